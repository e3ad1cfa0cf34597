"""Addresses of devices, and the command that makes certificates for them."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedsample.cli.main import main
from fedsample.errors import AddressError
from fedsample.fleets.grpc.security import cert_folders
from fedsample.fleets.grpc.security.address import Address, check_insecure, parse_address


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["fedsample", *(str(argument) for argument in arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


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
