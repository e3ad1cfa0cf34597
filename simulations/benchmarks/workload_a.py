"""Workload A: a round of Langevin-MARINA on logistic regression, beside the same work done in other ways.

    python simulations/benchmarks/workload_a.py [--clients 10 100 1000] [--threads 1] [--torch-compile] [--json]

d = 123, 300 rows a client, full gradients, 10 % sparsification by random blocks, one chain. In one process and
interleaved, the fastest of several repeats of each:

    floor       one pass over the data
    gradient    every client's gradient and nothing else: two products over all rows, batched products, the engines, and
                torch.compile where it is asked for
    loop        the round as a plain loop over clients in PyTorch, without keyed draws, prior, memories or accounts
    round       ours, with each engine: everything that a run computes between two rounds

`ratio` divides ours by the fastest gradient. The load of the machine stands beside it: on a busy one nothing is fast.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsample.config import load
from fedsample.errors import CompileError
from fedsample.monitor.progress import Progress
from fedsample.preparation import prepare
from fedsample.problem import Problem, build_problem
from fedsample.session import build_fleet, build_sampler
from fedsample.targets import GeneralizedLinear

D, ROWS, SHARE = 123, 300, 0.1
STEP = 1e-6
ENGINES = ("batched", "stacked", "compiled", "by-client")


def write_data(path: Path, clients: int) -> None:
    """Rows of a logistic model, the same number for each client."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((clients * ROWS, D), dtype=np.float32)
    y = (rng.random(clients * ROWS) < 1 / (1 + np.exp(-x @ (rng.standard_normal(D) / 11)))).astype(np.int64)
    np.savez(path, X=x, y=y, client=np.repeat(np.arange(clients), ROWS))


def settings(file: Path, engine: str = "auto") -> dict[str, Any]:
    """The experiment."""
    return {
        "preset": "langevin-marina",
        "chains": 1,
        "step_size": STEP,
        "data": {"kind": "npz", "file": str(file)},
        "model": {"name": "logistic", "intercept": False},
        "uplink": {"compressor": "randblock", "k": SHARE},
        "start": {"at": "zeros"},
        "fleet": {"engine": engine},
    }


def rounds_of(file: Path, engine: str) -> tuple[Problem, Callable[[], None]]:
    """The problem, and a function that does the next round."""
    experiment = load(settings(file, engine), environment={})
    problem = build_problem(experiment)
    fleet = build_fleet(experiment, problem)
    prepared = prepare(experiment, problem, fleet, Progress(1, 0, "quiet"))
    sampler = build_sampler(experiment, problem, prepared, fleet.n)
    state = sampler.begin(prepared.start)

    def one_round() -> None:
        nonlocal state
        request = sampler.request(state)
        state = sampler.update(state, request, fleet.exchange(request))

    return problem, one_round


def plain_loop(x: Tensor, y: Tensor) -> Callable[[], None]:
    """The round as one writes it down: x (n, rows, d), y (n, rows)."""
    point, kept = torch.zeros(D), round(SHARE * D)
    last = [torch.zeros(D) for _ in x]
    estimate = torch.zeros(D)

    def one_round() -> None:
        nonlocal point, estimate
        total = torch.zeros(D)
        dense = bool(torch.rand(()) < SHARE)
        for i in range(len(x)):
            gradient = x[i].T @ (torch.sigmoid(x[i] @ point) - y[i])
            if dense:
                total += gradient
            else:
                chosen = torch.randperm(D)[:kept]
                total[chosen] += (gradient - last[i])[chosen] * (D / kept)
            last[i] = gradient
        estimate = total if dense else estimate + total
        point = point - STEP * estimate + (2 * STEP) ** 0.5 * torch.randn(D)

    return one_round


def gradients(clients: GeneralizedLinear, x: Tensor, y: Tensor, torch_compile: bool) -> dict[str, Callable[[], object]]:
    """Ways to every client's gradient: x (n, rows, d), y (n, rows)."""
    point, flat = torch.full((D,), 0.01), x.view(-1, D)

    def two_products() -> Tensor:
        residual = torch.sigmoid_(flat.mv(point)).sub_(y.view(-1)).view(len(x), 1, -1)
        return torch.bmm(residual, x)

    def batched() -> Tensor:
        residual = torch.sigmoid_(torch.bmm(x, point.expand(len(x), D).unsqueeze(-1)).squeeze(-1)).sub_(y)
        return torch.bmm(residual.unsqueeze(1), x)

    def by_rows(x: Tensor, y: Tensor, point: Tensor) -> Tensor:
        residual = torch.sigmoid((x * point).sum(-1)) - y
        return (residual.unsqueeze(-1) * x).sum(1)

    ways: dict[str, Callable[[], object]] = {"two products": two_products, "batched products": batched}
    for name in ENGINES[:3]:
        try:
            path = clients.on(name)
        except CompileError as error:
            warnings.warn(str(error), stacklevel=1)
            continue
        ways[name] = lambda path=path: path.gradient(point.unsqueeze(0))  # type: ignore[misc]
    if torch_compile:
        made = torch.compile(by_rows, fullgraph=True, dynamic=False)
        ways["torch.compile"] = lambda: made(x, y, point)
    return ways


def best(works: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, float]:
    """Milliseconds of one call of each, the fastest of `repeats` times the mean of `rounds`; interleaved."""
    found = dict.fromkeys(works, float("inf"))
    for work in works.values():
        work()
        work()
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            for _ in range(rounds):
                work()
            found[name] = min(found[name], 1e3 * (time.perf_counter() - start) / rounds)
    return found


def measure(
    clients: Sequence[int] = (10, 100, 1000),
    rounds: int = 2000,
    *,
    repeats: int = 15,
    engines: Sequence[str] = ENGINES[:3],
    torch_compile: bool = False,
) -> list[dict[str, Any]]:
    """The table, one row a number of clients and way; `rounds` / clients of them in each repeat, at least 4."""
    rows: list[dict[str, Any]] = []
    for n in clients:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "data.npz"
            write_data(file, n)
            works: dict[str, Callable[[], object]] = {}
            for engine in engines:
                problem, works[f"round: {engine}"] = rounds_of(file, engine)
            linear = problem.clients
            if not isinstance(linear, GeneralizedLinear):
                raise TypeError("workload A is a logistic regression")
            x, y = linear.design.view(n, ROWS, D), linear.labels.view(n, ROWS).to(torch.float32)
            works["floor: one pass"] = linear.design.sum
            works["loop: plain torch"] = plain_loop(x, y)
            ways = gradients(linear, x, y, torch_compile)
            works |= {f"gradient: {name}": way for name, way in ways.items()}
            found = best(works, max(4, rounds // n), repeats)
        fastest = min(ms for name, ms in found.items() if name.startswith("gradient"))
        load = round(os.getloadavg()[0], 1)
        for name, ms in sorted(found.items()):
            row = {"clients": n, "what": name, "ms": round(ms, 4), "threads": torch.get_num_threads(), "load": load}
            rows.append(row | ({"ratio": round(ms / fastest, 2)} if name.startswith("round") else {}))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES[:3]), choices=ENGINES)
    parser.add_argument("--torch-compile", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(
        options.clients,
        options.rounds,
        repeats=options.repeats,
        engines=options.engines,
        torch_compile=options.torch_compile,
    )
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        ratio = f"{row['ratio']:7.2f} x the fastest gradient" if "ratio" in row else ""
        print(f"{row['clients']:6d}  {row['what']:28} {row['ms']:9.3f} ms  load {row['load']}{ratio}")


if __name__ == "__main__":
    main()
