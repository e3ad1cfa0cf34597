"""The parts of an experiment put together: the simulated fleet, the sampler, and what of them does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedsample.config import Experiment
from fedsample.errors import ConfigError
from fedsample.estimators.links import links, refresh_of
from fedsample.fleets.engines import choose_engine
from fedsample.fleets.faults import Faults, Recorded
from fedsample.fleets.local import LocalFleet
from fedsample.monitor.progress import Progress
from fedsample.numerics.dtypes import DTYPES
from fedsample.preparation.prepare import prepare
from fedsample.preparation.prepared import Prepared
from fedsample.problem import Problem, build_problem
from fedsample.protocol.exchange import Fleet
from fedsample.strategies import SAMPLERS, Cohort, Sampler, Stability, State
from fedsample.strategies.schedule import schedule_of
from fedsample.targets.metric import MOST_DENSE


def build_fleet(
    experiment: Experiment,
    problem: Problem,
    arrivals: Mapping[int, Sequence[int]] | None = None,
    *,
    strict: bool = False,
) -> LocalFleet:
    """The simulated federation of an experiment.

    Args:
        experiment: its settings. problem: its clients. arrivals: the clients that took part in rounds by number; None:
            as the settings say. strict: as for `choose_engine`.
    """
    section = experiment.fleet
    clients = problem.clients
    faults = Faults(clients.n, experiment.seed, section.loss, section.dropout, section.dropout_rounds)
    if arrivals is not None:
        faults = Recorded(**vars(faults), arrivals=arrivals)
    uplink, downlink = links(experiment, problem)
    engine = choose_engine(
        clients,
        section.engine,
        chains=experiment.chains,
        batch_size=experiment.batch_size,
        tune=section.tune,
        strict=strict,
    )
    return LocalFleet(
        clients,
        uplink,
        experiment.seed,
        experiment.chains,
        batch_size=experiment.batch_size,
        engine=engine,
        faults=faults,
        downlink=downlink,
    )


def build_sampler(experiment: Experiment, problem: Problem, prepared: Prepared, n: int) -> Sampler:
    """The server's half of an experiment, once its geometry is known."""
    extra = {"friction": experiment.sampler.friction} if experiment.sampler.name == "baoab" else {}
    uplink, downlink = links(experiment, problem)
    return SAMPLERS[experiment.sampler.name](
        uplink,
        problem.prior,
        prepared.geometry.metric,
        step_size=schedule_of(experiment, prepared.step_size),
        temperature=experiment.temperature,
        seed=experiment.seed,
        cohort=Cohort(n, experiment.chains, experiment.seed, experiment.fleet.participation),
        stability=Stability(prepared.geometry.curvature, prepared.forecast.limit, prepared.radius),
        downlink=downlink,
        refresh=refresh_of(experiment),
        anchor=prepared.geometry.gradient,
        **extra,
    )


def check_size(experiment: Experiment, problem: Problem) -> None:
    """Refuse what does not fit the number of parameters or of clients.

    Raises:
        ConfigError: a dense metric for too many parameters, more coordinates on the wire than there are, or a cohort of
            more clients.
    """
    if experiment.metric.name == "hessian" and problem.d > MOST_DENSE:
        raise ConfigError(
            f"metric.name = 'hessian' needs a matrix of {problem.d} x {problem.d} entries on every client; "
            f"choose kronecker or diagonal above {MOST_DENSE:,} parameters"
        )
    uplink, downlink = links(experiment, problem)
    dtype = DTYPES[experiment.dtype]
    uplink.bits(1, 0, problem.d, dtype)  # refuses settings that do not fit d
    downlink.bits(torch.ones(1, dtype=torch.int64), 1, problem.d, dtype)
    Cohort(problem.clients.n, experiment.chains, experiment.seed, experiment.fleet.participation)


@dataclass
class Assembled:
    """A simulated chain before its first round, without a run directory: for benchmarks and studies.

    Attributes:
        problem: what is sampled. fleet: the clients. prepared: what is fixed. sampler: the server. state: now.
    """

    problem: Problem
    fleet: LocalFleet
    prepared: Prepared
    sampler: Sampler
    state: State

    def round(self, fleet: Fleet | None = None) -> None:
        """One round, with its own clients or with others that stand for the same."""
        request = self.sampler.request(self.state)
        self.state = self.sampler.update(self.state, request, (fleet or self.fleet).exchange(request))


def assemble(experiment: Experiment) -> Assembled:
    """Everything up to the first round.

    Raises:
        DataError, ConfigError: as for a run.
    """
    problem = build_problem(experiment)
    check_size(experiment, problem)
    fleet = build_fleet(experiment, problem)
    prepared = prepare(experiment, problem, fleet, Progress(1, 0, "quiet"))
    sampler = build_sampler(experiment, problem, prepared, fleet.n)
    return Assembled(problem, fleet, prepared, sampler, sampler.begin(prepared.start))
