"""The Flower half of every sampler: `flwr.serverapp.strategy.Strategy`, once for all of them, over messages.

    configure_train   arrays -> state, request(state) -> one message to each client that is asked
    aggregate_train   replies -> sums over clients -> update(state, ...) -> arrays

The arrays that Flower carries from round to round are the whole state of the chains, beside `params`, their positions
in the model's own parameters (C, d). So `Result.arrays` of one `start` are the `initial_arrays` of the next, and chains
go on where they stood, whatever number Flower gives the round.
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
    """A round between its two halves."""

    state: State
    dispatch: Dispatch


class FlowerStrategy(Strategy):
    """Any sampler as Flower asks of a strategy.

    In `start`, `train_config` may hold `observe-every`: in how many rounds metrics are returned, with the log posterior
    where the round began, asked for along with the estimates; 100 by default. `evaluate_config` may hold `every`: in
    how many rounds the log posterior is asked for where the round ended, in a message of its own; by default in none.

    Args:
        driver: the chains, seen from the server.

    Attributes:
        traffic: bits on the wire so far, arrays only, preparation not included.
    """

    def __init__(self, driver: Driver) -> None:
        """Nothing is sent yet."""
        self.driver = driver
        self.traffic = Traffic()
        self._fleet: FlowerFleet | None = None
        self._pending: _Pending | None = None
        self._asked: Dispatch | None = None

    def begin(self, params: Tensor) -> State:
        """The state before round 1, at positions (C, d) in the metric's coordinates."""
        return self.driver.begin(params)

    def draw(self, state: State) -> Tensor:
        """The chains' positions as parameters theta (C, d)."""
        return self.driver.draw(state)

    # --- states as arrays ------------------------------------------------------------------------------------------

    def use(self, fleet: FlowerFleet) -> None:
        """Send messages through a fleet that has prepared the clients; otherwise one is made in the first round."""
        self._fleet = fleet

    def arrays(self, state: State) -> ArrayRecord:
        """A state as Flower carries it: give those of `begin` to `start`."""
        tensors = {PARAMS: self.draw(state)} | {f"{_STATE}{name}": each for name, each in state.tensors().items()}
        return ArrayRecord({name: Array(each.cpu().numpy()) for name, each in tensors.items()})

    def state_of(self, arrays: ArrayRecord) -> State:
        """Back from `arrays`; from `params` alone, (C, d) in the model's own parameters, chains begin.

        Raises:
            DataError: if the arrays are no chains of this target.
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
            return State.of_tensors(tensors, mean.device)
        except KeyError as error:
            raise DataError(
                f"a state without {error}: pass on all arrays of an earlier start, or params alone"
            ) from error

    # --- Flower's Strategy -----------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message to each client that the next round asks."""
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
        """The chains after the round, and what it cost.

        Raises:
            ClientError: if a client failed. QuorumError: if one did not answer. DivergenceError: if a chain diverged.
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
        """A question for the potential at the chains' positions, in every so many rounds; by default never."""
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
            ClientError: if a client failed. QuorumError: if one did not answer.
        """
        if self._asked is None or self._fleet is None:
            return None
        dispatch, self._asked = self._asked, None
        aggregate = self._fleet.gather(dispatch, replies)
        return MetricRecord({"log-posterior": self._log_posterior(dispatch.request, aggregate)})

    def summary(self) -> None:
        """Log what will be sampled, and how."""
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
        """The state once all clients have lost their memories."""
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
