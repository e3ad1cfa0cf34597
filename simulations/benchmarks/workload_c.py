"""Workload C: QLSD++ on networks, beside a plain PyTorch loop that takes the same gradients.

    python simulations/benchmarks/workload_c.py [--models lenet5 resnet20] [--rounds 3] [--device cuda] [--json]

20 clients with 300 rows, 5 of them a round, minibatches of 64, random data in the shape of Fashion-MNIST (for ResNet-20
in three channels of 32 x 32 pixels). With a moving reference a round costs every client two minibatch gradients, at the
iterate and at the reference, and a full one now and then, which is left out of both: the references are filled before
the clock starts. The loop does the same in plain PyTorch: it indexes its rows, calls `backward`, quantises the
difference to a memory with PyTorch's own random numbers, moves the memory and steps. Interleaved; reports the
fastest round of each, in wall-clock time and in processor time of the thread, which a busy machine disturbs less. On a
GPU there is a row with CUDA graphs and one without, and the minibatch gradients are compared with the CPU's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from agreement import agreement, plainly
from rows import show
from torch import Tensor, nn

from fedsample.config import load
from fedsample.estimators import build_links
from fedsample.problem import Problem, build_problem
from fedsample.random import Key, key
from fedsample.runs.build import build_fleet
from fedsample.strategies import Cohort, Driver, Langevin, Stability
from fedsample.targets.metric import Identity
from fedsample.targets.module import ModuleClients, skeleton

CLIENTS, ROWS, COHORT, BATCH, LEVELS = 20, 300, 5, 64, 255
SHAPES = {"lenet5": (28, 28), "resnet20": (32, 32, 3)}
STEP = 1e-7


def settings(file: Path, model: str, engine: str = "auto", device: str = "cpu") -> dict[str, Any]:
    """Settings of the experiment."""
    return {
        "preset": "qlsd-plus-plus",
        "chains": 1,
        "batch_size": BATCH,
        "data": {"kind": "npz", "file": str(file)},
        "model": {"name": model},
        "uplink": {"refresh": 1_000_000},
        "fleet": {"participation": COHORT, "engine": engine, "device": device},
    }


def write_data(path: Path, model: str) -> None:
    """Write random rows and labels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((CLIENTS * ROWS, *SHAPES[model]), dtype=np.float32)
    y = rng.integers(10, size=CLIENTS * ROWS)
    np.savez(path, X=x, y=y, client=np.repeat(np.arange(CLIENTS), ROWS))


def ours(file: Path, model: str, engine: str = "auto", device: str = "cpu") -> tuple[Problem, Callable[[], None]]:
    """Build the problem, and a function that does the next round, with all references computed."""
    experiment = load(settings(file, model, engine, device), environment={})
    problem = build_problem(experiment)
    links = build_links(experiment, problem.clients)
    fleet = build_fleet(experiment, problem, links)
    metric = Identity(torch.zeros(problem.d, device=device))
    fleet.set_metric(metric)
    driver = Driver(
        Langevin(step_size=STEP, temperature=1.0, seed=0),
        links,
        problem.prior,
        metric,
        cohort=Cohort(CLIENTS, 1, 0, COHORT),
        stability=Stability(1.0, 1.0, 1e6),
        refresh=1_000_000,
    )
    state = driver.begin(0.05 * torch.ones(1, problem.d, device=device))
    worker = fleet.workers[0]
    worker.about.gradient = torch.zeros(CLIENTS, 1, problem.d, device=device)  # any values: only time counts
    worker.about.round = torch.ones(CLIENTS, dtype=torch.int64)

    def one_round() -> None:
        nonlocal state
        request = driver.request(state)
        state = driver.update(state, request, fleet.exchange(request))

    return problem, one_round


