"""A run in progress: prepare, sample round by round, record, checkpoint, and sum up.

Everything that changes between rounds is in the checkpoint, and every draw is keyed by its round: a run that was
killed continues from its last checkpoint and gives the same draws, bit for bit.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fedsample.config import Experiment, dump_toml
from fedsample.config.loading import digest, reread
from fedsample.config.resolved import Resolved, on_machine
from fedsample.errors import Interrupted, RunDirectoryError
from fedsample.estimators import Links, build_links
from fedsample.fleets.opening import Opener
from fedsample.monitor.checkpoint import Checkpoint, CheckpointStore
from fedsample.monitor.directory import RunDirectory
from fedsample.monitor.draws import DrawStore
from fedsample.monitor.jsonl import read_jsonl
from fedsample.monitor.progress import Mode, Progress
from fedsample.monitor.tensorboard import LAZY_QUEUE, Recorder
from fedsample.numerics.math_library import choose_paths
from fedsample.preparation.prepare import prepare
from fedsample.preparation.prepared import Prepared, prepared_for, restore_prepared
from fedsample.problem import Problem, build_problem
from fedsample.protocol.exchange import Fleet, Traffic
from fedsample.protocol.recovery import Abandoned, Recovers, Rollback
from fedsample.runs.build import build_driver, build_fleet, check_size
from fedsample.runs.live_metrics import LiveMetrics
from fedsample.runs.loop import Clock, Parts, RoundLoop
from fedsample.runs.resume import below, checkpoint_at, common_checkpoint, has_ended, latest_checkpoint, recall
from fedsample.runs.signals import Stop
from fedsample.runs.summary import summarise
from fedsample.strategies import Driver, State

SHARD_ROUNDS = 1000


class Session:
    """A run directory and the run in it; use as a context manager."""

    def __init__(
        self, experiment: Experiment, directory: RunDirectory, progress: Mode, resumed: bool, opener: Opener | None
    ) -> None:
        """Called by `create` and `reopen`; use those."""
        self.directory, self.path = directory, directory.path
        self._threads = experiment.fleet.threads or 1  # small products: a second thread costs more than it brings
        self._asked = on_machine(experiment, None, self._threads)
        self._resolved: Resolved | None = None
        self._progress_mode: Mode = progress
        self._resumed = resumed
        self._stack = ExitStack()
        self._stack.enter_context(directory)
        self._stop = Stop()
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
        """Start a new run in an empty directory.

        Args:
            experiment: the configuration.
            path: the directory.
            progress: how progress is shown.
            opener: makes the problem and the fleet, where the clients are not in this process.
            replay: the directory of a run whose participation is repeated.
        """
        session = cls(experiment, RunDirectory.create(path), progress, resumed=False, opener=opener)
        if replay is not None:
            session._follow(replay)
        return session

    def _follow(self, path: Path) -> None:
        """Replay another run: the same clients take part in each round, and the chain forks where it forked."""
        self._arrivals = {row["round"]: row["clients"] for row in _rows(path / "participation.jsonl")}
        self.forks = frozenset(row["round"] for row in _rows(path / "forks.jsonl"))

    @classmethod
    def reopen(cls, path: Path, progress: Mode, *, opener: Opener | None = None) -> Self:
        """Reopen the run in `path`, as configured there."""
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
        """Release the directory and undo every process-wide setting made for the run."""
        self._stack.__exit__(kind, error, trace)

    @property
    def experiment(self) -> Experiment:
        """The configuration: as given, and from the first round on with every automatic choice resolved."""
        return self._asked if self._resolved is None else self._resolved.experiment

    # --- from configuration to first round ------------------------------------------------------------------------

    def sample(self) -> dict[str, Any]:
        """Run to the last round -> the summary.

        A run that cannot begin leaves no directory behind, so that the next attempt may use the same name.

        Raises:
            Interrupted: on Ctrl-C or SIGTERM; the draws so far are in a checkpoint.
        """
        try:
            with self._stop.listening(lambda: self.advice):
                return self._sample()
        except Abandoned as away:
            why = f"stopped by {self._stop.signal}: {away}; the last checkpoint is kept. {self.advice}"
            raise Interrupted(why) from None
        except KeyboardInterrupt:
            raise Interrupted(f"stopped at once; the last checkpoint is kept. {self.advice}") from None
        except Exception as error:
            fixable = isinstance(error, Interrupted | RunDirectoryError)  # these go on with --resume
            if self._stop.phase == "before" and not self._resumed and not fixable:
                self.directory.discard()
            raise

    @property
    def advice(self) -> str:
        """How to continue the run: the command to type."""
        return f"Go on with: {self.command} --resume --out {shlex.quote(str(self.path))}"

    def _sample(self) -> dict[str, Any]:
        began = time.perf_counter()
        if not self._resumed:
            self.directory.write_config(dump_toml(self._asked))
        self._use_threads()
        store = CheckpointStore(self.directory.checkpoint)
        checkpoint = latest_checkpoint(store, self._asked, self.path) if self._resumed else None
        progress = self.display(self._asked.rounds, checkpoint.round if checkpoint else 0, self._progress_mode)
        with progress:
            problem, links, fleet, engine = self._federation(progress)
            if checkpoint is not None:
                store.digest = digest(on_machine(self._asked, engine, self._threads))
                checkpoint = common_checkpoint(store, checkpoint, fleet, self._data, self.path)
            prepared = self._prepare(problem, links, fleet, engine, progress, checkpoint)
            store.digest = digest(self.experiment)
            while True:
                try:
                    driver = build_driver(self.experiment, problem, links, prepared, fleet.n)
                    traffic, clock, draws = self._stretch(problem, driver, fleet, prepared, store, progress, checkpoint)
                    break
                except Rollback as back:
                    if self.stopped:
                        raise Abandoned(str(back)) from None
                    progress.note(str(back))
                    checkpoint = checkpoint_at(store, back.round)
            self._stop.phase = "after"
            with progress.stage("summing up"):
                summary = summarise(problem, self.experiment, prepared, traffic, clock.total, draws)
        summary |= {name: value for name, value in self.scores.items() if summary.get(name) is None}
        summary["seconds_in_all"] = time.perf_counter() - began
        self.directory.write_json("summary.json", summary)
        return summary

    def _stretch(
        self, problem: Problem, driver: Driver, fleet: Fleet, prepared: Prepared, store: CheckpointStore,
        progress: Progress, checkpoint: Checkpoint | None,
    ) -> tuple[Traffic, Clock, DrawStore]:  # fmt: skip
        """Run from a checkpoint, or from the start, to the last round.

        Raises:
            Rollback: if it must restart from an earlier checkpoint.
        """
        self._rewind(0 if checkpoint is None else checkpoint.round, store, again=checkpoint is not None)
        state, traffic, clock = self._start(driver, fleet, prepared, checkpoint)
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
        self._stop.phase = "in"
        metrics = LiveMetrics(problem, self.experiment)
        rows = [] if checkpoint is None or has_ended(self.path, first) else checkpoint.meta["rows"]
        if rows or first < self.experiment.rounds:
            recall(metrics, self.path, first)
        again = None if checkpoint is None else min([first + 1, *(round for round, _, _ in rows)])
        with Recorder(self.path, again, self.experiment.monitor.tensorboard) as recorder:
            recorder.describe(dump_toml(self.experiment), _flat(self.experiment), metrics.headline)
            for left, (round, sent, scalars) in zip(range(len(rows), 0, -1), rows, strict=True):
                recorder.submit(round, sent, scalars, lazy=metrics.job(round) if left <= LAZY_QUEUE else None)
            parts = Parts(driver, fleet, store, draws, recorder, metrics, progress)
            loop = RoundLoop(self, parts, prepared.geometry.traffic)
            state, traffic, clock = loop.run(state, traffic, clock)
            recorder.close(finished=True)
        return traffic, clock, draws

    def _federation(self, progress: Progress) -> tuple[Problem, Links, Fleet, str | None]:
        """Open the problem, the links and the clients: here, in Flower's simulation runtime, or on devices over gRPC.

        Returns:
            The problem, its links, the fleet, and the engine if clients are in this process.
        """
        if self._opener is not None:
            problem, fleet = self._opener(self, progress, self._stack)
            return problem, self._links, fleet, None
        with progress.stage("reading the data"):
            problem = build_problem(self._asked)
        links = self.accept(problem)
        if self._asked.fleet.name == "local":
            local = build_fleet(self._asked, problem, links, self._arrivals, strict=self._resumed)
            return problem, links, local, local.engine
        from fedsample.fleets.flower.simulation import simulated_fleet

        with progress.stage(f"starting {problem.clients.n} Flower nodes"):
            fleet = self._stack.enter_context(simulated_fleet(self._asked, problem.clients, links))
        return problem, links, fleet, None

    def accept(self, problem: Problem) -> Links:
        """Take the problem -> the run's links, made once.

        Raises:
            FedSampleError: if the settings do not fit the number of parameters or of clients.
        """
        self._links = build_links(self._asked, problem.clients)
        check_size(self._asked, problem, self._links)
        self._data = problem.fingerprint
        return self._links

    def _use_threads(self) -> None:
        """Set the number of CPU threads for the duration of the run."""
        self._stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        choose_paths()
        torch.set_num_threads(self._threads)

    def _prepare(
        self, problem: Problem, links: Links, fleet: Fleet, engine: str | None, progress: Progress,
        checkpoint: Checkpoint | None,
    ) -> Prepared:  # fmt: skip
        """Prepare, or restore an earlier preparation; from now on the experiment is resolved."""
        asked = on_machine(self._asked, engine, self._threads)
        if checkpoint is not None:
            if changed := self.directory.compare_env(checkpoint.round):
                progress.note(
                    f"resumed elsewhere ({'; '.join(changed)}): the last bits of draws may differ from here on, "
                    "their law does not"
                )
            prepared = restore_prepared(self.path, asked.fleet.device)
        elif self._resumed and prepared_for(self.path, digest(asked)):  # with its exact step it would prepare less
            prepared = restore_prepared(self.path, asked.fleet.device)
        else:
            prepared = prepare(asked, problem, links, fleet, progress)
            self._resolved = Resolved.of(self._asked, engine, self._threads, prepared.step_size)
            prepared.save(self.path, [digest(asked), digest(self.experiment)])
            self._describe(problem)
            return prepared
        fleet.set_metric(prepared.geometry.metric)
        self._resolved = Resolved.of(self._asked, engine, self._threads, prepared.step_size)
        if checkpoint is None:
            self._describe(problem)
        return prepared

    def _describe(self, problem: Problem) -> None:
        """Write what the run depends on, before its first round."""
        self.directory.write_config(dump_toml(self.experiment))
        self.directory.write_env()
        self.directory.write_json(
            "params.json", [{"name": name, "shape": list(shape), "offset": at} for name, shape, at in problem.layout]
        )

    def _start(
        self, driver: Driver, fleet: Fleet, prepared: Prepared, checkpoint: Checkpoint | None
    ) -> tuple[State, Traffic, Clock]:
        if checkpoint is None:
            return driver.begin(prepared.start), Traffic(), Clock()
        state = State.of_tensors(below(checkpoint.tensors, "state."), prepared.start.device)
        driver.held(state)  # refuses another sampler's
        self.scores = dict(checkpoint.meta.get("scores", {}))
        fleet.restore(below(checkpoint.tensors, "fleet."))
        if isinstance(fleet, Recovers):
            lost = fleet.rewind(state.round)
            state = self.forked(driver, state, lost) if lost else state
        return state, Traffic(*checkpoint.meta["traffic"]), Clock(before=checkpoint.meta["seconds"])

    def forked(self, driver: Driver, state: State, clients: Sequence[int]) -> State:
        """Return the state after some clients have lost their memories for good; log it if it changes the chain."""
        before = state.tensors()
        after = driver.forked(state)
        if driver.uplink.memory((1, 1, 1), state.params.dtype, state.params.device):
            self.directory.append_fork(state.round + 1, clients)
            return after
        return State.of_tensors(before, state.params.device)

    def _rewind(self, round: int, store: CheckpointStore, *, again: bool) -> None:
        """Cut the directory back to a checkpoint, if it has gone beyond it."""
        if again or self._resumed:
            store.rewind(round)
            self.directory.rewind(round)

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
        """Write a checkpoint; `kept` is the fleet's state."""
        tensors = {f"state.{name}": tensor for name, tensor in state.tensors().items()}
        tensors |= {f"fleet.{name}": tensor for name, tensor in kept.items()}
        meta = {"traffic": list(traffic), "seconds": clock.total, "data": self._data, "rows": list(rows)}
        meta["scores"] = self.scores  # a resumed run that has reached its last round does not ask for them again
        store.save(state.round, tensors, meta)

    @property
    def over(self) -> bool:
        """Whether the run has ended before and has no rounds left."""
        return self._resumed and has_ended(self.path, self._asked.rounds)

    @property
    def stopped(self) -> str | None:
        """The name of the signal that asked the run to end; None: none did."""
        return self._stop.signal


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(path))


def _flat(experiment: Experiment) -> dict[str, Any]:
    """Flatten the settings to dotted names, for TensorBoard's hyper-parameters page."""
    result: dict[str, Any] = {}
    for name, value in experiment.model_dump().items():
        if isinstance(value, dict):
            result |= {f"{name}.{key}": below for key, below in value.items()}
        else:
            result[name] = value
    return result
