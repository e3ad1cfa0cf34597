"""Growth of time per round and of memory with the number of clients and of rounds.

    python simulations/benchmarks/growth.py [--clients 10 100 1000 10000] [--rows 20] [--long 10000] [--json]

A fresh process for each number of clients runs the experiment of workload A (20 rows per client by default): `ms` is
the fastest of several rounds, `peak_mb` the largest resident size less that of the process before it reads any data,
and `times_data` that over the bytes of the rows (float32). `state_kb` is the server's state between two rounds, which
must not grow with the clients but for one integer each. `--full` adds numbers of clients with 300 rows each, whose peak
memory can be told from what a process needs anyway. `--long` measures, at the smallest number of clients, how
much the process has grown between round 1,000 and the last one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows import show
from workload_a import write_data


def memory(name: str) -> float:
    """VmRSS, the resident size now, or VmHWM, the largest so far, in MB (getrusage's may be the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def alone(file: Path, engine: str, rounds: int, long: int) -> dict[str, Any]:
    """Measure one experiment in this fresh process."""
    import torch
    from workload_a import settings

    from fedsample.config import load
    from fedsample.runs.build import assemble

    torch.set_num_threads(1)
    experiment = load(settings(file, engine), environment={})
    before = memory("VmRSS")
    chain = assemble(experiment)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        chain.round()
        best = min(best, 1e3 * (time.perf_counter() - start))
    most, data = memory("VmHWM") - before, chain.problem.data.x.nbytes / 1e6 if chain.problem.data is not None else 0.0
    result = {
        "clients": chain.fleet.n,
        "rows": len(chain.problem.data.x) // chain.fleet.n if chain.problem.data is not None else 0,
        "engine": chain.fleet.engine,
        "ms": round(best, 3),
        "data_mb": round(data, 1),
        "peak_mb": round(most, 1),
        "times_data": round(most / data, 2),
        "state_kb": round(sum(each.nbytes for each in chain.state.tensors().values()) / 1e3, 1),
    }
    if long:
        at = 0.0
        while chain.state.round < long:
            chain.round()
            if chain.state.round == 1000:
                at = memory("VmRSS")
        result["grown_mb"] = round(memory("VmRSS") - at, 2)
    return result | {"load": round(os.getloadavg()[0], 1)}


def measure(
    clients: Sequence[int] = (10, 100, 1000, 10_000),
    *,
    rows: int = 20,
    rounds: int = 30,
    engine: str = "auto",
    long: int = 0,
) -> list[dict[str, Any]]:
    """Measure one row per number of clients; `long` rounds at the smallest."""
    found = []
    for n in clients:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "data.npz"
            write_data(file, n, rows)
            extra = long if n == min(clients) else 0
            command = [sys.executable, __file__, "--alone", str(file), "--engine", engine, "--rounds", str(rounds)]
            done = subprocess.run([*command, "--long", str(extra)], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--full", type=int, nargs="*", default=[1000], help="clients with 300 rows, for peak memory")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--long", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone is not None:
        print(json.dumps(alone(options.alone, options.engine, options.rounds, options.long)))
        return
    rows = measure(options.clients, rows=options.rows, rounds=options.rounds, engine=options.engine, long=options.long)
    if options.full:
        rows += measure(options.full, rows=300, rounds=options.rounds, engine=options.engine)
    show(rows, as_json=options.json)


if __name__ == "__main__":
    main()
