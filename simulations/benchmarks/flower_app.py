"""Speed of FedAvg apps on our Grid, against Flower's runtime and against a plain torch loop.

    python simulations/benchmarks/flower_app.py [--out FILE] [--only overhead|cnn] [--clients 10 100] [--device cuda]

`overhead`: a quickstart app, a perceptron that all clients train and evaluate in each round, in Flower's simulation
runtime and on our Grid; and the same with clients that return what they get, which leaves only the cost of carrying
messages. Both ways must end with the same parameters. The start of Ray and a first round are not counted.

`cnn`: the CNN of McMahan et al. (2017, arXiv 1602.05629), 1.66 M parameters, 100 clients of 500 images, 10 of
them in a round, one local epoch with batches of 32. Each round on our Grid is followed by the same round as a plain
torch loop in the same process, on the same clients from the same parameters, and both must agree. With --device cuda
both compute on the GPU, and the parameters after a local epoch there are compared with the CPU's.

Data are made in memory from keys. Results are printed and, with --out, written as JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from fedsample import run_flower

HERE = str(Path(__file__).parent)
if HERE not in sys.path:  # Ray's processes import the client from this process's path
    sys.path.insert(0, HERE)

from agreement import agreement, plainly  # noqa: E402
from flower_client import IMAGES, PIXELS, client_app, cnn, perceptron, placed, started, train  # noqa: E402

RTOL = 1e-5


# --- against Flower's runtime -----------------------------------------------------------------------------------------


def quickstart(rounds: int, idle: bool, found: dict[str, Any]) -> ServerApp:
    """FedAvg with all clients in every round; stores its parameters and its seconds per round in `found`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        clients = len(wait_for_nodes(grid))
        strategy = FedAvg(min_available_nodes=clients)
        first = ArrayRecord(started(perceptron()).state_dict())
        configs = {name: ConfigRecord({"idle": idle}) for name in ("train_config", "evaluate_config")}
        strategy.start(grid, first, num_rounds=1, **configs)  # processes start, imports and data are made
        start = time.perf_counter()
        result = strategy.start(grid, first, num_rounds=rounds, **configs)
        found["seconds"] = (time.perf_counter() - start) / rounds
        found["arrays"] = result.arrays.to_numpy_ndarrays()

    return app


def wait_for_nodes(grid: Grid) -> list[int]:
    """Wait for the nodes to connect, and return them."""
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    return nodes


def in_flowers_runtime(app: ServerApp, clients: int) -> None:
    """Run an app on Ray, a CPU for each client at a time."""
    from flwr.simulation import run_simulation

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns of its own default
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    backend: dict[str, Any] = {"client_resources": {"num_cpus": 1, "num_gpus": 0}, "init_args": quiet}
    run_simulation(app, client_app, clients, backend_config=backend)


def overhead(clients: int, rounds: int, idle: bool) -> dict[str, Any]:
    """One row: seconds per round in Flower's runtime and on our Grid, with the same parameters at the end.

    Raises:
        AssertionError: if the parameters differ.
    """
    flower: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in each of Ray's processes
    try:
        in_flowers_runtime(quickstart(rounds, idle, flower), clients)
        run_flower(quickstart(rounds, idle, ours), client_app, clients)
    finally:
        torch.set_num_threads(threads)
    for got, want in zip(ours["arrays"], flower["arrays"], strict=True):
        np.testing.assert_allclose(got, want, rtol=RTOL, atol=1e-7)
    return {
        "name": f"{'idle' if idle else 'perceptron'}, {clients} clients, train and evaluate",
        "clients": clients,
        "rounds": rounds,
        "flower_seconds": round(flower["seconds"], 4),
        "seconds": round(ours["seconds"], 4),
        "ratio": round(flower["seconds"] / ours["seconds"], 1),
    }


# --- against a plain loop ---------------------------------------------------------------------------------------------


class Noting(FedAvg):
    """FedAvg that records the clients of each round, so that the plain loop uses the same."""

    asked: Sequence[int] = ()

    def configure_train(self, *arguments: Any) -> Iterable[Message]:
        """As FedAvg."""
        messages = list(super().configure_train(*arguments))
        self.asked = [message.metadata.dst_node_id for message in messages]
        return messages


