"""`fedsample simulate --app FOLDER`: a Flower app in this process, as `flwr run FOLDER` would run it."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from fedsample.errors import FedSampleError

CLIENTS = 10  # unless said otherwise; Flower's own simulation has 2


def simulate_app(
    folder: Path | None, clients: int | None, run_config: Sequence[str], others: Sequence[str], *, quiet: bool = False
) -> None:
    """Run an app; what it prints goes where it would go, and one line of ours to standard error.

    Args:
        folder: of the app. clients: nodes; None: as many as the app's default federation, where it names one, else 10.
            run_config: 'key=value ...' or a TOML file. others: options of `simulate` that were given and mean nothing
            here. quiet: no log of Flower's and no line of ours.

    Raises:
        ConfigError: if the folder holds no app that can be imported, or `run_config` does not fit it. FedSampleError:
            if the ServerApp raises; its traceback is printed before.
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
    with imported(app) as (server_app, client_app):
        try:
            run = run_flower(server_app, client_app, number, config)
        except FedSampleError:
            raise
        except Exception as error:
            traceback.print_exception(error)
            raise FedSampleError(f"{folder}: the ServerApp raised {type(error).__name__}: {error}") from error
    if not quiet:
        failed = f", {run.failed} of them errors" if run.failed else ""
        replies = run.answered + run.failed
        print(f"{folder}: {number} clients, {replies} replies{failed}, {run.seconds:.1f} s", file=sys.stderr)
