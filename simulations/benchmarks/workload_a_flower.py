"""Workload A's round under Flower's own simulation runtime and on LocalFleet, side by side in one process.

    python simulations/benchmarks/workload_a_flower.py [--clients 10 100] [--rounds 5] [--json]

The same experiment, the same sampler and the same first state; needs Ray (`pip install 'fedsample[ray]'`).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def compare(clients: int, rounds: int) -> dict[str, Any]:
    """One row: milliseconds a round, Flower's and ours."""
    import torch

    from fedsample.config import load
    from fedsample.fleets.simulation import simulated_fleet
    from fedsample.monitor.progress import Progress
    from fedsample.preparation import prepare
    from fedsample.problem import build_problem
    from fedsample.session import build_fleet, build_sampler

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((clients * 300, 123))
    y = (rng.random(len(x)) < 1 / (1 + np.exp(-x @ (rng.standard_normal(123) / 11)))).astype(np.int64)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.npz"
        np.savez(file, X=x, y=y, client=np.repeat(np.arange(clients), 300))
        values = {
            "preset": "langevin-marina", "chains": 1, "step_size": 1e-6, "data": {"kind": "npz", "file": str(file)},
            "model": {"name": "logistic", "intercept": False}, "uplink": {"compressor": "randblock", "k": 0.1},
            "start": {"at": "zeros"},
        }  # fmt: skip
        experiment = load(values, environment={})
        problem = build_problem(experiment)
        local = build_fleet(experiment, problem)
        prepared = prepare(experiment, problem, local, Progress(1, 0, "quiet"))

        def spend(fleet: Any, count: int) -> float:
            sampler = build_sampler(experiment, problem, prepared, clients)
            fleet.set_metric(prepared.geometry.metric)
            state, spent = sampler.begin(prepared.start), []
            for _ in range(count + 1):
                start = time.perf_counter()
                request = sampler.request(state)
                state = sampler.update(state, request, fleet.exchange(request))
                spent.append(time.perf_counter() - start)
            return float(np.median(spent[1:]))  # the first round is dense, and finds everything cold

        ours = spend(local, 200)
        with simulated_fleet(experiment, problem) as fleet:
            theirs = spend(fleet, rounds)
    return {
        "clients": clients, "flower_ms": round(1e3 * theirs, 1), "ours_ms": round(1e3 * ours, 3),
        "ratio": round(theirs / ours, 1), "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def measure(clients: Sequence[int] = (10, 100), rounds: int = 5) -> list[dict[str, Any]]:
    """One row a number of clients."""
    return [compare(n, rounds) for n in clients]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.clients, options.rounds)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
