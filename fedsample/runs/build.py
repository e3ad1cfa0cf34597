"""Build the parts of an experiment: the simulated fleet, the driver of its chains, and checks of their sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedsample.config import Experiment
from fedsample.errors import ConfigError
from fedsample.estimators import Links, build_links
from fedsample.estimators.links import refresh_of
from fedsample.fleets.engines import choose_engine
from fedsample.fleets.faults import Faults, Recorded
from fedsample.fleets.local import LocalFleet
from fedsample.monitor.progress import Progress
from fedsample.numerics.dtypes import DTYPES
from fedsample.preparation.prepare import prepare
from fedsample.preparation.prepared import Prepared
from fedsample.problem import Problem, build_problem
from fedsample.protocol.exchange import Fleet
from fedsample.strategies import SAMPLERS, Cohort, Driver, Stability, State, options_of
from fedsample.strategies.schedule import schedule_of
from fedsample.targets.metric import MOST_DENSE


def build_fleet(
    experiment: Experiment,
    problem: Problem,
    links: Links,
    arrivals: Mapping[int, Sequence[int]] | None = None,
    *,
    strict: bool = False,
) -> LocalFleet:
    """Build the simulated federation of an experiment.

    Args:
        experiment: its settings.
        problem: holds the clients.
        links: uplink and downlink.
        arrivals: by round, the clients that took part, to replay a run; None: as the settings say.
        strict: see `choose_engine`.
    """
    section = experiment.fleet
    clients = problem.clients
    faults = Faults(clients.n, experiment.seed, section.loss, section.dropout, section.dropout_rounds)
    if arrivals is not None:
        faults = Recorded(**vars(faults), arrivals=arrivals)
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
        links.uplink,
        experiment.seed,
        experiment.chains,
        batch_size=experiment.batch_size,
        engine=engine,
        faults=faults,
        downlink=links.downlink,
    )


def build_driver(experiment: Experiment, problem: Problem, links: Links, prepared: Prepared, n: int) -> Driver:
    """Build the server's half of an experiment, once its geometry is known."""
    sampler = SAMPLERS[experiment.sampler.name](
        step_size=schedule_of(experiment.step_size, prepared.step_size),
        temperature=experiment.temperature,
        seed=experiment.seed,
        **options_of(experiment.sampler),
    )
    return Driver(
        sampler,
        links,
        problem.prior,
        prepared.geometry.metric,
        cohort=Cohort(n, experiment.chains, experiment.seed, experiment.fleet.participation),
        stability=Stability(prepared.geometry.curvature, prepared.forecast.limit, prepared.radius),
        refresh=refresh_of(experiment),
        anchor=prepared.geometry.gradient,
    )


def check_size(experiment: Experiment, problem: Problem, links: Links) -> None:
    """Refuse settings that do not fit the number of parameters or of clients.

    Raises:
        ConfigError: a dense metric for too many parameters, more coordinates on the wire than there are, or a cohort of
            more clients.
    """
    if experiment.metric.name == "hessian" and problem.d > MOST_DENSE:
        raise ConfigError(
            f"metric.name = 'hessian' needs a matrix of {problem.d} x {problem.d} entries on every client; "
            f"choose kronecker or diagonal above {MOST_DENSE:,} parameters"
        )
    dtype = DTYPES[experiment.dtype]
    links.uplink.bits(1, 0, problem.d, dtype)  # refuses settings that do not fit d
    links.downlink.bits(torch.ones(1, dtype=torch.int64), 1, problem.d, dtype)
    Cohort(problem.clients.n, experiment.chains, experiment.seed, experiment.fleet.participation)


@dataclass
class Assembled:
    """A simulated chain before its first round, without a run directory: for benchmarks and studies.

    Attributes:
        problem: what is sampled.
        links: uplink and downlink.
        fleet: the clients.
        prepared: metric, step and starting points.
        driver: the server's half.
        state: the current state of the chains.
    """

    problem: Problem
    links: Links
    fleet: LocalFleet
    prepared: Prepared
    driver: Driver
    state: State

    def round(self, fleet: Fleet | None = None) -> None:
        """Run one round, with its own clients or with another fleet of the same clients."""
        request = self.driver.request(self.state)
        self.state = self.driver.update(self.state, request, (fleet or self.fleet).exchange(request))


def assemble(experiment: Experiment) -> Assembled:
    """Build and prepare an experiment, up to its first round.

    Raises:
        DataError, ConfigError: as for a run.
    """
    problem = build_problem(experiment)
    links = build_links(experiment, problem.clients)
    check_size(experiment, problem, links)
    fleet = build_fleet(experiment, problem, links)
    prepared = prepare(experiment, problem, links, fleet, Progress(1, 0, "quiet"))
    driver = build_driver(experiment, problem, links, prepared, fleet.n)
    return Assembled(problem, links, fleet, prepared, driver, driver.begin(prepared.start))
