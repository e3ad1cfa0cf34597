"""Workload A: a round of Langevin-MARINA on logistic regression, and the same work done in other ways.

    python simulations/benchmarks/workload_a.py [--clients 10 100 1000] [--torch-compile] [--device cuda] [--json]

d = 123, 300 rows per client, full gradients, 10 % sparsification by random blocks, one chain. In one process and
interleaved, the fastest of several repeats of each:

    floor       one pass over the data
    gradient    every client's gradient and nothing else: two products over all rows, batched products, the engines, and
                torch.compile where it is asked for
    loop        the round as a plain loop over clients in PyTorch, without keyed draws, prior, memories or bit counts
    round       ours, with each engine: everything that a run computes between two rounds

On a GPU gradients and twenty rounds are compared with the CPU's: `difference` over the largest entry, at most `rtol`.
What cannot be measured here has a row that says `why`. `ratio` divides ours by the fastest gradient. The machine's load
is reported too, since a busy machine slows everything.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from agreement import agreement, plainly
from torch import Tensor

from fedsample.config import load
from fedsample.errors import CompileError
from fedsample.problem import Problem, build_problem
from fedsample.runs.build import assemble
from fedsample.targets import GeneralizedLinear

D, ROWS, SHARE = 123, 300, 0.1
STEP = 1e-6
ENGINES = ("batched", "stacked", "compiled", "cuda-graph", "by-client")


def write_data(path: Path, clients: int, rows: int = ROWS) -> None:
    """Write rows of a logistic model, the same number for each client."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((clients * rows, D), dtype=np.float32)
    y = (rng.random(clients * rows) < 1 / (1 + np.exp(-x @ (rng.standard_normal(D) / 11)))).astype(np.int64)
    np.savez(path, X=x, y=y, client=np.repeat(np.arange(clients), rows))


def settings(file: Path, engine: str = "auto", device: str = "cpu") -> dict[str, Any]:
    """Settings of the experiment."""
    return {
        "preset": "langevin-marina",
        "chains": 1,
        "step_size": STEP,
        "data": {"kind": "npz", "file": str(file)},
        "model": {"name": "logistic", "intercept": False},
        "uplink": {"compressor": "randblock", "k": SHARE},
        "start": {"at": "zeros"},
        "fleet": {"engine": engine, "device": device},
    }


def rounds_of(file: Path, engine: str, device: str = "cpu") -> tuple[Problem, Callable[[], None]]:
    """Build the problem, and a function that does the next round."""
    chain = assemble(load(settings(file, engine, device), environment={}))
    return chain.problem, chain.round


def plain_loop(x: Tensor, y: Tensor) -> Callable[[], None]:
    """The round as a plain loop over clients: x (n, rows, d), y (n, rows)."""
    zeros, kept = torch.zeros(D, device=x.device), round(SHARE * D)
    point, estimate, last = zeros, zeros, [zeros for _ in x]

    def one_round() -> None:
        nonlocal point, estimate
        total = torch.zeros_like(zeros)
        dense = bool(torch.rand(()) < SHARE)
        for i in range(len(x)):
            gradient = x[i].T @ (torch.sigmoid(x[i] @ point) - y[i])
            if dense:
                total += gradient
            else:
                chosen = torch.randperm(D, device=x.device)[:kept]
                total[chosen] += (gradient - last[i])[chosen] * (D / kept)
            last[i] = gradient
        estimate = total if dense else estimate + total
        point = point - STEP * estimate + (2 * STEP) ** 0.5 * torch.randn_like(zeros)

    return one_round


def gradients(clients: GeneralizedLinear, x: Tensor, y: Tensor, torch_compile: bool) -> dict[str, Callable[[], object]]:
    """Ways to every client's gradient: x (n, rows, d), y (n, rows)."""
    point, flat = torch.full((D,), 0.01, device=x.device), x.view(-1, D)

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
    for name in ENGINES[:-1]:
        if not missing(clients, name):
            path = clients.on(name)
            ways[name] = lambda path=path: path.gradient(point.unsqueeze(0))  # type: ignore[misc]
    if torch_compile:
        made = torch.compile(by_rows, fullgraph=True, dynamic=False)
        ways["torch.compile"] = lambda: made(x, y, point)
    return ways


def missing(clients: GeneralizedLinear, engine: str) -> str:
    """The reason why an engine is not available here; empty if it is."""
    try:
        clients.on(engine)
    except CompileError as error:
        return str(error)
    return ""


