"""The `fedsample` command: a thin shell over `fedsample.experiment`.

Nothing heavy is imported before a command needs it: `fedsample --help` loads no torch, no Flower and no pydantic.
Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 quorum lost, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
import typer
from typer.core import TyperCommand

from fedsample.cli_bench import bench
from fedsample.cli_certs import certs_app
from fedsample.cli_doctor import doctor_app
from fedsample.cli_fleet import client, server
from fedsample.errors import ConfigError, FedSampleError, RunDirectoryError

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(
    name="fedsample",
    help="Draw from the posterior of a model whose data stay with their owners.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Write, show and check configurations.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(certs_app, name="certs")
app.add_typer(doctor_app, name="doctor")


class _WithKeys(TyperCommand):
    """A command whose help ends with every setting and its environment variable."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Make the epilog only when help is asked for: it needs the configuration's classes."""
        from rich.markup import escape

        from fedsample.config import keys

        head = "Settings, by rising precedence: defaults, preset, FILE, environment, --set."
        rows = [
            f"[bold]{key.path}[/] ({key.variable}): "
            + escape(f"{key.meaning}; {key.allowed}; default {key.default or 'unset'}")
            for key in keys()
        ]
        self.epilog = "\n\n".join([head, "", *rows])
        super().format_help(ctx, formatter)


class Table(enum.StrEnum):
    """What `fedsample list` can list."""

    datasets = "datasets"
    models = "models"
    samplers = "samplers"
    estimators = "estimators"
    compressors = "compressors"
    presets = "presets"


_TABLES = {
    Table.datasets: ("fedsample.data", "datasets"),
    Table.models: ("fedsample.models", "models"),
    Table.samplers: ("fedsample.strategies", "table"),
    Table.estimators: ("fedsample.estimators", "table"),
    Table.compressors: ("fedsample.compression", "table"),
    Table.presets: ("fedsample.presets", "table"),
}

_WIDEST = 160  # characters that still read well as columns beside each other

File = Annotated[Path | None, typer.Argument(help="Configuration in TOML; without it, the default job.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting; may be given again."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from fedsample import __version__

        typer.echo(f"fedsample {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Draw from the posterior of a model whose data stay with their owners."""


@app.command()
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
    run_config: Annotated[
        list[str] | None, typer.Option("--run-config", metavar="'KEY=VALUE ...'", help="With --app: as in `flwr run`.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Sample in one process: all clients here, messages counted as if sent.

    FILE is a configuration in TOML. Without it: the posterior of softmax regression on scikit-learn's digits, unevenly
    split over 10 clients. `fedsample config show --help` lists all settings and their environment variables.

    With --app any Flower app runs in this process, as it is.
    """
    if folder is not None or clients is not None or run_config:
        from fedsample.cli_app import simulate_app

        given: dict[str, object] = {"FILE": file, "--set": settings or None, "--out": out, "--preset": preset}
        given |= {"--device": device, "--seed": seed, "--rounds": rounds, "--resume": resume or None}
        given |= {"--dry-run": dry_run or None, "--json": as_json or None, "--replay": replay}
        given |= {"--check-step": check_step or None}
        others = [name for name, value in given.items() if value is not None]
        simulate_app(folder, clients, run_config or [], others, quiet=quiet)
        return
    short = {"preset": preset, "seed": seed, "rounds": rounds, "fleet.device": device}
    overrides = [*(settings or []), *(f"{key}={value}" for key, value in short.items() if value is not None)]
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
    from fedsample.config import load

    configured = None if resume or replay is not None else load(file, overrides)
    from fedsample import experiment

    if configured is not None and dry_run:
        plan = experiment.plan(configured, [])
        if as_json:
            print_json(plan)
        else:
            _print(_grid([{"what": key, "value": value} for key, value in plan.items()], header=False))
        return
    progress: Literal["auto", "quiet"] = "quiet" if quiet else "auto"
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        changes = overrides if replay is not None else []
        run = experiment.run(
            configured,
            out=out,
            resume=resume,
            overrides=changes,
            progress=progress,
            replay=replay,
            check_step=check_step,
        )
    if as_json:
        print_json(run.summary)
    else:
        _print(run.table())


app.command()(server)
app.command()(client)
app.command()(bench)


@config_app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write; an existing file is left alone.")] = Path(
        "fedsample.toml"
    ),
    debug: Debug = False,
) -> None:
    """Write a TOML file of the default job, every setting in it with its meaning. PATH is fedsample.toml by default."""
    from fedsample.config import template

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(template())
    except FileExistsError:
        raise ConfigError(f"{path}: exists and is left as it is; name another file, or move this one away") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it first, or name another place") from None
    typer.echo(f"wrote {path}; edit it, then: fedsample simulate {path}")


@config_app.command(cls=_WithKeys)
def show(file: File = None, settings: Set = None, debug: Debug = False) -> None:
    """Print every resolved value as TOML, and who set what is not the default. Without FILE: the default job."""
    from fedsample.config import dump_toml, trace

    typer.echo(dump_toml(*trace(file, settings or [])), nl=False)


@config_app.command()
def check(file: File = None, settings: Set = None, debug: Debug = False) -> None:
    """Say whether a configuration can run: keys, types, ranges, and whether what it samples is the posterior.

    Without FILE: the default job.
    """
    from fedsample.config import load

    configured = load(file, settings or [])
    from fedsample import experiment

    experiment.check(configured)
    typer.echo(f"ok: {file or 'the default job'}, preset {configured.preset}")


@app.command(name="list")
def list_table(
    what: Annotated[Table, typer.Argument(help="Which table.", show_default=False)],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List what this version knows."""
    module, function = _TABLES[what]
    rows = [
        row if isinstance(row, Mapping) else row._asdict()
        for row in getattr(importlib.import_module(module), function)()
    ]
    if as_json:
        print_json(rows)
    else:
        width = sum(max(len(str(row[name])) for row in rows) for name in rows[0])
        _print(_grid(rows) if width <= _WIDEST else _cards(rows))


@app.command()
def monitor(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="A run directory, or one that holds several.", show_default=False)
    ] = Path("runs"),
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="TCP port; by default a free one.")] = None,
    debug: Debug = False,
) -> None:
    """Show runs in TensorBoard, on this machine only, until Ctrl-C. DIR is ./runs by default."""
    if not directory.is_dir():
        raise RunDirectoryError(
            f"{directory}: there is no such directory; give the run directory that `fedsample simulate` printed, "
            "or start where ./runs is"
        )
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(directory), "--host", "127.0.0.1"]
    code = _foreground([*command, *(["--port", str(port)] if port is not None else [])])
    if code:
        raise FedSampleError(f"TensorBoard ended with exit code {code}; its own message is above")


