"""A run in progress: prepare, sample round by round, record, checkpoint, and sum up.

Everything between two rounds is in the checkpoint, and every draw is keyed by its round: a run that was killed goes on
from its last checkpoint and gives the same draws, bit for bit.
"""

from __future__ import annotations

import json
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fedsample.config import Experiment, ScheduleConfig, dump_toml
from fedsample.errors import ConfigError, Interrupted, RunDirectoryError
from fedsample.exchange import Fleet, Request, Traffic
from fedsample.experiment import Mode, digest, reread
from fedsample.fleets.engines import choose_engine
from fedsample.fleets.faults import Faults
from fedsample.fleets.local import LocalFleet
from fedsample.links import links, refresh_of
from fedsample.monitor.checkpoint import Checkpoint, CheckpointStore
from fedsample.monitor.directory import RunDirectory
from fedsample.monitor.draws import DrawStore, load_draws, load_rounds
from fedsample.monitor.progress import Progress
from fedsample.monitor.tensorboard import LAZY_QUEUE, Recorder
from fedsample.preparation import Prepared, prepare, restore_prepared
from fedsample.problem import DTYPES, Problem, build_problem
from fedsample.strategies import SAMPLERS, Cohort, Sampler, Stability, State
from fedsample.strategies.schedule import Constant, Cyclical, Polynomial, Schedule
from fedsample.watch import Watch, summarise

SHARD_ROUNDS = 1000
_CHECKPOINT_SHARE = 0.02  # of the time, at most, spent on checkpoints
_ELEMENTARY = "exp expm1 log log1p log2 log10 sin cos tan asin acos atan tanh erf erfc erfinv trunc"


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


