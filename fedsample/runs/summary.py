"""The summary of a run: what was drawn, how well the chains mixed, and what it cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsample.diagnostics import calibration
from fedsample.diagnostics.convergence import worst_ess_tail, worst_rhat_and_ess
from fedsample.protocol.exchange import Traffic
from fedsample.runs.verdict import run_warnings

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.monitor.draws import DrawStore
    from fedsample.preparation.prepared import Prepared
    from fedsample.problem import Problem

_BLOCK = 1 << 25  # entries of draws processed together in the summary


def summarise(
    problem: Problem, experiment: Experiment, prepared: Prepared, traffic: Traffic, seconds: float, store: DrawStore
) -> dict[str, Any]:
    """Compute `summary.json`: what was drawn, how well the chains mixed, and what it cost."""
    draws = store.load().to(problem.clients.device)  # (C, n, d)
    chains, count, d = draws.shape
    n = problem.clients.n
    total = traffic.plus(prepared.geometry.traffic)
    done = max(1, experiment.rounds)
    functionals = _functionals(problem, draws)
    rhat, ess = worst_rhat_and_ess(functionals)
    result = {
        "preset": experiment.preset,
        "rounds": experiment.rounds,
        "draws": count,
        "chains": chains,
        "clients": n,
        "params": d,
        "seconds": seconds,
        "seconds_per_round": seconds / done,
        **_quality(problem, draws),
        "rhat_max": rhat,
        "ess_bulk_min": ess,
        "ess_tail_min": worst_ess_tail(functionals),
        "step_size": prepared.step_size,
        "largest_stable_step": prepared.forecast.limit,
        "relaxation_rounds": _number(prepared.forecast.relaxation),
        "curvature": prepared.geometry.curvature,
        "predicted_variance_bias": _prediction(experiment, prepared.forecast.bias),
        "predicted_stiff_bias": _prediction(experiment, prepared.forecast.stiff_bias),
        "predicted_mean_bias": _prediction(experiment, prepared.forecast.mean_bias),
        "predicted_mean_heating": _prediction(experiment, prepared.forecast.mean_heating),
        "predicted_worst_heating": _prediction(experiment, prepared.forecast.worst_heating),
        "uplink_bytes_per_client": total.up / 8 / n,
        "downlink_bytes_per_client": total.down / 8 / n,
        "preparation_uplink_bytes_per_client": prepared.geometry.traffic.up / 8 / n,
        "uplink_ratio": total.up_dense / max(1, total.up),
    }
    return result | {"warnings": run_warnings(experiment, result)}


def _prediction(experiment: Experiment, value: float) -> float | None:
    """Return a predicted figure where predictions hold: full gradients, positive temperature, no lasting absences."""
    unforeseen = experiment.batch_size is not None or experiment.fleet.dropout > 0
    return None if experiment.temperature == 0 or unforeseen else _number(value)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _functionals(problem: Problem, draws: Tensor) -> Tensor:
    """Compute the functionals (C, n, F), in float64, of draws (C, n, d)."""
    chains, count, d = draws.shape
    size = max(1, _BLOCK // max(1, d))
    flat = draws.reshape(-1, d)
    functionals = torch.cat([problem.functionals(block) for block in flat.split(size)])
    return functionals.view(chains, count, -1)


def _quality(problem: Problem, draws: Tensor) -> dict[str, float | None]:
    """Score the averaged predictions on held-out rows."""
    flat = draws.reshape(-1, draws.shape[-1])
    if problem.likelihood == "gaussian":
        if problem.test is None:
            return {"rmse": None, "nll": None}
        means = problem.predict_test(flat)
        return {
            "rmse": calibration.rmse(means.mean(0), problem.test[1]),
            "nll": calibration.gaussian_nll(means, problem.test[1], problem.noise_scale),
        }
    if problem.test is None:
        return dict.fromkeys(("accuracy", "nll", "brier", "ece", "adaptive_ece"))
    predictive = problem.predict_test(flat) / len(flat)
    labels = problem.test[1]
    return {
        "accuracy": calibration.accuracy(predictive, labels),
        "nll": calibration.nll(predictive, labels),
        "brier": calibration.brier(predictive, labels),
        "ece": calibration.ece(predictive, labels),
        "adaptive_ece": calibration.adaptive_ece(predictive, labels),
    }
