"""Metrics computed while a run goes on: the curves of `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsample.diagnostics.convergence import worst_rhat_and_ess
from fedsample.diagnostics.counts import Evaluator, scores
from fedsample.monitor.tensorboard import quantiles
from fedsample.protocol.exchange import Aggregate

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.problem import Problem
    from fedsample.strategies import Driver, State

_GROWTH = 2.0  # R-hat and ESS are computed again when there are this many times more draws
_PENDING = 4096  # draws that may wait for the recorder's thread


class LiveMetrics:
    """Metrics of a running chain; the costly part is computed in the recorder's thread.

    Args:
        problem: what is sampled.
        experiment: its configuration.
    """

    def __init__(self, problem: Problem, experiment: Experiment) -> None:
        self._problem, self._experiment = problem, experiment
        self._fresh: deque[tuple[int, Tensor]] = deque(maxlen=_PENDING)  # with their rounds
        self._functionals: list[Tensor] = []  # (C, F) per draw
        self._evaluator = Evaluator(problem)
        self._judged = 0
        self._lock = threading.Lock()

    @property
    def headline(self) -> tuple[str, ...]:
        """Tags of the metrics by which runs are compared."""
        chains = ("mcmc/rhat/max", "mcmc/ess/min")
        if self._problem.test is None:
            return chains
        if self._problem.likelihood == "gaussian":
            return ("round/rmse", "round/nll", *chains)
        return ("round/accuracy", "round/nll", "round/ece", *chains)

    def see(self, round: int, draw: Tensor) -> None:
        """Add the draw (C, d) of a round."""
        self._fresh.append((round, draw))

    def scalars(
        self, driver: Driver, before: State, state: State, aggregate: Aggregate, clients: int
    ) -> dict[str, float]:
        """Compute the cheap metrics: log posterior, step, drift against noise, quantiles over clients."""
        result = {
            "mcmc/step_size": driver.sampler.step_at(state.round),
            "fleet/arrived": float(aggregate.arrived.sum()) / clients,
        }
        if "value" in aggregate.sums:
            potential = aggregate.sums["value"].cpu() + driver.prior.potential(before.seen).cpu()
            result["mcmc/log_posterior"] = -float(potential.mean())
        if driver.sampler.temperature > 0:
            move = (state.params - before.params).to(torch.float64)
            scale = driver.sampler.noise_scale(driver.sampler.step_at(state.round))
            noise = scale * math.sqrt(move.shape[-1])  # root mean square length of a step's noise
            result["mcmc/move_to_noise"] = float(move.norm(dim=-1).mean()) / noise
            result["mcmc/drift_to_noise"] = driver.drift(before, state) / noise
        if aggregate.norms is not None:
            result |= quantiles("client/upload_norm", aggregate.norms)
        return result

    def job(self, round: int) -> Callable[[], dict[str, float]] | None:
        """Return what a thread has to compute for the curves: scores of predictions, and now and then R-hat and ESS."""
        return partial(self._look, round) if self._fresh else None

    def _look(self, round: int) -> dict[str, float]:
        """Compute the metrics from the draws up to a round; later draws belong to later rows."""
        torch.set_num_threads(1)  # the setting is per thread, and the chain needs the other core
        with self._lock:
            fresh = []
            while self._fresh and self._fresh[0][0] <= round:
                fresh.append(self._fresh.popleft()[1])
            if not fresh:
                return {}
            draws = torch.cat(fresh)  # (S C, d)
            functionals = self._problem.functionals(draws)
            self._functionals += functionals.unflatten(0, (len(fresh), -1)).unbind(0)
            self._evaluator.see(draws)
            found = scores(self._evaluator.counts(), self._problem.likelihood)
            result = {f"round/{name}": score for name, score in found.items() if score is not None}
            count = len(self._functionals)
            if count >= 8 and (count >= _GROWTH * self._judged or round == self._experiment.rounds):
                self._judged = count
                rhat, ess = worst_rhat_and_ess(torch.stack(self._functionals, dim=1))
                result |= {"mcmc/rhat/max": rhat, "mcmc/ess/min": ess}
            return result
