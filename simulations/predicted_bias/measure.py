"""The bias that `auto` predicts on digits against the bias of the chain that it then runs.

A reference without compression and (BAOAB at a step of 0.1, whitened) without discretisation to speak of gives the
posterior's covariance; its spread of single parameters is checked against the HMC run of `digits_reference`. Then each
preset runs at its automatic step from draws of the reference, and two variances are compared with it: the mean over the
coordinates of the preset's metric, and that along the stiffest direction of the Hessian at the mode.

    OMP_NUM_THREADS=1 python simulations/predicted_bias/measure.py langevin-diana whitened-diana ...
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsample.config import Experiment, load
from fedsample.monitor.progress import Progress
from fedsample.preparation import Prepared, prepare
from fedsample.problem import Problem, build_problem
from fedsample.session import build_fleet, build_sampler

HMC = Path(__file__).parents[2] / "tests" / "data" / "digits_hmc.npz"
REFERENCE = ["preset=underdamped-diana", "uplink.name=dense", "uplink.compressor=identity", "step_size=0.1"]
PRESETS = ("underdamped-diana", "whitened-diana", "underdamped-marina", "langevin-diana", "langevin-marina")
CHAINS, GROUPS = 64, 8
SECONDS = 240.0  # of one chain, at most


def run_chain(
    experiment: Experiment, problem: Problem, prepared: Prepared, start: Tensor, warmup: int, rounds: int, thin: int
) -> Tensor:
    """(rounds / thin, C, d) draws in the model's parameters; stopped early after `SECONDS`."""
    fleet = build_fleet(experiment, problem)
    fleet.set_metric(prepared.geometry.metric)
    sampler = build_sampler(experiment, problem, prepared, fleet.n)
    state, draws, began = sampler.begin(prepared.geometry.metric.invert(start)), [], time.perf_counter()
    for k in range(1, warmup + rounds + 1):
        request = sampler.request(state, observe=False)
        state = sampler.update(state, request, fleet.exchange(request))
        if k > warmup and k % thin == 0:
            draws.append(prepared.geometry.metric.push(state.params))
        if time.perf_counter() - began > SECONDS:
            break
    return torch.stack(draws).to(torch.float64)


def build(overrides: list[str]) -> tuple[Experiment, Problem, Prepared]:
    """An experiment with many chains, and its preparation."""
    experiment = load({}, [*overrides, f"chains={CHAINS}"])
    problem = build_problem(experiment)
    fleet = build_fleet(experiment, problem)
    one = load({}, overrides)  # what the preset would measure and choose by itself
    return experiment, problem, prepare(one, problem, fleet, Progress(1, mode="quiet"))


def excess(draws: Tensor, reference: Tensor, directions: Tensor) -> tuple[float, float]:
    """Mean over directions (d, m) of the relative excess of their variance, and its standard error by chains."""

    def variances(sample: Tensor) -> Tensor:
        centred = sample @ directions - (reference @ directions).mean((0, 1))
        return torch.stack([each.square().mean((0, 1)) for each in centred.chunk(GROUPS, dim=1)])  # (G, m)

    ours, theirs = variances(draws), variances(reference)
    ratios = (ours / theirs.mean(0)).mean(-1)
    spread = (theirs / theirs.mean(0)).mean(-1)
    error = math.hypot(float(ratios.std()), float(spread.std())) / math.sqrt(GROUPS)
    return float(ratios.mean()) - 1, error


def main(names: list[str]) -> None:
    """Print a JSON line for the reference and for each preset."""
    torch.set_num_threads(1)
    experiment, problem, prepared = build(REFERENCE)
    white = prepared.geometry.metric
    begin = white.push(prepared.start.new_empty(CHAINS, problem.d).normal_(generator=torch.Generator().manual_seed(0)))
    reference = run_chain(experiment, problem, prepared, begin, 300, 4000, 10)
    sd = torch.from_numpy(np.load(HMC)["sd"].astype(np.float64))
    against = float((reference.reshape(-1, problem.d).var(0) / sd**2).mean()) - 1
    print(json.dumps({"reference": len(reference) * CHAINS, "variance over HMC's, less one": against}), flush=True)
    hessian = problem.clients.hessian_sum(white.mean).to(torch.float64)
    stiffest = torch.linalg.eigh(hessian + problem.prior.precision * torch.eye(problem.d))[1][:, -1:]
    for name in names:
        experiment, problem, prepared = build([f"preset={name}"])
        forecast = prepared.forecast
        whitened = experiment.metric.name == "hessian"
        slow = forecast.relaxation
        rounds, thin = math.ceil(max(40 * slow, 4000)), max(1, int(slow / 4))
        draws = run_chain(experiment, problem, prepared, reference[-1].to(white.mean.dtype), int(slow * 2), rounds, thin)
        basis = torch.eye(problem.d, dtype=torch.float64)
        if whitened:  # the metric's coordinates z = S^{-1} (theta - m)
            basis = prepared.geometry.metric.unscale(basis.to(white.mean.dtype)).to(torch.float64)
        mean, mean_error = excess(draws, reference, basis)
        stiff, stiff_error = excess(draws, reference, stiffest)
        row: dict[str, Any] = {
            "preset": name,
            "step": forecast.step_size,
            "relaxation": slow,
            "draws": list(draws.shape[:2]),
            "predicted": {
                "bias": forecast.bias,
                "mean": forecast.mean_bias,
                "mean heating": forecast.mean_heating,
                "largest heating": forecast.worst_heating,
            },
            "measured mean": [mean, mean_error],
            "measured stiffest": [stiff, stiff_error],
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(PRESETS))
