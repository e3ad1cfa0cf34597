"""CUDA graphs: what surrounds a record, with a stand-in for CUDA; on a GPU, the same bits as without."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from running_error import LIKELY, response
from torch import Tensor

from fedsample.errors import CompileError
from fedsample.fleets.engines import by_shape, by_stopwatch, choose_engine
from fedsample.models import lenet
from fedsample.random import key
from fedsample.targets import Clients, GeneralizedLinear, ModuleClients, Quadratic, cuda_graphs, glm, module
from fedsample.targets.cuda_graphs import CudaRecorder, Replayed

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


class StandIn:
    """Records by keeping the function: a replay reads its inputs where they lie and overwrites its one result."""

    def __init__(self, device: torch.device) -> None:
        self.records: list[tuple[torch.Size, ...]] = []
        self.checked = 0

    def check(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.checked += 1

    def record(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Callable[[], None], Tensor]:
        self.records.append(tuple(each.shape for each in inputs))
        result = torch.full_like(function(*inputs), torch.nan)  # nothing is computed by a record

        def replay() -> None:
            result.copy_(function(*inputs))

        return replay, result


class Waits(StandIn):
    """Finds that the function waits."""

    def check(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        raise CompileError("it waits for the device")


def regression(even: bool = False, device: str = "cpu") -> GeneralizedLinear:
    offsets = torch.tensor([0, 30, 60, 90, 120] if even else [0, 9, 9, 10, 70, 120])
    keys = key(5, purpose="rows")
    x, y = keys.normal(120 * 7, torch.float32).view(120, 7), keys.fold("y").integers(3, 120)
    return GeneralizedLinear(x.to(device), y.to(device), offsets, "categorical", 3)


def network(device: str = "cpu") -> ModuleClients:
    keys = key(7, purpose="images")
    x, y = keys.normal(90 * 28 * 28, torch.float32).view(-1, 28, 28), keys.fold("y").integers(10, 90)
    offsets = torch.tensor([0, 25, 25, 60, 90])
    return ModuleClients(lenet.LeNet5((28, 28), 10), x.to(device), y.to(device), offsets, "categorical")


def points(clients: Clients, chains: int = 2, seed: int = 6) -> Tensor:
    drawn = key(seed, chain=torch.arange(chains), purpose="points").normal(clients.d, torch.float32)
    return 0.05 * drawn.to(clients.device)


def every_way(clients: Clients, path: Clients, seeds: Sequence[int] = (1, 2, 3)) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients of all clients, of some, and of minibatches, each by both."""
    some = torch.tensor([3, 0, 1])
    for seed in seeds:
        for chains in (1, 3):
            at = points(clients, chains, seed)
            yield clients.gradient(at), path.gradient(at)
            for who in (None, some):
                mine = None if who is None else who.to(clients.device)
                index = torch.arange(clients.n, device=clients.device) if mine is None else mine
                chain = torch.arange(chains, device=clients.device)
                draws = key(seed, client=index.unsqueeze(-1), chain=chain, device=clients.device)
                for more in ({}, {"keys": draws, "batch_size": 12}):
                    yield tuple(each.gradient(at, clients=mine, **more) for each in (clients, path))  # type: ignore


def own_roundings(clients: Clients) -> float:
    """How far two orders of sums may part, relative to a gradient's norm, where all rows are summed: the most terms."""
    at = points(clients, 1)
    size = clients.gradient(at).double().flatten(2).norm(dim=-1)
    own = response(lambda: clients.gradient(at), leading=2, responses=1)
    return 2 * LIKELY * float((own / size.clamp(min=1e-300)).max())


# --- what surrounds a record ------------------------------------------------------------------------------------------


def test_a_shape_is_recorded_once_and_every_result_is_its_own() -> None:
    recorder = StandIn(CUDA)
    replayed = Replayed(lambda x, y: x + 2 * y, (torch.ones(1), torch.ones(1)), recorder)
    assert (recorder.checked, len(recorder.records)) == (1, 1)
    x = torch.arange(6.0).view(2, 3)
    found = [replayed(x, x + seed) for seed in range(3)]
    assert len(recorder.records) == 2
    for seed, each in enumerate(found):
        assert torch.equal(each, 3 * x + 2 * seed)
    x.zero_()
    assert torch.equal(found[0], 3 * torch.arange(6.0).view(2, 3))
    wide = torch.arange(12.0).view(3, 4).T[:2]
    assert torch.equal(replayed(wide, wide), 3 * wide)  # as many rows, other strides
    assert len(recorder.records) == 2
    doubled = replayed(x.double(), x.double())
    assert doubled.dtype == torch.float64
    assert len(recorder.records) == 3