def plain_round(
    model: nn.Module, arrays: dict[str, Tensor], cohort: Sequence[int], device: str = "cpu"
) -> dict[str, Tensor]:
    """FedAvg without a federation: each client in turn, then their mean (all have equally many images)."""
    total = {name: torch.zeros_like(value) for name, value in arrays.items()}
    for client in cohort:
        model.load_state_dict(arrays)
        train(model, placed(client, IMAGES, PIXELS, device), client, 1)
        for name, value in model.state_dict().items():
            total[name] += value / len(cohort)
    return total


def epoch_agrees(device: str) -> dict[str, Any]:
    """One row: the parameters after a client's local epoch on the device and on the CPU."""
    ends = []
    for place in (device, "cpu"):
        model = started(cnn()).to(place)
        train(model, placed(0, IMAGES, PIXELS, place), 0, 1)
        ends.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    return agreement("CNN after a local epoch: against the CPU", ends[0], ends[1], 1e-3, 1)


def cohort_round(rounds: int, device: str = "cpu") -> dict[str, Any]:
    """One row: seconds of a round of the CNN on our Grid and of the plain loop, turn by turn.

    Raises:
        AssertionError: if the parameters differ.
    """
    clients, cohort = 100, 10
    grid_seconds, plain_seconds = [], []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = list(grid.get_node_ids())  # in the order of partitions
        arrays = ArrayRecord(started(cnn()).state_dict())
        model = started(cnn()).to(device)
        for client in range(clients):
            placed(client, IMAGES, PIXELS, device)
        plain_round(cnn().to(device), dict(model.state_dict()), [0], device)  # warm up
        random.seed(0)  # Flower samples with the global generator
        for _ in range(rounds):
            strategy = Noting(fraction_train=cohort / clients, fraction_evaluate=0.0)
            start = time.perf_counter()
            result = strategy.start(grid, arrays, num_rounds=1)
            grid_seconds.append(time.perf_counter() - start)
            asked = sorted(nodes.index(node) for node in strategy.asked)
            before = {name: value.to(device) for name, value in arrays.to_torch_state_dict().items()}
            start = time.perf_counter()
            plain = {name: value.cpu() for name, value in plain_round(model, before, asked, device).items()}
            plain_seconds.append(time.perf_counter() - start)
            arrays = result.arrays
            for name, value in arrays.to_torch_state_dict().items():
                torch.testing.assert_close(value, plain[name], rtol=RTOL, atol=1e-6)

    run_flower(app, client_app, clients, {"model": "cnn", "device": device})
    ours, plain = statistics.median(grid_seconds), statistics.median(plain_seconds)
    return {
        "name": "CNN of 1.66 M parameters, 10 of 100 clients with 500 images, one epoch",
        "clients": clients,
        "rounds": rounds,
        "plain_seconds": round(plain, 3),
        "seconds": round(ours, 3),
        "ratio": round(statistics.median(a / b for a, b in zip(grid_seconds, plain_seconds, strict=True)), 3),
        "threads": torch.get_num_threads(),
    }


def measure(
    clients: Sequence[int] = (10, 100),
    rounds: int = 3,
    *,
    only: str | None = None,
    cnn_rounds: int = 4,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Measure all rows.

    Args:
        clients: sizes of the federation for `overhead`.
        rounds: rounds of each.
        only: "overhead" or "cnn"; None: both.
        cnn_rounds: rounds of the CNN on our Grid, and of the plain loop.
        device: device of the CNN.

    Raises:
        AssertionError: if two ways to compute the same differ by more than a relative 1e-5.
    """
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        plainly(torch.device(device))
        table = [cohort_round(cnn_rounds, device)] if only in (None, "cnn") else []
        table += [epoch_agrees(device)] if table and device != "cpu" else []
        sizes = [(n, idle) for n in clients for idle in (True, False)] if only in (None, "overhead") else []
        return [*(overhead(n, rounds, idle) for n, idle in sizes), *table]
    finally:
        log.setLevel(level)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the rows as JSON")
    parser.add_argument("--only", choices=("overhead", "cnn"))
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cnn-rounds", type=int, default=4)
    parser.add_argument("--device", default="cpu", help="of the CNN: cpu, cuda or cuda:N")
    options = parser.parse_args()
    table = measure(
        options.clients, options.rounds, only=options.only, cnn_rounds=options.cnn_rounds, device=options.device
    )
    for row in table:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if options.out is not None:
        options.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
