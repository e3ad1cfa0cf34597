"""Convergence of chains: rank-normalised split R-hat and effective sample size.

    R-hat = sqrt( ((n-1)/n W + B/n) / W ),   W = mean of the chains' variances, B/n = variance of their means,
    ESS   = M n / ( -1 + 2 sum_t rho_t ),    rho_t = 1 - (W - mean_c acov_c(t)) / (((n-1)/n) W + B/n),

on chains cut in halves (M = 2 C chains of n draws) and ranks mapped to normal scores `Phi^-1((r - 3/8) / (S + 1/4))`,
so that neither heavy tails nor a different scale in each chain can hide. R-hat is the larger of that on the draws and
on their distances from the median; a chain set has mixed below 1.01 (1.03 in a short run) with a bulk ESS of 400.

All computations are numpy passes over a block of functionals, mostly outside the interpreter lock, so that they can run
in a thread beside the sampler. `arviz_stats` loops over functionals, takes three times as long and holds the lock
meanwhile; the tests use it as their reference, to which this agrees up to rounding.

Reference:
    Vehtari, Gelman, Simpson, Carpenter & Burkner (2021), "Rank-normalization, folding, and localization: an improved
    R-hat", Bayesian Analysis 16(2), arXiv 1903.08008, equations 3-5 and 10-14. Geyer (1992), "Practical Markov chain
    Monte Carlo", section 3.3: the initial monotone positive sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

BLOCK = 64  # functionals per pass: bounds memory, and lets a usual run's block fit the cache
_CACHED = 1 << 16  # numbers in a block that stays in the cache through all passes
MIN_DRAWS = 4


def rhat(x: torch.Tensor | NDArray[Any]) -> Array:
    """Rank-normalised split R-hat, the larger of bulk and folded.

    Args:
        x: (chains, draws, *functionals) scalar functions of the draws.

    Returns:
        (*functionals,) float64, at least about 1. NaN where it is undefined: one chain, fewer than four draws, a
        functional that is constant or not finite. Infinite where each half-chain is constant, at different values.
    """
    return _over_functionals(x, _rhat, min_chains=2)


def ess_bulk(x: torch.Tensor | NDArray[Any]) -> Array:
    """Effective sample size of the rank-normalised draws, over all chains together.

    Args:
        x: (chains, draws, *functionals) scalar functions of the draws; one chain is enough.

    Returns:
        (*functionals,) float64 in (0, M n log10(M n)]: a negatively correlated chain can beat independent draws. NaN
        for fewer than four draws and where a functional is constant or not finite.
    """
    return _over_functionals(x, lambda block: _ess(_normal_scores(_split(block))), min_chains=1)


def rhat_and_ess(x: torch.Tensor | NDArray[Any]) -> tuple[Array, Array]:
    """Compute `rhat` and `ess_bulk` of the same draws, ranking them once.

    Args:
        x: (chains, draws, *functionals) scalar functions of the draws.

    Returns:
        The results of both functions, (*functionals,) float64 each.
    """
    shape = x.shape[2:]
    if x.shape[0] < 2:
        return rhat(x), ess_bulk(x)
    both = _over_functionals(x, _rhat_and_ess, min_chains=2, results=2)
    return both[..., 0].reshape(shape), both[..., 1].reshape(shape)


def ess_tail(x: torch.Tensor | NDArray[Any], low: float = 0.05, high: float = 0.95) -> Array:
    """Effective sample size for the tails: the smaller of those of I(x <= q_low) and I(x <= q_high).

    Args:
        x: (chains, draws, *functionals) scalar functions of the draws; one chain is enough.
        low: probability of the lower quantile, in (0, 1).
        high: probability of the upper quantile, in (0, 1).

    Returns:
        (*functionals,) float64, NaN as for `ess_bulk`. A tail in which all draws tie is left
        out; NaN if both are.
    """
    return _over_functionals(x, lambda block: _tail(block, low, high), min_chains=1)


def worst_rhat_and_ess(functionals: torch.Tensor) -> tuple[float, float]:
    """Worst R-hat and smallest bulk ESS over functionals (C, n, F); ignores constant ones, NaN if all are."""
    ratios, sizes = rhat_and_ess(functionals)
    ratios = ratios[np.isfinite(ratios)]
    return float(ratios.max()) if ratios.size else math.nan, _smallest(sizes)


def worst_ess_tail(functionals: torch.Tensor) -> float:
    """Smallest tail ESS over functionals (C, n, F); ignores constant ones, NaN if all are."""
    return _smallest(ess_tail(functionals))


def _smallest(sizes: Array) -> float:
    sizes = sizes[np.isfinite(sizes)]
    return float(sizes.min()) if sizes.size else math.nan


def _over_functionals(
    x: torch.Tensor | NDArray[Any], statistic: Callable[[Array], Array], *, min_chains: int, results: int = 1
) -> Array:
    values = x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
    if values.ndim < 2:
        raise ValueError(f"expected (chains, draws, *functionals), got shape {values.shape}; add the missing axes")
    chains, draws = values.shape[:2]
    flat = values.reshape(chains, draws, math.prod(values.shape[2:]))
    result = np.full((flat.shape[-1], results), np.nan)
    if chains >= min_chains and draws >= MIN_DRAWS:
        width = min(BLOCK, max(1, _CACHED // (chains * draws)))
        for begin in range(0, flat.shape[-1], width):
            block = np.ascontiguousarray(flat[..., begin : begin + width].transpose(2, 0, 1), dtype=np.float64)
            finite = np.flatnonzero(np.isfinite(block).all(axis=(1, 2)))
            usable = finite[np.ptp(_split(block[finite]), axis=(1, 2)) > 0]
            if usable.size:
                result[begin + usable] = statistic(block[usable]).reshape(usable.size, results)
    return result.reshape((*values.shape[2:], results) if results > 1 else values.shape[2:])


def _split(block: Array) -> Array:
    """Split chains in halves, (F, C, n) -> (F, 2C, n // 2); drops the middle draw of an odd chain."""
    half = block.shape[-1] // 2
    return np.concatenate([block[..., :half], block[..., -half:]], axis=1)


def _normal_scores(block: Array) -> Array:
    """Normal scores of the ranks pooled over chains; ties share their average rank. (F, M, n) -> the same."""
    flat = block.reshape(block.shape[0], -1)
    size = flat.shape[1]
    order = np.argsort(flat, axis=1)
    values = np.take_along_axis(flat, order, axis=1)
    doubled = np.broadcast_to(np.arange(2, 2 * size + 2, 2), flat.shape).copy()  # twice the rank: an integer in a tie
    rises = values[:, 1:] > values[:, :-1]
    tied = np.flatnonzero(~rises.all(axis=1))
    doubled[tied] = _tied_ranks(rises[tied], size)
    ranks = np.arange(2 * size + 1) / 2
    # Possible ranks are few: one table of quantiles serves all functionals.
    table = torch.special.ndtri(torch.from_numpy((ranks - 3 / 8) / (size + 1 / 4)).clamp(0, 1)).numpy()
    scores = np.empty_like(flat)
    np.put_along_axis(scores, order, table[doubled], axis=1)
    return scores.reshape(block.shape)


def _tied_ranks(rises: NDArray[np.bool_], size: int) -> NDArray[np.int64]:
    """Twice the average rank of each sorted value: the first and the last place of its run, added."""
    places = np.arange(size)
    edge = np.ones((rises.shape[0], 1), dtype=bool)
    first = np.where(np.concatenate([edge, rises], axis=1), places, 0)
    last = np.where(np.concatenate([rises, edge], axis=1), places, size - 1)
    first = np.maximum.accumulate(first, axis=1)
    last = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
    return np.asarray(first + last + 2)


def _rhat(block: Array) -> Array:
    halves = _split(block)
    return _rhat_of(halves, _normal_scores(halves))


def _rhat_and_ess(block: Array) -> Array:
    halves = _split(block)
    scores = _normal_scores(halves)
    return np.stack([_rhat_of(halves, scores), _ess(scores)], axis=1)


def _rhat_of(halves: Array, scores: Array) -> Array:
    centre = np.median(halves, axis=(1, 2), keepdims=True)
    return np.fmax(_variance_ratio(scores), _variance_ratio(_normal_scores(np.abs(halves - centre))))


def _variance_ratio(scores: Array) -> Array:
    draws = scores.shape[-1]
    within = scores.var(axis=2, ddof=1).mean(axis=1)
    between = scores.mean(axis=2).var(axis=1, ddof=1)
    still = np.ptp(scores, axis=2).max(axis=1) == 0  # by rounding, such chains can have a variance of 1e-33
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sqrt((draws - 1) / draws + between / np.where(still, 0.0, within))
    # Equal scores, as of the distances from the median of a two-valued functional, have no R-hat.
    return np.where(np.ptp(scores, axis=(1, 2)) == 0, np.nan, ratio)


def _tail(block: Array, low: float, high: float) -> Array:
    result = np.full(block.shape[0], np.nan)
    for cut in np.quantile(block, (low, high), axis=(1, 2)):
        below = _split((block <= cut[:, None, None]).astype(np.float64))
        varies = np.ptp(below, axis=(1, 2)) > 0
        if not varies.any():  # all functionals of the block tie in this tail
            continue
        result[varies] = np.fmin(result[varies], _ess(below[varies]))
    return result


def _ess(chains: Array) -> Array:
    """Effective sample size of chains (F, M, n), without splitting or ranking."""
    count, draws = chains.shape[1:]
    covariance = _autocovariance(chains)  # (F, n)
    within = covariance[:, 0] * draws / (draws - 1)
    total = covariance[:, 0] + (chains.mean(axis=2).var(axis=1, ddof=1) if count > 1 else 0.0)
    rho = 1 - (within[:, None] - covariance) / total[:, None]
    rho[:, 0] = 1
    pairs = rho[:, : draws - draws % 2].reshape(rho.shape[0], -1, 2).sum(axis=2)
    # Stop where the reference implementations do, before the noisiest lags.
    limit = max(0, (draws - 3) // 2 if draws % 2 else (draws - 4) // 2)
    ends = np.concatenate([pairs[:, :limit] <= 0, np.ones((rho.shape[0], 1), dtype=bool)], axis=1)
    stop = ends.argmax(axis=1)[:, None]  # (F, 1) the first pair that does not count
    monotone = np.minimum.accumulate(pairs, axis=1)
    kept = np.where(np.arange(pairs.shape[1]) < stop, monotone, 0.0).sum(axis=1)
    last = np.take_along_axis(rho, 2 * stop, axis=1)[:, 0]
    cut = np.take_along_axis(pairs, stop, axis=1)[:, 0] < 0
    time = -1 + 2 * kept + np.where(cut, np.maximum(last, 0), last)
    size = count * draws
    return np.asarray(size / np.maximum(time, 1 / np.log10(size)))


def _autocovariance(chains: Array) -> Array:
    """Mean over chains of the autocovariance, divided by n at every lag. (F, M, n) -> (F, n)."""
    draws = chains.shape[-1]
    centred = chains - chains.mean(axis=2, keepdims=True)
    length = _fast_length(2 * draws)
    spectrum = np.fft.rfft(centred, n=length, axis=2)
    power = (spectrum.real**2 + spectrum.imag**2).mean(axis=1)
    covariance: Array = np.fft.irfft(power, n=length, axis=1)[:, :draws]
    covariance /= draws
    return covariance


def _fast_length(least: int) -> int:
    """Smallest 2^a 3^b 5^c that is at least `least`: transforms of other lengths are several times slower."""
    best = 1 << (least - 1).bit_length()
    for odd in (3**b * 5**c for b in range(4) for c in range(4)):
        best = min(best, odd << max(0, (-(-least // odd) - 1).bit_length()))
    return best
