"""Keys and certificates of devices: what is made, nothing overwritten, and keys that never travel."""

from __future__ import annotations

import os
import shutil
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from made_certificates import NAMES, certificate

from fedsample.errors import AddressError, CertificateError
from fedsample.fleets.grpc.security import authority, cert_folders, credentials
from fedsample.fleets.grpc.security.identity import ClientIdentity, Identity, ServerIdentity, identity_of


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- what is made -----------------------------------------------------------------------------------------------------


def test_layout_and_modes(made: Path) -> None:
    found = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    holders = ("server", "client-0", "client-1")
    expected = {f"{holder}/{name}" for holder in holders for name in ("ca.pem", "cert.pem", "key.pem")}
    assert found == expected | {"ca/ca.pem", "ca/ca-key.pem"}
    assert {mode(path) for path in made.rglob("*key.pem")} == {0o600}
    assert {mode(path) for path in [made, *made.iterdir()]} == {0o700}
    assert len({path.read_bytes() for path in made.rglob("ca.pem")}) == 1
    assert len({path.read_bytes() for path in made.rglob("*key.pem")}) == 4
    assert [path.name for path in made.parent.iterdir()] == ["certs"]  # nothing is left of how it was made


def test_keys_are_private_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        cert_folders.init(tmp_path / "certs", [], 1)
        cert_folders.request(tmp_path / "device", ClientIdentity(4))
    finally:
        os.umask(before)
    assert {mode(path) for path in tmp_path.rglob("*key.pem")} == {0o600}
    assert mode(tmp_path / "device") == 0o700


def test_the_authority_signs_leaves_only(made: Path) -> None:
    own = certificate(made / "ca" / "ca.pem")
    basic = own.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = own.extensions.get_extension_for_class(x509.KeyUsage)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    assert (usage.critical, usage.value.key_cert_sign, usage.value.digital_signature) == (True, True, False)


@pytest.mark.parametrize(
    ("folder", "identity", "usage"),
    [
        ("server", ServerIdentity(), ExtendedKeyUsageOID.SERVER_AUTH),
        ("client-1", ClientIdentity(1), ExtendedKeyUsageOID.CLIENT_AUTH),
    ],
)
def test_a_leaf_says_one_identity_and_one_use(
    made: Path, folder: str, identity: Identity, usage: x509.ObjectIdentifier
) -> None:
    leaf = certificate(made / folder / "cert.pem")
    basic = leaf.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca) == (True, False)
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
    assert leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False
    assert leaf.subject.rfc4514_string() == f"CN=fedsample {identity}"
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)
    peer = {"x509_pem_cert": [leaf.public_bytes(Encoding.PEM)]}
    for source in (leaf, leaf.public_bytes(Encoding.PEM), leaf.public_bytes(Encoding.DER), peer):
        assert identity_of(source) == identity


def test_names_of_the_server_are_dns_or_ip(made: Path) -> None:
    leaf = certificate(made / "server" / "cert.pem")
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["sampler.example.org", "localhost"]
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["192.0.2.7", "2001:db8::1", "127.0.0.1", "::1"]
    assert credentials.certificate_names(certificate(made / "client-0" / "cert.pem")) == ()


def shake(made: Path, server: str, client: str, name: str) -> None:
    """A strict mutual handshake between two folders, in memory."""
    outer, inner = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    outer.verify_mode = ssl.CERT_REQUIRED
    outer.maximum_version = ssl.TLSVersion.TLSv1_2  # there the client learns of a refusal within the handshake
    for context, folder in ((outer, server), (inner, client)):
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_verify_locations(made / folder / "ca.pem")
        context.load_cert_chain(made / folder / "cert.pem", made / folder / "key.pem")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [outer.wrap_bio(up, down, server_side=True), inner.wrap_bio(down, up, server_hostname=name)]
    for _ in range(6):
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert not ends


