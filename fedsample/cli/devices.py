"""`fedsample server` and `fedsample client`: a run with real devices."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import click
import typer

from fedsample.cli.options import Debug, File, RunConfig, Set
from fedsample.cli.printing import print_json, print_rich
from fedsample.errors import ConfigError

PORT = 9092

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Plaintext and no certificates; on loopback only, to try things out.")
]


def server(
    file: File = None,
    settings: Set = None,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where devices connect; 0.0.0.0:9092 is every network.")
    ] = f"127.0.0.1:{PORT}",
    certs: Annotated[Path | None, typer.Option(help="Folder with ca.pem, cert.pem and key.pem of the server.")] = None,
    insecure: Insecure = False,
    out: Annotated[Path | None, typer.Option(help="Run directory; by default runs/<time>-<preset>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, as configured there.")] = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on standard output.")] = False,
    app: Annotated[Path | None, typer.Option(help="Run the ServerApp of the Flower app in this folder.")] = None,
    clients: Annotated[int | None, typer.Option(min=1, help="With --app: how many devices to wait for.")] = None,
    run_config: RunConfig = None,
    patience: Annotated[
        float | None,
        typer.Option(min=0, help="With --app: seconds after which a device that is away is gone; 60 by default."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Sample with real devices: wait for data.clients of them, and serve until the chain has ended.

    Every device needs `fedsample client HOST:PORT`, a certificate and data; what is sampled is configured here.

    A device or this server may die at any moment: start it again (the server with --resume).

    With --app it runs any Flower app's ServerApp as it is; devices need `fedsample client HOST:PORT --app`.
    """
    _either(certs, insecure, "certs/server")
    if app is not None or clients is not None or run_config or patience is not None:
        given = {"FILE": file, "--set": settings, "--out": out, "--resume": resume or None, "--json": as_json or None}
        others = [name for name, value in given.items() if value]
        _serve_app(app, clients, run_config or [], listen, certs, patience, others, quiet)
        return
    if resume and out is None:
        raise click.UsageError("--resume needs --out DIR, the directory of the run to go on with")
    if resume and (file is not None or settings):
        raise click.UsageError("--resume takes everything from config.toml in --out: drop FILE and --set")
    from fedsample.config import load
    from fedsample.fleets.grpc.security.address import parse_address

    address = parse_address(listen, listen=True)
    experiment = None if resume else load(file, [*(settings or []), "fleet.name=grpc"])
    from fedsample.fleets.grpc.server.host import Host
    from fedsample.monitor.summary_table import summary_table
    from fedsample.runs import api as experiments
    from fedsample.runs import checks
    from fedsample.runs.serve import serve

    if experiment is not None:
        checks.check(experiment)
        out = out or experiments.default_path(experiment)
    if out is None:  # click has refused this above
        raise click.UsageError("--out DIR is missing")
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        path, summary, _ = serve(experiment, out, Host(address, certs), "quiet" if quiet else "auto")
    if as_json:
        print_json(summary)
    else:
        print_rich(summary_table(summary, path))


def client(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Of the server.")],
    certs: Annotated[Path | None, typer.Option(help="Folder with ca.pem, cert.pem and key.pem of this device.")] = None,
    data: Annotated[
        str | None, typer.Option(help="A csv, parquet or npz file of this device's own, or a built-in set.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Column to predict, of a csv or parquet file.")] = None,
    partition: Annotated[
        int | None, typer.Option(min=0, help="Which share of a built-in set; by default this client's own.")
    ] = None,
    partitions: Annotated[int | None, typer.Option(min=1, help="How many shares there are.")] = None,
    state: Annotated[
        Path | None, typer.Option(help="Where snapshots lie; by default below $XDG_STATE_HOME or ~/.local/state.")
    ] = None,
    insecure: Insecure = False,
    index: Annotated[
        int | None,
        typer.Option("--client", min=0, help="Which client this is, with --insecure only."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N.")] = "cpu",
    attempts: Annotated[
        int | None, typer.Option(min=1, help="Failures to connect in a row after which to give up; by default never.")
    ] = None,
    app: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER | MODULE:ATTRIBUTE",
            help="Run a Flower app's ClientApp, as it is; its server needs --app too.",
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Take part as one device, until the run has ended.

    The server configures everything; this device gives its rows' gradients, never its rows.

    When the connection or the server goes, it waits and comes back. Ctrl-C ends it; started again, it goes on.
    """
    _either(certs, insecure, "certs/client-0")
    if insecure and index is None:
        raise click.UsageError("--insecure has no certificate that says which client this is: add --client N")
    if certs is not None and index is not None:
        raise click.UsageError("the certificate says which client this is: drop --client")
    given = {"--data": data, "--target": target, "--partition": partition, "--partitions": partitions}
    given["--device"] = None if device == "cpu" else device
    others = [name for name, value in given.items() if value is not None]
    if app is not None and others:
        raise click.UsageError(f"{', '.join(others)}: not with --app, whose ClientApp finds its own data and device")
    from fedsample.fleets.grpc.device.process import DeviceOptions, take_part

    options = DeviceOptions(
        address, certs, -1 if index is None else index, state or _state_home(), device, data, target, partition,
        partitions, attempts, quiet, app,
    )  # fmt: skip
    typer.echo(take_part(options))


def _serve_app(
    folder: Path | None, clients: int | None, run_config: list[str], listen: str, certs: Path | None,
    patience: float | None, others: list[str], quiet: bool,
) -> None:  # fmt: skip
    """Run `server` with --app."""
    if folder is None or clients is None:
        raise click.UsageError("--app FOLDER and --clients N go together; --run-config and --patience are for them")
    if others:
        raise click.UsageError(
            f"{', '.join(others)}: not with --app, whose configuration is the app's own: --run-config 'key=value ...'"
        )
    from fedsample.cli.flower_app import serve_app
    from fedsample.fleets.grpc.security.address import parse_address

    address = parse_address(listen, listen=True)
    from fedsample.fleets.grpc.server.host import Host

    serve_app(folder, clients, run_config, Host(address, certs), 60.0 if patience is None else patience, quiet=quiet)


def _either(certs: Path | None, insecure: bool, example: str) -> None:
    if (certs is None) != insecure:
        raise click.UsageError(
            f"give --certs {example} (made by `fedsample certs init`), or --insecure on loopback, and not both"
        )


def _state_home() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    if not os.path.isabs(base):
        raise ConfigError(f"XDG_STATE_HOME is {base!r}, expected an absolute path; or give --state DIR")
    return Path(base) / "fedsample"
