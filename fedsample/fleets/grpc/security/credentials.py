"""A folder's ca.pem, cert.pem and key.pem: read, checked, and turned into gRPC credentials for mutual TLS.

A folder that cannot work is refused here, with the reason; the handshake would only say "handshake failed".
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedsample.errors import CertificateError
from fedsample.fleets.grpc.security.authority import names_of
from fedsample.fleets.grpc.security.identity import ClientIdentity, Identity, ServerIdentity, identity_of

SOON = timedelta(days=30)

_log = logging.getLogger(__name__)


class Material(NamedTuple):
    """The content of a folder, and its problems.

    Attributes:
        folder: its path.
        authorities: the certificates of ca.pem; several while an old one is being replaced.
        certificate: of cert.pem.
        key: of key.pem.
        ca_pem: bytes of ca.pem.
        certificate_pem: bytes of cert.pem.
        key_pem: bytes of key.pem.
        identity: the holder's; None: that is one of the problems.
        problems: why the folder cannot be used now, in the order to fix them; empty: it can.
        warning: that it expires soon; empty: it does not.
    """

    folder: Path
    authorities: list[x509.Certificate]
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    ca_pem: bytes
    certificate_pem: bytes
    key_pem: bytes
    identity: Identity | None
    problems: tuple[str, ...]
    warning: str

    @property
    def names(self) -> tuple[str, ...]:
        """DNS names and IP addresses of a server; none for a client."""
        return certificate_names(self.certificate)

    @property
    def expires(self) -> datetime:
        """End of validity, in UTC."""
        return self.certificate.not_valid_after_utc


def server_credentials(folder: Path | str) -> Any:
    """Make credentials of a gRPC server that accepts only clients with certificates of its authority.

    Args:
        folder: with ca.pem, cert.pem and key.pem of the server.

    Returns:
        `grpc.ServerCredentials`.

    Raises:
        CertificateError: a file is missing, unreadable or readable by others; key, certificate and authority do not
            belong together; it is expired, or not a server's.
    """
    import grpc

    material = load(Path(folder), ServerIdentity)
    pair = (material.key_pem, material.certificate_pem)
    return grpc.ssl_server_credentials([pair], root_certificates=material.ca_pem, require_client_auth=True)


def client_credentials(folder: Path | str) -> Any:
    """Make credentials of a gRPC client that accepts only a server with a certificate of its authority.

    Args:
        folder: with ca.pem, cert.pem and key.pem of the client.

    Returns:
        `grpc.ChannelCredentials`.

    Raises:
        CertificateError: as for `server_credentials`, or it is not a client's.
    """
    import grpc

    material = load(Path(folder), ClientIdentity)
    return grpc.ssl_channel_credentials(material.ca_pem, material.key_pem, material.certificate_pem)


def load(folder: Path, role: type[Identity], now: datetime | None = None) -> Material:
    """Read a folder that must be usable now by a client or a server; if it expires soon, log a warning.

    Raises:
        CertificateError: it is not usable; gives the first reason.
    """
    material = examine(folder, now)
    if material.identity is not None and not isinstance(material.identity, role):
        wanted = "a client" if role is ClientIdentity else "the server"
        raise CertificateError(f"{folder}: belongs to {material.identity}; expected the folder of {wanted}")
    if material.problems:
        raise CertificateError(material.problems[0])
    if material.warning:
        _log.warning("%s", material.warning)
    return material


def examine(folder: Path, now: datetime | None = None) -> Material:
    """Read a folder and list all its problems.

    Raises:
        CertificateError: a file is missing or invalid, or the key is readable by others.
    """
    now = now or datetime.now(UTC)
    if not folder.is_dir():
        raise CertificateError(
            f"{folder}: there is no such folder; make one with fedsample certs init, or fedsample certs request"
        )
    key = private_key(folder / "key.pem", "fedsample certs request makes it, with the request for its certificate")
    certificate_pem = read(folder / "cert.pem", "it comes from where the authority is: fedsample certs sign")
    ca_pem = read(folder / "ca.pem", "it comes with cert.pem from where the authority is")
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
    except ValueError:
        raise CertificateError(f"{folder / 'cert.pem'}: not a certificate in PEM; have it sent again") from None
    try:
        authorities = x509.load_pem_x509_certificates(ca_pem)
    except ValueError:
        raise CertificateError(f"{folder / 'ca.pem'}: not a certificate in PEM; have it sent again") from None
    try:
        identity, unnamed = identity_of(certificate), ""
    except CertificateError as error:
        identity, unnamed = None, f"{folder / 'cert.pem'}: {error}"
    problems = _problems(folder, authorities, certificate, key, now)
    left = certificate.not_valid_after_utc - now
    warning = f"{folder}: expires on {day(certificate.not_valid_after_utc)}, in {left.days} days; renew it"
    return Material(
        folder,
        authorities,
        certificate,
        key,
        ca_pem,
        certificate_pem,
        (folder / "key.pem").read_bytes(),
        identity,
        tuple([*([unnamed] if unnamed else []), *problems]),
        warning if timedelta(0) < left < SOON else "",
    )


def _problems(
    folder: Path,
    authorities: list[x509.Certificate],
    certificate: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    now: datetime,
) -> Iterator[str]:
    if key.public_key() != certificate.public_key():
        yield f"{folder}: key.pem does not belong to cert.pem; have the request.csr made with this key signed again"
    signers = [one for one in authorities if signs(one, certificate)]
    if not signers:
        yield f"{folder}: cert.pem was not signed by ca.pem; put back the ca.pem that came with it"
    for name, one in [("cert.pem", certificate), *(("ca.pem", signer) for signer in signers[:1])]:
        if now > one.not_valid_after_utc:
            yield (
                f"{folder / name}: expired on {day(one.not_valid_after_utc)}, by this machine's clock ({day(now)}); "
                "renew it: send request.csr to be signed again, or fedsample certs issue"
            )
        if now < one.not_valid_before_utc:
            yield (
                f"{folder / name}: not valid before {day(one.not_valid_before_utc)}, by this machine's clock "
                f"({day(now)}); set the clock (NTP)"
            )


def signs(authority: x509.Certificate, certificate: x509.Certificate) -> bool:
    """Whether a certificate is an authority's, and signed the other."""
    try:
        if not authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            return False
        certificate.verify_directly_issued_by(authority)
    except (x509.ExtensionNotFound, InvalidSignature, ValueError, TypeError):
        return False
    return True


def certificate_names(certificate: x509.Certificate) -> tuple[str, ...]:
    """The DNS names and IP addresses that a certificate is for."""
    try:
        return names_of(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return ()


def private_key(path: Path, advice: str) -> ec.EllipticCurvePrivateKey:
    """Read a private key that only its owner can read.

    Raises:
        CertificateError: it is missing, others can read or write it, or it is not an unencrypted ECDSA key in PEM.
    """
    data = read(path, advice)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise CertificateError(
            f"{path}: others on this machine may use it (mode {mode:o}); expected mode 600: chmod 600 {path}"
        )
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        raise CertificateError(f"{path}: not an unencrypted private key in PEM; restore it, or make another") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{path}: not an ECDSA key; make one with fedsample certs request")
    return key


def read(path: Path, advice: str) -> bytes:
    """Read a file; if it is missing, say where it comes from.

    Raises:
        CertificateError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CertificateError(f"{path}: there is no such file; {advice}") from None
    except OSError as error:
        raise CertificateError(f"{path}: cannot be read: {error.strerror}; run as the user who owns it") from None


def day(moment: datetime) -> str:
    """Format a time in UTC for people to read."""
    return f"{moment:%Y-%m-%d %H:%M} UTC"
