"""What a run says about itself: curves while it goes, and the summary at its end."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsample.diagnostics import calibration
from fedsample.diagnostics.convergence import rhat_and_ess
from fedsample.diagnostics.counts import Evaluator, scores
from fedsample.doubts import doubts
from fedsample.monitor.tensorboard import quantiles
from fedsample.protocol.exchange import Aggregate, Traffic

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.monitor.draws import DrawStore
    from fedsample.preparation.prepared import Prepared
    from fedsample.problem import Problem
    from fedsample.strategies import Sampler, State

_GROWTH = 2.0  # R-hat and ESS are renewed when there are so many times more draws
_PENDING = 4096  # draws that may wait for the thread that looks at them
_BLOCK = 1 << 25  # entries of draws looked at together in the summary


class Watch:
    """Follows the draws of a running chain; the costly part runs in the recorder's thread.

    Args:
        problem: what is sampled. experiment: its configuration.
    """

    def __init__(self, problem: Problem, experiment: Experiment) -> None:
        """Nothing seen yet."""
        self._problem, self._experiment = problem, experiment
        self._fresh: deque[tuple[int, Tensor]] = deque(maxlen=_PENDING)  # with their rounds
        self._functionals: list[Tensor] = []  # (C, F) a draw
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
        """The draw (C, d) of a round."""
        self._fresh.append((round, draw))

    def scalars(
        self, sampler: Sampler, before: State, state: State, aggregate: Aggregate, clients: int
    ) -> dict[str, float]:
        """What costs nothing: log posterior, step, drift against noise, quantiles over clients."""
        result = {
            "mcmc/step_size": sampler.step_at(state.round),
            "fleet/arrived": float(aggregate.arrived.sum()) / clients,
        }
        if "value" in aggregate.sums:
            potential = aggregate.sums["value"].cpu() + sampler.prior.potential(before.seen).cpu()
            result["mcmc/log_posterior"] = -float(potential.mean())
        if sampler.temperature > 0:
            move = (state.params - before.params).to(torch.float64)
            noise = math.sqrt(2 * sampler.step_at(state.round) * sampler.temperature * move.shape[-1])
            result["mcmc/move_to_noise"] = float(move.norm(dim=-1).mean()) / noise
            result["mcmc/drift_to_noise"] = sampler.drift(before, state) / noise
        if aggregate.norms is not None:
            result |= quantiles("client/upload_norm", aggregate.norms)
        return result

    def job(self, round: int) -> Callable[[], dict[str, float]] | None:
        """What is to be computed in a thread for the curves: predictions so far, now and then R-hat and ESS."""
        return partial(self._look, round) if self._fresh else None

    def _look(self, round: int) -> dict[str, float]:
        """At the draws up to a round: later ones, which the chain may have made meanwhile, belong to later rows."""
        torch.set_num_threads(1)  # the setting is a thread's own, and the chain needs the other core
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
                result |= _convergence(torch.stack(self._functionals, dim=1), "mcmc/rhat/max", "mcmc/ess/min")
            return result


def _convergence(functionals: Tensor, rhat_name: str, ess_name: str) -> dict[str, float]:
    """Worst R-hat and smallest bulk ESS over functionals (C, n, F), constant ones left out."""
    worst, smallest = (torch.from_numpy(each) for each in rhat_and_ess(functionals))
    worst, smallest = worst[worst.isfinite()], smallest[smallest.isfinite()]
    return {
        rhat_name: float(worst.max()) if len(worst) else math.nan,
        ess_name: float(smallest.min()) if len(smallest) else math.nan,
    }


def summarise(
    problem: Problem, experiment: Experiment, prepared: Prepared, traffic: Traffic, seconds: float, store: DrawStore
) -> dict[str, Any]:
    """`summary.json`: what was drawn, how good it is, and what it cost."""
    draws = store.load().to(problem.clients.device)  # (C, n, d)
    chains, count, d = draws.shape
    n = problem.clients.n
    total = traffic.plus(prepared.geometry.traffic)
    done = max(1, experiment.rounds)
    functionals = _functionals(problem, draws)
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
        **_convergence(functionals, "rhat_max", "ess_bulk_min"),
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
    return result | {"warnings": doubts(experiment, result)}


def _prediction(experiment: Experiment, value: float) -> float | None:
    """Predictions are for full gradients, a positive temperature, and absences that do not last."""
    unforeseen = experiment.batch_size is not None or experiment.fleet.dropout > 0
    return None if experiment.temperature == 0 or unforeseen else _number(value)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _functionals(problem: Problem, draws: Tensor) -> Tensor:
    """(C, n, F) float64 of draws (C, n, d)."""
    chains, count, d = draws.shape
    size = max(1, _BLOCK // max(1, d))
    flat = draws.reshape(-1, d)
    functionals = torch.cat([problem.functionals(block) for block in flat.split(size)])
    return functionals.view(chains, count, -1)


def _quality(problem: Problem, draws: Tensor) -> dict[str, float | None]:
    """Scores of the averaged predictions on held-out rows."""
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
        return {"accuracy": None, "nll": None, "ece": None}
    predictive = problem.predict_test(flat) / len(flat)
    labels = problem.test[1]
    return {
        "accuracy": calibration.accuracy(predictive, labels),
        "nll": calibration.nll(predictive, labels),
        "ece": calibration.ece(predictive, labels),
    }
