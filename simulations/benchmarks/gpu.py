"""Rounds on a GPU, eagerly and with CUDA graphs, and whether they agree with the CPU. Needs torch and numpy only.

    python simulations/benchmarks/gpu.py [--device cuda] [--parts a b c] [--seconds 3] [--quick] [--json]

Runs from a source tree, without installation, in under five minutes.

    a   Langevin-MARINA on logistic regression: d = 123, 300 rows per client, 100 and 1,000 clients, all rows
    b   a local epoch of a CNN of 1,663,370 parameters: 500 images, batches of 32
    c   QLSD++ on LeNet-5 and ResNet-20: 20 clients of 300 rows, 5 of them per round, batches of 64; the full
        gradients at the reference, needed now and then, are left out

Each way is repeated for `--seconds`; the fastest repeat counts. `agree` rows compare results: with CUDA graphs bit for
bit with those without, on the GPU with the CPU's up to the stated rtol (float32 throughout: TF32 is off, and cuDNN adds
in a fixed order). On a CPU (`--device cpu --quick`) it shows that the script works; CUDA graphs are left out, as a row
says.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parents[2]))  # the source tree, even if fedsample is installed

from agreement import agreement, plainly

from fedsample.compression import QSGD, RandBlock
from fedsample.errors import CompileError, FedSampleError
from fedsample.estimators import Diana, Marina, Uplink
from fedsample.fleets.local import LocalFleet
from fedsample.models.lenet import LeNet5
from fedsample.models.resnet import ResNet20
from fedsample.protocol.exchange import ESTIMATE, Request
from fedsample.random import SERVER, key
from fedsample.strategies.langevin import langevin_step
from fedsample.targets import Clients, GeneralizedLinear, ModuleClients
from fedsample.targets.cuda_graphs import CudaRecorder, Replayed

SEED, STEP, RATE, BATCH = 0, 1e-7, 0.05, 32
BLOCK = 16  # rounds whose noise is made together, as in samplers
Row = dict[str, Any]
Ways = dict[str, Callable[[], object]]


class Chain:
    """A Langevin chain over a simulated federation: the server of `fedsample.strategies`, without its checks.

    Minibatches use the start as the reference of variance reduction.

    Args:
        clients: the federation's clients.
        uplink: its gradient estimator.
        engine: the engine that computes gradients.
        start: (1, d) starting point.
        batch_size: rows per gradient; None: all.
        cohort: clients per round; None: all.
    """

    def __init__(
        self,
        clients: Clients,
        uplink: Uplink,
        engine: Any,
        start: Tensor,
        *,
        batch_size: int | None = None,
        cohort: int | None = None,
    ) -> None:
        self.fleet = LocalFleet(clients, uplink, SEED, 1, batch_size=batch_size, engine=engine)
        self.uplink, self.start, self.cohort = uplink, start, cohort
        self.svrg = batch_size is not None
        self.n, self.round = clients.n, 0
        self.params = self.previous = start
        self.server = uplink.start(1, clients.d, start.device)
        self.applied = torch.zeros(clients.n, dtype=torch.int64, device=start.device)
        self.block: tuple[int, Tensor, list[bool]] | None = None
        if self.svrg:  # the reference is known before the clock starts
            about = self.fleet.workers[0].about
            about.gradient = clients.gradient(start)
            about.round = torch.ones(clients.n, dtype=torch.int64)

    def step(self) -> None:
        """Do one round."""
        self.round += 1
        noise, syncs = self._drawn()
        request = Request(
            round=self.round,
            points=self.params,
            outputs=frozenset((ESTIMATE,)),
            previous=self.previous if self.uplink.needs_previous and self.round > 1 else None,
            sync=torch.ones(1, dtype=torch.bool, device=noise.device) if syncs else None,
            active=self._active(),
            applied=self.applied,
            reference=self.start if self.svrg else None,
            reference_round=1,
        )
        aggregate = self.fleet.exchange(request)
        if aggregate.total is None:
            raise TypeError("a round without an estimate")
        inclusion = 1.0 if self.cohort is None else self.cohort / self.n
        estimate, self.server = self.uplink.decode(self.server, aggregate.total, request.sync, inclusion)
        self.previous = self.params
        self.params = langevin_step(self.params, estimate.to(torch.float32), noise, STEP, 1.0)
        self.applied = torch.where(aggregate.arrived.to(noise.device), self.round, self.applied)

    def _drawn(self) -> tuple[Tensor, bool]:
        """The noise (1, d) of this round, and whether the round is dense; drawn for `BLOCK` rounds together."""
        index, at = divmod(self.round - 1, BLOCK)
        if self.block is None or self.block[0] != index:
            rounds = torch.arange(index * BLOCK + 1, (index + 1) * BLOCK + 1)
            device, d = self.params.device, self.params.shape[-1]
            noise = key(SEED, rounds.to(device), SERVER, purpose="noise", device=device).normal(d, torch.float32)
            chance = self.uplink.sync_probability(2, d)
            coins = key(SEED, rounds, SERVER, purpose="sync").bernoulli(chance)
            self.block = (index, noise, coins.tolist())
        first = self.round == 1 and self.uplink.sync_probability(1, 1) == 1
        return self.block[1][at : at + 1], first or self.block[2][at]

    def _active(self) -> Tensor | None:
        if self.cohort is None:
            return None
        chosen = key(SEED, self.round, SERVER, purpose="cohort").subset(self.n, self.cohort)
        active = torch.zeros(self.n, 1, dtype=torch.bool)
        active[chosen] = True
        return active.to(self.params.device)


class Clock:
    """Times several ways to do the same.

    Args:
        device: the device, whose calls may return before they are finished.
        seconds: time for each way.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def rows(self, part: str, clients: int | None, ways: Ways) -> Iterator[Row]:
        """Yield one row per way: milliseconds and rounds per second, the fastest of repeats of at least one call."""
        for what, work in ways.items():
            work()
            calls, best, end = 1, float("inf"), time.perf_counter() + self.seconds
            while True:
                self._settle()
                start = time.perf_counter()
                for _ in range(calls):
                    work()
                self._settle()
                took = time.perf_counter() - start
                best = min(best, took / calls)
                if time.perf_counter() >= end:
                    break
                calls = max(1, min(1000, int(0.1 * self.seconds / best)))
            yield {
                "part": part, "clients": clients, "what": what, "ms": 1e3 * best, "rounds_a_second": 1 / best
            }  # fmt: skip

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def recorded(clients: Clients) -> str:
    """The reason why CUDA graphs are not available for these clients; empty if they are."""
    try:
        clients.on("cuda-graph")
    except CompileError as error:
        return str(error)
    return ""


