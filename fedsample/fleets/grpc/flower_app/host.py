"""A Flower app with real devices, the server's side: its ServerApp here, unchanged ClientApps on the devices."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping

import flwr
import tomli_w
from flwr.serverapp import ServerApp

from fedsample.fleets.flower_grid import AppFolder, FlowerRun, drive
from fedsample.fleets.flower_grid.adapter import Value
from fedsample.fleets.grpc.flower_app.carrier import Devices
from fedsample.fleets.grpc.framing.version import run_id
from fedsample.fleets.grpc.server.fleet import gather
from fedsample.fleets.grpc.server.host import Host, listening
from fedsample.fleets.grpc.server.streams import Invitation

PATIENCE = 60.0  # seconds


def serve_app(
    app: AppFolder,
    server_app: ServerApp,
    clients: int,
    config: Mapping[str, Value],
    host: Host,
    *,
    patience: float = PATIENCE,
    say: Callable[[str], None] = lambda text: None,
) -> FlowerRun:
    """Wait for all devices, then run a ServerApp over them -> the result, without clients' contexts.

    Args:
        app: the app's folder, which names the app to devices.
        server_app: the ServerApp to run.
        clients: number of devices.
        config: the run configuration.
        host: where to listen.
        patience: see `Devices`.
        say: called with messages about devices that are awaited, come and go.

    Raises:
        FedSampleError: if the address or the certificates cannot be used.
        Exception: whatever the ServerApp raises.
    """
    hub = listening(_invitation(app, clients, config), host)
    hub.say, reason = say, "the Flower app was stopped"
    hub.start()
    try:
        host.opened(hub)
        say(f"waiting for {clients} devices at {host.address.host}:{hub.port}")
        gather(hub)
        hub.say = lambda text: None  # a ServerApp may leave a device without work, or with work for long
        carrier = Devices(hub, patience, say)
        try:
            run = drive(server_app, carrier, config)
        finally:
            carrier.close()
        reason = "the Flower app has ended"
        return run
    finally:
        hub.stop(reason, finished=True)  # in any case: a ServerApp cannot be resumed


def _invitation(app: AppFolder, clients: int, config: Mapping[str, Value]) -> Invitation:
    """Name a new run; devices need neither the ServerApp nor anything of the app's folder."""
    about = {"name": app.name, "version": app.version, "flwr": flwr.__version__}
    text, nonce = tomli_w.dumps({"flower": about, "config": dict(config)}), secrets.token_bytes(16)
    return Invitation(run_id(nonce, text), nonce, text, clients)
