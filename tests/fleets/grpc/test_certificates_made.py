"""Keys, certificates and addresses of devices: what is made, what is refused, and what the refusal says."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedsample.cli.main import main
from fedsample.errors import AddressError, CertificateError
from fedsample.fleets.grpc.security import authority, cert_folders, credentials
from fedsample.fleets.grpc.security.address import Address, check_insecure, parse_address
from fedsample.fleets.grpc.security.identity import ClientIdentity, Identity, ServerIdentity, identity_of

NAMES = ["Sampler.Example.org", "192.0.2.7", "2001:db8::1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet of two, never changed; tests that break something copy it."""
    folder = tmp_path_factory.mktemp("fleet") / "certs"
    cert_folders.init(folder, NAMES, 2)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "certs")
    return tmp_path / "certs"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["fedsample", *(str(argument) for argument in arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


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


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("sampler.example.org:8443", "sampler.example.org", 8443),
        ("Sampler.Example.ORG.:1", "sampler.example.org", 1),
        ("192.0.2.7:65535", "192.0.2.7", 65535),
        ("[2001:DB8:0::1]:8443", "2001:db8::1", 8443),
        ("xn--bcher-kva.example:443", "xn--bcher-kva.example", 443),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    address = parse_address(text)
    assert address == Address(host, port)
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("sampler", "has no port"),
        ("sampler:", "1 to 65535"),
        ("sampler:0", "1 to 65535"),
        ("sampler:65536", "1 to 65535"),
        ("sampler:-1", "1 to 65535"),
        ("sampler:+80", "1 to 65535"),
        ("sampler:8_0", "1 to 65535"),
        ("sampler:٨", "1 to 65535"),
        ("2001:db8::1:8443", "in brackets"),
        ("[2001:db8::1]", "brackets"),
        ("[127.0.0.1]:80", "brackets"),
        ("[zz::1]:80", "neither"),
        ("https://sampler:8443", "URL"),
        (":8443", "neither"),
        ("300.0.0.1:80", "neither"),
        ("a b:80", "neither"),
        ("bücher.example:80", "xn--"),
        ("*.example.org:80", "neither"),
        ("-a:80", "neither"),
        ("a" * 64 + ":80", "neither"),
    ],
)
def test_addresses_that_are_none(text: str, why: str) -> None:
    with pytest.raises(AddressError, match=why):
        parse_address(text)


def test_port_zero_is_for_listening() -> None:
    assert parse_address("127.0.0.1:0", listen=True).port == 0
    assert check_insecure("127.0.0.1:0", listen=True) == Address("127.0.0.1", 0)


def resolve(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    def found(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", found)


def test_plaintext_is_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, host in (("127.0.0.1:80", "127.0.0.1"), ("127.9.9.9:80", "127.9.9.9"), ("[::1]:80", "::1")):
        assert check_insecure(text) == Address(host, 80)
    for text in ("0.0.0.0:80", "192.0.2.7:80", "[::]:80", "[2001:db8::1]:80", "[::ffff:192.0.2.7]:80"):
        with pytest.raises(AddressError, match="is not loopback"):
            check_insecure(text)
    resolve(monkeypatch, "::1", "127.0.0.1")
    assert check_insecure("localhost:80") == Address("127.0.0.1", 80)
    resolve(monkeypatch, "::ffff:127.0.0.1")
    assert check_insecure("localhost:80") == Address("::ffff:127.0.0.1", 80)
    resolve(monkeypatch, "127.0.0.1", "192.0.2.7")
    with pytest.raises(AddressError, match=r"192\.0\.2\.7 is not loopback"):
        check_insecure("sampler.example.org:80")
    resolve(monkeypatch)
    with pytest.raises(AddressError, match="has no address here"):
        check_insecure("sampler.example.org:80")


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("--server-name", "a.example.org", "--server-name", "::1")
    assert command(monkeypatch, "certs", "init", "certs", "--clients", "3", *names, "--days", "20") == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:5]] == [
        f"certs/{name}" for name in ("ca", "server", "client-0", "client-1", "client-2")
    ]
    assert out.count(f"until {datetime.now(UTC) + timedelta(days=20):%Y-%m-%d}") == 4
    assert command(monkeypatch, "certs", "init", "certs", "--clients", "3") == 1
    assert "left as it is" in capsys.readouterr().err
    assert command(monkeypatch, "certs", "issue", "certs", "--clients", "1", "--first", "3") == 0
    assert command(monkeypatch, "certs", "request", "device", "--client", "4") == 0
    said = capsys.readouterr().out
    assert "never sent" in said
    assert "certs sign CA_DIR request.csr --client 4 --out cert.pem" in said
    signing = ("certs", "sign", "certs/ca", "device/request.csr", "--out", "back/cert.pem")
    assert command(monkeypatch, *signing, "--client", "5") == 1
    assert command(monkeypatch, *signing, "--client", "4") == 0
    assert "send back back/cert.pem and back/ca.pem" in capsys.readouterr().out
    for arguments in (("request", "x"), ("request", "x", "--client", "1", "--server-name", "a"), signing[1:]):
        assert command(monkeypatch, "certs", *arguments) == 2
        assert "give either --client N" in capsys.readouterr().err


def test_show(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "certs", "show", copy) == 0
    out = capsys.readouterr().out
    assert [line.split("/")[-1] for line in out.splitlines() if not line.startswith(" ")][1:] == [
        f"{name}: can be used" for name in ("server", "client-0", "client-1")
    ]
    assert "ca: certificate authority" in out
    assert "client 1 (fedsample:client:1)" in out
    assert "sampler.example.org, 192.0.2.7, 2001:db8::1, localhost, 127.0.0.1, ::1" in out
    assert "364 days left" in out
    shutil.copy(copy / "client-1" / "key.pem", copy / "client-0" / "key.pem")
    (copy / "client-1" / "cert.pem").unlink()
    assert command(monkeypatch, "certs", "show", copy) == 1
    out = capsys.readouterr().out
    assert "key.pem does not belong to cert.pem" in out
    assert "client-1/cert.pem: there is no such file" in out


def test_show_warns_and_lists_all_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cert_folders.init(tmp_path / "soon", [], 1, days=20)
    assert command(monkeypatch, "certs", "show", tmp_path / "soon" / "client-0") == 0
    assert "warning    " in capsys.readouterr().out
    cert_folders.init(tmp_path / "old", [], 1, now=datetime.now(UTC) - timedelta(days=400))
    shutil.copy(tmp_path / "soon" / "ca" / "ca.pem", tmp_path / "old" / "client-0" / "ca.pem")
    assert command(monkeypatch, "certs", "show", tmp_path / "old" / "client-0") == 1
    out = capsys.readouterr().out
    assert out.count("problem    ") == 2
    assert "35 days ago" in out


def test_help_loads_no_cryptography() -> None:
    code = (
        "import sys, fedsample.cli.main\nsys.argv = ['fedsample', 'certs', 'init', '--help']\n"
        "try:\n    fedsample.cli.main.main()\n"
        "finally:\n    print('HEAVY', {'cryptography', 'grpc', 'torch', 'google.protobuf'} & set(sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY None" in done.stdout
