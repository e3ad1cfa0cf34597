"""A device in its own process: its options, its state on disk, its signals, and its stream."""

from __future__ import annotations

import asyncio
import shlex
import signal
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedsample.clients.device_data import DataSource, DeviceData
from fedsample.config.loading import reread
from fedsample.data.device_files import check_source, is_builtin
from fedsample.errors import ConfigError, Interrupted, RunDirectoryError
from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.device.connection import Answering, Connection, Refused, Watching, prepare_threads
from fedsample.fleets.grpc.device.replica import Replica
from fedsample.fleets.grpc.display import device_display
from fedsample.fleets.grpc.framing.version import run_id
from fedsample.fleets.grpc.security.address import check_insecure, parse_address
from fedsample.fleets.grpc.security.credentials import client_credentials
from fedsample.problem import device_of

if TYPE_CHECKING:
    from io import BufferedWriter


class DeviceOptions(NamedTuple):
    """The options of a device.

    Attributes:
        address: the server's address.
        certs: folder of certificates; None: plaintext.
        claimed: the client's index, for plaintext connections.
        state: folder of the state of all runs of all devices on this machine.
        device: where to compute, such as cpu.
        data: see `DataSource`.
        target: see `DataSource`.
        partition: see `DataSource`.
        partitions: see `DataSource`.
        attempts: consecutive failures to connect before giving up; None: never.
        quiet: show nothing.
        app: a Flower app's folder, or `module:attribute` of its ClientApp, to run in place of what fedsample computes.
    """

    address: str
    certs: Path | None
    claimed: int
    state: Path
    device: str
    data: str | None
    target: str | None
    partition: int | None
    partitions: int | None
    attempts: int | None
    quiet: bool
    app: str | None = None


def take_part(options: DeviceOptions) -> str:
    """Serve until the run has ended -> the server's farewell.

    Raises:
        FedSampleError: if the server refuses, or the device's data or certificates cannot be used.
        Interrupted: on Ctrl-C or SIGTERM.
    """
    from rich.console import Console

    if options.certs is None:
        address, credentials = check_insecure(options.address), None
    else:
        address, credentials = parse_address(options.address), client_credentials(options.certs)
    watching = Watching(str(address))
    folders: list[BufferedWriter] = []

    def release() -> None:
        while folders:
            folders.pop().close()

    def hold(welcome: pb.Welcome) -> Path:
        """Lock this device's folder of a run."""
        release()  # the lock of another run, which this server may continue later
        folder = options.state / _name(welcome)
        folders.append(_locked(folder))
        return folder

    with ExitStack() as stack:
        stack.callback(release)
        entered = _sampling(options, watching, hold) if options.app is None else _app(options.app, hold, stack)

        def found(welcome: pb.Welcome) -> Answering:
            if welcome.run != run_id(welcome.nonce, welcome.config):
                raise Refused("the server's run does not belong to its configuration: it is not a fedsample server's")
            return entered(welcome)

        connection = Connection(
            str(address), credentials, options.claimed, found, attempts=options.attempts, watching=watching,
            doctor=f"fedsample doctor net {address} "
            + ("--insecure" if options.certs is None else f"--certs {shlex.quote(str(options.certs))}"),
        )  # fmt: skip
        stack.callback(connection.close)
        with device_display(watching, Console(stderr=True), quiet=options.quiet):
            return asyncio.run(_until_told(connection))


def _sampling(
    options: DeviceOptions, watching: Watching, hold: Callable[[pb.Welcome], Path]
) -> Callable[[pb.Welcome], Answering]:
    """Make the device's part of fedsample's own runs.

    Raises:
        ConfigError, DataError: if no run could use its options.
    """
    check_source(options.data, options.target, options.partition, options.partitions)
    device_of(options.device)

    def enter(welcome: pb.Welcome) -> Answering:
        if "flower" in tomllib.loads(welcome.config):
            raise ConfigError("this server runs a Flower app: add --app, its folder or the module:attribute here")
        experiment = reread(welcome.config)
        place = experiment.fleet.model_copy(update={"device": options.device})
        experiment = experiment.model_copy(update={"fleet": place})
        prepare_threads(experiment.fleet.threads or 1)
        source = _source(options, welcome, watching)
        data = DeviceData(experiment, welcome.client, welcome.clients, source)
        return Replica(hold(welcome), welcome.run, experiment, welcome.client, welcome.clients, data)

    return enter


def _app(app: str, hold: Callable[[pb.Welcome], Path], stack: ExitStack) -> Callable[[pb.Welcome], Answering]:
    """Make the device's part of runs of a Flower app; its ClientApp is imported until the stack ends."""
    from fedsample.fleets.flower_grid import imported_client
    from fedsample.fleets.grpc.flower_app.node import FlowerNode, run_config_in

    client_app = stack.enter_context(imported_client(app))

    def enter(welcome: pb.Welcome) -> Answering:
        config = run_config_in(welcome.config)
        if config is None:
            raise ConfigError("this server samples and runs no Flower app: drop --app, or start it with --app FOLDER")
        return FlowerNode(hold(welcome), welcome.run, welcome.client, welcome.clients, client_app, config)

    return enter


async def _until_told(connection: Connection) -> str:
    """Serve until the run ends or a signal comes."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.set)
    attending, waiting = asyncio.create_task(connection.attend()), asyncio.create_task(told.wait())
    done, _ = await asyncio.wait({attending, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if attending in done:
        waiting.cancel()
        return attending.result()
    attending.cancel()
    await asyncio.gather(attending, return_exceptions=True)
    raise Interrupted("stopped; start it again with the same options, and the run goes on")


def _source(options: DeviceOptions, welcome: pb.Welcome, watching: Watching) -> DataSource:
    """Say where the rows come from; a share of a built-in set is this client's own, unless told otherwise."""
    client, clients = welcome.client, welcome.clients
    partition, partitions = options.partition, options.partitions
    builtin = is_builtin(options.data)
    if builtin and partition is None and partitions is None:
        partition, partitions = client, clients
    elif builtin and None not in (partition, partitions) and (partition, partitions) != (client, clients):
        watching.say(
            f"note: client {client} of {clients} takes partition {partition} of {partitions} of {options.data}; rows "
            "that two devices hold count twice, and rows that none holds do not count"
        )
    return DataSource(options.data, options.target, partition, partitions)


def _name(welcome: pb.Welcome) -> str:
    """Name the folder of one run of one device; other clients on this machine have others."""
    return f"{welcome.run.hex()}-client-{welcome.client}"


def _locked(folder: Path) -> BufferedWriter:
    """Lock a device's folder for as long as the file is open.

    Raises:
        RunDirectoryError: if another process holds the lock, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "ab")
    except OSError as error:
        raise RunDirectoryError(f"{folder} cannot be used ({error.strerror}): choose another with --state") from error
    try:
        import fcntl
    except ImportError:  # Windows
        return lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise RunDirectoryError(
            f"another process is this device already (it holds {folder}): end it first, or choose another --state"
        ) from None
    return lock
