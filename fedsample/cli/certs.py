"""`fedsample certs`: keys and certificates for a fleet of real devices."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from fedsample.cli.options import Debug

if TYPE_CHECKING:
    from fedsample.fleets.grpc.security.cert_folders import Made
    from fedsample.fleets.grpc.security.identity import Identity

certs_app = typer.Typer(help="Make, request, sign and show keys and certificates for devices.", no_args_is_help=True)

_MAX_DAYS, _MAX_CLIENTS = 3650, 1_000_000  # as in fedsample.fleets.grpc, which help must not load

Days = Annotated[int, typer.Option(min=1, max=_MAX_DAYS, help="How long they last.")]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--server-name",
        metavar="NAME",
        help="DNS name or IP address by which clients reach the server; may be given again. This machine's own "
        "(localhost, 127.0.0.1, ::1) are always in.",
    ),
]
Client = Annotated[
    int | None, typer.Option("--client", min=0, max=_MAX_CLIENTS - 1, help="Index of the client, its partition.")
]


@certs_app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where; one that exists is left alone.")],
    clients: Annotated[int, typer.Option(min=1, max=_MAX_CLIENTS, help="How many client folders.")],
    names: Names = None,
    days: Days = 365,
    debug: Debug = False,
) -> None:
    """Make an authority, a server's folder and one folder per client: DIR/ca, DIR/server, DIR/client-0, ...

    For a trial, or where you hand the folders over yourself. Where devices are far away, make their keys on them:
    `fedsample certs request`.
    """
    from fedsample.fleets.grpc.security import cert_folders

    _report(cert_folders.init(folder, names or [], clients, days=days))
    typer.echo(f"{folder / 'ca'} signs for this fleet: keep it here, and private")


@certs_app.command()
def issue(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that `certs init` made.")],
    clients: Annotated[int, typer.Option(min=1, max=_MAX_CLIENTS, help="How many more.")],
    first: Annotated[int, typer.Option(min=0, max=_MAX_CLIENTS - 1, help="Index of the first one.")],
    days: Days = 365,
    debug: Debug = False,
) -> None:
    """Add client folders to a folder that `certs init` made."""
    from fedsample.fleets.grpc.security import cert_folders

    _report(cert_folders.issue(folder, first, clients, days=days))


@certs_app.command()
def request(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the key is made, and stays.")],
    client: Client = None,
    names: Names = None,
    debug: Debug = False,
) -> None:
    """On the device: make a key, and DIR/request.csr to have signed. For a server, with --server-name."""
    identity = _identity(client, names)
    from fedsample.fleets.grpc.security import cert_folders

    path = cert_folders.request(folder, identity, names or [])
    what = f"--client {client}" if client is not None else " ".join(f"--server-name {name}" for name in names or [])
    typer.echo(f"wrote {path} for {identity}; {folder / 'key.pem'} stays here and is never sent")
    typer.echo(
        f"send {path.name} to where the authority is: fedsample certs sign CA_DIR {path.name} {what} --out cert.pem"
    )
    typer.echo(f"put the cert.pem and ca.pem that come back into {folder}, then: fedsample certs show {folder}")


@certs_app.command()
def sign(
    ca: Annotated[Path, typer.Argument(metavar="CA_DIR", help="Folder with ca.pem and ca-key.pem.")],
    asked: Annotated[Path, typer.Argument(metavar="REQUEST", help="The request.csr that a device sent.")],
    out: Annotated[Path, typer.Option(help="Where to write the certificate; ca.pem goes beside it.")],
    client: Client = None,
    names: Names = None,
    days: Days = 365,
    debug: Debug = False,
) -> None:
    """Where the authority is: sign a request, and send back the certificate and the ca.pem beside it.

    Say whose it is: a request for another client, or for other names, is refused.
    """
    identity = _identity(client, names)
    from fedsample.fleets.grpc.security import cert_folders

    _report(cert_folders.sign(ca, asked, identity, names or [], out, days=days))
    typer.echo(f"send back {out} and {out.parent / 'ca.pem'}; neither is secret")


@certs_app.command()
def show(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a server, client or authority, or one of several.")
    ],
    debug: Debug = False,
) -> None:
    """Say whose a folder is, for which names and until when, and whether its parts belong together.

    Exit code 1 where one cannot be used.
    """
    from fedsample.errors import CertificateError
    from fedsample.fleets.grpc.security.cert_folders import holders

    failed = False
    for place in holders(folder):
        try:
            failed = not _show(place) or failed
        except CertificateError as error:
            typer.echo(f"{place}: cannot be used\n  problem    {error}")
            failed = True
    if failed:
        raise typer.Exit(1)


def _show(folder: Path) -> bool:
    """Print one folder; return whether it can be used."""
    from fedsample.fleets.grpc.security.cert_folders import CA_KEY, load_authority
    from fedsample.fleets.grpc.security.credentials import day, examine

    if (folder / CA_KEY).exists():
        own = load_authority(folder).certificate
        typer.echo(
            f"{folder}: certificate authority, {own.subject.rfc4514_string()}; key and certificate belong together"
        )
        typer.echo(f"  expires    {day(own.not_valid_after_utc)}, {_left(own.not_valid_after_utc)}")
        return own.not_valid_after_utc > datetime.now(UTC)
    found = examine(folder)
    typer.echo(f"{folder}: {'can be used' if not found.problems else 'cannot be used'}")
    identity = f"{found.identity} ({found.identity.uri})" if found.identity else "none"
    rows = [("identity", identity), ("names", ", ".join(found.names) or "none")]
    rows += [("expires", f"{day(found.expires)}, {_left(found.expires)}")]
    rows += [("authority", ", ".join(one.subject.rfc4514_string() for one in found.authorities))]
    rows += [("problem", problem) for problem in found.problems]
    rows += [("warning", found.warning)] if found.warning else []
    for name, value in rows:
        typer.echo(f"  {name:<10} {value}")
    return not found.problems


def _left(expires: datetime) -> str:
    now = datetime.now(UTC)
    return f"{(expires - now).days} days left" if now <= expires else f"{(now - expires).days} days ago"


def _identity(client: int | None, names: Sequence[str] | None) -> Identity:
    if (client is None) != bool(names):
        raise click.UsageError("give either --client N, or for a server --server-name NAME")
    from fedsample.fleets.grpc.security.identity import ClientIdentity, ServerIdentity

    return ServerIdentity() if client is None else ClientIdentity(client)


def _report(made: Sequence[Made]) -> None:
    """Print one line per folder or file; of many clients the first and the last."""
    from fedsample.fleets.grpc.security.credentials import day

    shown = list(made) if len(made) <= 12 else [*made[:4], None, made[-1]]
    for row in shown:
        if row is None:
            typer.echo(f"... {len(made) - 5} more ...")
        else:
            typer.echo(f"{row.path!s:<28} {row.holder:<22} until {day(row.expires)}")
