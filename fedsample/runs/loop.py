"""The loop over rounds: ask the clients, move the chains, record, and save at intervals."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fedsample.errors import Interrupted
from fedsample.protocol.exchange import Aggregate, Fleet, Traffic
from fedsample.protocol.recovery import Fork, Recovers
from fedsample.strategies import Driver, State

if TYPE_CHECKING:
    from torch import Tensor

    from fedsample.config import Experiment
    from fedsample.monitor.checkpoint import CheckpointStore
    from fedsample.monitor.directory import RunDirectory
    from fedsample.monitor.draws import DrawStore
    from fedsample.monitor.progress import Progress
    from fedsample.monitor.tensorboard import Recorder
    from fedsample.runs.live_metrics import LiveMetrics

_CHECKPOINT_SHARE = 0.02  # largest share of the time spent on checkpoints


@dataclass
class Clock:
    """Seconds spent, by phase."""

    exchange: float = 0.0
    server: float = 0.0
    record: float = 0.0
    before: float = 0.0  # seconds before the last start or rollback of this run

    @property
    def total(self) -> float:
        """Seconds that the run has taken, including earlier stretches."""
        return self.exchange + self.server + self.record + self.before


@dataclass(frozen=True)
class Parts:
    """The objects that a round uses.

    Attributes:
        driver: the server's half of the chains.
        fleet: the clients.
        checkpoints: stores checkpoints.
        draws: stores draws.
        recorder: writes curves.
        metrics: computes metrics of the draws while they are made.
        progress: shows the user how far the run is.
    """

    driver: Driver
    fleet: Fleet
    checkpoints: CheckpointStore
    draws: DrawStore
    recorder: Recorder
    metrics: LiveMetrics
    progress: Progress


class Keeper(Protocol):
    """What a loop needs of its run: whether to stop, checkpoints, and a log of forks."""

    scores: dict[str, float]

    @property
    def experiment(self) -> Experiment:
        """The configuration."""
        ...

    @property
    def directory(self) -> RunDirectory:
        """The run directory."""
        ...

    @property
    def forks(self) -> frozenset[int]:
        """Rounds before which the chain forks, when a run replays another."""
        ...

    @property
    def stopped(self) -> str | None:
        """The name of the signal that asked the run to end; None: none did."""
        ...

    @property
    def advice(self) -> str:
        """How to continue the run: the command to type."""
        ...

    def forked(self, driver: Driver, state: State, clients: Sequence[int]) -> State:
        """Return the state after some clients have lost their memories for good; log it if it changes the chain."""
        ...

    def save(
        self,
        store: CheckpointStore,
        state: State,
        kept: dict[str, Tensor],
        traffic: Traffic,
        clock: Clock,
        rows: Sequence[tuple[int, int, dict[str, float]]] = (),
    ) -> None:
        """Write a checkpoint; `kept` is the fleet's state."""
        ...


