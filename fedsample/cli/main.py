"""The `fedsample` command: its entry point, options, `init`, `config`, `list` and `monitor`.

Nothing heavy is imported before a command needs it: `fedsample --help` loads no torch, no Flower and no pydantic.
Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 quorum lost, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import importlib
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import click
import typer
from typer.core import TyperCommand

from fedsample.cli.bench import bench
from fedsample.cli.certs import certs_app
from fedsample.cli.devices import client, server
from fedsample.cli.doctor import doctor_app
from fedsample.cli.options import Debug, File, Json, Set
from fedsample.cli.printing import cards, grid, print_json, print_rich
from fedsample.cli.simulate import simulate
from fedsample.errors import ConfigError, FedSampleError, RunDirectoryError

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
    Table.presets: ("fedsample.config.presets", "table"),
}

_WIDEST = 160  # widest table, in characters, that reads well side by side


def _print_version(wanted: bool) -> None:
    if wanted:
        from fedsample.version import __version__

        typer.echo(f"fedsample {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Draw from the posterior of a model whose data stay with their owners."""


app.command()(simulate)
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
    from fedsample.runs import checks

    checks.check(configured)
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
        print_rich(grid(rows) if width <= _WIDEST else cards(rows))


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
    """Run a child process in the foreground, and end it when this process is ended; return its exit code."""
    process = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            process.terminate()
            process.wait()


def _explain(error: OSError) -> str:
    """Explain what the operating system refused, and what to do about it."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    advice = {
        errno.ENOSPC: "; free some space (a run goes on with --resume --out DIR)",
        errno.EDQUOT: "; free some of your quota (a run goes on with --resume --out DIR)",
        errno.EROFS: "; choose a place that can be written (a run: --out DIR)",
        errno.EACCES: "; choose a place that you may use (a run: --out DIR)",
    }
    return what + advice.get(error.errno or 0, "")


def _account(error: BaseException) -> tuple[str, int]:
    """Return the message and exit code for the exception that ended the command."""
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
    """Treat SIGTERM as Ctrl-C from the first import on, and SIGINT too if a shell's `&` had it ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [signal.SIGTERM, *([signal.SIGINT] if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else [])]
    before = {number: signal.signal(number, signal.default_int_handler) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """Run the command line; the process exits with the documented code, and a traceback only with --debug."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # else gRPC kills what an app forks, as a DataLoader does
    try:
        with _termination():
            app()
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in sys.argv[1:]:
            traceback.print_exc()
        message, code = _account(error)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(code)
