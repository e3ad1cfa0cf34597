"""The bounds that tests of rounding rest on: never too small for an order of summation, never too wide for a defect."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rounding import ELEMENTARY, agree, assert_within, gamma, near, product_error, sum_error, unit
from running_error import RunningError, assert_same_in_norm
from torch import Tensor
from torch.func import grad, vmap

F32, F64 = torch.float32, torch.float64


def numbers(*shape: int, seed: int = 1, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def one_by_one(terms: Tensor) -> Tensor:
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


@pytest.mark.rounding
@pytest.mark.parametrize("n", [2, 37, 1000])
def test_sums_and_products_in_any_order_lie_within_their_bounds(n: int) -> None:
    left, right = numbers(5, n), numbers(n, 4, seed=2)
    exact = left.double() @ right.double()
    bound = product_error(left, right)
    forward = one_by_one(left.T.unsqueeze(-1) * right.unsqueeze(1))
    for way in (left @ right, forward, (left.unsqueeze(-1) * right).flip(1).sum(1)):
        assert_within(way, exact, bound)
    with pytest.raises(AssertionError, match="differ by more"):  # the last of the products is missing
        assert_within(left[:, :-1] @ right[:-1], exact, bound)
    terms = numbers(n, 6)
    assert_within(one_by_one(terms), terms.double().sum(0), sum_error(terms))
    with pytest.raises(AssertionError, match="differ by more"):
        assert_within(one_by_one(terms[1:]), terms.double().sum(0), sum_error(terms))


WAYS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "softmax": (lambda x, w: torch.softmax(x @ w, -1), lambda x, w: (x @ w).exp() / (x @ w).exp().sum(-1, True)),
    "logistic": (lambda x, w: torch.sigmoid(x @ w), lambda x, w: 1 / (1 + torch.exp(-(x @ w)))),
    "log-sum": (lambda x, w: torch.logsumexp(x @ w, -1), lambda x, w: (x @ w).exp().sum(-1).log()),
    "gradient": (
        lambda x, w: vmap(grad(lambda each: torch.tanh(each @ w).square().sum()))(x),
        lambda x, w: (2 * torch.tanh(x @ w) * (1 - torch.tanh(x @ w).square())) @ w.T,
    ),
    "variance": (lambda x, w: (x @ w).var(0), lambda x, w: ((x @ w) - (x @ w).mean(0)).square().sum(0) / (len(x) - 1)),
}


@pytest.mark.rounding
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", WAYS)
def test_a_running_error_holds_and_sees_a_defect(name: str, dtype: torch.dtype) -> None:
    """Two formulas of one thing agree within their own bounds; in float32 also with float64's; a mutant does not."""
    x, w = numbers(9, 12, dtype=dtype), 0.3 * numbers(12, 5, seed=3, dtype=dtype)
    one, other = WAYS[name]
    with RunningError() as analysis:
        first, second = one(x, w), other(x, w)
        analysis.close(first, second)
        if dtype == F32:
            assert_within(first, one(x.double(), w.double()), analysis.error(first))
        wrong = one(x, w * (1 + 1000 * 12 * unit(dtype)))
        with pytest.raises(AssertionError, match="differ by more"):
            analysis.close(wrong, second)
    assert float(analysis.error(first).max()) < 200 * 12 * unit(dtype) * float(first.abs().max())


def test_views_and_writes_in_place_carry_their_errors() -> None:
    x, w = numbers(6, 4), numbers(4, 3, seed=2)
    with RunningError() as analysis:
        held = torch.zeros(6, 3)
        torch.mm(x, w, out=held[:])
        held[2:4] += 1.0
        view = held.T[1]
        assert bool((analysis.error(view) > 0).all())
        assert torch.equal(analysis.error(view), analysis.error(held)[:, 1])
        assert float(analysis.error(held[2:4]).min()) > float(analysis.error(x).max()) == 0.0
        held.zero_()
        assert not analysis.error(held).any()


def test_what_has_no_rule_says_so() -> None:
    with RunningError(), pytest.raises(NotImplementedError, match=r"no rule for the rounding of .*erf.?inv"):
        torch.erfinv(numbers(3))


def test_a_bound_that_sees_nothing_is_refused() -> None:
    x = numbers(4, dtype=F64)
    with pytest.raises(AssertionError, match="sees nothing"):
        assert_within(x, x, 1e-3)
    with pytest.raises(AssertionError, match="differ by more"):
        agree(x * (1 + 100 * unit()), x, roundings=10)
    agree(x * (1 + unit()), x, roundings=10)
    assert 1.0 + 5 * unit() == near(1.0, 4)
    assert 1.0 + 20 * unit() != near(1.0, 4)
    assert gamma(1, F32) == pytest.approx(2.0**-24)
    assert ELEMENTARY == 8


@pytest.mark.rounding
def test_ways_through_layers_agree_in_norm() -> None:
    x, layers = numbers(20, 30), [0.2 * numbers(30, 30, seed=seed) for seed in range(5)]

    def forward(reverse: bool, wrong: float = 1.0) -> Tensor:
        state = x
        for layer in [*layers[:-1], layers[-1] * wrong]:
            state = torch.tanh(state.flip(-1) @ layer.flip(0) if reverse else state @ layer)
        return state

    assert_same_in_norm(lambda: forward(False), lambda: forward(True))
    with pytest.raises(AssertionError, match="differ by more"):  # the last layer's term is off by a ten-thousandth
        assert_same_in_norm(lambda: forward(False), lambda: forward(True, 1.0001))