class RoundLoop:
    """The loop over rounds.

    Args:
        keeper: what keeps the run that it belongs to: directory, checkpoints, signals.
        parts: the objects that a round uses.
        setup: traffic of preparation.
    """

    def __init__(self, keeper: Keeper, parts: Parts, setup: Traffic) -> None:
        self.keeper, self.experiment = keeper, keeper.experiment
        self.driver, self.fleet, self.checkpoints, self.draws = (
            parts.driver, parts.fleet, parts.checkpoints, parts.draws
        )  # fmt: skip
        self.recorder, self.metrics, self.progress = parts.recorder, parts.metrics, parts.progress
        self._setup = setup
        self._recovers = parts.fleet if isinstance(parts.fleet, Recovers) else None
        self._forks = keeper.forks

    def run(self, state: State, traffic: Traffic, clock: Clock) -> tuple[State, Traffic, Clock]:
        """Run all remaining rounds.

        Raises:
            Rollback: if a client is back without its memory, and all have a snapshot to return to.
        """
        experiment = self.experiment
        saved_at, saved_round, cost = time.perf_counter(), state.round, 0.0
        while state.round < experiment.rounds:
            if state.round + 1 in self._forks:
                state = self.driver.forked(state)
            observe = (state.round + 1) % experiment.monitor.every == 0 or state.round + 1 == experiment.rounds
            t0 = time.perf_counter()
            request = self.driver.request(state, observe=observe)
            t1 = time.perf_counter()
            try:
                aggregate = self.fleet.exchange(request)
            except Fork as fork:
                state = self._fork(state, fork)
                continue
            t2 = time.perf_counter()
            before, state = state, self.driver.update(state, request, aggregate)
            traffic = traffic.plus(aggregate.traffic)
            t3 = time.perf_counter()
            if not bool(aggregate.arrived.all()):
                self.keeper.directory.append_participation(state.round, aggregate.arrived.nonzero().flatten().tolist())
            kept = state.round - experiment.warmup
            if kept > 0 and kept % experiment.thin == 0:
                draw = self.driver.draw(state)
                self.driver.check(state.params, state.round)
                self.draws.append(state.round, draw)
                self.metrics.see(state.round, draw)
            if observe:
                state = self._log(before, state, aggregate, traffic, clock)
            self.progress.update(state.round, self._sent(traffic), (traffic.down + self._setup.down) // 8)
            now = time.perf_counter()
            clock.exchange += t2 - t1
            clock.server += (t1 - t0) + (t3 - t2)
            clock.record += now - t3
            stop = self.keeper.stopped
            if stop or self._due(state.round, now - saved_at, cost) or state.round == experiment.rounds:
                state = self._save(state, traffic, clock)
                saved_at, saved_round = time.perf_counter(), state.round
                cost = saved_at - now
                clock.record += cost
            if stop and state.round < experiment.rounds:
                raise Interrupted(
                    f"stopped by {stop} after round {saved_round} of {experiment.rounds}; everything is kept. "
                    f"{self.keeper.advice}"
                )
        return state, traffic, clock

    def _due(self, round: int, seconds: float, cost: float) -> bool:
        """Whether a checkpoint is due: by the clock, or together with the clients' snapshots."""
        if self._recovers is not None:
            return round % self._recovers.snapshot_rounds == 0
        return seconds >= max(self.experiment.monitor.checkpoint_seconds, cost / _CHECKPOINT_SHARE)

    def _fork(self, state: State, fork: Fork) -> State:
        """Return the state after a client has lost its memory for good."""
        if self._recovers is None:
            raise fork
        lost = self._recovers.resume_without(fork.clients)
        return self.keeper.forked(self.driver, state, lost)

    def _save(self, state: State, traffic: Traffic, clock: Clock) -> State:
        """Write draws and logs, then the checkpoint that relies on them; return the state, forked if need be."""
        while True:
            try:
                kept = self.fleet.state()
                break
            except Fork as fork:
                state = self._fork(state, fork)
        self.draws.flush()
        self.keeper.directory.sync()
        self.keeper.save(self.checkpoints, state, kept, traffic, clock, self.recorder.unwritten())
        return state

    def _log(self, before: State, state: State, aggregate: Aggregate, traffic: Traffic, clock: Clock) -> State:
        """Write one row of the curves; return the state, forked if need be."""
        scalars = self.metrics.scalars(self.driver, before, state, aggregate, self.fleet.n)
        n = self.fleet.n
        scalars |= {
            "comm/up_bytes": self._sent(traffic) / n,
            "comm/down_bytes": (traffic.down + self._setup.down) / 8 / n,
            "comm/ratio": traffic.up_dense / max(1, traffic.up),
            "time/exchange": clock.exchange,
            "time/server": clock.server,
            "time/record": clock.record,
        }
        if self._recovers is not None:
            scalars |= self._recovers.scalars()
            if state.round > self.experiment.warmup:
                try:
                    scores = self._recovers.score(self.driver.draw(state), state.round)
                except Fork as fork:
                    state, scores = self._fork(state, fork), {}
                scalars |= {f"round/{name}": value for name, value in scores.items()}
                self.keeper.scores = scores or self.keeper.scores
        self.recorder.submit(state.round, self._sent(traffic) // n, scalars, lazy=self.metrics.job(state.round))
        return state

    def _sent(self, traffic: Traffic) -> int:
        """Bytes that all clients together have sent, including preparation."""
        return (traffic.up + self._setup.up) // 8
