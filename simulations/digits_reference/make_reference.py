r"""A long HMC run on Bayesian softmax regression of the scikit-learn digits: the law that fedsample is tested against.

    U(theta) = - sum_i log softmax(W x_i + b)_{y_i} + |theta|^2 / 2,    theta = (W, b) in R^650,    law ~ exp(-U)

This file imports nothing of fedsample, so that the reference shares no code with what it judges. Hamiltonian Monte
Carlo with mass matrix M = Hessian of U at the mode (the same chain as identity mass in the whitened coordinates
M^{1/2} (theta - mode)); velocities v ~ N(0, M^{-1}), leapfrog, Metropolis:

    v <- v - h/2 M^{-1} grad U,   theta <- theta + h v,   v <- v - h/2 M^{-1} grad U,   accept with min(1, e^{-dH})

Reference: R. M. Neal, "MCMC using Hamiltonian dynamics", 2011, arXiv:1206.1901, sections 2.3, 3.2 and 4.1.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sklearn
import torch
from arviz_stats.base import array_stats
from sklearn.datasets import load_digits
from torch import Tensor

CLASSES, FEATURES, DIM = 10, 64, 650
BATCHES = 20  # batches per chain in Monte-Carlo errors by batch means


class Split(NamedTuple):
    """Digits with pixels in [0, 1] and a last column of ones for the bias."""

    train_x: Tensor  # (1437, 65) float64
    train_y: Tensor  # (1437,) int64
    test_x: Tensor  # (360, 65) float64
    test_y: Tensor  # (360,) int64
    test_rows: np.ndarray  # (360,) row indices into load_digits()


class Trace(NamedTuple):
    """Record of the chains, draws on the first axis: params (N, C, 650) float32, all others (N, C) float64."""

    params: np.ndarray
    potential: np.ndarray  # U
    virial: np.ndarray  # (theta - mode) . grad U, whose mean is exactly 650 under the law
    energy: np.ndarray  # H at the start of each trajectory
    error: np.ndarray  # H(end) - H(start) of each trajectory, whose mean of exp(-error) is exactly 1
    accepted: np.ndarray


def split_digits() -> Split:
    x, y = load_digits(return_X_y=True)
    x = np.hstack([x / 16.0, np.ones((len(x), 1))])  # (1797, 65)
    order = np.random.default_rng(0).permutation(len(x))
    test, train = order[:360], order[360:]
    return Split(*map(torch.from_numpy, (x[train], y[train], x[test], y[test])), test)


def class_rows(params: Tensor) -> Tensor:
    """(C, 650) flat, as torch's Linear(64, 10) stores it -> (C, 10, 65) with the bias as the last column."""
    weight, bias = params[:, : CLASSES * FEATURES], params[:, CLASSES * FEATURES :]
    return torch.cat([weight.reshape(-1, CLASSES, FEATURES), bias.unsqueeze(2)], dim=2)


def flat(rows: Tensor) -> Tensor:
    """(C, 10, 65) -> (C, 650): the inverse of `class_rows`."""
    return torch.cat([rows[:, :, :FEATURES].flatten(1), rows[:, :, FEATURES]], dim=1)


