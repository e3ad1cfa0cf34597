"""A federation in Flower's own simulation runtime: every client a node, its messages handled by Ray actors.

Flower runs a ServerApp in a thread of its own and the runtime in the caller's. A session needs the main thread, where
signals arrive. So the runtime gets a thread, and its ServerApp passes its grid to the session and waits for the end.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsample.errors import ConfigError, FedSampleError
from fedsample.fleets.flower_grid.adapter import identity

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.estimators import Links
    from fedsample.fleets.flower.fleet import FlowerFleet
    from fedsample.targets import Clients

_POLL = 0.02  # seconds between two queries for replies
_START, _END = 60.0, 30.0  # seconds that the runtime may take to start and to end
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; until then it warns
}


@contextmanager
def simulated_fleet(experiment: Experiment, clients: Clients, links: Links) -> Iterator[FlowerFleet]:
    """Run the clients of an experiment as nodes of a simulation, for as long as the context lasts.

    Raises:
        ConfigError: if Ray is not installed, or another simulation is running in this process.
    """
    from fedsample.clients.app import client_app
    from fedsample.fleets.flower.fleet import fleet_on

    with simulation(client_app(experiment), clients.n, gpu=clients.device.type == "cuda") as grid:
        yield fleet_on(grid, experiment, clients, links)


@contextmanager
def simulation(app: ClientApp, nodes: int, *, gpu: bool = False) -> Iterator[Grid]:
    """Yield a grid of simulated nodes that run an app, each on one CPU at a time, and on one GPU if asked for."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "fleet.name = 'flower' runs in Flower's simulation runtime, which needs Ray: pip install 'fedsample[ray]', "
            "or set fleet.name = 'local'"
        )
    with identity(None), _environment(), _quiet():
        host = _Host(app, nodes, gpu)
        try:
            yield host.grid()
        finally:
            host.end()


class _Host:
    """The runtime in its thread, and the grid that its ServerApp passes over."""

    def __init__(self, app: ClientApp, nodes: int, gpu: bool) -> None:
        self._handed, self._over = threading.Event(), threading.Event()
        self._inner: Grid | None = None
        self._error: BaseException | None = None
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            self._inner = grid
            self._handed.set()
            self._over.wait()

        self._thread = threading.Thread(target=self._run, args=(server, app, nodes, gpu), name="flower", daemon=True)
        self._thread.start()

    def _run(self, server: ServerApp, app: ClientApp, nodes: int, gpu: bool) -> None:
        from flwr.simulation import run_simulation

        cpus = min(nodes, os.cpu_count() or 1)
        backend: dict[str, Any] = {
            "client_resources": {"num_cpus": 1, "num_gpus": 1 if gpu else 0},
            "init_args": {"num_cpus": cpus, "log_to_driver": False, "logging_level": "ERROR"},
        }
        try:
            run_simulation(server, app, nodes, backend_config=backend)
        except BaseException as error:  # raised in the main thread
            self._error = error
        finally:
            self._handed.set()

    def grid(self) -> Grid:
        """Wait for the grid and return it."""
        self._handed.wait(_START)
        self.check()
        if self._inner is None:
            raise FedSampleError(f"Flower's simulation runtime did not start within {_START:g} s: see its messages")
        return _HostedGrid(self._inner, self)

    def check(self) -> None:
        """Raise an error if the runtime has ended.

        Raises:
            FedSampleError: with the reason.
        """
        if not self._thread.is_alive():
            error = self._error
            while error is not None and error.__cause__ is not None:
                error = error.__cause__
            reason = "no reason given" if error is None else f"{type(error).__name__}: {error}"
            raise FedSampleError(f"Flower's simulation runtime ended ({reason}): see its messages") from self._error

    def end(self) -> None:
        """Let the ServerApp return, and wait until the runtime has stopped its actors."""
        self._over.set()
        self._thread.join(_END)
        import ray

        if ray.is_initialized():  # the runtime failed, or takes too long to end
            ray.shutdown()


class _HostedGrid(Grid):
    """The runtime's grid, but queried more often for replies, and checked for the runtime's end."""

    def __init__(self, inner: Grid, host: _Host) -> None:
        self._inner, self._host = inner, host

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push the messages and wait for their replies."""
        pending = set(self._inner.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while pending and (deadline is None or time.monotonic() < deadline):
            self._host.check()
            arrived = list(self._inner.pull_messages(pending))
            replies += arrived
            pending -= {reply.metadata.reply_to_message_id for reply in arrived}
            if pending:
                time.sleep(_POLL)
        return replies

    def get_node_ids(self) -> Iterable[int]:
        """List the nodes that are connected."""
        self._host.check()
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the runtime's."""
        return self._inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the runtime's."""
        return self._inner.pull_messages(message_ids)

    def set_run(self, run: Any) -> None:
        """As the runtime's."""
        self._inner.set_run(run)

    @property
    def run(self) -> Any:
        """As the runtime's."""
        return self._inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As the runtime's."""
        return self._inner.create_message(content, message_type, dst_node_id, group_id, ttl)


@contextmanager
def _environment() -> Iterator[None]:
    """Disable telemetry, and restore the search path that Flower changes for Ray's processes."""
    before = {name: os.environ.get(name) for name in (*_ENVIRONMENT, "PYTHONPATH")}
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


@contextmanager
def _quiet() -> Iterator[None]:
    """Show only Flower's warnings and errors, without its notice that `run_simulation` is deprecated."""
    log = logging.getLogger("flwr")
    level = log.level

    def wanted(record: logging.LogRecord) -> bool:
        return "`run_simulation` function is deprecated" not in record.getMessage()

    log.addFilter(wanted)
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeFilter(wanted)
