"""One TLS handshake by hand, to find out why it fails.

Under TLS 1.3 a server refuses a client's certificate after the client's half is done, and gRPC's server then closes
without an alert. So the first bytes of HTTP/2 are exchanged too: only they show that the client was accepted.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from cryptography import x509

from fedsample.errors import CertificateError
from fedsample.fleets.grpc.security.credentials import certificate_names, day
from fedsample.fleets.grpc.security.identity import ServerIdentity, identity_of

# Connection preface and an empty SETTINGS frame (RFC 9113, sections 3.4 and 6.5): a server answers with its own.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"

# X509_V_ERR_* of OpenSSL, in Python's SSLCertVerificationError.verify_code.
_NOT_YET, _EXPIRED, _PURPOSE = 9, 10, 26
_CHAIN = (2, 7, 18, 19, 20, 21)
_NAME = (62, 64)

_REFUSED = (
    "the server refuses this client's certificate ({}); was it signed by the server's authority, and is it still valid "
    "by the server's clock? Compare fedsample certs show on both machines"
)


class HandshakeFailed(Exception):
    """A handshake that failed; the text says why, and what to do."""


def handshake(peer: tuple[str, int], name: str, certs: Path, timeout: float) -> str:
    """Shake hands as a client of the fleet does, and describe the server.

    Args:
        peer: IP address and port to connect to.
        name: the DNS name or IP address that the server's certificate must be for.
        certs: the client's folder.
        timeout: seconds to wait for each answer.

    Returns:
        The TLS version, and the server's names and expiry.

    Raises:
        HandshakeFailed: the server speaks no TLS, or no HTTP/2; its certificate is of another authority, for other
            names, expired or not a server's; or it refuses the client's certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(certs / "ca.pem")
    context.load_cert_chain(certs / "cert.pem", certs / "key.pem")
    context.set_alpn_protocols(["h2"])
    try:
        with _connect(peer, timeout) as plain:
            try:
                secure = context.wrap_socket(plain, server_hostname=name)
            except ssl.SSLCertVerificationError as error:
                raise HandshakeFailed(_explain(error, peer, name, timeout)) from None
            except (ssl.SSLError, OSError) as error:
                raise HandshakeFailed(_no_tls(error, peer, timeout)) from None
            with secure:
                _let_in(secure)
                return _describe(secure, secure.getpeercert(binary_form=True))
    except OSError as error:
        raise HandshakeFailed(f"the connection broke: {error.strerror or error}; try again") from None


def _connect(peer: tuple[str, int], timeout: float) -> socket.socket:
    return socket.create_connection(peer, timeout=timeout)


def _let_in(secure: ssl.SSLSocket) -> None:
    """Wait for the server's first bytes after the handshake."""
    if secure.selected_alpn_protocol() != "h2":
        raise HandshakeFailed(
            "the server speaks TLS but not HTTP/2, so it is not a gRPC server; check host and port, and that no proxy "
            "ends the TLS in between"
        )
    try:
        secure.sendall(_PREFACE)
        first = secure.recv(1)
    except TimeoutError:
        raise HandshakeFailed(
            "the handshake passed, then the server said nothing; it is not a gRPC server, or it is overloaded"
        ) from None
    except ssl.SSLError as error:
        raise HandshakeFailed(_REFUSED.format(f"alert {_reason(error)}")) from None
    except ConnectionError:
        first = b""
    if not first:
        raise HandshakeFailed(_REFUSED.format("it hung up when it saw it"))


def _describe(secure: ssl.SSLSocket, der: bytes | None) -> str:
    certificate = x509.load_der_x509_certificate(der or b"")
    try:
        identity = identity_of(certificate)
    except CertificateError as error:
        raise HandshakeFailed(f"the server's certificate: {error}") from None
    if not isinstance(identity, ServerIdentity):
        raise HandshakeFailed(f"the other end is {identity}; expected the server: check host and port")
    return f"{secure.version()}, server of {_summary(certificate)}"


def _no_tls(error: OSError, peer: tuple[str, int], timeout: float) -> str:
    """Describe a handshake that failed before any certificate was checked."""
    reason = _reason(error)
    if "ALERT" in reason and "VERSION" not in reason and "HANDSHAKE_FAILURE" not in reason:
        return _REFUSED.format(f"alert {reason}")
    if "ALERT" in reason:
        return f"the server refuses this machine's TLS (alert {reason}); it needs TLS 1.2 or 1.3: update its software"
    what = f"silent for {timeout:g} s" if isinstance(error, TimeoutError) else reason or "it hung up"
    return (
        f"what listens on {peer[0]} port {peer[1]} does not speak TLS ({what}); check the port, and that the server "
        "was started with --certs and not --insecure"
    )


def _explain(error: ssl.SSLCertVerificationError, peer: tuple[str, int], name: str, timeout: float) -> str:
    """Say why the server's certificate was not accepted, with what it contains."""
    certificate = _certificate_of(peer, name, timeout)
    shown = _summary(certificate) if certificate else "unknown"
    if error.verify_code in _NAME:
        return (
            f"wrong name: the certificate is not for {name} but for {shown}; connect by one of these, or sign the "
            f"server's request again with --server-name {name}"
        )
    if error.verify_code == _EXPIRED:
        return f"expired: the server's certificate, of {shown}; renew it on the server, or set this machine's clock"
    if error.verify_code == _NOT_YET:
        return f"not valid yet: the server's certificate, of {shown}; set this machine's clock (NTP)"
    if error.verify_code == _PURPOSE:
        return f"the other end shows a client's certificate ({shown}); start the server with --certs certs/server"
    if error.verify_code in _CHAIN:
        issuer = certificate.issuer.rfc4514_string() if certificate else "unknown"
        return (
            f"wrong authority: the server's certificate, of {shown}, was signed by {issuer}, which is not this "
            "client's ca.pem; use the certificates made for this server"
        )
    return (
        f"the server's certificate, of {shown}, is not accepted: {error.verify_message}; make it with fedsample certs"
    )


def _certificate_of(peer: tuple[str, int], name: str, timeout: float) -> x509.Certificate | None:
    """Fetch the certificate that a server shows, without verifying it or sending one; None: it shows none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with _connect(peer, timeout) as plain, context.wrap_socket(plain, server_hostname=name) as secure:
            der = secure.getpeercert(binary_form=True)
            return x509.load_der_x509_certificate(der) if der else None
    except (OSError, ValueError):
        return None


def _summary(certificate: x509.Certificate) -> str:
    names = ", ".join(certificate_names(certificate)) or "no name"
    return f"{names} (until {day(certificate.not_valid_after_utc)})"


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or error)
