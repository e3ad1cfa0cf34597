"""Run one experiment: the one place that wires data, target, fleet, strategy and monitor together."""

from __future__ import annotations

import os
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsample import step_check
from fedsample.config import Experiment, Source, dump_toml, load
from fedsample.config.loading import reread
from fedsample.errors import ConfigError, DeviceMemoryError, Interrupted, RunDirectoryError, UnsoundError
from fedsample.estimators.links import build_downlink, build_uplink, links

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from fedsample.monitor.progress import Mode
    from fedsample.targets import Posterior


_PATIENT = ("fleet.quorum=1.0", "fleet.deadline=none")  # what only devices have
_FLOWER = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}  # read once, when flwr is imported


@dataclass(frozen=True)
class Run:
    """What an experiment left behind.

    Attributes:
        path: the run directory. summary: what `summary.json` holds. experiment: the resolved configuration.
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
        """The posterior that was sampled."""
        return build_target(self.experiment)

    def table(self) -> Table:
        """The summary for a person to read."""
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
        source: a configuration as dict, TOML path or `Experiment`; None: the default job. out: the run directory, by
            default runs/<time>-<preset>. resume: go on with the run in `out`, as configured there. overrides:
            "section.key=value" strings, as `--set` takes them. progress: a live bar, plain lines, or nothing.
            check_step: sample again at half the step, in `out`/check-step, and say in the summary's `step_check`
            whether that confirms the step; see `fedsample.step_check`.

    Raises:
        FedSampleError: whatever went wrong, in words; see `fedsample.errors`.
    """
    for name, value in _FLOWER.items():
        os.environ.setdefault(name, value)
    from fedsample.session import Session

    if resume:
        if out is None or source is not None or overrides:
            raise ConfigError("resume takes everything from the run directory: give `out`, and no configuration")
        with _within_memory(), Session.reopen(Path(out), progress) as session:
            if check_step:
                step_check.half(session.experiment)  # refuses before the chain goes on
            done = Run(session.path, session.sample(), session.experiment)
        return _check_step(done, progress) if check_step else done
    if replay is not None:
        if source is not None:
            raise ConfigError("replay takes the configuration from the run: give no other, only overrides")
        kept = tomllib.loads(dump_toml(reread(_config_of(Path(replay)))))
        source, overrides = kept, ["fleet.name=local", "fleet.engine=by-client", *_PATIENT, *overrides]
    experiment = load(source, overrides)
    check(experiment)
    if experiment.fleet.name == "grpc":
        raise ConfigError('fleet.name = "grpc" is served to devices: use `fedsample server`, or fleet "local"')
    if check_step:
        step_check.half(experiment)
    path = Path(out) if out is not None else default_path(experiment)
    with (
        _within_memory(),
        Session.create(experiment, path, progress, replay=None if replay is None else Path(replay)) as session,
    ):
        done = Run(session.path, session.sample(), session.experiment)
    return _check_step(done, progress) if check_step else done


def _check_step(done: Run, progress: Mode) -> Run:
    """Sample at half the step, below the run's directory, and add the verdict to its summary."""
    from fedsample.monitor.directory import RunDirectory
    from fedsample.session import Session

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


def check(experiment: Experiment) -> None:
    """Refuse what would not sample the posterior.

    Raises:
        UnsoundError: with the reason and the nearest sound choice.
    """
    build_uplink(experiment)
    build_downlink(experiment)
    section = experiment.fleet
    if section.name == "grpc":
        _check_devices(experiment)
    if section.name == "flower" and (section.loss or section.dropout):
        raise ConfigError(
            'fleet.loss and fleet.dropout simulate faults in fleet "local"; Flower\'s are real: set both to 0'
        )


def hasty(experiment: Experiment) -> bool:
    """Whether rounds go on without devices that are slow."""
    quorum = experiment.fleet.quorum
    return not (isinstance(quorum, float) and quorum == 1.0)


