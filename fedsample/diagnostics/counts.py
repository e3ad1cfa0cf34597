"""Scores of held-out rows on devices: each device sends counts and sums; their total gives the scores.

Over the draws that it has seen, a device keeps the sum of its rows' class probabilities (M, K); for a Gaussian
likelihood the sum of the means and the logarithm of the summed densities, (M,) each. What it sends identifies no row:

    classes   [rows, correct, sum of -log p_y, sum of sum_c (p_c - I[c = y])^2,
               then for each of 15 bins of the confidence: rows, confidence, correct]
    numbers   [rows, squared error, sum of -log p(y)]

`scores` of the sums over devices equal those of `calibration` on all rows together, up to the order of summation. The
adaptive ECE is no such sum: its bin edges depend on the confidences of all rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsample.diagnostics.calibration import BINS, bin_of
from fedsample.errors import DataError

if TYPE_CHECKING:
    from fedsample.problem import Problem

_NUMBERS = 3  # rows, squared error, negative log-likelihood
_HEAD = 4  # rows, correct, negative log-likelihood, squared distance from the label


class Evaluator:
    """Scores draws on the rows that one device holds out.

    Args:
        problem: the device's problem; without held-out rows every count is zero.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._seen = 0
        self._total: Tensor | None = None  # (M, K) or (M,)
        self._density: Tensor | None = None  # (M,), numbers only

    def see(self, draws: Tensor) -> None:
        """Add draws (S, d), S >= 1, in the model's parameters."""
        self._seen += len(draws)
        if self.problem.test is None:
            return
        predicted = self.problem.predict_test(draws)
        if self.problem.likelihood == "gaussian":
            exponents = -0.5 * ((predicted - self.problem.test[1]) / self.problem.noise_scale).square()
            density = torch.logsumexp(exponents, dim=0)
            self._density = density if self._density is None else torch.logaddexp(self._density, density)
            predicted = predicted.sum(0)
        self._total = predicted if self._total is None else self._total + predicted

    def counts(self) -> Tensor:
        """Return what is sent: (3,) or (4 + 45,) float64 on the CPU, zeros without held-out rows.

        Raises:
            DataError: if no draw has been seen.
        """
        if not self._seen:
            raise DataError("no draw has been seen: there is nothing to score yet")
        if self.problem.test is None or self._total is None:
            return torch.zeros(length(self.problem.likelihood), dtype=torch.float64)
        mean, labels = self._total / self._seen, self.problem.test[1]
        if self._density is not None:
            scale = self.problem.noise_scale
            constant = math.log(self._seen * scale) + 0.5 * math.log(2 * math.pi)
            parts = [mean.new_tensor(len(labels)), (mean - labels).square().sum(), (constant - self._density).sum()]
            return torch.stack(parts).cpu()
        return _class_counts(mean, labels.to(torch.int64)).cpu()

    def state(self) -> dict[str, Tensor]:
        """Return the state that `restore` needs."""
        state = {"seen": torch.tensor(self._seen, dtype=torch.int64)}
        if self._total is not None:
            state["total"] = self._total.clone()
        if self._density is not None:
            state["density"] = self._density.clone()
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore the state of an evaluator with the same held-out rows.

        Raises:
            DataError: if the state belongs to other rows or another model.
        """
        test, gaussian = self.problem.test, self.problem.likelihood == "gaussian"
        seen = int(state["seen"]) if "seen" in state else -1
        names = {"seen"}
        if test is not None and seen > 0:
            names |= {"total", "density"} if gaussian else {"total"}
        rows = 0 if test is None else len(test[0])
        shapes = {name: tuple(state[name].shape[:1]) for name in names - {"seen"} if name in state}
        if seen < 0 or set(state) != names or any(shape != (rows,) for shape in shapes.values()):
            raise DataError(
                f"the saved scores hold {sorted(state)} of {shapes} rows, expected {sorted(names)} of {rows}: this "
                "device's held-out rows have changed; start the run again"
            )
        self._seen = seen
        device = self.problem.clients.device
        self._total = state["total"].to(device).clone() if "total" in state else None
        self._density = state["density"].to(device).clone() if "density" in state else None


def length(likelihood: str | None) -> int:
    """Number of values that a device sends; 0 for a target that predicts nothing."""
    return {None: 0, "gaussian": _NUMBERS}.get(likelihood, _HEAD + 3 * BINS)


def scores(counts: Tensor, likelihood: str | None) -> dict[str, float | None]:
    """Compute the scores of all devices' held-out rows: accuracy, nll, brier, ece, or rmse, nll; None without rows.

    Args:
        counts: the sum over devices of `Evaluator.counts`.
        likelihood: the model's likelihood; None: nothing is predicted, and there are no scores.

    Raises:
        DataError: if the length is wrong, the number of rows is not a whole number >= 0, or counts do not fit it.
            NaN, which a diverged chain predicts, stays NaN.
    """
    if likelihood is None:
        return {}
    gaussian = likelihood == "gaussian"
    values = counts.to(torch.float64)
    if tuple(values.shape) != (length(likelihood),):
        raise DataError(
            f"got counts of shape {tuple(values.shape)}, expected ({length(likelihood)},): one version only"
        )
    rows, second, nll = values[:_NUMBERS].tolist()
    whole = math.isfinite(rows) and rows >= 0 and rows == int(rows)
    if not whole or second < 0 or (not gaussian and second > rows):
        what = "of squared error" if gaussian else "correct"
        raise DataError(f"got counts of {rows} rows, {second} {what}: expected whole rows, and numbers that fit them")
    if not rows:
        return dict.fromkeys(("rmse", "nll") if gaussian else ("accuracy", "nll", "brier", "ece"))
    if gaussian:
        return {"rmse": math.sqrt(second / rows), "nll": nll / rows}
    _, confidence, correct = values[_HEAD:].view(3, BINS)
    return {
        "accuracy": second / rows,
        "nll": nll / rows,
        "brier": float(values[_HEAD - 1]) / rows,
        "ece": float((correct - confidence).abs().sum()) / rows,
    }


def _class_counts(probabilities: Tensor, labels: Tensor) -> Tensor:
    """(M, K) float64 and (M,) -> (4 + 45,), with the bins of `calibration.ece`."""
    confidence, choice = probabilities.max(dim=1)
    correct = (choice == labels).to(torch.float64)
    nll = -probabilities.gather(1, labels[:, None]).log()
    distance = probabilities - torch.nn.functional.one_hot(labels, probabilities.shape[1])
    columns = torch.stack([torch.ones_like(confidence), confidence, correct], dim=1)  # (M, 3)
    bins = torch.zeros(BINS, 3, dtype=torch.float64, device=labels.device).index_add_(0, bin_of(confidence), columns)
    head = torch.stack([correct.new_tensor(len(labels)), correct.sum(), nll.sum(), distance.square().sum()])
    return torch.cat([head, bins.T.flatten()])
