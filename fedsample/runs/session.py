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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fedsample.config import Experiment, ScheduleConfig, dump_toml
from fedsample.config.loading import digest, reread
from fedsample.errors import Interrupted, RunDirectoryError
from fedsample.monitor.checkpoint import Checkpoint, CheckpointStore
from fedsample.monitor.directory import RunDirectory
from fedsample.monitor.draws import DrawStore, load_draws, load_rounds
from fedsample.monitor.jsonl import read_jsonl
from fedsample.monitor.progress import Mode, Progress
from fedsample.monitor.tensorboard import LAZY_QUEUE, Recorder
from fedsample.numerics.math_library import choose_paths
from fedsample.preparation.prepare import prepare
from fedsample.preparation.prepared import Prepared, prepared_for, restore_prepared
from fedsample.problem import Problem, build_problem
from fedsample.protocol.exchange import Fleet, Traffic
from fedsample.protocol.recovery import Abandoned, Recovers, Rollback
from fedsample.runs.build import build_fleet, build_sampler, check_size
from fedsample.runs.live_metrics import Watch
from fedsample.runs.loop import Chain, Clock
from fedsample.runs.summary import summarise
from fedsample.strategies import Sampler, State

SHARD_ROUNDS = 1000

Opener = Callable[["Session", Progress, ExitStack], tuple[Problem, Fleet]]