def agreements(file: Path, engine: str, device: str) -> list[dict[str, Any]]:
    """Compare a GPU with the CPU: every client's gradient, and a chain's position after twenty rounds."""
    found = []
    for place, way in (("cpu", "batched"), (device, engine)):
        chain = assemble(load(settings(file, way, place), environment={}))
        path = chain.problem.clients.on(way)
        gradient = path.gradient(torch.full((1, D), 0.01, device=path.device))
        for _ in range(20):
            chain.round()
        found.append((gradient, chain.state.params))
    (want, end), (gradient, reached) = found
    n = len(want)
    return [
        agreement(f"gradient: {engine} against the CPU", gradient, want, 1e-5, n),
        agreement(f"20 rounds: {engine} against the CPU", reached, end, 1e-4, n),
    ]


def best(works: dict[str, Callable[[], object]], rounds: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Measure milliseconds of one call of each, the fastest of `repeats` times the mean of `rounds`; interleaved."""
    found = dict.fromkeys(works, float("inf"))
    settle = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None  # returns early on GPUs
    for work in works.values():
        work()
        work()
    for _ in range(repeats):
        for name, work in works.items():
            settle()
            start = time.perf_counter()
            for _ in range(rounds):
                work()
            settle()
            found[name] = min(found[name], 1e3 * (time.perf_counter() - start) / rounds)
    return found


def measure(
    clients: Sequence[int] = (10, 100, 1000),
    rounds: int = 2000,
    *,
    repeats: int = 15,
    engines: Sequence[str] | None = None,
    torch_compile: bool = False,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Measure one row per number of clients and way; `rounds` / clients of them in each repeat, at least 4."""
    rows: list[dict[str, Any]] = []
    plainly(torch.device(device))
    engines = engines or usual(device)
    for n in clients:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "data.npz"
            write_data(file, n)
            works: dict[str, Callable[[], object]] = {}
            linear = build_problem(load(settings(file, device=device), environment={})).clients
            if not isinstance(linear, GeneralizedLinear):
                raise TypeError("workload A is a logistic regression")
            absent = {f"round: {engine}": why for engine in engines if (why := missing(linear, engine))}
            for engine in engines:
                if f"round: {engine}" not in absent:
                    _, works[f"round: {engine}"] = rounds_of(file, engine, device)
            compiler = "" if linear.device.type == "cuda" else missing(linear, "compiled")  # a GPU uses Triton
            if torch_compile and compiler:
                absent["gradient: torch.compile"] = compiler
            x, y = linear.design.view(n, ROWS, D), linear.labels.view(n, ROWS).to(torch.float32)
            works["floor: one pass"] = linear.design.sum
            works["loop: plain torch"] = plain_loop(x, y)
            ways = gradients(linear, x, y, torch_compile and not compiler)
            works |= {f"gradient: {name}": way for name, way in ways.items()}
            found = best(works, max(4, rounds // n), repeats, linear.device)
            compared = [] if linear.device.type == "cpu" else [e for e in engines if not missing(linear, e)]
            agree = [row for engine in compared for row in agreements(file, engine, device)]
        fastest = min(ms for name, ms in found.items() if name.startswith("gradient"))
        busy = round(os.getloadavg()[0], 1)
        for name, ms in sorted(found.items()):
            row = {"clients": n, "what": name, "ms": round(ms, 4), "threads": torch.get_num_threads(), "load": busy}
            rows.append(row | ({"ratio": round(ms / fastest, 2)} if name.startswith("round") else {}))
        rows += [{"clients": n, "what": name, "why": why} for name, why in sorted(absent.items())]
        rows += agree
    return rows


def usual(device: str) -> tuple[str, ...]:
    """Engines to measure on this kind of device."""
    return ENGINES[:3] if device == "cpu" else ("batched", "stacked", "cuda-graph")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="by default those that suit the device")
    parser.add_argument("--torch-compile", action="store_true")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(
        options.clients,
        options.rounds,
        repeats=options.repeats,
        engines=options.engines,
        torch_compile=options.torch_compile,
        device=options.device,
    )
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        if "why" in row:
            print(f"{row['clients']:6d}  {row['what']:28} {row['why']}")
            continue
        if "agree" in row:
            print(f"{row['clients']:6d}  {row['what']:28} differ by {row['difference']:.1e}, at most {row['rtol']:g}")
            continue
        ratio = f"{row['ratio']:7.2f} x the fastest gradient" if "ratio" in row else ""
        print(f"{row['clients']:6d}  {row['what']:28} {row['ms']:9.3f} ms  load {row['load']}{ratio}")


if __name__ == "__main__":
    main()
