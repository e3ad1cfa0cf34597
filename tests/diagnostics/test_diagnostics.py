"""Convergence against `arviz_stats` and known laws; predictive scores against counts by hand and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rounding import ELEMENTARY, agree, gamma, near

from fedsample.config import load
from fedsample.diagnostics.calibration import (
    accuracy,
    adaptive_ece,
    brier,
    ece,
    gaussian_nll,
    nll,
    rmse,
)
from fedsample.diagnostics.convergence import (
    ess_bulk,
    ess_tail,
    rhat,
    rhat_and_ess,
    worst_ess_tail,
    worst_rhat_and_ess,
)
from fedsample.errors import DataError
from fedsample.problem import build_problem

F32 = torch.float32
STATISTICS = [rhat, ess_bulk, ess_tail]


def autoregression(r: float, chains: int, draws: int, functionals: int, seed: int = 0) -> np.ndarray:
    """Stationary AR(1) chains of unit variance, whose effective sample size is known: N (1 - r) / (1 + r)."""
    noise = np.random.default_rng(seed).normal(size=(chains, draws, functionals))
    x = noise.copy()
    for t in range(1, draws):
        x[:, t] = r * x[:, t - 1] + math.sqrt(1 - r * r) * noise[:, t]
    return x


# Convergence


def oracle(name: str, x: np.ndarray) -> np.ndarray:
    from arviz_stats.base import array_stats

    axes = {"chain_axis": 0, "draw_axis": 1}
    if name == "rhat":
        return np.asarray(array_stats.rhat(x, **axes))
    method = name.removeprefix("ess_")
    return np.asarray(array_stats.ess(x, method=method, prob=(0.05, 0.95) if method == "tail" else None, **axes))


def of_statistic(chains: int, draws: int) -> float:
    """How far two ways to a statistic of ranked draws may part, relative to it.

    The sum of autocorrelations has at most n = draws / 2 terms of size 1, each from means over all draws, a fast
    Fourier transform (5 log2 of its length: Higham 2002, theorem 24.2) and normal quantiles; it is never below 1 over
    log10 of the draws, where ESS is cut off. R-hat has means and variances alone.
    """
    total, n = chains * draws, max(1, draws // 2)
    return 2 * gamma(n * (total + 10 * math.log2(2 * draws) + ELEMENTARY) * max(1.0, math.log10(total)))


@pytest.mark.rounding
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("shape", [(4, 350), (2, 51), (3, 16), (2, 4), (5, 14)])
@pytest.mark.parametrize("r", [0.0, 0.9, -0.8])
def test_equal_to_arviz(statistic: Callable[..., np.ndarray], shape: tuple[int, int], r: float) -> None:
    x = autoregression(r, *shape, functionals=70)  # more than a block
    x[:, :, 1] *= np.arange(1, shape[0] + 1)[:, None]  # chains of different scales, seen by the folded R-hat only
    x[:, :, 2] += np.arange(shape[0])[:, None]  # and of different means
    x[:, :, 3] = np.tan(x[:, :, 3])  # heavy tails
    if statistic is not ess_tail:
        x[:, :, 4] = np.round(x[:, :, 4])  # ties
        x[:, :, 5] = x[:, :, 5] > 0.5
        x[0, 0, 4:6] = 3.0  # never constant
    np.testing.assert_allclose(statistic(x), oracle(statistic.__name__, x), rtol=of_statistic(*shape))


@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
def test_ess_of_an_autoregression(r: float) -> None:
    x = autoregression(r, chains=4, draws=20_000, functionals=20)
    expected = 80_000 * (1 - r) / (1 + r)
    assert ess_bulk(x).mean() == pytest.approx(expected, rel=0.02)
    assert np.all(np.abs(ess_bulk(x) / expected - 1) < 0.2)


def test_ess_of_an_anticorrelated_chain_beats_independent_draws() -> None:
    x = autoregression(-0.5, chains=4, draws=20_000, functionals=20)
    assert ess_bulk(x).mean() == pytest.approx(80_000 * 3, rel=0.02)


def test_tail_ess_sees_a_chain_that_is_slow_in_its_tails_only() -> None:
    x = autoregression(0.0, chains=4, draws=2000, functionals=1)[..., 0]
    assert ess_tail(x) > 4000
    for chain in x:  # order the tail, as a chain does that visits it once
        high = chain > np.quantile(x, 0.9)
        chain[high] = np.sort(chain[high])
    assert ess_tail(x) < 1500 < 7000 < ess_bulk(x)


def test_tail_ess_leaves_out_a_tail_in_which_everything_ties() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (4, 200)).astype(float)  # none above the 0.95 quantile
    assert ess_tail(labels) == pytest.approx(oracle("ess_bulk", (labels <= 0).astype(float)), rel=of_statistic(4, 200))
    assert np.isnan(ess_tail(labels, low=0.9, high=0.95))


def test_the_worst_over_functionals_leaves_out_what_says_nothing() -> None:
    x = autoregression(0.5, chains=4, draws=400, functionals=6)
    x[0, :, 2] += 1.0
    x[..., 3] = 0.1
    high = x[1, :, 4] > np.quantile(x[..., 4], 0.9)
    x[1, high, 4] = np.sort(x[1, high, 4])
    kept, draws = np.delete(x, 3, axis=2), torch.from_numpy(x)
    assert worst_rhat_and_ess(draws) == pytest.approx((oracle("rhat", kept).max(), oracle("ess_bulk", kept).min()))
    assert worst_ess_tail(draws) == pytest.approx(oracle("ess_tail", kept).min(), rel=1e-11)
    assert worst_ess_tail(draws) != pytest.approx(worst_rhat_and_ess(draws)[1], rel=0.01)
    assert all(math.isnan(each) for each in (*worst_rhat_and_ess(draws[..., 3:4]), worst_ess_tail(draws[..., 3:4])))


def test_rhat_of_mixed_chains_is_one_and_grows_with_distance() -> None:
    x = autoregression(0.0, chains=4, draws=1000, functionals=30)
    assert np.all(np.abs(rhat(x) - 1) < 0.01)
    apart = x.copy()
    apart[0] += 1.0
    assert np.all(rhat(apart) > 1.05)
    wide = x.copy()
    wide[0] *= 3.0  # same mean: only the folded draws tell
    assert np.all(rhat(wide) > 1.03)
    drifting = x + np.linspace(-1, 1, 1000)[:, None]  # all chains alike: only their halves tell
    assert np.all(rhat(drifting) > 1.05)


def test_rhat_survives_tails_without_a_variance() -> None:
    x = np.random.default_rng(0).standard_cauchy(size=(4, 2000, 30))
    assert np.all(rhat(x) < 1.01)
    x[0] += 2.0
    assert np.all(rhat(x) > 1.05)


def test_only_the_order_of_the_draws_counts() -> None:
    x = autoregression(0.5, chains=3, draws=200, functionals=4)
    np.testing.assert_array_equal(ess_bulk(np.exp(x)), ess_bulk(x))
    np.testing.assert_array_equal(ess_bulk(1e-30 * x), ess_bulk(x))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_what_says_nothing_is_nan_without_a_warning(statistic: Callable[..., np.ndarray]) -> None:
    x = autoregression(0.0, chains=4, draws=100, functionals=5)
    x[..., 1] = 0.1  # constant
    x[2, 3, 2] = math.nan
    x[2, 3, 3] = math.inf
    assert np.isnan(statistic(x)).tolist() == [False, True, True, True, False]
    clean = np.delete(x, [1, 2, 3], axis=2)
    np.testing.assert_array_equal(statistic(x)[[0, 4]], statistic(clean))  # the others do not suffer
    assert np.isnan(statistic(x[:, :3])).all()
    assert np.isnan(statistic(x[:, :0])).all()
    assert statistic(x[..., :0]).shape == (0,)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_functional_that_moves_only_in_the_middle_draw_is_constant(statistic: Callable[..., np.ndarray]) -> None:
    x = np.zeros((2, 9, 1))
    x[:, 4] = 1.0  # the halves leave it out
    assert np.isnan(statistic(x)).all()


def test_one_chain_has_an_ess_but_no_rhat() -> None:
    x = autoregression(0.0, chains=1, draws=400, functionals=2)
    assert np.isnan(rhat(x)).all()
    assert np.all(ess_bulk(x) > 200)


def test_chains_that_stand_still_apart_have_not_mixed() -> None:
    x = np.broadcast_to(np.array([0.1, 0.2, 0.3, 0.4])[:, None, None], (4, 100, 1))
    assert np.isinf(rhat(x)).all()
    assert ess_bulk(x) == pytest.approx(4, rel=0.1)  # each chain is one draw


def test_tensors_and_any_functional_shape() -> None:
    x = autoregression(0.3, chains=4, draws=100, functionals=6)
    tensor = torch.from_numpy(x).reshape(4, 100, 2, 3).requires_grad_()
    for statistic in STATISTICS:
        assert statistic(tensor).shape == (2, 3)
        np.testing.assert_array_equal(statistic(tensor).ravel(), statistic(x))
        assert statistic(x[..., 0]).shape == ()
        np.testing.assert_allclose(statistic(tensor.float()).ravel(), statistic(x), rtol=0.05)
    with pytest.raises(ValueError, match="expected \\(chains, draws"):
        rhat(x[0, :, 0])


# Calibration

PROBABILITIES = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.25, 0.25], [0.05, 0.9, 0.05]])
LABELS = torch.tensor([0, 1, 0, 1])


def calibrated(points: int, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, and labels drawn from exactly them."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), size=points)
    labels = (rng.random((points, 1)) < p.cumsum(axis=1)).argmax(axis=1)
    return torch.from_numpy(p), torch.from_numpy(labels)


def test_scores_counted_by_hand() -> None:
    assert accuracy(PROBABILITIES, LABELS) == 0.75
    assert nll(PROBABILITIES, LABELS) == near(-math.log(0.7 * 0.3 * 0.5 * 0.9) / 4, ELEMENTARY + 8, 1.0, F32)
    squares = [0.09 + 0.04 + 0.01, 0.01 + 0.49 + 0.36, 0.25 + 0.0625 * 2, 0.0025 * 2 + 0.01]
    assert brier(PROBABILITIES, LABELS) == near(sum(squares) / 4, 16, 1.0, F32)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_brier_score_of_another_library(classes: int) -> None:
    """Brier (1950) sums over classes; halved, as others do for two classes, it would be the mutant."""
    from sklearn.metrics import brier_score_loss

    p, labels = calibrated(300, classes)
    want = brier_score_loss(labels.numpy(), p.numpy(), labels=range(classes), scale_by_half=False)
    assert brier(p, labels) == pytest.approx(want, rel=1e-12)
    if classes == 2:
        assert brier(p, labels) == pytest.approx(2 * brier_score_loss(labels.numpy(), p[:, 1].numpy()), rel=1e-12)


@pytest.mark.parametrize("bins", [5, 15])
def test_adaptive_ece_of_another_librarys_quantile_bins(bins: int) -> None:
    """Where the number of points is a multiple of the bins' and none tie, quantiles cut them into equal parts."""
    from sklearn.calibration import calibration_curve

    p, labels = calibrated(30 * bins)
    confidence, choice = p.max(dim=1)
    right, sure = calibration_curve(choice == labels, confidence, n_bins=bins, strategy="quantile")
    assert len(right) == bins
    assert adaptive_ece(p, labels, bins) == pytest.approx(np.abs(right - sure).mean(), rel=1e-12)
    assert adaptive_ece(p, labels, bins) != pytest.approx(ece(p, labels, bins), rel=1e-3)


