"""Compare the bias that step_size "auto" predicts on digits with the measured bias of the chain.

A reference without compression and with negligible discretisation error (BAOAB at step 0.25, whitened) gives the
posterior's covariance; its spread of single parameters is checked against the HMC run of `digits_reference`. Then each
preset runs at its automatic step from draws of the reference, and two variances are compared with it: the mean over the
coordinates of the preset's metric, and that along the stiffest direction of the Hessian at the mode.

    OMP_NUM_THREADS=1 python simulations/predicted_bias/measure.py langevin-diana whitened-diana
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsample.config import Experiment, load
from fedsample.estimators import build_links
from fedsample.monitor.progress import Progress
from fedsample.preparation.prepare import prepare
from fedsample.preparation.prepared import Prepared
from fedsample.problem import Problem, build_problem
from fedsample.runs.build import build_driver, build_fleet

HMC = Path(__file__).parents[2] / "tests" / "data" / "digits_hmc.npz"
REFERENCE = ["preset=underdamped-diana", "uplink.name=dense", "uplink.compressor=identity", "step_size=0.25"]
PRESETS = ("underdamped-diana", "whitened-diana", "underdamped-marina", "langevin-diana", "langevin-marina")
GROUPS = 8  # groups of chains, whose scatter gives the standard errors


def run_chain(
    experiment: Experiment, problem: Problem, prepared: Prepared, start: Tensor, warmup: int, thin: int, seconds: float
) -> Tensor:
    """Sample for this many seconds, warm-up included; return draws (S, C, d) in the model's parameters."""
    links = build_links(experiment, problem.clients)
    fleet = build_fleet(experiment, problem, links)
    fleet.set_metric(prepared.geometry.metric)
    driver = build_driver(experiment, problem, links, prepared, fleet.n)
    state, draws, began = driver.begin(prepared.geometry.metric.invert(start)), [], time.perf_counter()
    for k in itertools.count(1):
        request = driver.request(state, observe=False)
        state = driver.update(state, request, fleet.exchange(request))
        if k > warmup and k % thin == 0:
            draws.append(prepared.geometry.metric.push(state.params))
        if len(draws) >= 8 and time.perf_counter() - began > seconds:
            break
    return torch.stack(draws).to(torch.float64)


def build(overrides: list[str], chains: int) -> tuple[Experiment, Problem, Prepared]:
    """Build an experiment with many chains, and prepare it."""
    experiment = load({}, [*overrides, f"chains={chains}"])
    problem = build_problem(experiment)
    links = build_links(experiment, problem.clients)
    fleet = build_fleet(experiment, problem, links)
    one = load({}, overrides)  # what the preset itself would measure and choose
    return experiment, problem, prepare(one, problem, links, fleet, Progress(1, mode="quiet"))


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


def main(options: argparse.Namespace) -> None:
    """Print a JSON line for the reference and for each preset."""
    torch.set_num_threads(1)
    experiment, problem, prepared = build(REFERENCE, 64)
    white = prepared.geometry.metric
    begin = white.push(prepared.start.new_empty(64, problem.d).normal_(generator=torch.Generator().manual_seed(0)))
    reference = run_chain(experiment, problem, prepared, begin, 150, 4, options.reference)
    sd = torch.from_numpy(np.load(HMC)["sd"].astype(np.float64))
    against = float((reference.reshape(-1, problem.d).var(0) / sd**2).mean()) - 1
    print(json.dumps({"reference": len(reference) * 64, "variance over HMC's, less one": against}), flush=True)
    hessian = problem.clients.hessian(white.mean.unsqueeze(0))[:, 0].sum(0).to(torch.float64)
    stiffest = torch.linalg.eigh(hessian + problem.prior.precision * torch.eye(problem.d))[1][:, -1:]
    for name in options.presets:
        experiment, problem, prepared = build([f"preset={name}"], options.chains)
        forecast, basis = prepared.forecast, torch.eye(problem.d, dtype=torch.float64)
        if experiment.metric.name == "hessian":  # the metric's coordinates z = S^{-1} (theta - m)
            basis = prepared.geometry.metric.unscale(basis.to(white.mean.dtype)).to(torch.float64)
        slow, begin = forecast.relaxation, reference[-1, : options.chains].to(white.mean.dtype)
        thin = max(1, int(min(slow / 4, 25)))
        draws = run_chain(experiment, problem, prepared, begin, int(slow), thin, options.seconds)
        row = {
            "preset": name,
            "predicted": asdict(forecast),
            "draws": list(draws.shape[:2]),
            "measured mean": excess(draws, reference, basis),
            "measured stiffest": excess(draws, reference, stiffest),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--chains", type=int, default=32, help="of each preset, up to 64")
    parser.add_argument("--seconds", type=float, default=200.0, help="of each preset's chain")
    parser.add_argument("--reference", type=float, default=120.0, help="seconds of the reference's chain")
    main(parser.parse_args())
