"""Folders of keys and certificates: create, extend, request and sign.

```
certs/ca/        ca.pem  ca-key.pem                 signs; stays where it was made
certs/server/    ca.pem  cert.pem  key.pem          the server's
certs/client-0/  ca.pem  cert.pem  key.pem          client 0's, which holds partition 0
```

Private keys have mode 600 and lie in folders of mode 700. No file is ever overwritten: a folder is made whole under a
temporary name beside its place and then renamed, so that what exists is complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedsample.errors import CertificateError
from fedsample.fleets.grpc.security import authority
from fedsample.fleets.grpc.security.authority import DEFAULT_DAYS, MAX_DAYS, Authority, server_names
from fedsample.fleets.grpc.security.credentials import private_key, read, signs
from fedsample.fleets.grpc.security.identity import MAX_CLIENTS, ClientIdentity, Identity, ServerIdentity

CA, CA_KEY, CERTIFICATE, KEY, REQUEST = "ca.pem", "ca-key.pem", "cert.pem", "key.pem", "request.csr"


class Made(NamedTuple):
    """What was made: its path, its holder ("certificate authority", "client 0"), and when it expires."""

    path: Path
    holder: str
    expires: datetime


def init(
    folder: Path, names: Sequence[str], clients: int, *, days: int = DEFAULT_DAYS, now: datetime | None = None
) -> list[Made]:
    """Make an authority, a server's folder and `clients` client folders.

    Args:
        folder: where; it must not exist.
        names: names of the server, besides this machine's own.
        clients: number of clients, with indices 0, 1, ...
        days: how long server and clients are valid; the authority: 3650.
        now: when they start; None: now.

    Raises:
        CertificateError: the folder exists, or a number is out of range.
        AddressError: a name is invalid.
    """
    if os.path.lexists(folder):  # even an empty one: a mount point, or the current folder, cannot be replaced
        raise CertificateError(
            f"{folder}: exists and is left as it is; name a new folder, or add clients to this one: "
            f"fedsample certs issue {folder} --clients N --first FIRST"
        )
    identities = _clients(0, clients)
    made = authority.create(days=MAX_DAYS, now=now)
    holders: list[Identity] = [ServerIdentity(), *identities]
    with _staged(folder) as stage:
        _write_folder(stage / "ca", {CA: _pem(made.certificate), CA_KEY: _pem_key(made.key)})
        rows = [Made(folder / "ca", "certificate authority", made.certificate.not_valid_after_utc)]
        for identity in holders:
            rows.append(_issue(stage / _folder_name(identity), folder, made, identity, names, days, now))
    return rows


def issue(folder: Path, first: int, clients: int, *, days: int = DEFAULT_DAYS) -> list[Made]:
    """Add the folders of clients first, ..., first + clients - 1 to a folder that `init` made.

    Raises:
        CertificateError: one of them exists, a number is out of range, or there is no usable authority in the folder.
    """
    made = load_authority(folder / "ca")
    identities = _clients(first, clients)
    present = [identity for identity in identities if (folder / _folder_name(identity)).exists()]
    if present:
        raise CertificateError(
            f"{folder / _folder_name(present[0])}: exists and is left as it is; give --first as the lowest free index, "
            "or move the old folder away to replace it"
        )
    rows = []
    for identity in identities:
        with _staged(folder / _folder_name(identity)) as stage:
            rows.append(_issue(stage, folder, made, identity, (), days, None))
    return rows


def request(folder: Path, identity: Identity, names: Sequence[str] = ()) -> Path:
    """Make a key, which stays in the folder, and a request for its certificate, which is sent; return the request.

    Raises:
        CertificateError: the folder holds a key, a request or a certificate.
    """
    present = [name for name in (KEY, REQUEST, CERTIFICATE) if (folder / name).exists()]
    if present:
        raise CertificateError(
            f"{folder / present[0]}: exists and is left as it is; to renew with the same key, send the old {REQUEST} "
            "again; for a new key, name another folder"
        )
    key = authority.new_key()
    asked = authority.request(key, identity, _spelled(identity, names))
    _write_folder(folder, {KEY: _pem_key(key), REQUEST: asked.public_bytes(Encoding.PEM)})
    return folder / REQUEST


def sign(
    ca: Path, asked: Path, identity: Identity, names: Sequence[str], out: Path, *, days: int = DEFAULT_DAYS
) -> list[Made]:
    """Sign a device's request; the certificate, and the authority's own beside it, go back to the device.

    Args:
        ca: folder with ca.pem and ca-key.pem.
        asked: the request.
        identity: the identity that it must ask for.
        names: the names that it must ask for.
        out: where to write the certificate; it must not exist, and a ca.pem beside it must be this authority's.
        days: how long it is valid.

    Raises:
        CertificateError: the request is not as expected, or a file already exists.
    """
    made = load_authority(ca)
    try:
        wanted = x509.load_pem_x509_csr(read(asked, "the device makes it: fedsample certs request DIR"))
    except ValueError:
        raise CertificateError(f"{asked}: not a certificate request in PEM; have it sent again") from None
    spelled = _spelled(identity, names)
    key = authority.check_request(wanted, identity, spelled)
    ours, beside = _pem(made.certificate), out.parent / CA
    if out.name == CA:
        raise CertificateError(f"--out {out}: {CA} is the authority's own certificate; name it {CERTIFICATE}")
    if beside.exists() and read(beside, "") != ours:
        raise CertificateError(f"{beside}: is another authority's and is left as it is; choose --out in another folder")
    certificate = authority.sign(made, key, identity, spelled, days=days)
    out.parent.mkdir(parents=True, exist_ok=True)
    _write_new(out, _pem(certificate))
    if not beside.exists():
        _write_new(beside, ours)
    return [Made(out, str(identity), certificate.not_valid_after_utc)]


def load_authority(folder: Path) -> Authority:
    """Read ca.pem and ca-key.pem.

    Raises:
        CertificateError: one is missing or unreadable, the key is readable by others, or they do not belong together.
    """
    advice = "the authority lies where fedsample certs init was run, in its folder ca"
    try:
        certificate = x509.load_pem_x509_certificate(read(folder / CA, advice))
    except ValueError:
        raise CertificateError(f"{folder / CA}: not a certificate in PEM; restore it from a copy") from None
    key = private_key(folder / CA_KEY, advice)
    if key.public_key() != certificate.public_key() or not signs(certificate, certificate):
        raise CertificateError(f"{folder}: {CA_KEY} is not the key of {CA}; put the pair together again")
    return Authority(certificate, key)


def holders(folder: Path) -> list[Path]:
    """List the folders of authority, server and clients in a folder that `init` made, in this order; else itself."""
    found = [folder / name for name in ("ca", "server") if (folder / name).is_dir()]
    found += sorted(folder.glob("client-*"), key=lambda path: (len(path.name), path.name))
    return found if found and not (folder / KEY).exists() else [folder]


def _clients(first: int, count: int) -> list[ClientIdentity]:
    if count < 1 or first < 0 or first + count > MAX_CLIENTS:
        raise CertificateError(
            f"{count} clients from index {first}: expected at least one, with indices 0 to {MAX_CLIENTS - 1}"
        )
    return [ClientIdentity(index) for index in range(first, first + count)]


def _folder_name(identity: Identity) -> str:
    return f"client-{identity.client}" if isinstance(identity, ClientIdentity) else "server"


def _spelled(identity: Identity, names: Sequence[str]) -> tuple[str, ...]:
    """The names in a certificate: a server's and this machine's; none for a client."""
    return server_names(names) if isinstance(identity, ServerIdentity) else ()


def _issue(
    stage: Path,
    folder: Path,
    made: Authority,
    identity: Identity,
    names: Sequence[str],
    days: int,
    now: datetime | None,
) -> Made:
    """Make one holder's key, certificate and folder at `stage`, which will lie in `folder` under its own name."""
    key = authority.new_key()
    certificate = authority.sign(made, key.public_key(), identity, _spelled(identity, names), days=days, now=now)
    _write_folder(stage, {CA: _pem(made.certificate), CERTIFICATE: _pem(certificate), KEY: _pem_key(key)})
    return Made(folder / _folder_name(identity), str(identity), certificate.not_valid_after_utc)


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces the given one at the end, or is deleted on an error."""
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".certs-", dir=folder.absolute().parent))
    try:
        yield stage
        stage.rename(folder)
    except BaseException:
        shutil.rmtree(stage)
        raise


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, data in files.items():
        _write_new(folder / name, data, mode=0o600 if name in (KEY, CA_KEY) else 0o644)


def _write_new(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file that must not exist, never readable by more than `mode` allows."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise CertificateError(f"{path}: exists and is left as it is; move it away, or name another") from None
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(handle)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
