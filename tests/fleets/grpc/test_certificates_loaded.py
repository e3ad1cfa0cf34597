"""Keys and certificates of devices: identities, loading, and what a refusal says."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from made_certificates import certificate

from fedsample.errors import CertificateError
from fedsample.fleets.grpc.security import authority, cert_folders, credentials
from fedsample.fleets.grpc.security.identity import ClientIdentity, identity_of

# --- identities -------------------------------------------------------------------------------------------------------


def leaf(uris: list[str], usages: list[x509.ObjectIdentifier], ca: bool = False) -> x509.Certificate:
    key, name = authority.new_key(), x509.Name([])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    sans = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
    builder = builder.add_extension(sans, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
    return builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False).sign(key, hashes.SHA256())


CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


@pytest.mark.parametrize(
    ("uris", "usages"),
    [
        (["fedsample:client:-1"], [CLIENT]),
        (["fedsample:client:01"], [CLIENT]),
        (["fedsample:client:1000000"], [CLIENT]),
        (["fedsample:client:1\n"], [CLIENT]),
        (["fedsample:client:"], [CLIENT]),
        (["fedsample:server:0"], [SERVER]),
        (["FEDSAMPLE:server"], [SERVER]),
        (["https://example.org/fedsample:client:1"], [CLIENT]),
        (["fedsample:client:1", "fedsample:client:2"], [CLIENT]),
        (["fedsample:client:1"], [SERVER]),
        (["fedsample:client:1"], [CLIENT, SERVER]),
        (["fedsample:server"], [CLIENT]),
        (["fedsample:server"], [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]),
    ],
)
def test_identities_that_are_none(uris: list[str], usages: list[x509.ObjectIdentifier]) -> None:
    with pytest.raises(CertificateError, match="expected"):
        identity_of(leaf(uris, usages))


def test_more_identities_that_are_none(made: Path) -> None:
    assert identity_of(leaf(["fedsample:client:999999"], [CLIENT])) == ClientIdentity(999_999)
    with pytest.raises(CertificateError, match="authority cannot be"):
        identity_of(leaf(["fedsample:client:1"], [CLIENT], ca=True))
    with pytest.raises(CertificateError, match="not a certificate of fedsample"):
        identity_of((made / "ca" / "ca.pem").read_bytes())
    with pytest.raises(CertificateError, match="not a certificate in PEM or DER"):
        identity_of(b"hello")
    with pytest.raises(CertificateError, match="showed no certificate"):
        identity_of({"transport_security_type": [b"insecure"]})
    with pytest.raises(CertificateError, match="0 to 999999"):
        ClientIdentity(-1)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_credentials_load(made: Path) -> None:
    assert credentials.server_credentials(made / "server") is not None
    assert credentials.client_credentials(str(made / "client-0")) is not None


def test_a_key_that_others_can_read_is_refused(copy: Path) -> None:
    key = copy / "client-0" / "key.pem"
    for bits in (0o640, 0o604, 0o620):
        key.chmod(bits)
        with pytest.raises(CertificateError, match=f"mode {bits:o}.*chmod 600 .*key.pem"):
            credentials.client_credentials(copy / "client-0")
    (copy / "ca" / "ca-key.pem").chmod(0o644)
    with pytest.raises(CertificateError, match="chmod 600"):
        cert_folders.issue(copy, 2, 1)


@pytest.mark.parametrize("name", ["ca.pem", "cert.pem", "key.pem"])
def test_a_missing_or_broken_file_is_named(copy: Path, name: str) -> None:
    path = copy / "client-0" / name
    content = path.read_bytes()
    path.write_bytes(content[:100])
    with pytest.raises(CertificateError, match=f"{name}: not .* in PEM"):
        credentials.client_credentials(copy / "client-0")
    path.unlink()
    with pytest.raises(CertificateError, match=f"{name}: there is no such file; .*authority|{name}.*certs request"):
        credentials.client_credentials(copy / "client-0")
    path.mkdir()
    with pytest.raises(CertificateError, match=f"{name}: cannot be read"):
        credentials.client_credentials(copy / "client-0")


def test_parts_that_do_not_belong_together(copy: Path, tmp_path: Path) -> None:
    cert_folders.init(tmp_path / "other", [], 1)
    shutil.copy(copy / "client-1" / "key.pem", copy / "client-0" / "key.pem")
    with pytest.raises(CertificateError, match=r"key\.pem does not belong to cert\.pem"):
        credentials.client_credentials(copy / "client-0")
    shutil.copy(tmp_path / "other" / "ca" / "ca.pem", copy / "client-1" / "ca.pem")
    with pytest.raises(CertificateError, match=r"was not signed by ca\.pem"):
        credentials.client_credentials(copy / "client-1")
    both = (tmp_path / "other" / "ca" / "ca.pem").read_bytes() + (copy / "ca" / "ca.pem").read_bytes()
    (copy / "client-1" / "ca.pem").write_bytes(both)  # while one authority takes over from another
    assert len(credentials.load(copy / "client-1", ClientIdentity).authorities) == 2


def test_a_leaf_signs_nothing(copy: Path, tmp_path: Path) -> None:
    rogue = authority.Authority(
        certificate(copy / "client-1" / "cert.pem"), credentials.private_key(copy / "client-1" / "key.pem", "")
    )
    key = authority.new_key()
    forged = authority.sign(rogue, key.public_key(), ClientIdentity(0), days=1)
    folder = copy / "client-0"
    (folder / "cert.pem").write_bytes(forged.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    shutil.copy(copy / "client-1" / "cert.pem", folder / "ca.pem")
    with pytest.raises(CertificateError, match=r"was not signed by ca\.pem"):
        credentials.client_credentials(folder)


def test_roles_are_not_exchanged(made: Path) -> None:
    with pytest.raises(CertificateError, match="belongs to client 0; expected the folder of the server"):
        credentials.server_credentials(made / "client-0")
    with pytest.raises(CertificateError, match="belongs to server; expected the folder of a client"):
        credentials.client_credentials(made / "server")
    with pytest.raises(CertificateError, match="no such folder"):
        credentials.client_credentials(made / "client-7")


def test_time(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, now = made / "client-0", datetime.now(UTC)
    credentials.load(folder, ClientIdentity, now + timedelta(days=334))
    assert not caplog.records
    credentials.load(folder, ClientIdentity, now + timedelta(days=336))
    assert "in 28 days; renew it" in caplog.text
    with pytest.raises(CertificateError, match=r"cert\.pem: expired on .*renew it"):
        credentials.load(folder, ClientIdentity, now + timedelta(days=366))
    with pytest.raises(CertificateError, match=r"cert\.pem: not valid before .*set the clock"):
        credentials.load(folder, ClientIdentity, datetime(1970, 1, 1, tzinfo=UTC))