def test_a_record_is_used_by_one_thread_at_a_time() -> None:
    made: list[Replayed] = []
    held: list[bool] = []

    def function(x: Tensor) -> Tensor:
        held.extend(each._lock.locked() for each in made)
        return -x

    made.append(Replayed(function, (torch.ones(1),), StandIn(CUDA)))
    assert float(made[0](torch.ones(1))) == -1
    assert held == [True]
    assert not made[0]._lock.locked()


def test_beyond_some_shapes_the_function_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "_MOST", 3)
    recorder = StandIn(CUDA)
    replayed = Replayed(torch.neg, (torch.ones(1),), recorder)
    for size in (1, 2, 3, 4, 5, 2):
        assert torch.equal(replayed(torch.ones(size)), -torch.ones(size))
    assert len(recorder.records) == 3


@pytest.mark.parametrize("even", [True, False])
def test_regressions_replay_all_rows_and_nothing_else(even: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StandIn] = []
    monkeypatch.setattr(glm, "CudaRecorder", lambda device: made.append(StandIn(device)) or made[-1])
    clients = regression(even)
    for want, found in every_way(clients.on("stacked"), clients.on("cuda-graph")):
        assert torch.equal(found, want)
    assert made[0].records == [((1, clients.d),), ((3, clients.d),)]


