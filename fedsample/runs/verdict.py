"""Warnings about the draws of a run: bias, mixing, and what to do about them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedsample.targets.metric import MOST_DENSE

if TYPE_CHECKING:
    from fedsample.config import Experiment

MIXED = 1.1  # R-hat above which the chains have not mixed
_FEW = 50  # effective draws, below which a single chain tells little
_OVER = 1.05  # times the tolerance: how far rounding may take the bias predicted for an automatic step


def run_warnings(experiment: Experiment, summary: Mapping[str, Any]) -> list[str]:
    """List the reasons not to trust a run's draws yet, each with what to do; empty: none was found.

    Args:
        experiment: the resolved configuration.
        summary: see `fedsample.runs.summary.summarise`.
    """
    if experiment.temperature == 0:
        return []
    return [*_of_mixing(experiment, summary), *_of_bias(experiment, summary)]


def _of_mixing(experiment: Experiment, summary: Mapping[str, Any]) -> list[str]:
    rhat, ess, relaxation = (summary[name] for name in ("rhat_max", "ess_bulk_min", "relaxation_rounds"))
    kept = experiment.rounds - experiment.warmup
    slow = "; the slowest direction forgets where it was only in "
    slow = f"{slow}{relaxation:,.0f} rounds, and {kept:,} were kept" if relaxation and relaxation > kept else ""
    denser = experiment.metric.name != "hessian" and summary.get("params", 0) <= MOST_DENSE
    metric = ", set metric.name = 'hessian'" if denser else ""
    advice = "raise rounds and warmup" + (f"{metric}, or scale the data" if slow else "")
    if rhat is not None and math.isfinite(rhat) and rhat > MIXED:
        return [f"the chains have not mixed: worst R-hat {rhat:.2f}, expected at most {MIXED}{slow}: {advice}"]
    if summary["draws"] < 4:
        return [f"{summary['draws']} draws per chain tell nothing of their mixing, expected at least 4: {advice}"]
    if ess is None or not math.isfinite(ess) or (summary["chains"] > 1 and not _finite(rhat)):
        finer = ", or set dtype = 'float64'" if experiment.dtype == "float32" else ""
        return [f"the chains did not move as far as {experiment.dtype} tells: raise step_size, or rounds{finer}"]
    if summary["chains"] == 1 and ess < _FEW:
        return [f"the smallest bulk ESS of the one chain is {ess:.0f}, expected at least {_FEW}{slow}: {advice}"]
    return []


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _of_bias(experiment: Experiment, summary: Mapping[str, Any]) -> list[str]:
    from fedsample.strategies.schedule import Constant, schedule_of

    bias, step, limit = (summary[name] for name in ("predicted_variance_bias", "step_size", "largest_stable_step"))
    schedule = schedule_of(experiment.step_size, step)
    constant = isinstance(schedule, Constant)
    if not constant:  # the prediction is for the first step: what counts is the largest step while draws are kept
        step, bias = schedule.largest(experiment.warmup + 1, experiment.rounds), None
    foreseen = constant and experiment.batch_size is None and experiment.fleet.dropout == 0
    if step > limit or (foreseen and bias is None):
        return [
            f"at step {step:.4g} no stationary variance is predicted (the largest stable step is {limit:.4g}): lower "
            "step_size, or set it to 'auto'"
        ]
    if bias is not None and bias > experiment.bias_tolerance * _OVER:
        memory = experiment.uplink.name in ("diana", "ef21", "dense")
        advice = "lower step_size" + ("" if memory else ", or take an uplink with a memory, such as diana")
        return [
            f"the step predicts a variance bias of {bias:+.2%}, expected at most bias_tolerance = "
            f"{experiment.bias_tolerance:.2%}: {advice}"
        ]
    return []
