"""Workload C: QLSD++ on networks, beside a plain PyTorch loop that takes the same gradients.

    python simulations/benchmarks/workload_c.py [--models lenet5 resnet20] [--rounds 3] [--threads 1] [--json]

20 clients with 300 rows, 5 of them a round, minibatches of 64, random data in the shape of Fashion-MNIST (for ResNet-20
in three channels of 32 x 32 pixels). With a moving reference a round costs every client two minibatch gradients, at the
iterate and at the reference, and a full one now and then, which is left out of both: the references are filled before
the clock starts. The loop does the same as one writes it down: it indexes its rows, calls `backward`, quantises the
difference to a memory with PyTorch's own random numbers, moves the memory and steps. Interleaved; of each the fastest
round, by the clock on the wall and by the processor time of the thread, which a busy machine disturbs less.
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
from rows import show
from torch import nn

from fedsample.assembly import build_fleet
from fedsample.config import load
from fedsample.problem import Problem, build_problem
from fedsample.strategies import Cohort, Langevin, Stability
from fedsample.targets.metric import Identity
from fedsample.targets.module import ModuleClients, skeleton

CLIENTS, ROWS, COHORT, BATCH, LEVELS = 20, 300, 5, 64, 255
SHAPES = {"lenet5": (28, 28), "resnet20": (32, 32, 3)}
STEP = 1e-7


def settings(file: Path, model: str) -> dict[str, Any]:
    """The experiment."""
    return {
        "preset": "qlsd-plus-plus",
        "chains": 1,
        "batch_size": BATCH,
        "data": {"kind": "npz", "file": str(file)},
        "model": {"name": model},
        "uplink": {"refresh": 1_000_000},
        "fleet": {"participation": COHORT},
    }


def write_data(path: Path, model: str) -> None:
    """Random rows and labels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((CLIENTS * ROWS, *SHAPES[model]), dtype=np.float32)
    y = rng.integers(10, size=CLIENTS * ROWS)
    np.savez(path, X=x, y=y, client=np.repeat(np.arange(CLIENTS), ROWS))


def ours(file: Path, model: str) -> tuple[Problem, Callable[[], None]]:
    """The problem, and a function that does the next round, all references known."""
    experiment = load(settings(file, model), environment={})
    problem = build_problem(experiment)
    fleet = build_fleet(experiment, problem)
    metric = Identity(torch.zeros(problem.d))
    fleet.set_metric(metric)
    sampler = Langevin(
        fleet.uplink,
        problem.prior,
        metric,
        step_size=STEP,
        temperature=1.0,
        seed=0,
        cohort=Cohort(CLIENTS, 1, 0, COHORT),
        stability=Stability(1.0, 1.0, 1e6),
        refresh=1_000_000,
    )
    state = sampler.begin(0.05 * torch.ones(1, problem.d))
    worker = fleet.workers[0]
    worker.about.gradient = torch.zeros(CLIENTS, 1, problem.d)  # any values: only time counts
    worker.about.round = torch.ones(CLIENTS, dtype=torch.int64)

    def one_round() -> None:
        nonlocal state
        request = sampler.request(state)
        state = sampler.update(state, request, fleet.exchange(request))

    return problem, one_round


def plain(problem: Problem) -> Callable[[], None]:
    """Two minibatch gradients of each client of a cohort, by autograd on the module."""
    clients = problem.clients
    if problem.module is None or not isinstance(clients, ModuleClients):
        raise TypeError("workload C is a network")
    module: nn.Module = skeleton(problem.module)
    parameters = [nn.Parameter(torch.full_like(each, 0.05)) for each in module.parameters()]
    names = [name for name, _ in module.named_parameters()]
    for name, parameter in zip(names, parameters, strict=True):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)
    reference = skeleton(module)
    for name, parameter in zip(names, parameters, strict=True):
        owner, _, leaf = name.rpartition(".")
        setattr(reference.get_submodule(owner), leaf, nn.Parameter(parameter.detach().clone()))
    x, y = clients.x, clients.labels

    kept, memory = torch.zeros(CLIENTS, problem.d), torch.zeros(CLIENTS, problem.d)

    def one_round() -> None:
        total = memory.sum(0)
        for client in torch.randperm(CLIENTS)[:COHORT].tolist():
            rows = client * ROWS + torch.randperm(ROWS)[:BATCH]
            estimate = kept[client] - memory[client]
            for network, sign in ((module, 1.0), (reference, -1.0)):
                network.zero_grad()
                loss = nn.functional.cross_entropy(network(x[rows]), y[rows], reduction="sum") * (ROWS / BATCH)
                loss.backward()
                estimate += sign * torch.cat([each.grad.flatten() for each in network.parameters()])  # type: ignore[union-attr]
            norm = estimate.norm()
            levels = torch.floor(estimate.abs() * (LEVELS / norm) + torch.rand(problem.d))
            sent = estimate.sign() * levels * (norm / LEVELS)
            memory[client] += 0.5 * sent
            total += (CLIENTS / COHORT) * sent
        step = -STEP * total + (2 * STEP) ** 0.5 * torch.randn(problem.d)
        with torch.no_grad():
            for parameter, piece in zip(parameters, step.split([each.numel() for each in parameters]), strict=True):
                parameter.add_(piece.view_as(parameter))

    return one_round


def measure(models: Sequence[str] = ("lenet5", "resnet20"), rounds: int = 3) -> list[dict[str, Any]]:
    """One row a model: milliseconds a round, ours and the loop's, and their ratio."""
    rows = []
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "data.npz"
            write_data(file, model)
            problem, one_round = ours(file, model)
            works = {"ours": one_round, "loop": plain(problem)}
            found, spent = dict.fromkeys(works, float("inf")), dict.fromkeys(works, float("inf"))
            for at in range(rounds + 1):
                for name, work in works.items():
                    start, processor = time.perf_counter(), time.thread_time()
                    work()
                    if at:
                        found[name] = min(found[name], 1e3 * (time.perf_counter() - start))
                        spent[name] = min(spent[name], 1e3 * (time.thread_time() - processor))
        rows.append(
            {
                "model": model,
                "clients": CLIENTS,
                "parameters": problem.d,
                **{f"{name}_ms": round(ms, 2) for name, ms in found.items()},
                "ratio": round(found["ours"] / found["loop"], 3),
                "processor_ratio": round(spent["ours"] / spent["loop"], 3),
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
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.models, options.rounds)
    show(rows, as_json=options.json)


if __name__ == "__main__":
    main()
