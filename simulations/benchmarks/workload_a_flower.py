"""Workload A's round under Flower's own simulation runtime and on LocalFleet, side by side in one process.

    python simulations/benchmarks/workload_a_flower.py [--clients 10 100] [--rounds 5] [--json]

The same experiment, the same sampler and the same first state; needs Ray (`pip install 'fedsample[ray]'`).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rows import show


def compare(clients: int, rounds: int) -> dict[str, Any]:
    """One row: milliseconds per round, Flower's and ours."""
    import torch
    from workload_a import settings, write_data

    from fedsample.config import load
    from fedsample.fleets.flower.simulation import simulated_fleet
    from fedsample.runs.build import assemble

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.npz"
        write_data(file, clients)
        experiment = load(settings(file, "compiled"), environment={})  # without a compiler, its replacement
        chain = assemble(experiment)
        first = chain.state

        def spend(fleet: Any, count: int) -> float:
            fleet.set_metric(chain.prepared.geometry.metric)
            chain.state, spent = first, []
            for _ in range(count + 1):
                start = time.perf_counter()
                chain.round(fleet)
                spent.append(time.perf_counter() - start)
            return float(np.median(spent[1:]))  # the first round is dense, and nothing is cached yet

        ours = spend(chain.fleet, 200)
        with simulated_fleet(experiment, chain.problem.clients, chain.links) as fleet:
            theirs = spend(fleet, rounds)
    return {
        "clients": clients, "engine": chain.fleet.engine, "flower_ms": round(1e3 * theirs, 1),
        "ours_ms": round(1e3 * ours, 3), "ratio": round(theirs / ours, 1), "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def measure(clients: Sequence[int] = (10, 100), rounds: int = 5) -> list[dict[str, Any]]:
    """One row per number of clients."""
    return [compare(n, rounds) for n in clients]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.clients, options.rounds)
    show(rows, as_json=options.json)


if __name__ == "__main__":
    main()