def test_ece_counted_by_hand() -> None:
    # confidences .7 right, .6 wrong, .5 right, .9 right; two bins (0, .5] and (.5, 1]
    assert ece(PROBABILITIES.double(), LABELS, bins=2) == near((0.5 + abs(2 - 0.7 - 0.6 - 0.9)) / 4, 8, 1.0, F32)
    # fifteen bins: .5, .6, .7, .9 fall in bins of their own
    assert ece(PROBABILITIES, LABELS) == near((0.3 + 0.6 + 0.5 + 0.1) / 4, 8, 1.0, F32)
    # equal mass, two bins: (.5, .6) and (.7, .9)
    assert adaptive_ece(PROBABILITIES, LABELS, bins=2) == near((abs(1 - 1.1) + 0.4) / 4, 8, 1.0, F32)


def test_a_confidence_on_the_edge_falls_below_it() -> None:
    p = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.7, 0.3]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    # edges at .6 and .8: the two at .6 are right by .4 each, the one at .7 wrong by .7 in a bin of its own
    assert ece(p, labels, bins=5) == near((0.8 + 0.7) / 3, 8)


def test_calibrated_probabilities_have_little_ece_and_sharpened_ones_their_closed_form() -> None:
    p, labels = calibrated(200_000)
    for score in (ece, adaptive_ece):
        assert score(p, labels) < 0.005
    confidence, choice = p.max(dim=1)
    sharp = torch.full_like(p, 0.0).scatter_(1, choice[:, None], 1.0)
    # all confidences 1: the error is one minus the accuracy, which calibration says is the mean confidence
    for score in (ece, adaptive_ece):
        assert score(sharp, labels) == pytest.approx(1 - float(confidence.mean()), abs=0.005)


