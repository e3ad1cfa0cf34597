"""A run with real devices, the server's side: listen, wait for all, agree on the data, then sample."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedsample.config import dump_toml
from fedsample.config.loading import digest, reread
from fedsample.data.device_files import agreed_schema
from fedsample.data.schema import Schema
from fedsample.diagnostics.counts import scores
from fedsample.errors import CertificateError, ConfigError, DataError, Interrupted, RunDirectoryError
from fedsample.fleets.grpc.display import FleetProgress
from fedsample.fleets.grpc.framing.version import run_id
from fedsample.fleets.grpc.security.address import Address, check_free, check_insecure
from fedsample.fleets.grpc.security.credentials import server_credentials
from fedsample.fleets.grpc.security.identity import ClientIdentity, identity_of
from fedsample.fleets.grpc.server.dispatcher import Dispatcher
from fedsample.fleets.grpc.server.fleet import GrpcFleet, fleet_on, gather, sums_of
from fedsample.fleets.grpc.server.hub import Hub
from fedsample.fleets.grpc.server.streams import Identified, Invitation
from fedsample.problem.remote import remote_problem
from fedsample.protocol.names import FIT, SCALE, SPREAD
from fedsample.protocol.wire import Parcel, header, pack_tensors

if TYPE_CHECKING:
    from fedsample.fleets.opening import Opening
    from fedsample.monitor.progress import Progress
    from fedsample.problem import Problem

_RUN, _SETUP = "run.json", "setup.json"
_SUMS = 1 << 24  # bytes of sums over rows that one device may send


@dataclass(frozen=True)
class Host:
    """Where a server listens, and with which certificate.

    Attributes:
        address: the address to listen at.
        certs: folder of the server's certificate; None: plaintext, on loopback only.
        opened: called with the hub once it listens.
    """

    address: Address
    certs: Path | None
    opened: Callable[[Hub], None] = lambda hub: None

    def open(self, run: Opening, progress: Progress, stack: ExitStack) -> tuple[Problem, GrpcFleet]:
        """Listen, wait for all devices, agree on the data -> the server's problem, and the fleet.

        Raises:
            FedSampleError: if the address, the certificates or the devices' data cannot be used.
        """
        experiment = run.experiment
        hub = self._listen(run, progress)

        def leave(kind: object, error: BaseException | None, trace: object) -> None:
            hub.stop(_farewell(error), finished=error is None)  # stopped while it is summed up, it needs them again

        stack.push(leave)
        if isinstance(progress, FleetProgress):
            progress.watch(hub.records)
        self.opened(hub)
        dispatcher = Dispatcher(hub)
        if run.over:
            progress.note(
                f"this run has ended with its round {experiment.rounds}; its devices are needed to sum it up again. To "
                "extend it, raise rounds in its config.toml"
            )
        with progress.stage(f"waiting for {experiment.data.clients} devices at {self.address.host}:{hub.port}"):
            schemas = gather(hub)
        kept = _read(run.path / _SETUP)
        with progress.stage("agreeing on the data"):
            if kept is None:
                agreed = agreed_schema(experiment, [Schema.from_json(text) for text in schemas.values()])
                sums = _agree(dispatcher, agreed)
                run.directory.write_json(_SETUP, {"schema": agreed.to_json(), "sums": sums})
            else:
                agreed, sums = Schema.from_json(kept["schema"]), kept["sums"]
                dispatcher.tell(FIT, Parcel(header(schema=agreed.to_json())))
                dispatcher.tell(SCALE, _scale(sums))
        problem = remote_problem(experiment, agreed, experiment.data.clients)
        links = run.accept(problem)
        fleet = fleet_on(dispatcher, experiment, problem.clients, links)
        fleet.scores = partial(_scores, likelihood=problem.likelihood)
        return problem, fleet

    def _listen(self, run: Opening, progress: Progress) -> Hub:
        hub = listening(_invitation(run), self)
        hub.say = progress.note
        hub.remind = progress.remind if isinstance(progress, FleetProgress) else progress.note
        hub.stopping = lambda: run.stopped is not None
        hub.start()
        return hub


def listening(invitation: Invitation, host: Host) -> Hub:
    """Make a hub that will listen at the host's address once it is started.

    Raises:
        FedSampleError: if the address or the certificates cannot be used.
    """
    if host.certs is None:
        address, credentials = check_insecure(host.address, listen=True), None
    else:
        address, credentials = host.address, server_credentials(host.certs)
    check_free(address)
    return Hub(invitation, str(address), credentials, _claimed if credentials is None else _certified)


def _invitation(run: Opening) -> Invitation:
    """Make the run's identity, or read that of a resumed run.

    Raises:
        RunDirectoryError: if the configuration differs from that which devices are sent; they would use the old one.
    """
    path = run.path / _RUN
    kept = _read(path)
    if kept is None:
        kept = {"nonce": secrets.token_hex(16), "config": dump_toml(run.experiment)}
        run.directory.write_json(_RUN, kept)
    began = reread(str(kept["config"])).model_copy(update={"step_size": run.experiment.step_size})
    if digest(began) != digest(run.experiment):  # but for the step, which is chosen here, and how long it runs
        raise RunDirectoryError(
            f"{run.path / 'config.toml'} was changed after the run began, and its devices go by what it said then: "
            "restore that file, or start a new run in another directory with --out"
        )
    nonce, config = bytes.fromhex(kept["nonce"]), str(kept["config"])
    return Invitation(run_id(nonce, config), nonce, config, run.experiment.data.clients)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise RunDirectoryError(f"{path} is damaged ({error}): restore it from a copy, or start a new run") from error


def _agree(dispatcher: Dispatcher, agreed: Schema) -> dict[str, list[float]]:
    """Round 0: agree on columns and labels -> sums over clients for means and squares, if rows are standardised."""
    fit = Parcel(header(schema=agreed.to_json(), sums=True if agreed.standardize else None))
    answers = dispatcher.tell(FIT, fit, _SUMS)
    sums = {}
    if agreed.standardize:
        first = sums_of(answers, "sums")
        answers = dispatcher.tell(SPREAD, Parcel(header(), pack_tensors({"first": first})), _SUMS)
        sums = {"first": first.tolist(), "second": sums_of(answers, "sums").tolist()}
    dispatcher.tell(SCALE, _scale(sums))
    return sums


def _scale(sums: dict[str, list[float]]) -> Parcel:
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in sums.items()}
    return Parcel(header(), pack_tensors(tensors))


def _scores(counts: torch.Tensor, likelihood: str | None) -> dict[str, float]:
    if likelihood is None or float(counts[0]) == 0:
        return {}
    return {name: value for name, value in scores(counts, likelihood).items() if value is not None}


def _farewell(error: BaseException | None) -> str:
    """The farewell to devices; the text of unexpected errors is withheld, as it may hold private details."""
    if error is None:
        return "the run has ended"
    if isinstance(error, Interrupted):
        return "the server was stopped, and can go on"
    if isinstance(error, ConfigError | DataError):
        return f"the server stopped: {(str(error).splitlines() or [''])[0]}"
    return "the server stopped with an error, which it shows itself"


def _claimed(context: Any, claimed: int) -> Identified:
    """On a plaintext connection a client's index is the one it claims."""
    return Identified(claimed)


def _certified(context: Any, claimed: int) -> Identified:
    """Over TLS a client's index is the one in its certificate."""
    try:
        identity = identity_of(context.auth_context())
    except CertificateError as error:
        return Identified(-1, str(error))
    if not isinstance(identity, ClientIdentity):
        return Identified(-1, "a server's certificate: a device needs a client's")
    return Identified(identity.client)
