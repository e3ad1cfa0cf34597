"""Scores of a predictive distribution on held-out points: accuracy and calibration.

The predictive distribution of a classifier is the *average over draws of its probabilities*, never of its logits:
`p(y | x) = 1/S sum_s softmax(f(x; theta_s))_y`; that of a regression is the mixture of the draws' Gaussians
(`gaussian_nll`). Everything is computed in float64.

    accuracy = mean I[argmax p = y]            NLL = -mean log p_y            Brier = mean sum_c (p_c - I[c = y])^2
    ECE = sum_bins |B| / N |accuracy(B) - confidence(B)|,   confidence = max_c p_c,   bins of equal width
    adaptive ECE: the same over bins of equal mass

ECE is biased upwards on few points: with N points a perfectly calibrated model scores about `sqrt(bins / N)` times a
constant below one, so compare models on the same points and bins.

Reference:
    Guo, Pleiss, Sun & Weinberger (2017), "On calibration of modern neural networks", arXiv 1706.04599, equation 3
    (ECE, 15 bins). Nguyen & O'Connor (2015), arXiv 1508.05154 (equal-mass bins). Mukhoti, Kulharia, Sanyal, Golodetz,
    Torr & Dokania (2020), arXiv 2002.09437 (adaptive ECE: of the confidence alone, whereas the adaptive calibration
    error of Nixon, Dusenberry, Jerfel, Nguyen, Liu, Zhang & Tran (2019), arXiv 1904.01685, is a mean over all classes).
    Brier (1950), Monthly Weather Review 78 (the sum over classes: for two, twice the squared error of one).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedsample.errors import DataError

BINS = 15


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of points whose most probable class is the true one, in [0, 1].

    Args:
        probabilities: (N, K), N >= 1.
        labels: (N,) integers in [0, K).

    Raises:
        DataError: if shapes do not match or a label is out of range; all functions here raise it.
    """
    _check(probabilities, labels)
    return float((probabilities.argmax(dim=1) == labels).double().mean())


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Negative log-likelihood per point, in nats: `-mean log p_y`. Infinite where a true class has probability 0.

    Args:
        probabilities: (N, K), averaged over draws.
        labels: (N,) integers in [0, K).
    """
    _check(probabilities, labels)
    return float(-probabilities.double().gather(1, labels.long()[:, None]).log().mean())


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """Squared distance from the true label, `mean sum_c (p_c - I[c = y])^2`, in [0, 2].

    Args:
        probabilities: (N, K).
        labels: (N,) integers in [0, K).
    """
    _check(probabilities, labels)
    truth = torch.nn.functional.one_hot(labels.long(), probabilities.shape[1])
    return float((probabilities.double() - truth).square().sum(dim=1).mean())


def ece(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error over equal-width bins `(b / bins, (b + 1) / bins]` of the confidence, in [0, 1].

    Args:
        probabilities: (N, K).
        labels: (N,) integers in [0, K).
        bins: number of bins, at least 1.
    """
    confidence, correct = _confidence(probabilities, labels)
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, bin_of(confidence, bins), correct - confidence)
    return float(gap.abs().sum() / len(confidence))


def bin_of(confidence: Tensor, bins: int = BINS) -> Tensor:
    """Number of the bin `(b / bins, (b + 1) / bins]` that each confidence lies in: (N,) float64 -> (N,) int64."""
    edges = torch.arange(1, bins, dtype=torch.float64, device=confidence.device) / bins
    return torch.bucketize(confidence, edges)


def adaptive_ece(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error over bins of equal mass: points in order of confidence, cut into `bins` parts.

    Args:
        probabilities: (N, K).
        labels: (N,) integers in [0, K).
        bins: number of bins, at least 1; sizes differ by at most one point.
    """
    confidence, correct = _confidence(probabilities, labels)
    order = confidence.argsort(stable=True)
    gaps = (correct - confidence)[order].tensor_split(bins)
    return float(sum(abs(float(part.sum())) for part in gaps) / len(confidence))


def rmse(prediction: Tensor, target: Tensor) -> float:
    """Root mean squared error, in the units of the target.

    Args:
        prediction: (N,) predictive means, averaged over draws.
        target: (N,) true values.
    """
    if prediction.shape != target.shape or target.numel() == 0:
        raise DataError(
            f"expected predictions and targets of one shape (N,), N >= 1; got {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}; average the predictions over draws first"
        )
    return float((prediction.double() - target.double()).square().mean().sqrt())


def gaussian_nll(means: Tensor, target: Tensor, noise_scale: float) -> float:
    """Negative log-likelihood per point of the mixture over draws, `-mean_i log 1/S sum_s N(y_i; mean_si, noise^2)`.

    Args:
        means: (..., N) predictions of each draw, with any leading axes of draws and chains.
        target: (N,) true values.
        noise_scale: standard deviation of the likelihood, > 0, in the units of the target.
    """
    if means.shape[-1:] != target.shape or target.numel() == 0 or not noise_scale > 0:
        raise DataError(
            f"expected means (..., N), targets (N,) with N >= 1 and a positive noise scale; got {tuple(means.shape)}, "
            f"{tuple(target.shape)} and {noise_scale}; put the points last"
        )
    draws = means.reshape(-1, target.shape[0]).double()
    exponents = -0.5 * ((draws - target.double()) / noise_scale).square()  # (S, N)
    log_mixture = torch.logsumexp(exponents, dim=0) - math.log(draws.shape[0])
    return float(-log_mixture.mean()) + math.log(noise_scale) + 0.5 * math.log(2 * math.pi)


def _confidence(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _check(probabilities, labels)
    confidence, choice = probabilities.double().max(dim=1)
    return confidence, (choice == labels).double()


def _check(probabilities: Tensor, labels: Tensor) -> None:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or labels.numel() == 0:
        raise DataError(
            f"expected probabilities (N, K) and labels (N,), N >= 1; got {tuple(probabilities.shape)} and "
            f"{tuple(labels.shape)}; average over draws first"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= probabilities.shape[1]:
        raise DataError(
            f"labels lie in [{low}, {high}], but there are {probabilities.shape[1]} classes: expected 0 to "
            f"{probabilities.shape[1] - 1}; number the classes from 0"
        )