def moved(found: Row, part: str) -> Row:
    return {"part": part, **found}


# --- a ----------------------------------------------------------------------------------------------------------------


def regression(n: int, device: torch.device) -> GeneralizedLinear:
    """Logistic clients, the same on every device."""
    d, rows = 123, 300
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n * rows, d), dtype=np.float32)
    y = (rng.random(n * rows) < 1 / (1 + np.exp(-x @ (rng.standard_normal(d) / 11)))).astype(np.int64)
    offsets = torch.arange(0, n * rows + 1, rows)
    made = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
    return GeneralizedLinear(*made, offsets, "bernoulli", intercept=False)


def part_a(clock: Clock, quick: bool) -> Iterator[Row]:
    """Rounds of Langevin-MARINA, and the gradient alone."""
    for n in (10,) if quick else (100, 1000):
        clients, here = regression(n, clock.device), regression(n, torch.device("cpu"))
        point = torch.full((1, clients.d), 0.01, device=clock.device)
        why = recorded(clients)
        engines = {"eagerly, batched": "batched", "eagerly, stacked": "stacked"}
        if why:
            yield {"part": "a", "clients": n, "what": "with CUDA graphs", "why": why}
        else:
            engines["with CUDA graphs"] = "cuda-graph"
        uplink = Marina(RandBlock(0.1), 0.1)
        paths = {name: clients.on(engine) for name, engine in engines.items()}
        chains = {name: Chain(clients, uplink, engine, 0 * point) for name, engine in engines.items()}
        ways: Ways = {f"gradient {name}": lambda path=path, at=point: path.gradient(at) for name, path in paths.items()}
        ways |= {f"round {name}": chain.step for name, chain in chains.items()}
        yield from clock.rows("a", n, ways)
        want = here.gradient(point.cpu())
        for name, path in paths.items():
            found = path.gradient(point)
            yield moved(agreement(f"gradient {name}, and on the CPU", found, want, 1e-5, n), "a")
        if not why:
            bits = [paths[name].gradient(point) for name in ("with CUDA graphs", "eagerly, stacked")]
            yield moved(agreement("gradient with CUDA graphs, and stacked", *bits, 0.0, n), "a")
        yield moved(twenty(clients, here, "stacked" if why else "cuda-graph", n), "a")


