"""`fedsample simulate`: a run in this process, its plan, its replay, or any Flower app."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from fedsample.cli.options import Debug, File, Json, RunConfig, Set
from fedsample.cli.printing import grid, print_json, print_rich

if TYPE_CHECKING:
    from fedsample.config import Experiment


def simulate(
    file: File = None,
    settings: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; by default runs/<time>-<preset>. One with files is refused.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, as configured there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and what it would send.")] = False,
    check_step: Annotated[
        bool, typer.Option("--check-step", help="Sample again at half the step, and say whether that confirms it.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; short for --set fleet.device=...")] = None,
    preset: Annotated[str | None, typer.Option(help="Row of `fedsample list presets`; for --set preset=...")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=...")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="A run, of devices say: its settings, and who took part in each round.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Short for --set rounds=...")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the final table.")] = False,
    as_json: Json = False,
    folder: Annotated[Path | None, typer.Option("--app", help="Run the Flower app in this folder instead.")] = None,
    clients: Annotated[int | None, typer.Option(min=1, help="With --app: how many nodes; 10 by default.")] = None,
    run_config: RunConfig = None,
    debug: Debug = False,
) -> None:
    """Sample in one process: all clients here, messages counted as if sent.

    FILE is a configuration in TOML. Without it: the posterior of softmax regression on scikit-learn's digits, unevenly
    split over 10 clients. `fedsample config show --help` lists all settings and their environment variables.

    With --app any Flower app runs in this process, as it is.
    """
    if folder is not None or clients is not None or run_config:
        from fedsample.cli.flower_app import simulate_app

        given: dict[str, object] = {"FILE": file, "--set": settings or None, "--out": out, "--preset": preset}
        given |= {"--device": device, "--seed": seed, "--rounds": rounds, "--resume": resume or None}
        given |= {"--dry-run": dry_run or None, "--json": as_json or None, "--replay": replay}
        given |= {"--check-step": check_step or None}
        others = [name for name, value in given.items() if value is not None]
        simulate_app(folder, clients, run_config or [], others, quiet=quiet)
        return
    short = {"preset": preset, "seed": seed, "rounds": rounds, "fleet.device": device}
    overrides = _overrides(settings, short)
    _agree(file, overrides, out, replay, resume=resume, dry_run=dry_run)
    if dry_run and check_step:
        raise click.UsageError("--dry-run samples nothing that --check-step could check: drop one")
    from fedsample.config import load

    configured = None if resume or replay is not None else load(file, overrides)
    if configured is not None and dry_run:
        _plan(configured, as_json=as_json)
        return
    changes = overrides if replay is not None else []
    _sample(configured, changes, out, replay, resume=resume, check_step=check_step, quiet=quiet, as_json=as_json)


def _overrides(settings: Sequence[str] | None, short: Mapping[str, object]) -> list[str]:
    """List --set's values, then the options that abbreviate others, as KEY=VALUE each."""
    return [*(settings or []), *(f"{key}={value}" for key, value in short.items() if value is not None)]


def _agree(
    file: Path | None, overrides: Sequence[str], out: Path | None, replay: Path | None, *, resume: bool, dry_run: bool
) -> None:
    """Refuse options beside --resume and --replay that the run they name already determines.

    Raises:
        click.UsageError: if there is one, or if --resume names no run.
    """
    if resume:
        if out is None:
            raise click.UsageError("--resume needs --out DIR, the directory of the run to go on with")
        if file is not None or overrides or dry_run:
            raise click.UsageError(
                "--resume takes everything from config.toml in --out: drop FILE, --set, --preset, --seed, --rounds, "
                "--device and --dry-run"
            )
    if replay is not None and (resume or file is not None or dry_run):
        raise click.UsageError("--replay takes its settings from that run: drop FILE, --resume and --dry-run")


def _plan(configured: Experiment, *, as_json: bool) -> None:
    """Print what would run and what it would send."""
    from fedsample.runs.plan import plan as planned

    plan = planned(configured, [])
    if as_json:
        print_json(plan)
    else:
        print_rich(grid([{"what": key, "value": value} for key, value in plan.items()], header=False))


def _sample(
    configured: Experiment | None, changes: Sequence[str], out: Path | None, replay: Path | None, *, resume: bool,
    check_step: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run, and print the summary.

    Args:
        configured: the experiment; None: that of the run in `out` or `replay`.
        changes: overrides of the settings of a replay.
    """
    from fedsample.runs import api

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        run = api.run(
            configured, out=out, resume=resume, overrides=changes, progress="quiet" if quiet else "auto", replay=replay,
            check_step=check_step,
        )  # fmt: skip
    if as_json:
        print_json(run.summary)
    else:
        print_rich(run.table())