@pytest.mark.parametrize("name", ["sampler.example.org", "192.0.2.7", "2001:db8::1", "localhost", "127.0.0.1", "::1"])
def test_a_strict_handshake_accepts_them(made: Path, name: str) -> None:
    shake(made, "server", "client-0", name)


def test_no_client_is_a_server_and_no_server_a_client(made: Path) -> None:
    with pytest.raises(ssl.SSLError, match="purpose"):
        shake(made, "client-0", "client-1", "localhost")
    with pytest.raises(ssl.SSLError, match=r"purpose|verify failed"):
        shake(made, "server", "server", "localhost")
    with pytest.raises(ssl.SSLError, match="mismatch"):
        shake(made, "server", "client-0", "elsewhere.example.org")


def test_days(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    rows = {row.holder: row.expires for row in cert_folders.init(tmp_path / "c", [], 1, days=7, now=now)}
    assert rows["server"] == rows["client 0"] == (now + timedelta(days=7)).replace(microsecond=0)
    assert rows["certificate authority"] == (now + timedelta(days=3650)).replace(microsecond=0)
    old = authority.create(days=90, now=now - timedelta(days=80))
    with pytest.raises(CertificateError, match="ends in 10 days; give --days 10 at most"):
        authority.sign(old, authority.new_key().public_key(), ClientIdentity(0), now=now)


# --- nothing is overwritten -------------------------------------------------------------------------------------------


def test_existing_files_stay(copy: Path) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*.pem")}
    with pytest.raises(CertificateError, match=r"left as it is.*certs issue"):
        cert_folders.init(copy, [], 5)
    with pytest.raises(CertificateError, match="client-1: exists"):
        cert_folders.issue(copy, 1, 3)
    with pytest.raises(CertificateError, match="left as it is"):
        cert_folders.request(copy / "client-0", ClientIdentity(0))
    assert {path: path.read_bytes() for path in copy.rglob("*.pem")} == before
    (copy / "empty").mkdir()
    with pytest.raises(CertificateError, match="empty: exists"):
        cert_folders.init(copy / "empty", [], 1)
    (copy / "empty" / "request.csr").touch()
    with pytest.raises(CertificateError, match=r"request\.csr: exists.*to renew with the same key"):
        cert_folders.request(copy / "empty", ClientIdentity(0))
    assert not (copy / "empty" / "key.pem").exists()


def test_more_clients(copy: Path) -> None:
    assert [row.path.name for row in cert_folders.issue(copy, 2, 2)] == ["client-2", "client-3"]
    assert credentials.load(copy / "client-3", ClientIdentity).identity == ClientIdentity(3)
    shake(copy, "server", "client-3", "localhost")


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="--days 5000"):
        cert_folders.init(tmp_path / "c", [], 1, days=5000)
    with pytest.raises(AddressError, match=r"server-name sampler:8443"):
        cert_folders.init(tmp_path / "c", ["sampler:8443"], 1)
    assert list(tmp_path.iterdir()) == []


# --- a key never travels ----------------------------------------------------------------------------------------------


def test_request_and_sign(copy: Path, tmp_path: Path) -> None:
    device, back = tmp_path / "device", tmp_path / "back"
    asked = cert_folders.request(device, ClientIdentity(4))
    key = (device / "key.pem").read_bytes()
    assert b"PRIVATE" not in asked.read_bytes()
    cert_folders.sign(copy / "ca", asked, ClientIdentity(4), (), back / "cert.pem")
    assert sorted(path.name for path in back.iterdir()) == ["ca.pem", "cert.pem"]
    for path in back.iterdir():
        shutil.copy(path, device)
    assert credentials.load(device, ClientIdentity).identity == ClientIdentity(4)
    assert (device / "key.pem").read_bytes() == key
    shutil.copytree(device, copy / "client-4")
    shake(copy, "server", "client-4", "localhost")
    with pytest.raises(CertificateError, match=r"cert\.pem: exists"):
        cert_folders.sign(copy / "ca", asked, ClientIdentity(4), (), back / "cert.pem")
    cert_folders.sign(
        copy / "ca", asked, ClientIdentity(4), (), back / "renewed.pem"
    )  # the same ca.pem beside it is fine
    (back / "ca.pem").write_text("another")
    with pytest.raises(CertificateError, match="another authority's"):
        cert_folders.sign(copy / "ca", asked, ClientIdentity(4), (), back / "again.pem")
    with pytest.raises(CertificateError, match=r"--out .*is the authority's own"):
        cert_folders.sign(copy / "ca", asked, ClientIdentity(4), (), tmp_path / "elsewhere" / "ca.pem")
    assert not (back / "again.pem").exists()