def test_nll_and_brier_of_calibrated_probabilities_are_their_entropies() -> None:
    p, labels = calibrated(200_000)
    assert nll(p, labels) == pytest.approx(float(-(p * p.log()).sum(1).mean()), abs=0.01)
    assert brier(p, labels) == pytest.approx(float((1 - p.square().sum(1)).mean()), abs=0.01)
    for other in (p.square() / p.square().sum(1, keepdim=True), torch.full_like(p, 0.25)):
        assert nll(other, labels) > nll(p, labels) + 0.02
        assert brier(other, labels) > brier(p, labels) + 0.01


def test_probabilities_are_averaged_not_logits() -> None:
    problem = build_problem(
        load({"data": {"name": "iris", "clients": 2}, "model": {"name": "softmax"}}, environment={})
    )
    assert problem.test is not None
    draws = 3 * torch.randn(2, problem.d, generator=torch.Generator().manual_seed(0))
    one, other = (problem.predict_test(draw[None]) for draw in draws)
    averaged = problem.predict_test(draws) / 2
    logits_of = 2 * problem.d  # a logit is a sum of products, the same row by itself or among others
    agree(averaged.to(F32), ((one + other) / 2).to(F32), logits_of + 2 * ELEMENTARY, 1.0)
    logits = (one.log() + other.log()) / 2  # up to a constant for each row
    assert float((averaged - torch.softmax(logits, -1)).abs().max()) > 0.1
    classes = averaged.shape[1]
    agree(averaged.sum(1).to(F32), torch.ones(len(averaged)), classes + 2 * ELEMENTARY, 1.0)


