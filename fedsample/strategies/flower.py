"""Flower strategy for every sampler: `flwr.serverapp.strategy.Strategy`, implemented once, over messages.

    configure_train   arrays -> state, request(state) -> one message to each client that is asked
    aggregate_train   replies -> sums over clients -> update(state, ...) -> arrays

The arrays that Flower carries from round to round are the whole state of the chains, together with `params`, their
positions in the model's own parameters (C, d). So `Result.arrays` of one `start` can be the `initial_arrays` of the
next, and the chains continue, whatever number Flower gives the round.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsample.errors import ConfigError, DataError
from fedsample.fleets.flower.fleet import FlowerFleet
from fedsample.fleets.remote import Dispatch, Federation
from fedsample.protocol.exchange import Aggregate, Request, Traffic
from fedsample.strategies.driver import Driver
from fedsample.strategies.state import State

if TYPE_CHECKING:
    from flwr.serverapp import Grid

PARAMS = "params"
EVALUATE = "evaluate"  # Flower's message type
_STATE = "state."
_OBSERVE = 100


class _Pending(NamedTuple):
    """A round whose replies have not been aggregated yet."""

    state: State
    dispatch: Dispatch


class FlowerStrategy(Strategy):
    """Any sampler as a Flower strategy.

    In `start`, `train_config` may hold `observe-every`: metrics are returned every so many rounds (100 by default),
    with the log posterior at the start of the round, which the request for estimates also asks for. `evaluate_config`
    may hold `every`: every so many rounds a separate message asks for the log posterior at the end of the round; by
    default never.

    Args:
        driver: the server side of the chains.

    Attributes:
        traffic: bits on the wire so far, arrays only, preparation not included.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.traffic = Traffic()
        self._fleet: FlowerFleet | None = None
        self._pending: _Pending | None = None
        self._asked: Dispatch | None = None

    def begin(self, params: Tensor) -> State:
        """Create the state before round 1, at positions (C, d) in the metric's coordinates."""
        return self.driver.begin(params)

    def draw(self, state: State) -> Tensor:
        """The chains' positions as parameters theta (C, d)."""
        return self.driver.draw(state)

    # --- states as arrays ------------------------------------------------------------------------------------------

    def use(self, fleet: FlowerFleet) -> None:
        """Send messages through this fleet, which has prepared the clients; otherwise the first round makes one."""
        self._fleet = fleet

    def arrays(self, state: State) -> ArrayRecord:
        """Encode a state as Flower arrays; pass those of `begin` to `start`."""
        tensors = {PARAMS: self.draw(state)} | {f"{_STATE}{name}": each for name, each in state.tensors().items()}
        return ArrayRecord({name: Array(each.cpu().numpy()) for name, each in tensors.items()})

    def state_of(self, arrays: ArrayRecord) -> State:
        """Decode a state from `arrays`; `params` alone, (C, d) in the model's own parameters, starts new chains.

        Raises:
            DataError: if the arrays do not fit this target.
        """
        mean = self.driver.metric.mean
        shape = (self.driver.cohort.chains, len(mean))
        if PARAMS not in arrays or tuple(arrays[PARAMS].shape) != shape:
            got = {name: list(array.shape) for name, array in arrays.items()}
            raise DataError(f"got the arrays {got}, expected {PARAMS!r} of shape {list(shape)}: (chains, parameters)")
        tensors = {name.removeprefix(_STATE): torch.from_numpy(array.numpy()) for name, array in arrays.items()}
        if len(tensors) == 1:
            return self.begin(self.driver.metric.invert(tensors[PARAMS].to(mean.dtype).to(mean.device)))
        try:
            state = State.of_tensors(tensors, mean.device)
            self.driver.held(state)  # refuses another sampler's before any client computes
            return state
        except KeyError as error:
            raise DataError(
                f"a state without {error}: pass on all arrays of an earlier start, or params alone"
            ) from error

    # --- Flower's Strategy -----------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send one message to each client that takes part in the next round."""
        state = self.state_of(arrays)
        fleet = self._fleet_on(grid)
        if not fleet.fresh and (state.round == 0 or not fleet.holds(self.driver.metric)):
            self.traffic = self.traffic.plus(fleet.set_metric(self.driver.metric))
            state = self._forgotten(state)
        request = self.driver.request(state, observe=_due(config, "observe-every", _OBSERVE, state.round + 1))
        content, dispatch = fleet.dispatch(request)
        self._pending = _Pending(state, dispatch)
        return content

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the chains after the round, and the round's metrics if it is observed.

        Raises:
            ClientError: if a client failed.
            QuorumError: if one did not answer.
            DivergenceError: if a chain diverged.
            ConfigError: if `configure_train` was not called before.
        """
        if self._pending is None or self._fleet is None:
            raise ConfigError("aggregate_train without configure_train: nothing was asked")
        (state, dispatch), self._pending = self._pending, None
        aggregate = self._fleet.gather(dispatch, replies)
        self.traffic = self.traffic.plus(aggregate.traffic)
        after = self.driver.update(state, dispatch.request, aggregate)
        self.driver.check(after.params, after.round)
        return self.arrays(after), self._metrics(dispatch.request, aggregate) if dispatch.request.observe else None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for the potential at the chains' positions every `every` rounds; by default never."""
        state = self.state_of(arrays)
        self._asked = None
        if not _due(config, "every", 0, state.round):
            return []
        question = Request(state.round, state.params, frozenset({"value"}))
        content, self._asked = self._fleet_on(grid).dispatch(question, EVALUATE)
        return content

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The mean log posterior of the chains, up to a constant.

        Raises:
            ClientError: if a client failed.
            QuorumError: if one did not answer.
        """
        if self._asked is None or self._fleet is None:
            return None
        dispatch, self._asked = self._asked, None
        aggregate = self._fleet.gather(dispatch, replies)
        return MetricRecord({"log-posterior": self._log_posterior(dispatch.request, aggregate)})

    def summary(self) -> None:
        """Log the sampler, links, metric and federation."""
        log = logging.getLogger("flwr")
        sampler, uplink, cohort = self.driver.sampler, self.driver.uplink, self.driver.cohort
        log.info("\t├──> %s, step %.4g, temperature %g", sampler.name, sampler.step_size, sampler.temperature)
        log.info("\t├──> uplink %s + %s", uplink.name, uplink.compressor.name)
        log.info("\t├──> metric %s, %d parameters", self.driver.metric.name, len(self.driver.metric.mean))
        log.info("\t└──> %d chains, %d clients, participation %g", cohort.chains, cohort.n, cohort.size)

    # --- the clients -----------------------------------------------------------------------------------------------

    def _fleet_on(self, grid: Grid) -> FlowerFleet:
        if self._fleet is None or self._fleet.grid is not grid:
            driver, cohort = self.driver, self.driver.cohort
            federation = Federation(
                cohort.n, driver.uplink, driver.sampler.seed, cohort.chains, driver.metric.mean, driver.downlink
            )
            self._fleet = FlowerFleet(grid, federation)
        return self._fleet

    def _forgotten(self, state: State) -> State:
        """The state after all clients have lost their memories."""
        if state.round == 0:
            return state
        return state._replace(uplink=self.driver.uplink.forget(state.uplink), epoch=state.epoch + 1)

    def _metrics(self, request: Request, aggregate: Aggregate) -> MetricRecord:
        metrics = MetricRecord(
            {
                "round": request.round,
                "arrived": int(aggregate.arrived.sum()),
                "uplink-bytes": self.traffic.up // 8,
                "downlink-bytes": self.traffic.down // 8,
            }
        )
        if "value" in aggregate.sums:
            metrics["log-posterior"] = self._log_posterior(request, aggregate)
        return metrics

    def _log_posterior(self, request: Request, aggregate: Aggregate) -> float:
        return -float((aggregate.sums["value"].cpu() + self.driver.prior.potential(request.points).cpu()).mean())


def _due(config: ConfigRecord, name: str, default: int, round: int) -> bool:
    every = config.get(name, default)
    if not isinstance(every, int) or isinstance(every, bool) or every < 0:
        raise ConfigError(f"{name} = {every!r} in the strategy's configuration; expected a number of rounds, 0: never")
    return every > 0 and round % every == 0
