"""The loop over rounds: ask, move, record, now and then save."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsample.errors import Interrupted
from fedsample.protocol.exchange import Aggregate, Fleet, Request, Traffic
from fedsample.protocol.recovery import Fork, Recovers
from fedsample.strategies import Sampler, State

if TYPE_CHECKING:
    from fedsample.monitor.checkpoint import CheckpointStore
    from fedsample.monitor.draws import DrawStore
    from fedsample.monitor.progress import Progress
    from fedsample.monitor.tensorboard import Recorder
    from fedsample.preparation.prepared import Prepared
    from fedsample.runs.live_metrics import Watch
    from fedsample.runs.session import Session

_CHECKPOINT_SHARE = 0.02  # of the time, at most, spent on checkpoints


@dataclass
class Clock:
    """Seconds by phase."""

    exchange: float = 0.0
    server: float = 0.0
    record: float = 0.0
    before: float = 0.0  # seconds of earlier stretches of this run

    @property
    def total(self) -> float:
        """Seconds of this stretch and the ones before."""
        return self.exchange + self.server + self.record + self.before


class Chain:
    """The loop over rounds."""

    def __init__(
        self,
        session: Session,
        sampler: Sampler,
        fleet: Fleet,
        checkpoints: CheckpointStore,
        draws: DrawStore,
        recorder: Recorder,
        watch: Watch,
        progress: Progress,
        prepared: Prepared,
    ) -> None:
        """Keep the parts."""
        self.session, self.experiment = session, session.experiment
        self.sampler, self.fleet, self.checkpoints, self.draws = sampler, fleet, checkpoints, draws
        self.recorder, self.watch, self.progress, self.prepared = recorder, watch, progress, prepared
        self._setup = prepared.geometry.traffic
        self._recovers = fleet if isinstance(fleet, Recovers) else None
        self._forks = session.forks

    def run(self, state: State, traffic: Traffic, clock: Clock) -> tuple[State, Traffic, Clock]:
        """All remaining rounds.

        Raises:
            Rollback: if a client is back without its memory, and all have a snapshot to go back to.
        """
        experiment = self.experiment
        saved_at, saved_round, cost = time.perf_counter(), state.round, 0.0
        while state.round < experiment.rounds:
            if state.round + 1 in self._forks:
                state = self.sampler.forked(state)
            observe = (state.round + 1) % experiment.monitor.every == 0 or state.round + 1 == experiment.rounds
            t0 = time.perf_counter()
            request = self.sampler.request(state, observe=observe)
            t1 = time.perf_counter()
            try:
                aggregate = self.fleet.exchange(request)
            except Fork as fork:
                state = self._fork(state, fork)
                continue
            t2 = time.perf_counter()
            before, state = state, self.sampler.update(state, request, aggregate)
            traffic = traffic.plus(aggregate.traffic)
            t3 = time.perf_counter()
            if not bool(aggregate.arrived.all()):
                self.session.directory.append_participation(state.round, aggregate.arrived.nonzero().flatten().tolist())
            kept = state.round - experiment.warmup
            if kept > 0 and kept % experiment.thin == 0:
                draw = self.sampler.draw(state)
                self.sampler.check(state.params, state.round)
                self.draws.append(state.round, draw)
                self.watch.see(state.round, draw)
            if observe:
                state = self._log(before, state, request, aggregate, traffic, clock)
            self.progress.update(state.round, self._sent(traffic), (traffic.down + self._setup.down) // 8)
            now = time.perf_counter()
            clock.exchange += t2 - t1
            clock.server += (t1 - t0) + (t3 - t2)
            clock.record += now - t3
            stop = self.session.stopped
            if stop or self._due(state.round, now - saved_at, cost) or state.round == experiment.rounds:
                state = self._save(state, traffic, clock)
                saved_at, saved_round = time.perf_counter(), state.round
                cost = saved_at - now
                clock.record += cost
            if stop and state.round < experiment.rounds:
                raise Interrupted(
                    f"stopped by {stop} after round {saved_round} of {experiment.rounds}; everything is kept. "
                    f"{self.session.advice}"
                )
        return state, traffic, clock

    def _due(self, round: int, seconds: float, cost: float) -> bool:
        """Whether it is time for a checkpoint: by the clock, or together with the clients' snapshots."""
        if self._recovers is not None:
            return round % self._recovers.snapshot_rounds == 0
        return seconds >= max(self.experiment.monitor.checkpoint_seconds, cost / _CHECKPOINT_SHARE)

    def _fork(self, state: State, fork: Fork) -> State:
        """The state after a client has lost its memory for good."""
        if self._recovers is None:
            raise fork
        lost = self._recovers.rally(fork.clients)
        return self.session.forked(self.sampler, state, lost)

    def _save(self, state: State, traffic: Traffic, clock: Clock) -> State:
        """Draws and logs first, then the checkpoint that counts on them -> the state, forked if need be."""
        while True:
            try:
                kept = self.fleet.state()
                break
            except Fork as fork:
                state = self._fork(state, fork)
        self.draws.flush()
        self.session.directory.sync()
        self.session.save(self.checkpoints, state, kept, traffic, clock, self.recorder.unwritten())
        return state

    def _log(
        self, before: State, state: State, request: Request, aggregate: Aggregate, traffic: Traffic, clock: Clock
    ) -> State:
        """One row of the curves -> the state, forked if need be."""
        scalars = self.watch.scalars(self.sampler, before, state, aggregate, self.fleet.n)
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
                    scores = self._recovers.score(self.sampler.draw(state), state.round)
                except Fork as fork:
                    state, scores = self._fork(state, fork), {}
                scalars |= {f"round/{name}": value for name, value in scores.items()}
                self.session.scores = scores or self.session.scores
        self.recorder.submit(state.round, self._sent(traffic) // n, scalars, lazy=self.watch.job(state.round))
        return state

    def _sent(self, traffic: Traffic) -> int:
        """Bytes that all clients together have sent, preparation included."""
        return (traffic.up + self._setup.up) // 8