class Posterior:
    """U, grad U and Hessian of softmax regression under the N(0, I) prior, for C chains at once."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        """Takes features x (n, 65) float64, bias column included, and labels y (n,) int64."""
        self.x, self.x_t = x, x.T.contiguous()
        # sum_i log-likelihood = <theta, sum_i onehot(y_i) x_i> - sum_i logsumexp_i: labels enter through this sum only
        self.label_sum = flat((torch.nn.functional.one_hot(y, CLASSES).T.to(x.dtype) @ x).unsqueeze(0))  # (1, 650)

    def _exp_logits(self, params: Tensor) -> tuple[Tensor, Tensor]:
        # Classes before data points: torch's softmax over a last dimension of 10 is many times slower. No shift by the
        # maximum: float64 holds exp(709), and a logit beyond that ends in NaN, which Metropolis rejects.
        scores = (class_rows(params).reshape(-1, FEATURES + 1) @ self.x_t).view(len(params), CLASSES, -1).exp_()
        return scores, scores.sum(1, keepdim=True)  # (C, 10, n), (C, 1, n)

    def potential_and_gradient(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """(C, 650) -> U (C,), grad U (C, 650)."""
        scores, total = self._exp_logits(params)
        potential = total.log().sum((1, 2)) - (params * self.label_sum).sum(1) + 0.5 * params.square().sum(1)
        rows = (scores.div_(total).view(-1, len(self.x)) @ self.x).view(-1, CLASSES, FEATURES + 1)
        return potential, flat(rows) - self.label_sum + params

    def probs(self, params: Tensor) -> Tensor:
        """(C, 650) -> class probabilities (C, 10, n)."""
        scores, total = self._exp_logits(params)
        return scores.div_(total)

    def hessian(self, params: Tensor) -> Tensor:
        """(1, 650) -> (650, 650)."""
        p = self.probs(params)[0]  # (10, n)
        blocks = torch.empty(CLASSES, FEATURES + 1, CLASSES, FEATURES + 1, dtype=p.dtype)
        for a in range(CLASSES):
            for b in range(CLASSES):
                blocks[a, :, b, :] = (self.x_t * (p[a] * (float(a == b) - p[b]))) @ self.x
        rows = flat(blocks.reshape(DIM, CLASSES, FEATURES + 1))  # columns in flat order, then rows in flat order
        return flat(rows.T.reshape(DIM, CLASSES, FEATURES + 1)) + torch.eye(DIM, dtype=p.dtype)


def find_mode(posterior: Posterior) -> Tensor:
    """Newton's method with step halving from zero -> (1, 650). U is 1-strongly convex: the mode is unique."""
    params = torch.zeros(1, DIM, dtype=torch.float64)
    for _ in range(50):
        potential, gradient = posterior.potential_and_gradient(params)
        if float(gradient.abs().max()) < 1e-10:
            return params
        step, scale = torch.linalg.solve(posterior.hessian(params), gradient[0]), 1.0
        while not bool(posterior.potential_and_gradient(params - scale * step)[0] <= potential + 1e-9) and scale > 1e-6:
            scale /= 2
        params = params - scale * step
    raise SystemExit(f"Newton stopped with |grad U| = {float(gradient.abs().max()):.1e} after 50 steps, wanted < 1e-10")


def run_hmc(posterior: Posterior, mode: Tensor, args: argparse.Namespace) -> Trace:
    """Runs `args.chains` chains side by side, each on random numbers of its own, and drops the warm-up."""
    rngs = [np.random.default_rng(child) for child in np.random.SeedSequence(args.seed).spawn(args.chains)]

    def draw(sample: str, *shape: int) -> Tensor:
        return torch.from_numpy(np.stack([getattr(rng, sample)(size=shape) for rng in rngs]))  # (C, *shape)

    mass = posterior.hessian(mode)
    root = torch.linalg.cholesky(mass)  # M = root root^T
    root_inv = torch.linalg.solve_triangular(root, torch.eye(DIM, dtype=mass.dtype), upper=False)
    mass_inv = root_inv.T @ root_inv

    params = mode + args.start_scale * draw("standard_normal", DIM) @ root_inv  # over-dispersed Laplace draws
    potential, gradient = posterior.potential_and_gradient(params)
    shape = (args.draws, args.chains)
    trace = Trace(np.empty((*shape, DIM), np.float32), *(np.empty(shape) for _ in range(5)))
    for t in range(-args.warmup, args.draws):
        white = draw("standard_normal", DIM)  # root^T v
        # A jittered step keeps a trajectory from being a near-period of one of the 650 oscillators.
        h = args.step * (1 + args.jitter * (2 * draw("random", 1) - 1))  # (C, 1)
        energy = potential + 0.5 * white.square().sum(1)
        q, g, v = params, gradient, white @ root_inv - 0.5 * h * (gradient @ mass_inv)
        for leap in range(args.leapfrog):
            q = q + h * v
            u, g = posterior.potential_and_gradient(q)
            v = v - (h if leap < args.leapfrog - 1 else 0.5 * h) * (g @ mass_inv)
        error = u + 0.5 * (v @ root).square().sum(1) - energy
        accept = draw("random").log() < -error  # (C,); False for NaN
        params = torch.where(accept[:, None], q, params)
        gradient = torch.where(accept[:, None], g, gradient)
        potential = torch.where(accept, u, potential)
        if t >= 0:
            virial = ((params - mode) * gradient).sum(1)
            for store, value in zip(trace, (params, potential, virial, energy, error, accept), strict=True):
                store[t] = value.numpy()
    return trace


