"""Run one experiment: the one place that wires data, target, fleet, strategy and monitor together."""

from __future__ import annotations

import os
import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsample.config import Experiment, Source, dump_toml, load
from fedsample.config.loading import reread
from fedsample.errors import ConfigError, Interrupted, RunDirectoryError
from fedsample.runs import step_check
from fedsample.runs.checks import check
from fedsample.runs.memory import within_memory

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from fedsample.monitor.progress import Mode
    from fedsample.targets import Posterior


_WAIT_FOR_ALL = ("fleet.quorum=1.0", "fleet.deadline=none")  # settings of real devices only
_FLOWER = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}  # read once, when flwr is imported


@dataclass(frozen=True)
class Run:
    """A finished experiment.

    Attributes:
        path: the run directory.
        summary: what `summary.json` holds.
        experiment: the resolved configuration.
    """

    path: Path
    summary: dict[str, Any]
    experiment: Experiment

    @cached_property
    def draws(self) -> Tensor:
        """(chains, draws, d) in the model's parameters; `params.json` in the run names them."""
        from fedsample.monitor.draws import load_draws

        return load_draws(self.path)

    @cached_property
    def target(self) -> Posterior:
        """Return the posterior that was sampled."""
        return build_target(self.experiment)

    def table(self) -> Table:
        """Return the summary as a table for `rich`."""
        from fedsample.monitor.summary_table import summary_table

        return summary_table(self.summary, self.path)


def run(
    source: Source = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Sequence[str] = (),
    progress: Mode = "auto",
    replay: str | Path | None = None,
    check_step: bool = False,
) -> Run:
    """Sample, and keep everything in a run directory.

    Args:
        source: a configuration as dict, TOML path or `Experiment`; None: the default job.
        out: the run directory, by default runs/<time>-<preset>.
        resume: continue the run in `out`, as configured there.
        overrides: "section.key=value" strings, as `--set` takes them.
        progress: a live bar, plain lines, or nothing.
        check_step: sample again at half the step, in `out`/check-step, and say in the summary's `step_check` whether
            that confirms the step; see `fedsample.runs.step_check`.

    Raises:
        FedSampleError: whatever went wrong, in words; see `fedsample.errors`.
    """
    for name, value in _FLOWER.items():
        os.environ.setdefault(name, value)
    from fedsample.runs.session import Session

    if resume:
        if out is None or source is not None or overrides:
            raise ConfigError("resume takes everything from the run directory: give `out`, and no configuration")
        with within_memory(), Session.reopen(Path(out), progress) as session:
            if check_step:
                step_check.half(session.experiment)  # refuses before the chain goes on
            done = Run(session.path, session.sample(), session.experiment)
        return _check_step(done, progress) if check_step else done
    if replay is not None:
        if source is not None:
            raise ConfigError("replay takes the configuration from the run: give no other, only overrides")
        kept = tomllib.loads(dump_toml(reread(_config_of(Path(replay)))))
        source, overrides = kept, ["fleet.name=local", "fleet.engine=by-client", *_WAIT_FOR_ALL, *overrides]
    experiment = load(source, overrides)
    check(experiment)
    if experiment.fleet.name == "grpc":
        raise ConfigError('fleet.name = "grpc" is served to devices: use `fedsample server`, or fleet "local"')
    if check_step:
        step_check.half(experiment)
    path = Path(out) if out is not None else default_path(experiment)
    with (
        within_memory(),
        Session.create(experiment, path, progress, replay=None if replay is None else Path(replay)) as session,
    ):
        done = Run(session.path, session.sample(), session.experiment)
    return _check_step(done, progress) if check_step else done


def _check_step(done: Run, progress: Mode) -> Run:
    """Sample at half the step, in a folder inside the run's directory, and add the verdict to its summary."""
    from fedsample.monitor.directory import RunDirectory
    from fedsample.runs.session import Session

    below = done.path / step_check.DIRECTORY
    try:
        if (below / "config.toml").exists():
            session = Session.reopen(below, progress)
        else:
            session = Session.create(step_check.half(done.experiment), below, progress)
        with session:
            other = session.sample()
    except Interrupted as error:
        again = f"fedsample simulate --resume --check-step --out {shlex.quote(str(done.path))}"
        raise Interrupted(f"the run is complete, but its step check was stopped. Go on with: {again}") from error
    summary = {**done.summary, "step_check": step_check.check(done.path, done.experiment, done.summary, other)}
    with RunDirectory.open(done.path) as directory:
        directory.write_json("summary.json", summary)
    return Run(done.path, summary, done.experiment)


def build_target(source: Source = None, overrides: Sequence[str] = ()) -> Posterior:
    """Return the posterior of a configuration, without sampling."""
    from fedsample.problem import build_problem

    with within_memory():
        return build_problem(load(source, overrides)).posterior


def _config_of(path: Path) -> str:
    try:
        return (path / "config.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path} holds no run to replay: {error}; give the directory of a run") from error


def default_path(experiment: Experiment) -> Path:
    """Return the default run directory, runs/<time>-<preset>."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path("runs") / f"{stamp}-{experiment.preset}"
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path