def _foreground(command: Sequence[str]) -> int:
    """Run a process in this one's place; it ends when this one is told to. Returns its exit code."""
    process = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            process.terminate()
            process.wait()


def _print(renderable: RenderableType) -> None:
    """Show something of rich on standard output."""
    from rich.console import Console

    Console().print(renderable)


def print_json(value: Any) -> None:
    """Print strict JSON: what is not a finite number becomes null."""

    def finite(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: finite(below) for key, below in item.items()}
        if isinstance(item, list | tuple):
            return [finite(below) for below in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    typer.echo(json.dumps(finite(value), indent=2, allow_nan=False))


def _grid(rows: Sequence[Mapping[str, Any]], header: bool = True) -> RenderableType:
    """Rows of one shape as a table; the first column names the row."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=SIMPLE_HEAD, show_header=header)
    for number, name in enumerate(rows[0] if rows else ()):
        grid.add_column(Text(name), no_wrap=number == 0, style="bold" if number == 0 else "", overflow="fold")
    for row in rows:
        grid.add_row(*(Text("-" if value is None else str(value)) for value in row.values()))
    return grid


def _cards(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Rows of many columns, one below the other; the first column is the heading."""
    from rich.table import Table as Grid
    from rich.text import Text

    cards = Grid.grid(padding=(0, 2, 0, 0))
    cards.add_column(no_wrap=True)
    cards.add_column(overflow="fold")
    for row in rows:
        (_, heading), *rest = row.items()
        cards.add_row(Text(str(heading), style="bold"), Text(str(rest[0][1])))
        for name, value in rest[1:]:
            cards.add_row(Text(f"  {name}"), Text(str(value)))
        cards.add_row()
    return cards


def _explain(error: OSError) -> str:
    """What the system refused, and what to do about it."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    advice = {
        errno.ENOSPC: "; free some space (a run goes on with --resume --out DIR)",
        errno.EDQUOT: "; free some of your quota (a run goes on with --resume --out DIR)",
        errno.EROFS: "; choose a place that can be written (a run: --out DIR)",
        errno.EACCES: "; choose a place that you may use (a run: --out DIR)",
    }
    return what + advice.get(error.errno or 0, "")


def _account(error: BaseException) -> tuple[str, int]:
    """One message and the exit code for whatever ended the command."""
    if isinstance(error, FedSampleError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, OSError):
        return _explain(error), 1
    first = next(iter(str(error).splitlines()), "no message")
    return f"unexpected {type(error).__name__}: {first} (a defect of fedsample; --debug shows where)", 1


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM counts as Ctrl-C, from the first import on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run the command line; the process exits with the documented code, and a traceback only with --debug."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    try:
        with _termination():
            app()
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in sys.argv[1:]:
            traceback.print_exc()
        message, code = _account(error)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(code)
