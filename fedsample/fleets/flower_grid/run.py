"""`run_flower`: run a ServerApp and its ClientApps in this process."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsample.errors import ConfigError
from fedsample.fleets.flower_grid import adapter, global_rng
from fedsample.fleets.flower_grid.adapter import Value
from fedsample.fleets.flower_grid.grid import Carrier, CarrierGrid
from fedsample.fleets.flower_grid.in_process import InProcess

NodeConfig = Mapping[str, Value]


@dataclass(frozen=True)
class FlowerRun:
    """The result of a Flower run.

    Attributes:
        context: the ServerApp's; its results are in `context.state`.
        clients: the nodes' contexts, by partition, if the nodes are in this process.
        answered: number of replies with content.
        failed: number of error replies.
        seconds: duration of the run.
    """

    context: Context
    clients: list[Context]
    answered: int
    failed: int
    seconds: float


def run_flower(
    server_app: ServerApp,
    client_app: ClientApp,
    num_clients: int,
    run_config: Mapping[str, object] | None = None,
    node_config: NodeConfig | Sequence[NodeConfig] | None = None,
    *,
    workers: int = 1,
) -> FlowerRun:
    """Run a Flower app, unchanged, on nodes in this process: no Ray, no SuperLink, no waiting between rounds.

    The ServerApp runs in the caller's thread, the ClientApps in `workers` others. With one worker clients take turns in
    the order of partitions, and replies are handed over in that order with any number. Several runs may go on at once.

    Args:
        server_app: any ServerApp.
        client_app: any ClientApp.
        num_clients: number of nodes, each with `partition-id` and `num-partitions` in its node configuration.
        run_config: in every context; nested tables become dotted keys.
        node_config: further entries of the nodes' configurations, the same for all or one for each.
        workers: number of ClientApps that run at a time.

    Returns:
        The contexts at the end, and counts of replies.

    Raises:
        ConfigError: if an argument is invalid, or Flower's own simulation is running in this process.
        QuorumError: if a strategy waits for more nodes than there are.
        Exception: whatever the ServerApp raises.
    """
    for what, value, kind in (("server_app", server_app, ServerApp), ("client_app", client_app, ClientApp)):
        if not isinstance(value, kind):
            raise ConfigError(f"{what} is of type {type(value).__name__}, expected a flwr {kind.__name__}")
    for what, number in (("num_clients", num_clients), ("workers", workers)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ConfigError(f"{what} = {number!r}, expected a number from 1 up")
    config = adapter.flat(run_config or {}, "run_config")
    nodes = InProcess(client_app, _node_configs(node_config, num_clients), config, workers)
    with global_rng.kept_apart():
        run = drive(server_app, nodes, config)
    clients = [nodes.context(node, run.context.run_id) for node in nodes.nodes()]
    return replace(run, clients=clients)


def drive(server_app: ServerApp, carrier: Carrier, config: Mapping[str, Value]) -> FlowerRun:
    """Run a ServerApp in this thread over a carrier, closed at the end -> the result, without clients' contexts.

    Raises:
        ConfigError: if Flower's own simulation is running in this process.
        Exception: whatever the ServerApp raises.
    """
    run_id = secrets.randbits(63) | 1
    grid = CarrierGrid(carrier, run_id)
    context = Context(run_id, adapter.SERVER, {}, RecordDict(), dict(config))
    start = time.perf_counter()
    with adapter.identity(run_id):
        try:
            server_app(grid, context)
        finally:
            grid.close()
    return FlowerRun(context, [], grid.answered, grid.failed, time.perf_counter() - start)


def _node_configs(given: NodeConfig | Sequence[NodeConfig] | None, n: int) -> list[dict[str, Value]]:
    """Make the configuration of each node.

    Raises:
        ConfigError: if there is not one for each, or one contradicts its partition.
    """
    each: Sequence[NodeConfig] = [given or {}] * n if given is None or isinstance(given, Mapping) else given
    if len(each) != n:
        raise ConfigError(f"node_config holds {len(each)} configurations, expected {n}: one per client, or one for all")
    configs = []
    for place, config in enumerate(each):
        own: dict[str, Value] = {adapter.PARTITION_ID_KEY: place, adapter.NUM_PARTITIONS_KEY: n}
        said = adapter.flat(config, f"node_config of client {place}")
        clash = sorted(key for key in own.keys() & said.keys() if own[key] != said[key])
        if clash:
            raise ConfigError(
                f"node_config of client {place} sets {', '.join(clash)} to {said[clash[0]]!r}, expected "
                f"{own[clash[0]]!r}: leave it out, clients are numbered in order"
            )
        configs.append(said | own)
    return configs
