"""The certificate authority of one fleet, in memory: create it, request certificates, sign them.

Keys are ECDSA on P-256 and signatures use SHA-256, which every device's TLS supports. The authority signs leaves only
(path length 0). A leaf carries one identity (`identity.py`), one extended key usage, and for a server the names by
which it is reached. Only the public key, the identity and the server's names are ever taken from a request.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedsample.errors import CertificateError
from fedsample.fleets.grpc.security.address import parse_host
from fedsample.fleets.grpc.security.identity import Identity, ServerIdentity, parse_uri

DEFAULT_DAYS = 365
MAX_DAYS = 3650
LOOPBACK = ("localhost", "127.0.0.1", "::1")

# A device whose clock is some minutes late may connect at once.
BACKDATED = timedelta(hours=1)


class Authority(NamedTuple):
    """A certificate that signs others, and its private key, which stays where it was made."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def new_key() -> ec.EllipticCurvePrivateKey:
    """Make a private key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def server_names(names: Iterable[str]) -> tuple[str, ...]:
    """Normalise the names of a server, in order, each once; this machine's own are added.

    Raises:
        AddressError: one is neither a DNS name nor an IP address (a port, a URL or a `*` is not part of a name).
    """
    given = [parse_host(name.removeprefix("[").removesuffix("]"), f"--server-name {name}") for name in names]
    return tuple(dict.fromkeys([*given, *LOOPBACK]))


def create(*, days: int = MAX_DAYS, now: datetime | None = None) -> Authority:
    """Make an authority that is valid for `days` from now."""
    key, now = new_key(), _clock(now)
    serial = x509.random_serial_number()
    # With equal names, a certificate of the wrong authority would look like a broken signature.
    name = _common_name(f"fedsample CA {serial % 16**8:08x}")
    builder = x509.CertificateBuilder(name, name, key.public_key(), serial, now - BACKDATED, now + timedelta(days=days))
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(certificates=True), critical=True).add_extension(own, critical=False)
    return Authority(builder.sign(key, hashes.SHA256()), key)


def sign(
    authority: Authority,
    public_key: ec.EllipticCurvePublicKey,
    identity: Identity,
    names: Sequence[str] = (),
    *,
    days: int = DEFAULT_DAYS,
    now: datetime | None = None,
) -> x509.Certificate:
    """Certify that a key belongs to an identity.

    Args:
        authority: the signer.
        public_key: the holder's.
        identity: the holder's.
        names: DNS names and IP addresses of a server, as `server_names` returns them; none for a client.
        days: how long the certificate is valid.
        now: when it starts; None: now.

    Raises:
        CertificateError: days are out of range, or end after the authority does.
    """
    now = _clock(now)
    if not 1 <= days <= MAX_DAYS:
        raise CertificateError(f"--days {days}: expected 1 to {MAX_DAYS}")
    issuer = authority.certificate
    if now + timedelta(days=days) > issuer.not_valid_after_utc + timedelta(seconds=1):
        left = max((issuer.not_valid_after_utc - now).days, 0)
        raise CertificateError(
            f"--days {days}: the certificate authority itself ends in {left} days; "
            + (f"give --days {left} at most, or" if left else "it is over:")
            + " make a new one with fedsample certs init NEW_DIR and give every device new certificates"
        )
    builder = x509.CertificateBuilder(
        issuer.subject,
        _common_name(f"fedsample {identity}"),
        public_key,
        x509.random_serial_number(),
        now - BACKDATED,
        now + timedelta(days=days),
    )
    own = x509.SubjectKeyIdentifier.from_public_key(public_key)
    theirs = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([identity.usage]), critical=False)
        .add_extension(_alternative_names(identity, names), critical=False)
        .add_extension(own, critical=False)
        .add_extension(theirs, critical=False)
    )
    return builder.sign(authority.key, hashes.SHA256())


def request(
    key: ec.EllipticCurvePrivateKey, identity: Identity, names: Sequence[str] = ()
) -> x509.CertificateSigningRequest:
    """Request a certificate, signed with the key that it is for; the private key is not in it."""
    builder = x509.CertificateSigningRequestBuilder(_common_name(f"fedsample {identity}"))
    return builder.add_extension(_alternative_names(identity, names), critical=False).sign(key, hashes.SHA256())


def check_request(
    asked: x509.CertificateSigningRequest, identity: Identity, names: Sequence[str] = ()
) -> ec.EllipticCurvePublicKey:
    """Check a request against what the signer was told out of band.

    Returns:
        The public key to certify.

    Raises:
        CertificateError: its signature is wrong, its key is not on P-256, or it asks for another identity or names.
    """
    key = asked.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CertificateError("the request's key is not on the curve P-256; make it with fedsample certs request")
    try:
        key.verify(asked.signature, asked.tbs_certrequest_bytes, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise CertificateError(
            "the request is not signed by the key that it names: it was changed on its way; have it sent again"
        ) from None
    try:
        wanted = asked.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        claimed = parse_uri(wanted.get_values_for_type(x509.UniformResourceIdentifier))
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise CertificateError(f"not a request of fedsample: {error}; make it with fedsample certs request") from None
    if claimed != identity:
        raise CertificateError(
            f"the request is for {claimed}, and you sign for {identity}; ask the device which it is, and sign for "
            "that or have it make another request"
        )
    if set(names_of(wanted)) != set(names):
        raise CertificateError(
            f"the request names {', '.join(names_of(wanted))}, and you sign for {', '.join(names)}; give the same "
            "--server-name options to both"
        )
    return key


def names_of(alternatives: x509.SubjectAlternativeName) -> tuple[str, ...]:
    """List the DNS names and IP addresses among a certificate's alternative names, in order."""
    return tuple(str(name.value) for name in alternatives if isinstance(name, x509.DNSName | x509.IPAddress))


def _alternative_names(identity: Identity, names: Sequence[str]) -> x509.SubjectAlternativeName:
    if bool(names) != isinstance(identity, ServerIdentity):
        raise CertificateError(f"{identity} with the names {list(names)}: a server has names, a client has none")
    return x509.SubjectAlternativeName(
        [x509.UniformResourceIdentifier(identity.uri), *(_general_name(name) for name in names)]
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _clock(now: datetime | None) -> datetime:
    return (now or datetime.now(UTC)).replace(microsecond=0)
