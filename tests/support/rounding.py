"""Bounds of rounding errors, a priori: what two orders of the same arithmetic may differ by on any processor.

A test that compares two ways to one number states what was added or multiplied (its sizes) and how many roundings lie
on the way; the tolerance follows. With u the unit roundoff, one operation gives (a op b)(1 + e), |e| <= u, and

    n roundings in a row        |prod (1 + e_i) - 1| <= gamma_n = n u / (1 - n u)          Higham 2002, lemma 3.1
    a sum of n terms, any order |error| <= gamma_(n-1) sum |x_i|                            eq. 4.4
    a product of n terms        |error| <= gamma_n |x|.|y|                                  eq. 3.5, 3.13
    a stable solve A x = b      |error| <= cond(A) gamma_m |x|, m = 3 n per row            theorem 9.4 with growth 1

(N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, SIAM 2002.) A fused multiply-add rounds
once where two are counted, so that these hold with and without. `running_error` does the same for whole computations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike
from torch import Tensor

ULPS = 4  # of one exp, log, tanh, ...: SLEEF's u35 and MKL's low-accuracy mode promise less than 4, glibc less than 3
ELEMENTARY = 2 * ULPS  # the same in roundings: an ulp is up to two unit roundoffs
SEES = {torch.float32: 1e-2, torch.float64: 1e-6}  # a bound above this share of what is compared would see no defect


def unit(dtype: torch.dtype = torch.float64) -> float:
    """The unit roundoff u: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def gamma(roundings: float, dtype: torch.dtype = torch.float64) -> float:
    """n u / (1 - n u): what n roundings in a row come to, relative to the result."""
    nu = roundings * unit(dtype)
    assert nu < 0.1, f"{roundings} roundings of {dtype} leave no digit"
    return nu / (1 - nu)


def assert_within(
    got: Tensor, want: Tensor, bound: Tensor | float, *, sees: float | None = None, what: str = ""
) -> None:
    """Entry by entry |got - want| <= bound; and the bound is small enough to see a defect.

    Args:
        got: the same as `want`, another way; entries that are not finite must be equal.
        want: any shape.
        bound: of `want`'s shape, or one for all.
        sees: the largest share of the largest entry that the bound may be; the dtype's `SEES`, where None is given.
        what: says what is compared.
    """
    assert got.shape == want.shape, (got.shape, want.shape)
    dtype = torch.float32 if torch.float32 in (got.dtype, want.dtype) else torch.float64
    one, other = got.detach().to(torch.float64), want.detach().to(torch.float64)
    limit = torch.as_tensor(bound, dtype=torch.float64).expand_as(other)
    apart = torch.where(one == other, 0.0, (one - other).abs())  # equal infinities are equal
    bad = ~(apart <= limit * 1.001) & ~(one.isnan() & other.isnan())  # the bound was itself computed in float64
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        worst = float((apart / limit.clamp(min=1e-320))[bad].max())
        raise AssertionError(
            f"{what + ': ' if what else ''}{int(bad.sum())} of {bad.numel()} entries differ by more than arithmetic "
            f"does, up to {worst:.3g} times: at {at} {float(one[at])!r} against {float(other[at])!r}, bound "
            f"{float(limit[at]):.3g}"
        )
    finite = other[other.isfinite()]
    if finite.numel() and float(finite.abs().max()) > 0:
        most, share = float(finite.abs().max()), SEES[dtype] if sees is None else sees
        assert float(limit[other.isfinite()].max()) <= share * most, (
            f"{what + ': ' if what else ''}a bound of {float(limit.max()):.3g} on numbers up to {most:.3g} sees nothing"
        )


def agree(
    got: Tensor | ArrayLike,
    want: Tensor | ArrayLike,
    roundings: float,
    size: Tensor | ArrayLike | None = None,
    *,
    sees: float | None = None,
) -> None:
    """|got - want| <= 2 gamma_n size, entry by entry: each of the two ways makes the roundings.

    Args:
        got: one way. want: the other. roundings: n on the longest path to an entry. size: sum of the sizes of what was
            added to it; where nothing cancels that is the entry's own, which None stands for. sees: `assert_within`.
    """
    one, other = _tensor(got), _tensor(want)
    dtype = torch.float32 if torch.float32 in (one.dtype, other.dtype) else torch.float64
    sizes = other.detach().abs() if size is None else _tensor(size)
    assert_within(one, other, 2 * gamma(roundings, dtype) * sizes.to(torch.float64), sees=sees)


def near(want: Any, roundings: float, size: float | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """`pytest.approx` for numbers made with n roundings each way.

    Args:
        want: a number, array, list or dictionary.
        roundings: n.
        size: sum of the sizes of what was added; None: no more than the number itself.
        dtype: of the arithmetic.
    """
    bound = 2 * gamma(roundings, dtype)
    return pytest.approx(want, rel=bound, abs=0.0) if size is None else pytest.approx(want, rel=0.0, abs=bound * size)


def solved(matrix: ArrayLike, roundings: float = 0) -> float:
    """Roundings that a stable solve, inverse or eigenproblem of a matrix is worth, after `roundings` of its entries.

    A computed solution is exact for a matrix whose entries are off by gamma_3n (theorem 9.4, growth 1 as pivoting shows
    in practice and Cholesky guarantees); the entries' own roundings count as much; both are magnified by cond(A).
    """
    array = np.asarray(matrix, dtype=np.float64)
    return float(np.linalg.cond(array)) * (3 * array.shape[-1] + roundings)


def sum_error(terms: Tensor, dim: int = 0) -> Tensor:
    """gamma_(n-1) sum |x_i|: what a sum over `dim` in any order may be off by; float64."""
    return gamma(max(1, terms.shape[dim] - 1), terms.dtype) * terms.detach().abs().to(torch.float64).sum(dim)


def product_error(left: Tensor, right: Tensor) -> Tensor:
    """gamma_n |X| |Y|: what a matrix product in any order, fused or not, may be off by; float64."""
    narrow = torch.float32 if torch.float32 in (left.dtype, right.dtype) else torch.float64
    return gamma(left.shape[-1], narrow) * (left.abs().to(torch.float64) @ right.abs().to(torch.float64))


def propagated(error: float, growth: float, rounds: int) -> float:
    """An error made anew in each round, carried on by the rounds after it: error (1 + g + ... + g^(R-1)).

    growth: the Lipschitz constant of a round in the norm of `error`: at most 1 for a Langevin step h <= 2 / L on a
    convex potential, since I - h H has its eigenvalues in [-1, 1]; 1 + h L otherwise.
    """
    return error * sum(growth**k for k in range(rounds))


def central_difference(
    function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor, step: float, evaluation: float
) -> tuple[Tensor, Tensor]:
    """The directional derivative by central differences, and a bound of its error.

    Truncation h^2 M / 6, with the third derivative M along the direction read off the differences at 2 h: the two
    estimates are off by h^2 M / 6 and four times that, so their difference is half h^2 M, three times the truncation.
    Rounding: each value is off by `evaluation`, over 2 h twice.
    """

    def quotient(h: float) -> Tensor:
        return (function(point + h * direction) - function(point - h * direction)) / (2 * h)

    one, other = quotient(step), quotient(2 * step)
    return one, (one - other).abs() + 4 * evaluation / (2 * step)


def _tensor(value: Tensor | ArrayLike) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))


def root_of(number: float) -> float:
    """sqrt, for steps of differences: the balance of truncation and rounding."""
    return math.sqrt(number)
