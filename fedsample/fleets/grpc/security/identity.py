"""The identity in a certificate.

A client is identified by its certificate: by one URI among its alternative names, `fedsample:client:<index>` or
`fedsample:server`. The extended key usage must agree with it, so that no client can pose as the server or the other way
round. The common name (`fedsample client 0`) is for people, and no code reads it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier

from fedsample.errors import CertificateError

MAX_CLIENTS = 1_000_000
_URI = re.compile(r"fedsample:(?:server|client:(0|[1-9][0-9]{0,5}))")


@dataclass(frozen=True)
class ClientIdentity:
    """A client: `client` is its index, 0 <= client < 1,000,000, and the partition whose rows it holds."""

    client: int

    def __post_init__(self) -> None:
        if not 0 <= self.client < MAX_CLIENTS:
            raise CertificateError(f"client {self.client}: expected an index from 0 to {MAX_CLIENTS - 1}")

    @property
    def uri(self) -> str:
        """The URI in its certificate."""
        return f"fedsample:client:{self.client}"

    @property
    def usage(self) -> ObjectIdentifier:
        """The key usage that its certificate must have."""
        return ExtendedKeyUsageOID.CLIENT_AUTH

    def __str__(self) -> str:
        return f"client {self.client}"


@dataclass(frozen=True)
class ServerIdentity:
    """The server, whichever names it is reached by."""

    @property
    def uri(self) -> str:
        """The URI in its certificate."""
        return "fedsample:server"

    @property
    def usage(self) -> ObjectIdentifier:
        """The key usage that its certificate must have."""
        return ExtendedKeyUsageOID.SERVER_AUTH

    def __str__(self) -> str:
        return "server"


Identity = ClientIdentity | ServerIdentity


def identity_of(source: bytes | x509.Certificate | Mapping[str, Iterable[bytes]]) -> Identity:
    """Read the identity of a certificate. It does not check who signed it: the handshake has, or `credentials` does.

    Args:
        source: a certificate, its PEM or DER bytes, or gRPC's `context.auth_context()` of a call over mutual TLS.

    Raises:
        CertificateError: there is no certificate, it cannot be read, or it lacks exactly one identity of ours whose key
            usage agrees with it.
    """
    if isinstance(source, x509.Certificate):
        return _of_certificate(source)
    if isinstance(source, Mapping):
        pem = next(iter(source.get("x509_pem_cert", ())), None)
        if pem is None:
            raise CertificateError("the peer showed no certificate; expected mutual TLS: connect with --certs DIR")
        return _of_bytes(pem)
    return _of_bytes(source)


@functools.lru_cache(maxsize=4096)  # a server asks at each call, for the same few certificates
def _of_bytes(data: bytes) -> Identity:
    try:
        if data.lstrip().startswith(b"-----"):
            certificate = x509.load_pem_x509_certificate(data)
        else:
            certificate = x509.load_der_x509_certificate(data)
    except ValueError as error:
        raise CertificateError(f"not a certificate in PEM or DER: {error}") from None
    return _of_certificate(certificate)


def _of_certificate(certificate: x509.Certificate) -> Identity:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        usages = list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise CertificateError(f"not a certificate of fedsample: {error}; make one with fedsample certs") from None
    identity = parse_uri(names.get_values_for_type(x509.UniformResourceIdentifier))
    if basic.ca:
        raise CertificateError(f"a certificate authority cannot be {identity}; use the certificate that it signed")
    if usages != [identity.usage]:
        raise CertificateError(
            f"the certificate says {identity} but its key usage is {[usage.dotted_string for usage in usages]}; "
            f"expected {identity.usage.dotted_string} alone: make one with fedsample certs"
        )
    return identity


def parse_uri(uris: Iterable[str]) -> Identity:
    """Find the identity among the URIs of a certificate or a request.

    Raises:
        CertificateError: there is not exactly one URI, or it is none of ours.
    """
    found = list(uris)
    match = _URI.fullmatch(found[0]) if len(found) == 1 else None
    if match is None:
        raise CertificateError(
            f"names {found or 'no identity'}; expected exactly one URI, fedsample:server or fedsample:client:<index>"
        )
    return ServerIdentity() if match[1] is None else ClientIdentity(int(match[1]))