class Session:
    """One run directory and everything that works in it; use as a context manager."""

    def __init__(self, experiment: Experiment, directory: RunDirectory, progress: Mode, resumed: bool) -> None:
        """Use `create` or `reopen`."""
        self.experiment, self.directory, self.path = experiment, directory, directory.path
        self._progress_mode: Mode = progress
        self._resumed = resumed
        self._stack = ExitStack()
        self._stack.enter_context(directory)
        self._stop: str | None = None
        self._phase = "before"  # the first round, "in" the chain, or "after" its last round
        self._data = ""

    @classmethod
    def create(cls, experiment: Experiment, path: Path, progress: Mode) -> Self:
        """A new run in an empty directory."""
        return cls(experiment, RunDirectory.create(path), progress, resumed=False)

    @classmethod
    def reopen(cls, path: Path, progress: Mode) -> Self:
        """The run that lies in `path`, as configured there."""
        directory = RunDirectory.open(path)
        try:
            return cls(reread(directory.read_config()), directory, progress, resumed=True)
        except BaseException:
            directory.close()
            raise

    def __enter__(self) -> Self:
        """Return itself; the directory is locked."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the directory and everything that was changed for the run."""
        self._stack.close()

    # --- from configuration to first round ------------------------------------------------------------------------

    def sample(self) -> dict[str, Any]:
        """Run to the last round -> the summary.

        A run that cannot begin leaves no directory behind, so that the next attempt may use the same name.

        Raises:
            Interrupted: on Ctrl-C or SIGTERM; what was drawn is in a checkpoint.
        """
        try:
            with self._signals():
                return self._sample()
        except KeyboardInterrupt:
            raise Interrupted(f"stopped at once; the last checkpoint is kept. {self.advice}") from None
        except Exception as error:
            fixable = isinstance(error, Interrupted | RunDirectoryError)  # these go on with --resume
            if self._phase == "before" and not self._resumed and not fixable:
                self.directory.discard()
            raise

    @property
    def advice(self) -> str:
        """How to go on."""
        return f"Go on with: fedsample simulate --resume --out {shlex.quote(str(self.path))}"

    def _sample(self) -> dict[str, Any]:
        began = time.perf_counter()
        if not self._resumed:
            self.directory.write_config(dump_toml(self.experiment))
        self._use_threads()
        first = 0
        store = CheckpointStore(self.directory.checkpoint)
        checkpoint = self._checkpoint(store) if self._resumed else None
        progress = Progress(self.experiment.rounds, checkpoint.round if checkpoint else 0, self._progress_mode)
        with progress:
            with progress.stage("reading the data"):
                problem = build_problem(self.experiment)
            check_size(self.experiment, problem)
            self._data = problem.fingerprint
            if checkpoint is not None and checkpoint.meta["data"] != self._data:
                raise RunDirectoryError(
                    f"the data are not those that the run in {self.path} began with: restore them, or start a new run "
                    "in another directory with --out"
                )
            fleet = self._fleet(problem, progress)
            prepared = self._prepare(problem, fleet, progress, checkpoint)
            store.digest = digest(self.experiment)
            sampler = build_sampler(self.experiment, problem, prepared, fleet.n)
            state, traffic, clock = self._start(sampler, fleet, prepared, checkpoint)
            first = state.round
            store_draws = DrawStore(self.directory.draws, SHARD_ROUNDS, start=self.experiment.warmup)
            self._rewind(first, store_draws, checkpoint is not None)
            self._phase = "in"
            if checkpoint is None:
                self._save(store, state, fleet, traffic, clock)
            watch = Watch(problem, self.experiment)
            rows = [] if checkpoint is None or self._summed_up(first) else checkpoint.meta["rows"]
            if rows or first < self.experiment.rounds:
                self._recall(watch, first)
            again = None if checkpoint is None else min([first + 1, *(round for round, _, _ in rows)])
            with Recorder(self.path, again, self.experiment.monitor.tensorboard) as recorder:
                recorder.describe(dump_toml(self.experiment), _flat(self.experiment), watch.headline)
                for left, (round, sent, scalars) in zip(range(len(rows), 0, -1), rows, strict=True):
                    recorder.submit(round, sent, scalars, lazy=watch.job(round) if left <= LAZY_QUEUE else None)
                chain = Chain(self, sampler, fleet, store, store_draws, recorder, watch, progress, prepared)
                state, traffic, clock = chain.run(state, traffic, clock)
                recorder.close(finished=True)
            self._phase = "after"
            with progress.stage("summing up"):
                summary = summarise(problem, self.experiment, prepared, traffic, clock.total, store_draws)
        summary["seconds_in_all"] = time.perf_counter() - began
        self.directory.write_json("summary.json", summary)
        return summary

    def _fleet(self, problem: Problem, progress: Progress) -> Fleet:
        """The clients, in this process or in Flower's simulation runtime, which lasts as long as the session."""
        if self.experiment.fleet.name == "local":
            fleet = build_fleet(self.experiment, problem, strict=self._resumed)
            self.experiment = _with(self.experiment, fleet={"engine": fleet.engine})
            return fleet
        from fedsample.fleets.simulation import simulated_fleet

        with progress.stage(f"starting {problem.clients.n} Flower nodes"):
            return self._stack.enter_context(simulated_fleet(self.experiment, problem))

    def _checkpoint(self, store: CheckpointStore) -> Checkpoint | None:
        checkpoint = store.latest(digest(self.experiment))
        if checkpoint is None and len(load_rounds(self.path)):
            raise RunDirectoryError(
                f"{self.directory.checkpoint} holds no checkpoint, but there are draws: it was emptied, and going on "
                "would begin again; restore a checkpoint, or start a new run in another directory with --out"
            )
        if checkpoint is not None and checkpoint.round > self.experiment.rounds:
            raise RunDirectoryError(
                f"the run has done {checkpoint.round} rounds, but its config.toml says "
                f"rounds = {self.experiment.rounds}: raise it"
            )
        return checkpoint

    def _use_threads(self) -> None:
        """Set the number of CPU threads, for the time of the run, and store the choice."""
        before = torch.get_num_threads()
        self._stack.callback(torch.set_num_threads, before)
        threads = self.experiment.fleet.threads or 1  # small products: a second thread costs more than it brings
        self.experiment = _with(self.experiment, fleet={"threads": threads})
        torch.set_num_threads(1)
        _choose_paths()
        torch.set_num_threads(threads)

    def _prepare(self, problem: Problem, fleet: Fleet, progress: Progress, checkpoint: Checkpoint | None) -> Prepared:
        if checkpoint is not None:
            prepared = restore_prepared(self.path, self.experiment)
            fleet.set_metric(prepared.geometry.metric)
            return prepared
        prepared = prepare(self.experiment, problem, fleet, progress)
        prepared.save(self.path)
        self.experiment = _with(self.experiment, step_size=_resolved(self.experiment.step_size, prepared.step_size))
        self.directory.write_config(dump_toml(self.experiment))
        self.directory.write_env()
        self.directory.write_json(
            "params.json", [{"name": name, "shape": list(shape), "offset": at} for name, shape, at in problem.layout]
        )
        return prepared

    def _start(
        self, sampler: Sampler, fleet: Fleet, prepared: Prepared, checkpoint: Checkpoint | None
    ) -> tuple[State, Traffic, Clock]:
        if checkpoint is None:
            return sampler.begin(prepared.start), Traffic(), Clock()
        state = State.of_tensors(_below(checkpoint.tensors, "state."), prepared.start.device)
        fleet.restore(_below(checkpoint.tensors, "fleet."))
        return state, Traffic(*checkpoint.meta["traffic"]), Clock(before=checkpoint.meta["seconds"])

    def _rewind(self, round: int, draws: DrawStore, resumed: bool) -> None:
        if not resumed:
            if self._resumed:  # it was killed before its first checkpoint: nothing in the directory counts
                draws.resume(0)
                self.directory.rewind(0)
            return
        self.directory.rewind(round)
        kept = max(0, (round - self.experiment.warmup) // self.experiment.thin)
        draws.resume(round, kept)

    def _summed_up(self, round: int) -> bool:
        """Whether the run once ended with this round: then its log is complete."""
        try:
            return bool(json.loads((self.path / "summary.json").read_bytes())["rounds"] == round)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _recall(self, watch: Watch, round: int) -> None:
        """Show the draws so far to a watch: curves go on where they were."""
        rounds = load_rounds(self.path).tolist() if round > 0 else []
        if rounds:
            for at, draw in zip(rounds, load_draws(self.path).unbind(1), strict=True):
                watch.see(at, draw)

    # --- stopping and saving ----------------------------------------------------------------------------------------

    def _save(
        self,
        store: CheckpointStore,
        state: State,
        fleet: Fleet,
        traffic: Traffic,
        clock: Clock,
        rows: Sequence[tuple[int, int, dict[str, float]]] = (),
    ) -> None:
        tensors = {f"state.{name}": tensor for name, tensor in state.tensors().items()}
        tensors |= {f"fleet.{name}": tensor for name, tensor in fleet.state().items()}
        meta = {"traffic": list(traffic), "seconds": clock.total, "data": self._data, "rows": list(rows)}
        store.save(state.round, tensors, meta)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the round with a checkpoint; outside the rounds, or twice, at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: object) -> None:
            self._stop = signal.Signals(number).name
            for each, handler in before.items():
                signal.signal(each, handler)
            if self._phase != "in":
                when = "while it was being prepared" if self._phase == "before" else "after the last round"
                raise Interrupted(f"stopped by {self._stop} {when}; everything is kept. {self.advice}")

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def stopped(self) -> str | None:
        """The name of the signal that asked the run to end."""
        return self._stop


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

    def run(self, state: State, traffic: Traffic, clock: Clock) -> tuple[State, Traffic, Clock]:
        """All remaining rounds."""
        experiment = self.experiment
        saved_at, saved_round, cost = time.perf_counter(), state.round, 0.0
        while state.round < experiment.rounds:
            observe = (state.round + 1) % experiment.monitor.every == 0 or state.round + 1 == experiment.rounds
            t0 = time.perf_counter()
            request = self.sampler.request(state, observe=observe)
            t1 = time.perf_counter()
            aggregate = self.fleet.exchange(request)
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
                self._log(before, state, request, aggregate, traffic, clock)
            self.progress.update(state.round, self._sent(traffic), (traffic.down + self._setup.down) // 8)
            now = time.perf_counter()
            clock.exchange += t2 - t1
            clock.server += (t1 - t0) + (t3 - t2)
            clock.record += now - t3
            stop = self.session.stopped
            due = max(experiment.monitor.checkpoint_seconds, cost / _CHECKPOINT_SHARE)
            if stop or now - saved_at >= due or state.round == experiment.rounds:
                self._save(state, traffic, clock)
                saved_at, saved_round = time.perf_counter(), state.round
                cost = saved_at - now
                clock.record += cost
            if stop and state.round < experiment.rounds:
                raise Interrupted(
                    f"stopped by {stop} after round {saved_round} of {experiment.rounds}; everything is kept. "
                    f"{self.session.advice}"
                )
        return state, traffic, clock

    def _save(self, state: State, traffic: Traffic, clock: Clock) -> None:
        """Draws and logs first, then the checkpoint that counts on them."""
        self.draws.flush()
        self.session.directory.sync()
        self.session._save(self.checkpoints, state, self.fleet, traffic, clock, self.recorder.unwritten())

    def _log(
        self, before: State, state: State, request: Request, aggregate: Any, traffic: Traffic, clock: Clock
    ) -> None:
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
        self.recorder.submit(state.round, self._sent(traffic) // n, scalars, lazy=self.watch.job(state.round))

    def _sent(self, traffic: Traffic) -> int:
        """Bytes that all clients together have sent, preparation included."""
        return (traffic.up + self._setup.up) // 8


def build_fleet(experiment: Experiment, problem: Problem, *, strict: bool = False) -> LocalFleet:
    """The simulated federation of an experiment; `strict` as for `choose_engine`."""
    section = experiment.fleet
    clients = problem.clients
    faults = Faults(clients.n, experiment.seed, section.loss, section.dropout, section.dropout_rounds)
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
        step_size=_schedule(experiment, prepared.step_size),
        temperature=experiment.temperature,
        seed=experiment.seed,
        cohort=Cohort(n, experiment.chains, experiment.seed, experiment.fleet.participation),
        stability=Stability(prepared.geometry.curvature, prepared.limit, prepared.radius),
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
    if experiment.metric.name == "hessian" and problem.d > 5000:
        raise ConfigError(
            f"metric.name = 'hessian' needs a matrix of {problem.d} x {problem.d} entries on every client; "
            "choose kronecker or diagonal above 5,000 parameters"
        )
    uplink, downlink = links(experiment, problem)
    dtype = DTYPES[experiment.dtype]
    uplink.bits(1, 0, problem.d, dtype)  # refuses settings that do not fit d
    downlink.bits(torch.ones(1, dtype=torch.int64), 1, problem.d, dtype)
    Cohort(problem.clients.n, experiment.chains, experiment.seed, experiment.fleet.participation)


def _schedule(experiment: Experiment, initial: float) -> Schedule:
    """The steps of a run that begins with `initial`."""
    section = experiment.step_size
    if isinstance(section, ScheduleConfig) and section.schedule == "polynomial":
        return Polynomial(initial, section.power, section.offset)
    if isinstance(section, ScheduleConfig) and section.schedule == "cyclical":
        return Cyclical(initial, section.period)
    return Constant(initial)


def _resolved(section: float | str | ScheduleConfig, step: float) -> float | ScheduleConfig:
    """The setting `step_size` with the step that was chosen."""
    return section.model_copy(update={"initial": step}) if isinstance(section, ScheduleConfig) else step


def _choose_paths() -> None:
    """Call each elementary function once, alone.

    MKL chooses its code path in the first call. Where two threads make that at the same time, one of them may get the
    values of a less exact path, once: about one run in fifty with two threads then differed from the others.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for name in _ELEMENTARY.split():
            getattr(torch, name)(one)


def _with(experiment: Experiment, **changes: Any) -> Experiment:
    """The same experiment with other values; sections take a dict of keys."""
    values = {
        name: getattr(experiment, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return experiment.model_copy(update=values)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _flat(experiment: Experiment) -> dict[str, Any]:
    """Settings by dotted name, for the hyper-parameters page."""
    result: dict[str, Any] = {}
    for name, value in experiment.model_dump().items():
        if isinstance(value, dict):
            result |= {f"{name}.{key}": below for key, below in value.items()}
        else:
            result[name] = value
    return result