def plain(problem: Problem) -> Callable[[], None]:
    """Compute two minibatch gradients of each client of a cohort, by autograd on the module."""
    clients = problem.clients
    if problem.module is None or not isinstance(clients, ModuleClients):
        raise TypeError("workload C is a network")
    module: nn.Module = skeleton(problem.module)
    here = clients.device
    parameters = [nn.Parameter(torch.full_like(each, 0.05, device=here)) for each in module.parameters()]
    names = [name for name, _ in module.named_parameters()]
    for name, parameter in zip(names, parameters, strict=True):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)
    reference = skeleton(module)
    for name, parameter in zip(names, parameters, strict=True):
        owner, _, leaf = name.rpartition(".")
        setattr(reference.get_submodule(owner), leaf, nn.Parameter(parameter.detach().clone()))
    x, y = clients.x, clients.labels

    kept, memory = (torch.zeros(CLIENTS, problem.d, device=here) for _ in range(2))

    def one_round() -> None:
        total = memory.sum(0)
        for client in torch.randperm(CLIENTS)[:COHORT].tolist():
            rows = client * ROWS + torch.randperm(ROWS, device=here)[:BATCH]
            estimate = kept[client] - memory[client]
            for network, sign in ((module, 1.0), (reference, -1.0)):
                network.zero_grad()
                loss = nn.functional.cross_entropy(network(x[rows]), y[rows], reduction="sum") * (ROWS / BATCH)
                loss.backward()
                estimate += sign * torch.cat([each.grad.flatten() for each in network.parameters()])  # type: ignore[union-attr]
            norm = estimate.norm()
            levels = torch.floor(estimate.abs() * (LEVELS / norm) + torch.rand(problem.d, device=here))
            sent = estimate.sign() * levels * (norm / LEVELS)
            memory[client] += 0.5 * sent
            total += (CLIENTS / COHORT) * sent
        step = -STEP * total + (2 * STEP) ** 0.5 * torch.randn(problem.d, device=here)
        with torch.no_grad():
            for parameter, piece in zip(parameters, step.split([each.numel() for each in parameters]), strict=True):
                parameter.add_(piece.view_as(parameter))

    return one_round


def sampled(problem: Problem, engine: str) -> Tensor:
    """Compute the minibatch gradients (COHORT, 1, d) of the first clients."""
    path, who = problem.clients.on(engine), torch.arange(COHORT)
    keys = key(0, client=who.unsqueeze(-1), chain=torch.arange(1), purpose="batch").tensor().to(path.device)
    at = 0.05 * key(0, purpose="point").normal(problem.d, torch.float32).unsqueeze(0).to(path.device)
    return path.gradient(at, clients=who.to(path.device), keys=Key(keys, path.device), batch_size=BATCH)


def best(works: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, tuple[float, float]]:
    """Measure milliseconds of the fastest round of each, wall-clock and processor time; interleaved."""
    settle = torch.cuda.synchronize if device != "cpu" else lambda: None  # GPU calls return early
    found = dict.fromkeys(works, (float("inf"), float("inf")))
    for at in range(rounds + 1):
        for name, work in works.items():
            settle()
            start, processor = time.perf_counter(), time.thread_time()
            work()
            settle()
            took = 1e3 * (time.perf_counter() - start), 1e3 * (time.thread_time() - processor)
            if at:
                found[name] = min(found[name][0], took[0]), min(found[name][1], took[1])
    return found


def measure(
    models: Sequence[str] = ("lenet5", "resnet20"), rounds: int = 3, device: str = "cpu"
) -> list[dict[str, Any]]:
    """One row per model and engine: milliseconds per round, ours and the loop's, and their ratio."""
    rows: list[dict[str, Any]] = []
    plainly(torch.device(device))
    engines = ("batched",) if device == "cpu" else ("batched", "cuda-graph")
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "data.npz"
            write_data(file, model)
            made = {engine: ours(file, model, engine, device) for engine in engines}
            problem = made["batched"][0]
            found = best({**{name: each[1] for name, each in made.items()}, "loop": plain(problem)}, rounds, device)
            if device != "cpu":
                want = sampled(build_problem(load(settings(file, model), environment={})), "batched")
                for engine in engines:
                    what = f"gradient: {model}, {engine} against the CPU"
                    rows.append(agreement(what, sampled(problem, engine), want, 1e-3, CLIENTS))
        for engine in engines:
            (mine, my_time), (loop, its_time) = found[engine], found["loop"]
            rows.append(
                {
                    "model": model,
                    "engine": engine,
                    "clients": CLIENTS,
                    "parameters": problem.d,
                    "ours_ms": round(mine, 2),
                    "loop_ms": round(loop, 2),
                    "ratio": round(mine / loop, 3),
                    "processor_ratio": round(my_time / its_time, 3),
                    "threads": torch.get_num_threads(),
                    "load": round(os.getloadavg()[0], 1),
                }
            )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.models, options.rounds, options.device)
    show(rows, as_json=options.json)


if __name__ == "__main__":
    main()
