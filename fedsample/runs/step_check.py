"""Confirm a step by halving it: the same experiment again at half the step, and how much narrower its draws are.

The bias of a variance grows as a power of the step, so the change from halving estimates what is left. Where a
prediction of the bias exists, its ratio between the two steps gives the power; otherwise the bias is taken to be of
first order, which at worst overstates it. Two variances are compared, both in the run's own metric: the mean over its
coordinates, as the geometric mean of the ratios of variances (errors of the two runs' variances then do not favour one
side), and that along the stiffest direction. Standard errors are of batch means.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsample.config import ScheduleConfig
from fedsample.errors import ConfigError
from fedsample.runs.verdict import MIXED

if TYPE_CHECKING:
    from fedsample.config import Experiment

DIRECTORY = "check-step"
MARGIN = 4 / 3  # a bias up to a third over the tolerance is accepted: predictions are no better
_BATCHES = 8
_SIGMAS = 2.0


@dataclass(frozen=True)
class Comparison:
    """One variance, compared between a step h and h / 2.

    Attributes:
        of: which variance.
        change: its relative excess at h over that at h / 2.
        error: the change's standard error.
        predicted_change: the change that the moments predict; None: no prediction.
        bias: estimated relative excess at h over the target's.
        bias_error: its standard error.
        predicted_bias: the bias that the moments predict; None: no prediction.
    """

    of: str
    change: float
    error: float
    predicted_change: float | None
    bias: float
    bias_error: float
    predicted_bias: float | None


def half(experiment: Experiment) -> Experiment:
    """Return the experiment at half its step: other randomness, as many draws, over the same simulated time.

    Raises:
        ConfigError: if there is no single step, or nothing that a step could bias.
    """
    step = experiment.step_size
    if isinstance(step, ScheduleConfig):
        raise ConfigError(
            f'a step check halves one constant step, but step_size follows schedule "{step.schedule}": '
            'set step_size to a number or "auto", or leave the check out'
        )
    if experiment.temperature == 0:
        raise ConfigError("a step check compares variances, and at temperature 0 there are none: leave it out")
    if step == "auto":
        return experiment
    changes: dict[str, Any] = {name: 2 * getattr(experiment, name) for name in ("rounds", "warmup", "thin")}
    return experiment.model_copy(update={"step_size": float(step) / 2, "seed": experiment.seed + 1, **changes})


def compare(
    draws: Tensor, halved: Tensor, of: str, predicted: tuple[float | None, float | None] = (None, None)
) -> Comparison:
    """Compare variances of draws (C, n, m) at h and at h / 2, by the geometric mean over m.

    Args:
        draws: at h.
        halved: at h / 2.
        of: which variance, for the report.
        predicted: the predicted biases at h and at h / 2; None: no prediction.
    """
    (one, one_error), (two, two_error) = _log_variance(draws), _log_variance(halved)
    change = math.expm1(one - two)
    error = (1 + change) * math.hypot(one_error, two_error)
    expected, at_half = predicted
    known = expected is not None and at_half is not None
    predicted_change = (1 + expected) / (1 + at_half) - 1 if known else None  # type: ignore[operator]
    factor = 2.0  # by which halving divides a bias of first order
    if expected is not None and predicted_change is not None and 0 < at_half < expected:  # type: ignore[operator]
        factor = min(2.0, expected / predicted_change)
    return Comparison(of, change, error, predicted_change, factor * change, factor * error, expected)


def _log_variance(draws: Tensor) -> tuple[float, float]:
    """Return the mean over m of the log variance of draws (C, n, m), and its standard error."""
    chains, count, _ = draws.shape
    draws = draws.to(torch.float64)
    squares = (draws - draws.mean((0, 1))).square()
    variances = squares.mean((0, 1))
    size = count // _BATCHES
    if size < 1 or not bool((variances > 0).all()):
        return float(variances.log().mean()), math.inf
    relative = (squares / variances).mean(-1)[:, : size * _BATCHES]  # (C, n)
    batches = relative.unflatten(1, (_BATCHES, size)).mean(-1)
    return float(variances.log().mean()), float(batches.std()) / math.sqrt(chains * _BATCHES)


def verdict(comparisons: list[Comparison], tolerance: float, rhat: float | None) -> tuple[str, str]:
    """Return "confirmed", "not confirmed" or "undecided", and the reason in a sentence."""
    limit = MARGIN * tolerance
    worst = max(comparisons, key=lambda each: each.bias - _SIGMAS * each.bias_error)
    said = ", ".join(
        f"{each.of} {each.change:+.2%} ± {each.error:.2%}"
        + ("" if each.predicted_change is None else f" (predicted {each.predicted_change:+.2%})")
        for each in comparisons
    )
    if worst.bias - _SIGMAS * worst.bias_error > limit:
        return "not confirmed", (
            f"against half the step variances grow: {said}. That is a bias of {worst.bias:+.1%}, "
            f"more than bias_tolerance = {tolerance:g} allows: take a smaller step"
        )
    if rhat is not None and rhat > MIXED:
        return (
            "undecided",
            f"the chains have not mixed (R-hat {rhat:.2f}): their errors are unknown; run longer",
        )
    if any(not each.bias + _SIGMAS * each.bias_error <= limit for each in comparisons):
        return "undecided", (f"the Monte-Carlo error is too large to tell: {said}; run longer, or with more chains")
    return "confirmed", f"against half the step variances change: {said}; within bias_tolerance = {tolerance:g}"


def check(path: Path, experiment: Experiment, summary: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Compare a finished run with the one at half its step -> the `step_check` object of its summary.

    Args:
        path: the run's directory; the run at half the step lies in `DIRECTORY` inside it.
        experiment: the resolved configuration.
        summary: of the run.
        other: of the run at half the step.
    """
    from fedsample.monitor.draws import load_draws
    from fedsample.preparation.prepared import restore_prepared

    geometry = restore_prepared(path, experiment.fleet.device).geometry
    draws, halved = (
        geometry.metric.invert(load_draws(each).to(geometry.metric.mean)) for each in (path, path / DIRECTORY)
    )

    def predictions(name: str) -> tuple[float | None, float | None]:
        return summary.get(name), other.get(name)

    comparisons = [compare(draws, halved, "mean over coordinates", predictions("predicted_mean_bias"))]
    if bool(geometry.stiffest.any()):
        along = geometry.stiffest.unsqueeze(-1)
        comparisons.append(
            compare(draws @ along, halved @ along, "stiffest direction", predictions("predicted_stiff_bias"))
        )
    rhats = [each["rhat_max"] for each in (summary, other) if each.get("rhat_max") is not None]
    word, why = verdict(comparisons, experiment.bias_tolerance, max(rhats, default=None))
    return {
        "verdict": word,
        "why": why,
        "step_size": summary["step_size"],
        "half_step_size": other["step_size"],
        "comparisons": [asdict(each) for each in comparisons],
        "uplink_bytes_per_client": other["uplink_bytes_per_client"],
        "downlink_bytes_per_client": other["downlink_bytes_per_client"],
        "seconds": other["seconds_in_all"],
    }
