"""`--app FOLDER`: a Flower app in this process, as `flwr run FOLDER` would run it, or with real devices."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedsample.errors import FedSampleError

if TYPE_CHECKING:
    from fedsample.fleets.flower_grid import FlowerRun
    from fedsample.fleets.grpc.server.host import Host

CLIENTS = 10  # the default; Flower's own simulation has 2


def simulate_app(
    folder: Path | None, clients: int | None, run_config: Sequence[str], others: Sequence[str], *, quiet: bool = False
) -> None:
    """Run an app; its own output is left as it is, and one line of ours goes to standard error.

    Args:
        folder: the app's folder.
        clients: number of nodes; None: that of the app's default federation, if it names one, else 10.
        run_config: 'key=value ...' or a TOML file.
        others: options of `simulate` that were given but do not apply here.
        quiet: show neither Flower's log nor our line.

    Raises:
        ConfigError: if the folder holds no app that can be imported, or `run_config` does not fit it.
        FedSampleError: if the ServerApp raises; its traceback is printed before.
    """
    if folder is None:
        raise click.UsageError("--clients and --run-config need --app FOLDER, the Flower app that they are for")
    if others:
        raise click.UsageError(
            f"{', '.join(others)}: not with --app, whose configuration is the app's own: --run-config 'key=value ...'"
        )
    from fedsample.fleets.flower_grid import imported, read_app, run_flower
    from fedsample.fleets.flower_grid.adapter import overridden

    app = read_app(folder)
    config = overridden(app.config, run_config)
    number = clients or app.nodes or CLIENTS
    if quiet:
        logging.getLogger("flwr").setLevel(logging.WARNING)
    with imported(app) as (server_app, client_app), _explained(folder):
        run = run_flower(server_app, client_app, number, config)
    _report(folder, number, run, quiet)


def serve_app(
    folder: Path, clients: int, run_config: Sequence[str], host: Host, patience: float, *, quiet: bool = False
) -> None:
    """Run an app's ServerApp with devices that run its ClientApp; see `simulate_app`.

    Args:
        folder: the app's folder.
        clients: number of devices.
        run_config: as for `simulate_app`.
        host: where to listen.
        patience: seconds after which an absent device is considered gone.
        quiet: show neither Flower's log nor our line.

    Raises:
        FedSampleError: as `simulate_app`, or if the address or the certificates cannot be used.
    """
    from fedsample.fleets.flower_grid import imported_server, read_app
    from fedsample.fleets.flower_grid.adapter import overridden
    from fedsample.fleets.grpc.flower_app import host as flower_host

    app = read_app(folder)
    config = overridden(app.config, run_config)
    if quiet:
        logging.getLogger("flwr").setLevel(logging.WARNING)

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    with imported_server(app) as server_app, _explained(folder):
        run = flower_host.serve_app(app, server_app, clients, config, host, patience=patience, say=say)
    _report(folder, clients, run, quiet)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Print the traceback of whatever a ServerApp raises, and raise a `FedSampleError`."""
    try:
        yield
    except FedSampleError:
        raise
    except Exception as error:
        traceback.print_exception(error)
        raise FedSampleError(f"{folder}: the ServerApp raised {type(error).__name__}: {error}") from error


def _report(folder: Path, number: int, run: FlowerRun, quiet: bool) -> None:
    if not quiet:
        failed = f", {run.failed} of them errors" if run.failed else ""
        replies = run.answered + run.failed
        print(f"{folder}: {number} clients, {replies} replies{failed}, {run.seconds:.1f} s", file=sys.stderr)