def test_a_server_requests_too(copy: Path, tmp_path: Path) -> None:
    asked = cert_folders.request(tmp_path / "device", ServerIdentity(), NAMES)
    out = tmp_path / "device" / "cert.pem"
    with pytest.raises(CertificateError, match="give the same --server-name"):
        cert_folders.sign(copy / "ca", asked, ServerIdentity(), ["other.example.org"], out)
    cert_folders.sign(copy / "ca", asked, ServerIdentity(), NAMES[::-1], out)
    assert set(credentials.load(tmp_path / "device", ServerIdentity).names) >= {"sampler.example.org", "2001:db8::1"}


def test_requests_that_are_refused(copy: Path, tmp_path: Path) -> None:
    asked, out = cert_folders.request(tmp_path / "device", ClientIdentity(4)), tmp_path / "out" / "cert.pem"
    with pytest.raises(CertificateError, match="is for client 4, and you sign for client 5"):
        cert_folders.sign(copy / "ca", asked, ClientIdentity(5), (), out)
    with pytest.raises(CertificateError, match="is for client 4, and you sign for server"):
        cert_folders.sign(copy / "ca", asked, ServerIdentity(), NAMES, out)
    csr = x509.load_pem_x509_csr(asked.read_bytes())
    forged = csr.public_bytes(Encoding.DER).replace(b"fedsample:client:4", b"fedsample:client:5")
    asked.write_bytes(x509.load_der_x509_csr(forged).public_bytes(Encoding.PEM))
    with pytest.raises(CertificateError, match="changed on its way"):
        cert_folders.sign(copy / "ca", asked, ClientIdentity(5), (), out)
    plain = x509.CertificateSigningRequestBuilder(x509.Name([])).sign(authority.new_key(), hashes.SHA256())
    asked.write_bytes(plain.public_bytes(Encoding.PEM))
    with pytest.raises(CertificateError, match="not a request of fedsample"):
        cert_folders.sign(copy / "ca", asked, ClientIdentity(5), (), out)
    weak = rsa.generate_private_key(65537, 2048)
    asked.write_bytes(
        x509.CertificateSigningRequestBuilder(x509.Name([])).sign(weak, hashes.SHA256()).public_bytes(Encoding.PEM)
    )
    with pytest.raises(CertificateError, match="P-256"):
        cert_folders.sign(copy / "ca", asked, ClientIdentity(5), (), out)
    asked.write_text("hello")
    with pytest.raises(CertificateError, match="not a certificate request"):
        cert_folders.sign(copy / "ca", asked, ClientIdentity(5), (), out)
    assert not out.parent.exists()


def test_an_authority_that_is_none(copy: Path, tmp_path: Path) -> None:
    asked, out = cert_folders.request(tmp_path / "device", ClientIdentity(4)), tmp_path / "cert.pem"
    with pytest.raises(CertificateError, match="there is no such file"):
        cert_folders.sign(copy / "server", asked, ClientIdentity(4), (), out)
    shutil.copy(copy / "server" / "key.pem", copy / "ca" / "ca-key.pem")
    with pytest.raises(CertificateError, match="is not the key of"):
        cert_folders.sign(copy / "ca", asked, ClientIdentity(4), (), out)