class Session:
    """One run directory and everything that works in it; use as a context manager."""

    def __init__(
        self, experiment: Experiment, directory: RunDirectory, progress: Mode, resumed: bool, opener: Opener | None
    ) -> None:
        """Use `create` or `reopen`."""
        self.experiment, self.directory, self.path = experiment, directory, directory.path
        self._progress_mode: Mode = progress
        self._resumed = resumed
        self._stack = ExitStack()
        self._stack.enter_context(directory)
        self._stop: str | None = None
        self._phase = "before"  # the first round, "in" the chain, or "after" its last round
        self._data = ""
        self._opener = opener
        self.display: type[Progress] = Progress
        self.command = "fedsample simulate"
        self._arrivals: dict[int, list[int]] | None = None
        self.forks: frozenset[int] = frozenset()
        self.scores: dict[str, float] = {}

    @classmethod
    def create(
        cls, experiment: Experiment, path: Path, progress: Mode, *, opener: Opener | None = None,
        replay: Path | None = None,
    ) -> Self:  # fmt: skip
        """A new run in an empty directory.

        Args:
            experiment: the configuration. path: the directory. progress: how much is shown. opener: makes the problem
                and the fleet, where they are not in this process. replay: a run whose participation is followed.
        """
        session = cls(experiment, RunDirectory.create(path), progress, resumed=False, opener=opener)
        if replay is not None:
            session._follow(replay)
        return session

    def _follow(self, path: Path) -> None:
        """Take part when the clients of another run did, and fork where it forked."""
        self._arrivals = {row["round"]: row["clients"] for row in _rows(path / "participation.jsonl")}
        self.forks = frozenset(row["round"] for row in _rows(path / "forks.jsonl"))

    @classmethod
    def reopen(cls, path: Path, progress: Mode, *, opener: Opener | None = None) -> Self:
        """The run that lies in `path`, as configured there."""
        directory = RunDirectory.open(path)
        try:
            return cls(reread(directory.read_config()), directory, progress, resumed=True, opener=opener)
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
        self._stack.__exit__(kind, error, trace)

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
        except Abandoned as away:
            why = f"stopped by {self._stop}: {away}; the last checkpoint is kept. {self.advice}"
            raise Interrupted(why) from None
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
        return f"Go on with: {self.command} --resume --out {shlex.quote(str(self.path))}"

    def _sample(self) -> dict[str, Any]:
        began = time.perf_counter()
        if not self._resumed:
            self.directory.write_config(dump_toml(self.experiment))
        self._use_threads()
        store = CheckpointStore(self.directory.checkpoint)
        checkpoint = self._checkpoint(store) if self._resumed else None
        progress = self.display(self.experiment.rounds, checkpoint.round if checkpoint else 0, self._progress_mode)
        with progress:
            problem, fleet = self._federation(progress)
            if checkpoint is not None:
                store.digest = digest(self.experiment)
                checkpoint = self._shared(fleet, store, checkpoint)
            prepared = self._prepare(problem, fleet, progress, checkpoint)
            store.digest = digest(self.experiment)
            while True:
                try:
                    traffic, clock, draws = self._stretch(problem, fleet, prepared, store, progress, checkpoint)
                    break
                except Rollback as back:
                    if self._stop:
                        raise Abandoned(str(back)) from None
                    progress.note(str(back))
                    checkpoint = self._at(store, back.round)
            self._phase = "after"
            with progress.stage("summing up"):
                summary = summarise(problem, self.experiment, prepared, traffic, clock.total, draws)
        summary |= {name: value for name, value in self.scores.items() if summary.get(name) is None}
        summary["seconds_in_all"] = time.perf_counter() - began
        self.directory.write_json("summary.json", summary)
        return summary

    def _stretch(
        self, problem: Problem, fleet: Fleet, prepared: Prepared, store: CheckpointStore, progress: Progress,
        checkpoint: Checkpoint | None,
    ) -> tuple[Traffic, Clock, DrawStore]:  # fmt: skip
        """From a checkpoint, or the start, to the last round.

        Raises:
            Rollback: if it must be begun again from an earlier checkpoint.
        """
        sampler = build_sampler(self.experiment, problem, prepared, fleet.n)
        self._rewind(0 if checkpoint is None else checkpoint.round, store, again=checkpoint is not None)
        state, traffic, clock = self._start(sampler, fleet, prepared, checkpoint)
        first = state.round
        draws = DrawStore(self.directory.draws, SHARD_ROUNDS, start=self.experiment.warmup)
        if checkpoint is not None:
            draws.resume(first, max(0, (first - self.experiment.warmup) // self.experiment.thin))
        elif self._resumed:  # it was killed before its first checkpoint: nothing in the directory counts
            draws.resume(0)
        if checkpoint is None:
            self.save(store, state, fleet.state(), traffic, clock)
        if isinstance(fleet, Recovers):
            fleet.keep(store.rounds)
        self._phase = "in"
        watch = Watch(problem, self.experiment)
        rows = [] if checkpoint is None or self._summed_up(first) else checkpoint.meta["rows"]
        if rows or first < self.experiment.rounds:
            self._recall(watch, first)
        again = None if checkpoint is None else min([first + 1, *(round for round, _, _ in rows)])
        with Recorder(self.path, again, self.experiment.monitor.tensorboard) as recorder:
            recorder.describe(dump_toml(self.experiment), _flat(self.experiment), watch.headline)
            for left, (round, sent, scalars) in zip(range(len(rows), 0, -1), rows, strict=True):
                recorder.submit(round, sent, scalars, lazy=watch.job(round) if left <= LAZY_QUEUE else None)
            chain = Chain(self, sampler, fleet, store, draws, recorder, watch, progress, prepared)
            state, traffic, clock = chain.run(state, traffic, clock)
            recorder.close(finished=True)
        return traffic, clock, draws

    def _federation(self, progress: Progress) -> tuple[Problem, Fleet]:
        """What is sampled, and the clients: here, in Flower's simulation runtime, or at the ends of streams."""
        if self._opener is not None:
            problem, fleet = self._opener(self, progress, self._stack)
        else:
            with progress.stage("reading the data"):
                problem = build_problem(self.experiment)
            check_size(self.experiment, problem)
            fleet = self._fleet(problem, progress)
        self._data = problem.fingerprint
        return problem, fleet

    def _fleet(self, problem: Problem, progress: Progress) -> Fleet:
        if self.experiment.fleet.name == "local":
            fleet = build_fleet(self.experiment, problem, self._arrivals, strict=self._resumed)
            self.experiment = _with(self.experiment, fleet={"engine": fleet.engine})
            return fleet
        from fedsample.fleets.flower.simulation import simulated_fleet

        with progress.stage(f"starting {problem.clients.n} Flower nodes"):
            return self._stack.enter_context(simulated_fleet(self.experiment, problem))

    def _shared(self, fleet: Fleet, store: CheckpointStore, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint that this run goes on from: of these data, and one that the clients can go back to too."""
        if checkpoint.meta["data"] != self._data:
            raise RunDirectoryError(
                f"the data are not those that the run in {self.path} began with: restore them, or start a new run "
                "in another directory with --out"
            )
        rounds = [round for round in store.rounds() if round <= checkpoint.round]  # a later one is damaged
        common = fleet.common(rounds) if isinstance(fleet, Recovers) else None
        return checkpoint if common is None or common == checkpoint.round else self._at(store, common)

    def _at(self, store: CheckpointStore, round: int) -> Checkpoint:
        checkpoint = store.at(round)
        if checkpoint is None:
            raise RunDirectoryError(
                f"the checkpoint of round {round} in {store.folder} is damaged, and the clients remember no other: "
                "restore it from a copy, or start a new run in another directory with --out"
            )
        return checkpoint

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
        choose_paths()
        torch.set_num_threads(threads)

    def _prepare(self, problem: Problem, fleet: Fleet, progress: Progress, checkpoint: Checkpoint | None) -> Prepared:
        if checkpoint is not None:
            if changed := self.directory.compare_env(checkpoint.round):
                progress.note(
                    f"resumed elsewhere ({'; '.join(changed)}): the last bits of draws may differ from here on, "
                    "their law does not"
                )
            prepared = restore_prepared(self.path, self.experiment)
            fleet.set_metric(prepared.geometry.metric)
            return prepared
        asked = digest(self.experiment)
        if self._resumed and prepared_for(self.path, asked):  # killed since: with its exact step it would prepare less
            prepared = restore_prepared(self.path, self.experiment)
            fleet.set_metric(prepared.geometry.metric)
            self.experiment = _with(self.experiment, step_size=_resolved(self.experiment.step_size, prepared.step_size))
        else:
            prepared = prepare(self.experiment, problem, fleet, progress)
            step = _resolved(self.experiment.step_size, prepared.step_size)
            self.experiment = _with(self.experiment, step_size=step)
            prepared.save(self.path, [asked, digest(self.experiment)])
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
        self.scores = dict(checkpoint.meta.get("scores", {}))
        fleet.restore(_below(checkpoint.tensors, "fleet."))
        if isinstance(fleet, Recovers):
            lost = fleet.rewind(state.round)
            state = self.forked(sampler, state, lost) if lost else state
        return state, Traffic(*checkpoint.meta["traffic"]), Clock(before=checkpoint.meta["seconds"])

    def forked(self, sampler: Sampler, state: State, clients: Sequence[int]) -> State:
        """The state after some clients have lost their memories for good; logged, if it changes the chain."""
        before = state.tensors()
        after = sampler.forked(state)
        if sampler.uplink.memory((1, 1, 1), state.params.dtype, state.params.device):
            self.directory.append_fork(state.round + 1, clients)
            return after
        return State.of_tensors(before, state.params.device)

    def _rewind(self, round: int, store: CheckpointStore, *, again: bool) -> None:
        """Cut the directory back to a checkpoint, if it has gone beyond it."""
        if again or self._resumed:
            store.rewind(round)
            self.directory.rewind(round)

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

    def save(
        self,
        store: CheckpointStore,
        state: State,
        kept: dict[str, Tensor],
        traffic: Traffic,
        clock: Clock,
        rows: Sequence[tuple[int, int, dict[str, float]]] = (),
    ) -> None:
        """Write a checkpoint; `kept` is what the fleet remembers."""
        tensors = {f"state.{name}": tensor for name, tensor in state.tensors().items()}
        tensors |= {f"fleet.{name}": tensor for name, tensor in kept.items()}
        meta = {"traffic": list(traffic), "seconds": clock.total, "data": self._data, "rows": list(rows)}
        meta["scores"] = self.scores  # a run that has reached its last round does not ask for them again
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
    def over(self) -> bool:
        """Whether the run has once ended, and has no further rounds to do."""
        return self._resumed and self._summed_up(self.experiment.rounds)

    @property
    def stopped(self) -> str | None:
        """The name of the signal that asked the run to end."""
        return self._stop


def _resolved(section: float | str | ScheduleConfig, step: float) -> float | ScheduleConfig:
    """The setting `step_size` with the step that was chosen."""
    return section.model_copy(update={"initial": step}) if isinstance(section, ScheduleConfig) else step


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(path))


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
