"""Cost of a round relative to its bare gradient: same process, interleaved, best of several repeats.

    python simulations/benchmarks/round.py [--set section.key=value ...] [--json]

The bare gradient is the clients' work alone: every client's gradient at every chain's position, in the coordinates of
the metric. A round adds the keyed draws, compression, memories, sums over clients, the server's step and its noise.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from fedsample.config import load
from fedsample.runs.build import assemble


def seconds(work: Callable[[], object], count: int) -> float:
    """Seconds per call, the mean over `count` calls."""
    start = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - start) / count


def main() -> None:
    """Measure one configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=200, help="rounds in a repeat")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    experiment = load(None, options.overrides)
    torch.set_num_threads(experiment.fleet.threads or 1)
    chain = assemble(experiment)

    def one_gradient() -> None:
        for worker in chain.fleet.workers:
            worker.clients.gradient(chain.state.params)

    seconds(chain.round, options.rounds)  # warm up caches, and pass marina's dense first round
    pairs = [
        (seconds(chain.round, options.rounds), seconds(one_gradient, options.rounds)) for _ in range(options.repeats)
    ]
    round_ms, gradient_ms = (1e3 * min(each) for each in zip(*pairs, strict=True))
    result = {
        "preset": experiment.preset,
        "clients": chain.fleet.n,
        "chains": experiment.chains,
        "parameters": chain.problem.d,
        "threads": torch.get_num_threads(),
        "round_ms": round(round_ms, 4),
        "gradient_ms": round(gradient_ms, 4),
        "ratio": round(round_ms / gradient_ms, 2),
    }
    print(json.dumps(result) if options.json else "  ".join(f"{name} {value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
