"""`fedsample doctor`: why a device cannot reach its server, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click
import typer

from fedsample.cli.options import Debug

doctor_app = typer.Typer(help="Find what is wrong, and say what to do.", no_args_is_help=True)


@doctor_app.callback()
def _root() -> None:
    """Find what is wrong, and say what to do."""


@doctor_app.command()
def net(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the server listens.")],
    certs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="This client's folder, such as certs/client-0.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plaintext; on loopback only.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds that a step may wait.")] = 5.0,
    debug: Debug = False,
) -> None:
    """Walk from this device to its server: name, connection, TLS, clock, identity, protocol version, round trip.

    One line per step. Exit code 0 where none failed, 1 otherwise.
    """
    if (certs is None) != insecure:
        raise click.UsageError("give either --certs DIR, this client's folder, or --insecure on loopback")
    from fedsample.fleets.grpc.security.doctor import examine_net

    failed = []
    for step in examine_net(address, certs, insecure=insecure, timeout=timeout):
        typer.echo(f"{step.name:<12} {step.state:<7} {step.milliseconds:8.1f} ms  {step.detail}")
        if step.state == "failed":
            failed.append(step.name)
    if failed:
        typer.echo(f"failed: {', '.join(failed)}; mend {failed[0]} first")
        raise typer.Exit(1)
    typer.echo(f"this device reaches {address}")