def batch_error(batches: np.ndarray) -> np.ndarray:
    """Batch statistics (BATCHES, C, ...) -> Monte-Carlo standard error of their average."""
    return batches.std((0, 1), ddof=1) / np.sqrt(batches.shape[0] * batches.shape[1])


def law_checks(trace: Trace) -> dict[str, float]:
    """Identities that hold exactly under the law, as distances in Monte-Carlo standard errors.

    Adding one number to a feature's weights in all ten classes leaves every likelihood as it was, so each of the 65
    directions sum_k theta_kj / sqrt(10) keeps its N(0, 1) prior; and E[(theta - mode) . grad U] = d, E[exp(-dH)] = 1.
    """
    n, c = trace.potential.shape
    split = (BATCHES, n // BATCHES, c)
    weight_sum = trace.params[:, :, :640].reshape(n, c, CLASSES, FEATURES).sum(2, dtype=np.float64)
    gauge = np.concatenate([weight_sum, trace.params[:, :, 640:].sum(2, keepdims=True, dtype=np.float64)], 2) / 10**0.5
    first, second = gauge.reshape(*split, 65).mean(1), np.square(gauge).reshape(*split, 65).mean(1)  # (B, C, 65)
    virial, ratio = trace.virial.reshape(split).mean(1), np.exp(-trace.error).reshape(split).mean(1)
    return {
        "gauge_mean_z_max": float(np.abs(first.mean((0, 1)) / batch_error(first)).max()),
        "gauge_second_moment_z_max": float(np.abs((second.mean((0, 1)) - 1) / batch_error(second)).max()),
        "virial": float(virial.mean()),
        "virial_z": float((virial.mean() - DIM) / batch_error(virial)),
        "exp_minus_error": float(ratio.mean()),
        "exp_minus_error_z": float((ratio.mean() - 1) / batch_error(ratio)),
    }


def chain_predictive(posterior: Posterior, trace: Trace) -> np.ndarray:
    """Posterior predictive mean of each chain over all its draws -> (C, 360, 10), `posterior` holding the test rows."""
    total = torch.zeros(trace.params.shape[1], CLASSES, len(posterior.x), dtype=torch.float64)
    for draw in trace.params:
        total += posterior.probs(torch.from_numpy(draw).double())
    return (total / len(trace.params)).transpose(1, 2).contiguous().numpy()


def mixing(trace: Trace, test_x: Tensor, every: int) -> dict[str, float]:
    """Rank-normalised split R-hat and ESS of every `every`-th draw: of the params, of U, of all 3600 test logits."""
    params = trace.params[::every]
    rows = class_rows(torch.from_numpy(params.reshape(-1, DIM)))  # (N C, 10, 65)
    axes = {"chain_axis": 1, "draw_axis": 0}
    found: dict[str, list[np.ndarray]] = {}

    def judge(name: str, values: np.ndarray) -> None:  # (N, C, any)
        found.setdefault(f"rhat_{name}", []).append(array_stats.rhat(values, **axes))
        found.setdefault(f"ess_{name}", []).append(array_stats.ess(values, **axes))
        found.setdefault(f"ess_sd_{name}", []).append(array_stats.ess(values, method="sd", **axes))

    judge("potential", trace.potential[::every, :, None])
    for chunk in np.array_split(params, BATCHES, axis=2):
        judge("params", chunk)
    for point in test_x.float():
        judge("logits", (rows @ point).reshape(*params.shape[:2], CLASSES).numpy())
    extreme = {key: np.concatenate(value) for key, value in found.items()}
    result = {
        key + ("_max" if key.startswith("rhat") else "_min"): float(v.max() if key.startswith("rhat") else v.min())
        for key, v in extreme.items()
    }
    result["rhat_max"] = max(v for k, v in result.items() if k.startswith("rhat"))
    result["ess_min"] = min(v for k, v in result.items() if k.startswith("ess"))
    return result


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Mean over points of half the l1 distance, both (360, 10)."""
    return float(0.5 * np.abs(p - q).sum(-1).mean())


def scores(probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, mean negative log-likelihood (nats) and ECE over 15 bins (k/15, (k+1)/15] of max-probability."""
    confidence, hit = probs.max(1), probs.argmax(1) == labels
    bins = np.ceil(confidence * 15).astype(int)
    gaps = [abs(np.sum(hit[bins == b]) - np.sum(confidence[bins == b])) for b in range(1, 16)]
    nll = -np.log(probs[np.arange(len(labels)), labels]).mean()
    return {"accuracy": float(hit.mean()), "nll": float(nll), "ece": float(np.sum(gaps) / len(labels))}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the HMC reference of Bayesian softmax regression on digits.")
    parser.add_argument("--seed", type=int, default=20261125, help="root of the chains' random numbers")
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--draws", type=int, default=30_000, help=f"kept draws per chain, a multiple of {BATCHES}")
    parser.add_argument("--warmup", type=int, default=500, help="dropped draws per chain")
    parser.add_argument("--step", type=float, default=0.25, help="leapfrog step in whitened coordinates")
    parser.add_argument("--jitter", type=float, default=0.2, help="relative half-width of the step's uniform jitter")
    parser.add_argument("--leapfrog", type=int, default=6, help="steps a trajectory")
    parser.add_argument("--start-scale", type=float, default=3.0, help="starts, in Laplace standard deviations")
    parser.add_argument("--diagnose-every", type=int, default=5, help="thinning for R-hat and ESS only")
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    args = parser.parse_args()
    if args.draws < BATCHES or args.draws % BATCHES:
        parser.error(f"--draws is {args.draws}, expected a positive multiple of {BATCHES}")
    return args


def main() -> None:
    args, started = parse_args(), time.perf_counter()
    torch.set_num_threads(1)
    split = split_digits()
    posterior, held_out = Posterior(split.train_x, split.train_y), Posterior(split.test_x, split.test_y)
    mode = find_mode(posterior)
    trace = run_hmc(posterior, mode, args)
    print(f"sampled in {time.perf_counter() - started:.0f} s", file=sys.stderr)

    batches = trace.params.reshape(BATCHES, -1, args.chains, DIM)
    batch_mean = batches.mean(1, dtype=np.float64)  # (B, C, 650)
    mean = batch_mean.mean((0, 1))
    batch_square = np.stack([np.square(b - mean).mean(0) for b in batches])  # (B, C, 650), about the grand mean
    sd = np.sqrt(batch_square.mean((0, 1)))
    errors = batch_error(batch_mean), batch_error(batch_square) / (2 * sd)  # delta method for the sd

    chain_probs = chain_predictive(held_out, trace)
    probs = chain_probs.mean(0)
    pairs = [total_variation(chain_probs[a], chain_probs[b]) for a in range(args.chains) for b in range(a)]
    measured = {
        **scores(probs, split.test_y.numpy()),
        "potential_mean": float(trace.potential.mean()),
        "potential_sd": float(trace.potential.std()),
        "chain_tv_mean": float(np.mean(pairs)),
        "chain_tv_max": float(np.max(pairs)),
    }
    settings = {k: v for k, v in vars(args).items() if k != "out"} | {
        "acceptance": float(trace.accepted.mean()),
        "acceptance_by_chain": [round(float(a), 4) for a in trace.accepted.mean(0)],
        "bfmi_min": float((np.square(np.diff(trace.energy, axis=0)).mean(0) / trace.energy.var(0)).min()),
        "potential_at_mode": float(posterior.potential_and_gradient(mode)[0]),
        **mixing(trace, split.test_x, args.diagnose_every),
        **law_checks(trace),
        "mean_mcse_over_sd_max": float((errors[0] / sd).max()),
        "sd_mcse_over_sd_max": float((errors[1] / sd).max()),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "sklearn": sklearn.__version__,
            "torch": torch.__version__,
        },
    }
    print(json.dumps({"seconds": round(time.perf_counter() - started), **measured, **settings}, indent=2))
    worst_z = max(abs(value) for key, value in settings.items() if "_z" in key)
    if not (settings["rhat_max"] < 1.01 and measured["chain_tv_max"] < 0.003 and worst_z < 5):
        raise SystemExit(f"{args.out} not written: want rhat_max < 1.01, chain_tv_max < .003, |z| < 5; draw more")
    arrays = {"probs": probs, "chain_probs": chain_probs, "mean": mean, "sd": sd, "mode": mode[0].numpy()}
    arrays |= {"mean_mcse": errors[0], "sd_mcse": errors[1]}
    np.savez_compressed(
        args.out,
        **{name: value.astype(np.float32) for name, value in arrays.items()},
        test_rows=split.test_rows.astype(np.int16),
        settings=np.array(json.dumps(settings)),
        **{name: np.float64(value) for name, value in measured.items()},
    )
    print(f"wrote {args.out}: {args.out.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