def twenty(clients: Clients, here: Clients, engine: str, n: int) -> Row:
    """Position of a chain after twenty rounds with the same draws everywhere: only products round differently."""
    ends = []
    for each, way in ((clients, engine), (here, "batched")):
        start = torch.zeros(1, each.d, device=each.device)
        chain = Chain(each, Marina(RandBlock(0.1), 0.1), way, start)
        for _ in range(20):
            chain.step()
        ends.append(chain.params)
    return agreement(f"20 rounds {engine}, and on the CPU", ends[0], ends[1], 1e-4, n)


# --- b ----------------------------------------------------------------------------------------------------------------


def cnn() -> nn.Module:
    """Two 5 x 5 convolutions and a dense layer of 512 (McMahan et al. 2017): 1,663,370 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


class Epochs:
    """Local epochs of stochastic gradient descent, always from the same start.

    Args:
        device: where to compute.
        images: number of rows.
    """

    def __init__(self, device: torch.device, images: int) -> None:
        self.module = cnn().to(device)
        keys = key(SEED, purpose="images")
        self.x = keys.normal(images * 784, torch.float32).view(images, 1, 28, 28).to(device)
        self.y = keys.fold("labels").integers(10, images).to(device)
        self.order = keys.fold("order").permutation(images).to(device).split(BATCH)
        named = list(self.module.named_parameters())
        self.shapes = {name: each.shape for name, each in named}
        scales = [each[0].numel() ** -0.5 if each.ndim > 1 else 0.01 for _, each in named]
        pieces = [
            scale * keys.fold(place).normal(each.numel(), torch.float32)
            for place, (scale, (_, each)) in enumerate(zip(scales, named, strict=True))
        ]
        self.start = torch.cat(pieces).to(device)

    def step(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """One gradient step on a batch: parameters (d,) -> (d,)."""
        leaf = theta.detach().requires_grad_()
        pieces = torch.split(leaf, [shape.numel() for shape in self.shapes.values()])
        shaped = {name: each.view(shape) for each, (name, shape) in zip(pieces, self.shapes.items(), strict=True)}
        loss = nn.functional.cross_entropy(functional_call(self.module, shaped, (x,)), y)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return theta - RATE * gradient

    def epoch(self, step: Callable[..., Tensor]) -> Tensor:
        """The parameters (d,) after an epoch."""
        theta = self.start
        for batch in self.order:
            theta = step(theta, self.x[batch], self.y[batch])
        return theta

    def plain(self) -> None:
        """The same epoch with a plain module and optimizer."""
        torch.nn.utils.vector_to_parameters(self.start.clone(), self.module.parameters())  # views of the copy
        optimizer = torch.optim.SGD(self.module.parameters(), lr=RATE)
        for batch in self.order:
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.module(self.x[batch]), self.y[batch]).backward()
            optimizer.step()


def part_b(clock: Clock, quick: bool) -> Iterator[Row]:
    """Local epochs of the CNN."""
    images = 40 if quick else 500
    epochs, here = Epochs(clock.device, images), Epochs(torch.device("cpu"), images)
    ways: Ways = {"epoch, plain module and SGD": epochs.plain, "epoch eagerly": lambda: epochs.epoch(epochs.step)}
    end = epochs.epoch(epochs.step)
    bits = None
    try:
        first = epochs.order[0]
        example = (epochs.start, epochs.x[first], epochs.y[first])
        replayed = Replayed(epochs.step, example, CudaRecorder(clock.device))
        ways["epoch with CUDA graphs"] = lambda: epochs.epoch(replayed)
        bits = epochs.epoch(replayed)
    except CompileError as error:
        yield {"part": "b", "clients": 1, "what": "with CUDA graphs", "why": str(error)}
    yield from clock.rows("b", 1, ways)
    yield moved(agreement("epoch eagerly, and on the CPU", end, here.epoch(here.step), 1e-3, 1), "b")
    epochs.plain()
    plain = torch.nn.utils.parameters_to_vector(epochs.module.parameters())
    yield moved(agreement("epoch eagerly, and plain", end, plain, 1e-5, 1), "b")
    if bits is not None:
        yield moved(agreement("epoch with CUDA graphs, and eagerly", bits, end, 0.0, 1), "b")


# --- c ----------------------------------------------------------------------------------------------------------------


def network(name: str, n: int, rows: int, device: torch.device) -> ModuleClients:
    """Clients with random images, the same on every device."""
    module, shape = (LeNet5((28, 28), 10), (28, 28)) if name == "lenet5" else (ResNet20((32, 32, 3), 10), (32, 32, 3))
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((n * rows, *shape), dtype=np.float32))
    y = torch.from_numpy(rng.integers(10, size=n * rows))
    offsets = torch.arange(0, n * rows + 1, rows)
    return ModuleClients(module, x.to(device), y.to(device), offsets, "categorical")


def part_c(clock: Clock, quick: bool) -> Iterator[Row]:
    """Rounds of QLSD++, a cohort at a time."""
    n, rows, cohort, batch = (4, 40, 2, 16) if quick else (20, 300, 5, 64)
    for name in ("lenet5",) if quick else ("lenet5", "resnet20"):
        clients, here = network(name, n, rows, clock.device), network(name, n, rows, torch.device("cpu"))
        start = 0.05 * key(SEED, purpose="start").normal(clients.d, torch.float32).unsqueeze(0).to(clock.device)
        engines = {"eagerly": "batched"}
        why = recorded(clients)
        if why:
            yield {"part": "c", "clients": n, "what": f"{name} with CUDA graphs", "why": why}
        else:
            engines["with CUDA graphs"] = "cuda-graph"
        chains = {
            f"{name}, round {way}": Chain(clients, Diana(QSGD(255)), engine, start, batch_size=batch, cohort=cohort)
            for way, engine in engines.items()
        }
        yield from clock.rows("c", n, {what: chain.step for what, chain in chains.items()})
        who = torch.arange(cohort)
        results = []
        for each in (here, *(clients.on(engine) for engine in engines.values())):
            keys = key(SEED, client=who[:, None], chain=torch.arange(1), purpose="batch").tensor().to(each.device)
            draws = type(key(SEED))(keys, each.device)
            at = start.to(each.device)
            results.append(each.gradient(at, clients=who.to(each.device), keys=draws, batch_size=batch))
        want, eagerly, *graphs = results
        yield moved(agreement(f"{name}, gradient eagerly, and on the CPU", eagerly, want, 1e-3, n), "c")
        for found in graphs:
            yield moved(agreement(f"{name}, gradient with CUDA graphs, and eagerly", found, eagerly, 0.0, n), "c")


# --- all --------------------------------------------------------------------------------------------------------------

PARTS = {"a": part_a, "b": part_b, "c": part_c}


def machine(device: torch.device) -> Row:
    """Describe the machine."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": gpu.name if gpu else "cpu", "memory_gib": round(gpu.total_memory / 2**30, 1) if gpu else None,
        "torch": torch.__version__, "cuda": torch.version.cuda if gpu else None, "threads": torch.get_num_threads(),
    }  # fmt: skip