def test_an_impossible_label_is_infinitely_surprising() -> None:
    assert nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == math.inf


def test_regression_scores() -> None:
    target = torch.tensor([1.0, 2.0, 4.0])
    assert rmse(torch.tensor([1.0, 4.0, 3.0]), target) == near(math.sqrt(5 / 3), 12, None, F32)
    one = torch.distributions.Normal(torch.tensor([1.0, 4.0, 3.0]), 2.0)
    assert gaussian_nll(one.mean, target, 2.0) == near(float(-one.log_prob(target).mean()), ELEMENTARY + 12, 4.0, F32)


def test_the_predictive_density_is_a_mixture_over_draws() -> None:
    means = torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(0)).double() * 2
    target = torch.linspace(-2, 2, 6).double()
    density = torch.distributions.Normal(means, 0.7).log_prob(target).exp().mean((0, 1))
    assert gaussian_nll(means, target, 0.7) == near(float(-density.log().mean()), 150 + 4 * ELEMENTARY, 100.0)
    averaged = gaussian_nll(means.mean((0, 1)), target, 0.7)
    assert abs(averaged - gaussian_nll(means, target, 0.7)) > 0.1
    far = gaussian_nll(torch.full((2, 1), 1e4), torch.zeros(1), 1.0)  # exp underflows there
    assert far == near(0.5e8 + 0.5 * math.log(2 * math.pi), ELEMENTARY + 12, None, F32)


@pytest.mark.parametrize("score", [accuracy, nll, brier, ece, adaptive_ece])
def test_inputs_that_do_not_match_are_named(score: Callable[..., float]) -> None:
    bad: list[tuple[Any, Any, str]] = [
        (PROBABILITIES[None], LABELS, r"\(1, 4, 3\) and \(4,\); average over draws"),
        (PROBABILITIES, LABELS[:3], r"\(4, 3\) and \(3,\)"),
        (PROBABILITIES[:0], LABELS[:0], "N >= 1"),
        (PROBABILITIES, LABELS + 2, r"labels lie in \[2, 3\], but there are 3 classes"),
        (PROBABILITIES, LABELS - 1, r"labels lie in \[-1, 0\]"),
    ]
    for probabilities, labels, message in bad:
        with pytest.raises(DataError, match=message):
            score(probabilities, labels)


def test_pairs_and_targets_that_do_not_match_are_named() -> None:
    with pytest.raises(DataError, match=r"\(2, 3\) and \(3,\); average"):
        rmse(torch.zeros(2, 3), torch.zeros(3))
    for means, noise in ((torch.zeros(3, 2), 1.0), (torch.zeros(2, 3), 0.0), (torch.zeros(2, 3), math.nan)):
        with pytest.raises(DataError, match="positive noise scale"):
            gaussian_nll(means, torch.zeros(3), noise)


@pytest.mark.parametrize(
    "shape", [(4, 100, 30), (4, 1001, 7, 5), (2, 9, 3), (1, 50, 4), (4, 3, 2), (4, 10), (3, 9000, 5)]
)
def test_rhat_and_ess_of_one_ranking_are_those_of_two(shape: tuple[int, ...]) -> None:
    """Constant, tied and infinite functionals too; the last shape takes several blocks."""
    draws = np.random.default_rng(0).standard_normal(shape)
    if len(shape) > 2:
        draws[..., 0], draws[..., 1] = 1.0, np.round(draws[..., 1])
        draws[0, 0, ..., -1] = np.inf
    for got, want in zip(rhat_and_ess(draws), (rhat(draws), ess_bulk(draws)), strict=True):
        assert got.shape == want.shape == shape[2:]
        assert np.array_equal(got, want, equal_nan=True)
