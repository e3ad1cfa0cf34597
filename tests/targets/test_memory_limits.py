"""Out of memory: gradients in smaller portions with the same draws, then an error that says what would fit."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from rounding import assert_within, gamma
from running_error import RunningError
from torch import Tensor

from fedsample.compression import RandK
from fedsample.errors import DeviceMemoryError
from fedsample.estimators import Marina, Uplink
from fedsample.fleets.engines import by_stopwatch, choose_engine
from fedsample.fleets.local import LocalFleet
from fedsample.protocol.exchange import ESTIMATE, Request
from fedsample.random import key
from fedsample.targets import Clients, GeneralizedLinear, Metric, MetricClients, memory_limits
from fedsample.targets.metric import Identity

N, CHAINS, D = 7, 3, 4


class Small(GeneralizedLinear):
    """Clients on a device that holds gradients of so many pairs of a client and a chain at a time."""

    most = 10**9
    asked: list[tuple[int, int]]

    def gradient(self, theta: Tensor, **more: Any) -> Tensor:
        m = self.n if more.get("clients") is None else len(more["clients"])
        self.asked.append((m, len(theta)))
        if m * len(theta) > self.most:
            raise torch.OutOfMemoryError(f"Tried to allocate {m} x {len(theta)}")
        return super().gradient(theta, **more)

    def hessian(self, theta: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("Tried to allocate a matrix")


def small(most: int) -> Small:
    keys = key(5, purpose="rows")
    x, y = keys.normal(100 * D, torch.float64).view(-1, D), keys.fold("y").bernoulli(0.4, 100).double()
    clients = Small(x, y, torch.tensor([0, 9, 9, 10, 40, 70, 85, 100]), "bernoulli", intercept=False)
    clients.most, clients.asked = most, []
    return clients


def seen(clients: Clients, metric: Metric | None = None) -> MetricClients:
    return MetricClients(clients, metric or Identity(torch.zeros(D, dtype=torch.float64)))


def theta(chains: int = CHAINS) -> Tensor:
    return key(6, chain=torch.arange(chains), purpose="points").normal(D)


@pytest.mark.parametrize(
    ("most", "portion"), [(21, (7, 3)), (20, (4, 3)), (12, (4, 3)), (11, (2, 3)), (5, (1, 3)), (2, (1, 2)), (1, (1, 1))]
)
def test_half_as_many_until_it_fits(most: int, portion: tuple[int, int]) -> None:
    """The gradients of all clients, of some, and of minibatches, whatever the portions, which are then remembered."""
    clients = small(most)
    looked = seen(clients)
    some = torch.tensor([5, 0, 3, 1])
    keys = key(8, client=some[:, None], chain=torch.arange(CHAINS), purpose="batch")
    whole = small(10**9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with RunningError() as analysis:
            found = looked.gradient(theta())
        tries = clients.asked.index(portion)
        assert len(caught) == tries
        assert all("out of memory on cpu: gradients are computed for at most" in str(each.message) for each in caught)
        more = {"clients": some, "keys": keys, "batch_size": 8}
        with analysis:
            analysis.close(found, whole.gradient(theta()))
            analysis.close(looked.gradient(theta(), **more), whole.gradient(theta(), **more))
        assert len(caught) == tries
    if most < N * CHAINS:
        assert f"at most {portion[0]} clients and {portion[1]} chains at a time" in str(caught[-1].message)
    clients.asked.clear()
    looked.gradient(theta(1))
    assert clients.asked[0] == (portion[0], 1)


def test_nothing_of_a_failed_attempt_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception keeps the frames it came through, and these their arrays: it must be gone before the next try."""
    clients = small(12)
    original, alive = Small.gradient, []

    def watching(self: Small, at: Tensor, **more: Any) -> Tensor:
        assert not [each for each in alive if each() is not None]
        large = torch.ones(3)
        try:
            return original(self, at, **more)
        except torch.OutOfMemoryError:
            alive.append(weakref.ref(large))
            raise

    monkeypatch.setattr(Small, "gradient", watching)
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="at most 4 clients"):
            seen(clients).gradient(theta())
    finally:
        gc.enable()
    assert len(alive) == 1


def test_what_does_not_fit_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limits, "memory", lambda device: (4 * D * 8 * 1000, 1 << 34))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DeviceMemoryError) as caught:
            seen(small(0)).gradient(theta())
    text = str(caught.value)
    for part in (
        "out of memory on cpu, at the gradient of a single client and chain: 7 clients of up to 30 rows, 3 chains",
        "4 parameters",
        "The device has 16 GiB",
        "enough for about 1,000 pairs of a client and a chain",
        "Take fewer chains or clients, a smaller batch_size, or fleet.device = 'cpu'",
        "PyTorch says: Tried to allocate 1 x 1",
    ):
        assert part in text


def test_memory_is_known_of_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_limits.memory(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7)
    assert memory_limits.memory(torch.device("cuda")) == (12, 20)


# --- in a fleet -------------------------------------------------------------------------------------------------------


def fleet(clients: Clients, uplink: Uplink) -> LocalFleet:
    return LocalFleet(clients, uplink, 0, CHAINS)


def test_a_round_in_portions_is_the_round() -> None:
    totals = []
    for most in (10**9, 6):
        made = fleet(small(most), Marina(RandK(2), 0.1))
        sync = torch.ones(CHAINS, dtype=torch.bool)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.exchange(Request(1, theta(), frozenset((ESTIMATE,)), sync=sync))
            totals.append(made.exchange(Request(2, theta() + 0.1, frozenset((ESTIMATE,)), previous=theta())).total)
    clients = small(10**9)
    with RunningError() as analysis:
        terms = [clients.gradient(theta() + 0.1), clients.gradient(theta())]
    # the difference of two gradients, times d / k = 2 where it is sent, over clients
    sums = sum(2 * each.abs() for each in terms)
    errors = sum(2 * analysis.error(each) for each in terms) + gamma(2) * sums
    assert_within(totals[0], totals[1], 2 * errors.sum(0) + 2 * gamma(N) * sums.sum(0))


def test_other_outputs_say_what_they_were() -> None:
    made = fleet(small(10**9), Marina(RandK(2), 0.1))
    with pytest.raises(DeviceMemoryError, match=r"out of memory on cpu, at the hessian: .* allocate a matrix"):
        made.exchange(Request(0, theta(1), frozenset(("hessian",))))


def test_an_engine_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one runs; where a run goes on with it, our error. A stopwatch passes it by."""

    def on(self: Small, engine: str) -> Small:
        if engine == "compiled":
            raise torch.OutOfMemoryError("Tried to allocate a copy")
        return self

    monkeypatch.setattr(Small, "on", on)
    with pytest.warns(UserWarning, match='"compiled" is not possible, "batched" is used: Tried to allocate a copy'):
        assert choose_engine(small(10**9), "compiled", chains=1) == "batched"
    with pytest.raises(DeviceMemoryError, match="at the engine compiled: 7 clients"):
        LocalFleet(small(1), Marina(RandK(2), 0.1), 0, CHAINS, engine="compiled")
    assert by_stopwatch(small(10**9), 1) != "compiled"
    assert by_stopwatch(small(0), 1) == "batched"


def test_memories_that_do_not_fit() -> None:
    class Greedy(Marina):
        def memory(self, *arguments: Any) -> dict[str, Tensor]:
            raise torch.OutOfMemoryError("Tried to allocate all of it")

    with pytest.raises(DeviceMemoryError, match="at the clients' memories: 7 clients"):
        fleet(small(1), Greedy(RandK(2), 0.1))
