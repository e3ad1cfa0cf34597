"""Run one experiment: the one place that wires data, target, fleet, strategy and monitor together."""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedsample.config import Experiment, dump_toml, load
from fedsample.errors import ConfigError, RunDirectoryError
from fedsample.links import build_downlink, build_uplink, links

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from fedsample.targets import Posterior

Source = Experiment | Mapping[str, Any] | str | Path | None
Mode = Literal["auto", "plain", "quiet"]

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
        from fedsample.monitor.report import summary_table

        return summary_table(self.summary, self.path)


def run(
    source: Source = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Sequence[str] = (),
    progress: Mode = "auto",
) -> Run:
    """Sample, and keep everything in a run directory.

    Args:
        source: a configuration as dict, TOML path or `Experiment`; None: the default job. out: the run directory, by
            default runs/<time>-<preset>. resume: go on with the run in `out`, as configured there. overrides:
            "section.key=value" strings, as `--set` takes them. progress: a live bar, plain lines, or nothing.

    Raises:
        FedSampleError: whatever went wrong, in words; see `fedsample.errors`.
    """
    for name, value in _FLOWER.items():
        os.environ.setdefault(name, value)
    from fedsample.session import Session

    if resume:
        if out is None or source is not None or overrides:
            raise ConfigError("resume takes everything from the run directory: give `out`, and no configuration")
        with Session.reopen(Path(out), progress) as session:
            return Run(session.path, session.sample(), session.experiment)
    experiment = load(source, overrides)
    check(experiment)
    path = Path(out) if out is not None else _default_path(experiment)
    with Session.create(experiment, path, progress) as session:
        return Run(session.path, session.sample(), session.experiment)


def of_run_config(run_config: Mapping[str, bool | float | int | str]) -> Experiment:
    """The experiment of a Flower run, the same on server and clients: the environment is not asked.

    Args:
        run_config: as `[tool.flwr.app.config]` and `flwr run --run-config` make it. `config-file` names a TOML file, or
            `config` is its text; every other key is a setting, such as `uplink.k`, and is laid over it. Keys that begin
            with `app.` are the app's own.

    Raises:
        ConfigError: as for any configuration.
    """
    import tomli_w

    settings = {name: value for name, value in run_config.items() if not name.startswith("app.")}
    file, text = settings.pop("config-file", ""), settings.pop("config", "")
    if file and text:
        raise ConfigError("the run configuration has both config-file and config: give the path or the text, not both")
    try:
        source: Source = Path(str(file)) if file else tomllib.loads(str(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the run configuration's key config is not TOML: {error}") from error
    literals = {name: tomli_w.dumps({"v": value}).removeprefix("v = ").strip() for name, value in settings.items()}
    return load(source, [f"{name}={literal}" for name, literal in literals.items()], {})


def check(experiment: Experiment) -> None:
    """Refuse what would not sample the posterior.

    Raises:
        UnsoundError: with the reason and the nearest sound choice.
    """
    build_uplink(experiment)
    build_downlink(experiment)
    if experiment.fleet.name == "flower" and (experiment.fleet.loss or experiment.fleet.dropout):
        raise ConfigError(
            'fleet.loss and fleet.dropout simulate faults in fleet "local"; Flower\'s are real: set both to 0'
        )


def build_target(source: Source = None, overrides: Sequence[str] = ()) -> Posterior:
    """The posterior of a configuration, without any sampling."""
    from fedsample.problem import build_problem

    return build_problem(load(source, overrides)).posterior


def plan(source: Source = None, overrides: Sequence[str] = ()) -> dict[str, str]:
    """What a configuration would run, and what it would send, without sampling."""
    import torch

    from fedsample.problem import DTYPES, build_problem

    experiment = load(source, overrides)
    check(experiment)
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


def _default_path(experiment: Experiment) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path("runs") / f"{stamp}-{experiment.preset}"
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def digest(experiment: Experiment) -> str:
    """Names what a checkpoint depends on: everything but the number of rounds and what is written down."""
    values = tomllib.loads(dump_toml(experiment))
    for free in ("rounds", "monitor"):
        values.pop(free, None)
    return hashlib.sha256(repr(sorted(_leaves(values))).encode()).hexdigest()[:32]


def _leaves(values: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    result = []
    for name, value in values.items():
        result += _leaves(value, f"{path}{name}.") if isinstance(value, Mapping) else [(f"{path}{name}", repr(value))]
    return result


def reread(text: str) -> Experiment:
    """The experiment of a run directory's config.toml, whatever the environment says now.

    Raises:
        RunDirectoryError: if it cannot be read.
    """
    try:
        return Experiment(**tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ConfigError) as error:
        raise RunDirectoryError(
            f"config.toml of the run cannot be used: {error}; restore it, or start a new run in another directory"
        ) from error