@pytest.mark.parametrize("alone", [1, 1 << 60])
def test_networks_replay_piece_by_piece(alone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients together or alone, of one size or not, all rows or minibatches; a piece's record serves other clients."""
    made: list[StandIn] = []
    monkeypatch.setattr(module, "CudaRecorder", lambda device: made.append(StandIn(device)) or made[-1])
    monkeypatch.setattr(module, "_ALONE", alone)
    clients = network()
    for want, found in every_way(clients, clients.on("cuda-graph"), (1, 2)):
        assert torch.equal(found, want)
    shapes = made[0].records
    assert len(set(shapes)) == len(shapes)
    if alone == 1:  # 25, 35 and 30 rows, or 12 of each, at 1 and 3 chains, and the first record
        assert len(shapes) == 1 + 2 * (3 + 1)
    before = len(shapes)
    path = clients.on("cuda-graph")
    path.gradient(points(clients))
    path.gradient(points(clients, seed=9), clients=torch.tensor([0]))
    assert len(made[1].records) <= before


def test_networks_without_rows() -> None:
    empty = ModuleClients(
        lenet.LeNet5((28, 28), 10), torch.zeros(0, 28, 28), torch.zeros(0), torch.tensor([0, 0, 0]), "categorical"
    )
    assert float(empty.gradient(points(empty)).abs().sum()) == 0


# --- what is chosen ---------------------------------------------------------------------------------------------------


def on_gpu(clients: Clients) -> Clients:
    """Clients that say so; nothing of them is computed."""
    clients.device = CUDA
    return clients


def test_the_table_on_a_gpu() -> None:
    assert by_shape(on_gpu(regression()), None) == "cuda-graph"
    assert by_shape(on_gpu(regression()), 12) == "batched"
    assert by_shape(on_gpu(network()), None) == "cuda-graph"
    assert by_shape(on_gpu(network()), 12) == "cuda-graph"
    assert by_shape(on_gpu(Quadratic(torch.ones(2, 3), torch.zeros(2, 3))), None) == "batched"
    assert by_shape(on_gpu(regression(even=True)), None, without="cuda-graph") == "stacked"
    assert by_shape(on_gpu(network()), None, without="cuda-graph") == "batched"


@pytest.mark.parametrize(("make", "next_one"), [(lambda: regression(even=True), "stacked"), (network, "batched")])
def test_where_there_is_no_gpu_the_next_engine_runs(make: Callable[[], Clients], next_one: str) -> None:
    clients = make()
    with pytest.raises(CompileError, match="CUDA graphs need clients on a GPU, these are on cpu; set fleet"):
        clients.on("cuda-graph")
    with pytest.warns(UserWarning, match=f'"cuda-graph" is not possible, "{next_one}" is used: CUDA graphs need'):
        assert choose_engine(clients, "cuda-graph", chains=1) == next_one
    assert choose_engine(clients, "cuda-graph", chains=1, strict=True) == "cuda-graph"
    assert by_stopwatch(clients, 1) != "cuda-graph"


def test_other_clients_are_not_recorded() -> None:
    with pytest.raises(CompileError, match="only regressions and networks on a GPU"):
        Quadratic(torch.ones(2, 3), torch.zeros(2, 3)).on("cuda-graph")


@pytest.mark.parametrize("wanted", ["auto", "cuda-graph", "compiled"])
def test_what_cannot_be_recorded_is_computed_as_it_comes(wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glm, "CudaRecorder", Waits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert choose_engine(on_gpu(regression(even=True)), wanted, chains=1) == "stacked"
    assert '"stacked" is used: it waits for the device' in str(caught[-1].message)
    assert len(caught) == 1 + (wanted == "compiled")


def test_a_stopwatch_looks_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.device] = []
    monkeypatch.setattr(glm, "CudaRecorder", lambda device: seen.append(device) or StandIn(device))
    by_stopwatch(regression(), 1)
    assert seen == [torch.device("cpu")]


# --- calls of CUDA, with a stand-in for it ----------------------------------------------------------------------------


class FakeCuda:
    """Writes down in which order PyTorch's functions are called, and which stream is the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.current, self.mode, self.broken = "main", 0, False
        names = ("Stream", "CUDAGraph", "device", "stream", "graph", "current_stream", "graph_pool_handle")
        for name in (*names, "get_sync_debug_mode", "set_sync_debug_mode"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    class FakeStream:
        def __init__(self, cuda: FakeCuda, name: str) -> None:
            self.cuda, self.name = cuda, name

        def wait_stream(self, other: FakeCuda.FakeStream) -> None:
            self.cuda.log.append(f"{self.name} waits for {other.name}")

    class FakeGraph:
        def replay(self) -> None:
            """Nothing to do."""

    def Stream(self, device: torch.device) -> FakeStream:
        return self.FakeStream(self, "side")

    def CUDAGraph(self) -> FakeGraph:
        return self.FakeGraph()

    def current_stream(self) -> FakeStream:
        return self.FakeStream(self, self.current)

    def graph_pool_handle(self) -> str:
        return "pool"

    def get_sync_debug_mode(self) -> int:
        return self.mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.mode = {"error": 2}.get(mode, mode)  # type: ignore[arg-type,assignment]

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: FakeGraph, *, pool: str, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        assert (self.current, pool, capture_error_mode) == (stream.name, "pool", "thread_local")
        self.current = "lost" if self.broken else stream.name  # as PyTorch leaves it where the end of a record fails
        self.log.append("record")
        yield
        if self.broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.log.append("recorded")

    def function(self, x: Tensor) -> Tensor:
        self.log.append(f"call on {self.current}")
        if self.mode == 2 and float(x[0]) == 13:
            raise RuntimeError("called a synchronizing CUDA operation")
        if float(x[0]) == 17:
            raise torch.OutOfMemoryError("no memory")
        return -x


def test_a_record_warms_up_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    _, result = CudaRecorder(CUDA).record(cuda.function, (torch.ones(2),))
    assert torch.equal(result, -torch.ones(2))
    calls = ["call on side"] * 2
    assert cuda.log == ["side waits for main", *calls, "record", "call on side", "recorded", "main waits for side"]


def test_a_record_that_fails_gives_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    cuda.broken = True
    with pytest.raises(CompileError, match="cannot be recorded as a CUDA graph: operation failed"):
        CudaRecorder(CUDA).record(cuda.function, (torch.ones(2),))
    assert cuda.current == "main"
    with pytest.raises(torch.OutOfMemoryError):
        CudaRecorder(CUDA).record(cuda.function, (17 * torch.ones(2),))
    assert cuda.current == "main"


def test_a_function_that_waits_is_refused_before_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    recorder = CudaRecorder(CUDA)
    recorder.check(cuda.function, (torch.ones(2),))
    with pytest.raises(CompileError, match="cannot be recorded as a CUDA graph: called a synchronizing"):
        recorder.check(cuda.function, (13 * torch.ones(2),))
    with pytest.raises(torch.OutOfMemoryError):
        recorder.check(cuda.function, (17 * torch.ones(2),))
    assert cuda.mode == 0


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("make", [regression, network])
def test_the_same_bits_as_without(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels on the same numbers; cuDNN is told to choose those that add in a fixed order."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    clients = make(device="cuda")
    eager = clients.on("stacked") if isinstance(clients, GeneralizedLinear) else clients
    for want, found in every_way(eager, clients.on("cuda-graph")):
        assert torch.equal(found, want)


@GPU
@pytest.mark.parametrize("make", [regression, network])
def test_the_same_as_on_the_cpu_to_rounding(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 sums of some hundred terms in another order, by convolutions with all 24 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    here, there = make(), make(device="cuda").on("cuda-graph")
    relative = own_roundings(here)
    assert 0 < relative < 1e-2
    for (want, _), (found, _) in zip(every_way(here, here), every_way(there, there), strict=True):
        apart, size = (each.double().flatten(2).norm(dim=-1) for each in (found.cpu() - want, want))
        assert bool((apart <= relative * size).all())