def measure(parts: list[str], device: torch.device, seconds: float, quick: bool) -> list[Row]:
    """Measure all rows, printing each to standard error; a part that fails gets a row with the reason."""
    clock, rows = Clock(device, seconds), []
    for part in parts:
        try:
            for row in PARTS[part](clock, quick):
                rows.append(row)
                print(text(row), file=sys.stderr, flush=True)
        except (RuntimeError, FedSampleError, TypeError, ValueError) as error:  # the other parts still run
            rows.append({"part": part, "clients": None, "what": "failed", "why": f"{type(error).__name__}: {error}"})
            print(text(rows[-1]), file=sys.stderr, flush=True)
    return rows


def text(row: Row) -> str:
    """Format a row as one line."""
    head = f"{row['part']}  {row['clients'] or '':>5}  {row['what']:58} "
    if "why" in row:
        return f"{head}not measured: {row['why']}"
    if "agree" in row:
        bound = f"at most {row['rtol']:g}" if row["rtol"] else "the same bits"
        return f"{head}{'agree' if row['agree'] else 'DIFFER'} by {row['difference']:.1e} ({bound})"
    return f"{head}{row['ms']:10.3f} ms  {row['rounds_a_second']:10.1f} a second"


def main() -> int:
    """Measure and print; return 1 if something failed or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each way that is timed")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("--device cuda, but this machine has no GPU that PyTorch can use; choose cpu", file=sys.stderr)
        return 2
    plainly(device)
    about = machine(device)
    print("  ".join(f"{name} {value}" for name, value in about.items()), file=sys.stderr)
    rows = measure(options.parts, device, 0.1 if options.quick else options.seconds, options.quick)
    if options.json:
        print(json.dumps({"machine": about, "quick": options.quick, "rows": rows}, indent=1))
    return int(any(row["what"] == "failed" or not row.get("agree", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
