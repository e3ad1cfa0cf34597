"""Potentials of clients that each have points of their own, on every class of target and in every coordinate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loop_reference import CHAINS, LIKELIHOODS, batch_keys, close, glm, normal, stack
from torch import Tensor

from fedsample.errors import CompileError, DeviceMemoryError
from fedsample.random import Key
from fedsample.targets import Clients, GeneralizedLinear, MetricClients, ModuleClients, Quadratic
from fedsample.targets import module as module_module
from fedsample.targets.base import collapsed
from fedsample.targets.memory_limits import Portions
from fedsample.targets.metric import Dense, Diagonal, Identity, Kronecker, Metric

pytestmark = pytest.mark.usefixtures("analysis")

STACKS = ("glm", "glm-gaussian", "module", "module-gaussian", "dense", "diagonal")
METRICS: dict[str, Callable[[int], Metric]] = {
    "none": lambda d: Identity(torch.zeros(d, dtype=torch.float64)),
    "moved": lambda d: Identity(normal(d, seed=11)),
    "diagonal": lambda d: Diagonal(normal(d, seed=11), normal(d, seed=12).abs() + 0.1),
    "kronecker": lambda d: Kronecker(
        normal(d, seed=11),
        [
            (
                torch.arange(d).unsqueeze(1),
                torch.linalg.qr(normal(d, d, seed=12)).Q,
                torch.ones(1, 1, dtype=torch.float64),
                normal(d, 1, seed=13).abs() + 0.5,
            )
        ],
    ),
    "dense": lambda d: Dense(
        normal(d, seed=11),
        torch.eye(d, dtype=torch.float64) + 0.05 * (normal(d, d, seed=12) + normal(d, d, seed=12).T),
        None,
    ),
}


def answers(clients: Clients, points: Tensor, vector: Tensor, who: Tensor, keys: Key) -> dict[str, Tensor]:
    """Everything that takes points, clients first; `who` (m,) are asked for gradients with the first m points."""
    some = points if points.ndim == 2 else points[: len(who)]
    value, gradient = clients.value_and_gradient(points)
    return {
        "potential": clients.potential(points),
        "gradient": clients.gradient(points),
        "value": value,
        "its gradient": gradient,
        "some": clients.gradient(some, clients=who),
        "minibatch": clients.gradient(some, clients=who, keys=keys, batch_size=2),
        "hvp": clients.hvp(points, vector),
        "hessian": clients.hessian(points),
        "diagonal": clients.diagonal(points),
    }


PAIRS = [(kind, metric) for kind in STACKS for metric in METRICS if metric in ("none", "dense") or kind == "glm"]


@pytest.mark.rounding
@pytest.mark.parametrize(("kind", "metric"), PAIRS)
def test_each_answers_at_its_own_points_as_it_would_alone(kind: str, metric: str) -> None:
    base = stack(kind)
    clients = MetricClients(base, METRICS[metric](base.d))
    points, vector = normal(base.n, CHAINS, base.d, seed=21), normal(base.n, CHAINS, base.d, seed=22)
    who = torch.tensor([3, 0])
    keys = batch_keys(2)
    found = answers(clients, points, vector, who, keys)
    for i in range(base.n):
        alone = clients.client(i)
        want = answers(alone, points[i], vector[i], torch.tensor([0]), Key(keys.tensor()[:1], keys.device))
        for name in found.keys() - {"some", "minibatch"}:
            close(found[name][i], want[name][0], what=name)
    for place, i in enumerate(who.tolist()):
        own = Key(keys.tensor()[place : place + 1], keys.device)
        want = answers(clients.client(i), points[place], vector[place], torch.tensor([0]), own)
        close(found["some"][place], want["some"][0])
        close(found["minibatch"][place], want["minibatch"][0])


@pytest.mark.parametrize(("kind", "metric"), PAIRS)
def test_at_shared_points_the_bits_are_those_of_shared_points(kind: str, metric: str) -> None:
    base = stack(kind)
    clients = MetricClients(base, METRICS[metric](base.d))
    points, vector = normal(CHAINS, base.d, seed=21), normal(CHAINS, base.d, seed=22)
    who, keys = torch.arange(base.n), batch_keys(base.n)
    want = answers(clients, points, vector, who, keys)
    for copied in (False, True):
        own, along = (each.expand(base.n, *each.shape) for each in (points, vector))
        own, along = (own.clone(), along.clone()) if copied else (own, along)
        for name, answer in answers(clients, own, along, who, keys).items():
            assert torch.equal(answer, want[name]), name


@pytest.mark.parametrize("engine", ["stacked", "compiled"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_engines_for_shared_points_leave_own_points_alone(likelihood: str, engine: str) -> None:
    clients = glm(likelihood)  # type: ignore[arg-type]
    points = normal(clients.n, CHAINS, clients.d, seed=21)
    try:
        fast = clients.on(engine)
    except CompileError as error:
        pytest.skip(str(error))
    assert torch.equal(fast.gradient(points), clients.gradient(points))


@pytest.mark.parametrize("kind", ["glm", "module"])
def test_what_is_recorded_at_shared_points_is_not_replayed_at_own_ones(kind: str) -> None:
    clients = stack(kind)
    assert isinstance(clients, GeneralizedLinear | ModuleClients)
    points = normal(clients.n, CHAINS, clients.d, seed=21)
    want = clients.gradient(points)

    def replayed(*arguments: Tensor) -> Tensor:
        raise AssertionError(f"replayed at {[tuple(each.shape) for each in arguments]}")

    clients._replayed = replayed  # type: ignore[assignment]
    assert torch.equal(clients.gradient(points), want)
    with pytest.raises(AssertionError, match="replayed at"):
        clients.gradient(points[0])


def test_points_of_one_kind_and_vectors_of_another() -> None:
    for kind in STACKS:
        clients = stack(kind)
        points, vector = normal(clients.n, CHAINS, clients.d), normal(CHAINS, clients.d, seed=5)
        mixed = clients.hvp(points, vector)
        close(mixed, clients.hvp(points, vector.expand(clients.n, -1, -1)))
        mixed = clients.hvp(vector, points)
        close(mixed, clients.hvp(vector.expand(clients.n, -1, -1).clone(), points))


def test_networks_that_are_computed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = stack("module")
    points = normal(clients.n, CHAINS, clients.d)
    want, (value, gradient) = clients.gradient(points), clients.value_and_gradient(points)
    monkeypatch.setattr(module_module, "_ALONE", 1)
    close(clients.gradient(points), want)
    close(clients.value_and_gradient(points)[0], value)
    close(clients.value_and_gradient(points)[1], gradient)


@pytest.mark.parametrize("kind", ["glm", "module"])
def test_portions_take_the_points_of_their_clients(kind: str) -> None:
    clients = stack(kind)
    points, keys = normal(clients.n, 4, clients.d), batch_keys(clients.n, 4)
    portions = Portions(clients)
    whole = portions.gradient(points), portions.gradient(points, keys=keys, batch_size=2)
    portions._most = (2, 3)
    for got, want in zip(
        (portions.gradient(points), portions.gradient(points, keys=keys, batch_size=2)), whole, strict=True
    ):
        close(got, want)
    close(portions.value_and_gradient(points)[1], whole[0])


def test_nan_is_no_shared_point() -> None:
    points = torch.full((2, 1, 3), float("nan"))
    assert collapsed(points, 2).ndim == 3
    assert collapsed(torch.zeros(1, 2, 3), 1).ndim == 2
    assert collapsed(torch.zeros(0, 2, 3), 0).shape == (0, 2, 3)


@pytest.mark.parametrize("kind", STACKS)
def test_points_of_another_number_of_clients_are_refused(kind: str) -> None:
    clients = stack(kind)
    n, d = clients.n, clients.d
    for points, who in (
        (normal(n - 1, CHAINS, d), None),
        (normal(n + 1, CHAINS, d), None),
        (normal(n, CHAINS, d), [3]),
    ):
        some = None if who is None else torch.tensor(who)
        with pytest.raises(ValueError, match=r"for \d clients, expected"):
            clients.gradient(points, clients=some)
        with pytest.raises(ValueError, match=r"for \d clients, expected"):
            MetricClients(clients, METRICS["dense"](d)).gradient(points, clients=some)
    for ask in (clients.potential, clients.value_and_gradient, clients.hessian, clients.diagonal):
        if isinstance(clients, Quadratic) and ask in (clients.hessian, clients.diagonal):
            continue  # the same everywhere
        with pytest.raises(ValueError, match=r"for \d clients, expected"):
            ask(normal(n + 1, CHAINS, d))


def test_values_and_gradients_that_do_not_fit_together_are_taken_in_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = stack("glm")
    points, tries = normal(CHAINS, clients.d), []

    def too_much(theta: Tensor) -> None:
        tries.append(theta)
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(clients, "value_and_gradient", too_much)
    portions = Portions(clients)
    for _ in range(2):
        value, gradient = portions.value_and_gradient(points)
        assert torch.equal(value, clients.potential(points))
        assert torch.equal(gradient, clients.gradient(points))
    assert len(tries) == 1
    monkeypatch.setattr(clients, "potential", too_much)
    with pytest.raises(DeviceMemoryError, match="at the value"):
        portions.value_and_gradient(points)