def _check_devices(experiment: Experiment) -> None:
    """Refuse what real devices cannot do, and rounds without some of them where that changes the law."""
    section, uplink = experiment.fleet, experiment.uplink.name
    if section.dropout or (section.loss and not hasty(experiment)):
        raise ConfigError(
            'fleet.loss and fleet.dropout simulate faults in fleet "local"; those of devices are real: set both to 0 '
            "(with a quorum, fleet.loss states how likely an answer is late)"
        )
    if hasty(experiment) and uplink not in ("diana", "ef21") and not section.loss:
        raise UnsoundError(
            f"fleet.quorum = {section.quorum}: without knowing how likely a device is late, {uplink} samples another "
            'posterior, because nothing stands in for who is missing; take uplink.name = "diana", whose memories do, '
            "or state that probability as fleet.loss"
        )


def build_target(source: Source = None, overrides: Sequence[str] = ()) -> Posterior:
    """The posterior of a configuration, without any sampling."""
    from fedsample.problem import build_problem

    with _within_memory():
        return build_problem(load(source, overrides)).posterior


@contextmanager
def _within_memory() -> Iterator[None]:
    """Say of what the processor's memory does not hold that it does not, and not that it is a defect.

    Raises:
        DeviceMemoryError: PyTorch, or Python, could not allocate what was asked for.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or "can't allocate memory" in str(error)):
            raise
        said = next(iter(str(error).splitlines()), "no memory").removesuffix(" (Cannot allocate memory)")
        raise DeviceMemoryError(
            "out of memory on cpu: take fewer chains, clients or draws, a smaller model, or metric.name = 'diagonal'; "
            f"PyTorch says: {said}"
        ) from None


def plan(source: Source = None, overrides: Sequence[str] = ()) -> dict[str, str]:
    """What a configuration would run, and what it would send, without sampling."""
    import torch

    from fedsample.numerics.dtypes import DTYPES
    from fedsample.problem import build_problem

    experiment = load(source, overrides)
    check(experiment)
    with _within_memory():
        problem = build_problem(experiment)
    uplink, downlink = links(experiment, problem)
    dtype, d, chains = DTYPES[experiment.dtype], problem.d, experiment.chains
    p = uplink.sync_probability(2, d)
    packet = (1 - p) * uplink.bits(chains, 0, d, dtype) + p * uplink.bits(chains, chains, d, dtype)
    dense = 8 * d * chains * (4 if experiment.dtype == "float32" else 8)
    down = downlink.bits(torch.ones(1, dtype=torch.int64), chains, d, dtype)
    rows = problem.clients.rows.tolist()
    return {
        "target": f"{experiment.model.name} on {experiment.data.name or experiment.data.file}, {d} parameters",
        "clients": f"{problem.clients.n}, rows {_shortened(rows)}",
        "sampler": f"{experiment.sampler.name}, {chains} chains, temperature {experiment.temperature:g}",
        "metric": experiment.metric.name,
        "uplink": f"{experiment.uplink.name} + {uplink.compressor.name}",
        "step": str(experiment.step_size),
        "rounds": f"{experiment.rounds} ({experiment.warmup} of warm-up), {experiment.draws} draws a chain",
        "uplink a client and round": f"{packet / 8:,.0f} bytes (dense: {dense / 8:,.0f})",
        "downlink a client and round": f"{down / 8:,.0f} bytes (dense: {dense / 8:,.0f})",
        "uplink a client in all": f"{packet / 8e6 * experiment.rounds:,.2f} MB, preparation not counted",
    }


def _shortened(rows: list[int]) -> str:
    if len(rows) <= 16:
        return " ".join(map(str, rows))
    return f"{' '.join(map(str, rows[:12]))} ... (from {min(rows)} to {max(rows)})"


def _config_of(path: Path) -> str:
    try:
        return (path / "config.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path} holds no run to replay: {error}; give the directory of a run") from error


def default_path(experiment: Experiment) -> Path:
    """runs/<time>-<preset>."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path("runs") / f"{stamp}-{experiment.preset}"
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path
