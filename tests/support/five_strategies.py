"""A Flower app that federates logistic regression with five of Flower's strategies, one after the other.

`python five_strategies.py FILE` writes what Flower's simulation runtime gives, as in tests/data/flower_strategies.json.
Clients use what an app may use: the run and the node configuration, the configuration in the message, a context that
persists, and a mod. Data come from the partition's number alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedProx,
    Krum,
    Result,
    Strategy,
)
from numpy.typing import NDArray

CLIENTS, ROUNDS = 5, 2
ALL = {"fraction_train": 1.0, "fraction_evaluate": 1.0, "min_available_nodes": CLIENTS}
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": lambda: FedAvg(**ALL),  # type: ignore[arg-type]
    "FedAdam": lambda: FedAdam(**ALL, eta=0.05),  # type: ignore[arg-type]
    "FedProx": lambda: FedProx(**ALL, proximal_mu=0.3),  # type: ignore[arg-type]
    "Krum": lambda: Krum(**ALL, num_malicious_nodes=1),  # type: ignore[arg-type]
    "DP": lambda: DifferentialPrivacyServerSideFixedClipping(
        FedAvg(**ALL),  # type: ignore[arg-type]
        noise_multiplier=0.1,
        clipping_norm=0.5,
        num_sampled_clients=CLIENTS,
    ),
}
client_app = ClientApp(mods=[arrays_size_mod])


def rows(place: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """40 + 7 i rows of 6 features, and labels that depend on the client."""
    draw = np.random.default_rng(place)
    x = draw.normal(size=(40 + 7 * place, 6))
    return x, (x[:, place % 6] + 0.3 * draw.normal(size=len(x)) > 0).astype(np.float64)


def slope(weights: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(x.T @ (1 / (1 + np.exp(-x @ weights)) - y) / len(x))


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Ten steps with momentum, which is kept from round to round."""
    start = message.content["arrays"].to_numpy_ndarrays()[0]  # type: ignore[union-attr]
    pull = float(message.content["config"].get("proximal-mu", 0.0))  # type: ignore[arg-type, union-attr]
    x, y = rows(int(context.node_config["partition-id"]))
    kept = context.state.get("momentum")
    momentum = kept.to_numpy_ndarrays()[0] if isinstance(kept, ArrayRecord) else np.zeros_like(start)
    weights = start.copy()
    for _ in range(10):
        momentum = 0.5 * momentum + slope(weights, x, y) + pull * (weights - start)
        weights = weights - 0.4 * momentum
    context.state["momentum"] = ArrayRecord([momentum])
    metrics = MetricRecord({"num-examples": len(x), "norm": float(np.linalg.norm(weights))})
    return Message(RecordDict({"arrays": ArrayRecord([weights]), "metrics": metrics}), reply_to=message)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The share of right answers."""
    weights = message.content["arrays"].to_numpy_ndarrays()[0]  # type: ignore[union-attr]
    x, y = rows(int(context.node_config["partition-id"]))
    right = float(((x @ weights > 0) == (y > 0.5)).mean())
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": len(x), "right": right})}), reply_to=message)


@client_app.query("forget")
def forget(message: Message, context: Context) -> Message:
    """Between strategies."""
    context.state = RecordDict()
    return Message(RecordDict(), reply_to=message)


def server_app(results: dict[str, Result]) -> ServerApp:
    """Fills `results`, by strategy."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        for name, strategy in STRATEGIES.items():
            np.random.seed(3)  # noqa: NPY002  the generator that Flower's privacy noise comes from
            config = ConfigRecord({"lr": 0.4})
            results[name] = strategy().start(
                grid, ArrayRecord([np.zeros(6)]), num_rounds=ROUNDS, train_config=config, evaluate_config=config
            )
            list(grid.send_and_receive([Message(RecordDict(), node, "query.forget") for node in grid.get_node_ids()]))

    return app


def plain(results: dict[str, Result]) -> dict[str, Any]:
    """Results as JSON writes them: arrays and metrics of each round, by strategy."""
    return {
        name: {
            "arrays": result.arrays.to_numpy_ndarrays()[0].tolist(),
            "train": {str(round): dict(metrics) for round, metrics in result.train_metrics_clientapp.items()},
            "evaluate": {str(round): dict(metrics) for round, metrics in result.evaluate_metrics_clientapp.items()},
        }
        for name, result in results.items()
    }


if __name__ == "__main__":
    from flwr.simulation import run_simulation

    found: dict[str, Result] = {}
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0}, "init_args": {"num_cpus": 2}}
    run_simulation(server_app(found), client_app, CLIENTS, backend_config=resources)  # type: ignore[arg-type]
    Path(sys.argv[1]).write_text(json.dumps(plain(found)), encoding="utf-8")
