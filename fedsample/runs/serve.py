"""A run with real devices: the server's side."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsample.fleets.grpc.display import FleetProgress
from fedsample.fleets.grpc.server.host import Host
from fedsample.runs.session import Session

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.monitor.progress import Mode


def serve(
    experiment: Experiment | None, path: Path, host: Host, mode: Mode = "auto"
) -> tuple[Path, dict[str, Any], Experiment]:
    """Sample with the devices that connect -> the run directory, its summary, the resolved configuration.

    Args:
        experiment: the configuration; None: continue the run in `path`.
        path: the run directory.
        host: where to listen.
        mode: how progress is shown.

    Raises:
        FedSampleError: see `fedsample.errors`.
        Interrupted: on Ctrl-C or SIGTERM.
    """
    if experiment is None:
        manager = Session.reopen(path, mode, opener=host.open)
    else:
        manager = Session.create(experiment, path, mode, opener=host.open)
    with manager as session:
        session.display = FleetProgress
        session.command = f"fedsample server --listen {host.address} " + (
            "--insecure" if host.certs is None else f"--certs {shlex.quote(str(host.certs))}"
        )
        return session.path, session.sample(), session.experiment
