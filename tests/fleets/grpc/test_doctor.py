"""`fedsample doctor net` against real servers on loopback: all in order, and each thing that can be wrong."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedsample.cli.main import main
from fedsample.fleets.grpc.fedsample_pb2 import ProbeRequest
from fedsample.fleets.grpc.framing.probe import probe_call, probe_handler
from fedsample.fleets.grpc.framing.version import PROTOCOL
from fedsample.fleets.grpc.security import authority, cert_folders, credentials, doctor
from fedsample.fleets.grpc.security.identity import ClientIdentity, ServerIdentity

pytestmark = pytest.mark.slow

STEPS = ["certificates", "dns", "tcp", "tls", "service", "clock", "identity", "protocol", "round trip"]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet") / "certs"
    cert_folders.init(folder, ["sampler.example.org"], 3)
    return folder


@contextlib.contextmanager
def serving(server_credentials: Any, *handlers: Any) -> Iterator[int]:
    """A grpc.aio server in a thread of its own; yields its port."""
    started: list[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = []
    ready = threading.Event()

    async def serve() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(handlers)
        if server_credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", server_credentials)
        await server.start()
        stop = asyncio.Event()
        started.append((port, asyncio.get_running_loop(), stop))
        ready.set()
        await stop.wait()
        await server.stop(None)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield started[0][0]
    finally:
        if started:
            started[0][1].call_soon_threadsafe(started[0][2].set)
        thread.join(10)


@contextlib.contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A plain TCP server that treats each connection in the same way; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, contextlib.suppress(OSError):
                        answer(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(10)


@dataclasses.dataclass
class Examination:
    """What the command printed, by step."""

    code: int
    state: dict[str, str]
    detail: dict[str, str]
    last: str

    def fails(self, step: str, why: str) -> None:
        """This step is the first that failed, for this reason; those before it passed."""
        assert self.code == 1
        failed = [name for name in STEPS if self.state[name] == "failed"]
        assert failed[:1] == [step], self.detail
        assert re.search(why, self.detail[step]), self.detail[step]
        assert self.last == f"failed: {', '.join(failed)}; mend {step} first"


@pytest.fixture
def examine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Examination]:
    def run(address: str | int, *arguments: str | Path) -> Examination:
        where = f"127.0.0.1:{address}" if isinstance(address, int) else address
        monkeypatch.setattr(sys, "argv", ["fedsample", "doctor", "net", where, *(str(word) for word in arguments)])
        with pytest.raises(SystemExit) as done:
            main()
        out = capsys.readouterr().out
        rows = re.findall(r"^([a-z ]+?) +(ok|failed|skipped) +[0-9.]+ ms  (.+)$", out, re.MULTILINE)
        assert [name for name, _, _ in rows] == STEPS
        state, detail = {row[0]: row[1] for row in rows}, {row[0]: row[2] for row in rows}
        return Examination(int(done.value.code or 0), state, detail, out.splitlines()[-1])

    return run


def raw(folder: Path, trusted: Path | None = None) -> Any:
    """A server's credentials without the checks of ours."""
    pair = ((folder / "key.pem").read_bytes(), (folder / "cert.pem").read_bytes())
    return grpc.ssl_server_credentials([pair], ((trusted or folder) / "ca.pem").read_bytes(), require_client_auth=True)


def own_server(folder: Path, names: list[str], out: Path, **options: Any) -> Path:
    """A server's folder for exactly these names: `certs` would add this machine's own."""
    key = authority.new_key()
    leaf = authority.sign(
        cert_folders.load_authority(folder / "ca"), key.public_key(), ServerIdentity(), names, **options
    )
    out.mkdir()
    shutil.copy(folder / "ca" / "ca.pem", out)
    (out / "cert.pem").write_bytes(leaf.public_bytes(Encoding.PEM))
    (out / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return out


def test_all_in_order(fleet: Path, examine: Callable[..., Examination]) -> None:
    with serving(credentials.server_credentials(fleet / "server"), probe_handler(lambda: 3)) as port:
        seen = examine(f"localhost:{port}", "--certs", fleet / "client-1")
        assert (seen.code, set(seen.state.values())) == (0, {"ok"}), seen.detail
        assert "sampler.example.org, localhost, 127.0.0.1, ::1 (until " in seen.detail["tls"]
        assert seen.detail["service"].endswith("answers for 3 clients")
        assert "client 1 (fedsample:client:1), to the server too" in seen.detail["identity"]
        assert re.search(r"[+-]0\.0\d\d s against the server's", seen.detail["clock"])
        assert "median" in seen.detail["round trip"]
        assert seen.last == f"this device reaches localhost:{port}"


def test_plaintext_on_loopback(fleet: Path, examine: Callable[..., Examination]) -> None:
    with serving(None, probe_handler()) as port:
        seen = examine(port, "--insecure")
        assert seen.code == 0
        assert [name for name in STEPS if seen.state[name] != "ok"] == ["certificates", "tls", "identity"]
        assert "against the server's" in seen.detail["clock"]
        examine(port, "--certs", fleet / "client-0").fails("tls", "does not speak TLS.*not --insecure")
    with serving(credentials.server_credentials(fleet / "server"), probe_handler()) as port:
        examine(port, "--insecure", "--timeout", "2").fails("service", "needs --certs DIR in place of --insecure")


def test_usage(fleet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, why in (
        (["127.0.0.1:80"], "give either --certs"),
        (["127.0.0.1:80", "--insecure", "--certs", "x"], "give either --certs"),
        (["192.0.2.7:80", "--insecure"], "is not loopback"),
        (["sampler", "--certs", "x"], "has no port"),
    ):
        monkeypatch.setattr(sys, "argv", ["fedsample", "doctor", "net", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code == 2
        assert why in capsys.readouterr().err


def test_the_name_has_no_address(
    fleet: Path, examine: Callable[..., Examination], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    seen = examine("sampler.example.org:8443", "--certs", fleet / "client-0")
    seen.fails("dns", "sampler.example.org has no address: Name or service not known; check the spelling")
    assert seen.detail["tcp"] == "needs dns"
    assert seen.state["clock"] == seen.state["identity"] == "ok"
    assert [seen.state[name] for name in ("tls", "service", "protocol", "round trip")] == ["skipped"] * 4


def test_nothing_listens(fleet: Path, examine: Callable[..., Examination]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    examine(port, "--certs", fleet / "client-0").fails("tcp", f"nothing listens on 127.0.0.1 port {port}")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda connection: connection.sendall(b"220 mail.example.org ESMTP\r\n"), "does not speak TLS"),
        (lambda connection: connection.recv(1), r"does not speak TLS"),
        (lambda connection: [*iter(lambda: connection.recv(4096), b"")], r"does not speak TLS \(silent for 0.2 s\)"),
    ],
    ids=["greets", "hangs up", "silent"],
)
def test_not_tls(
    fleet: Path, examine: Callable[..., Examination], answer: Callable[[socket.socket], None], why: str
) -> None:
    with listening(answer) as port:
        examine(port, "--certs", fleet / "client-0", "--timeout", "0.2").fails("tls", why)


def test_wrong_authority(fleet: Path, examine: Callable[..., Examination], tmp_path: Path) -> None:
    other = tmp_path / "other"
    cert_folders.init(other, [], 1)
    issuer = x509.load_pem_x509_certificate((other / "ca" / "ca.pem").read_bytes()).subject.rfc4514_string()
    with serving(credentials.server_credentials(other / "server"), probe_handler()) as port:
        seen = examine(port, "--certs", fleet / "client-0")
        seen.fails("tls", f"wrong authority: .*was signed by {issuer}, which is not this client's ca.pem")
    with serving(raw(fleet / "server", trusted=other / "ca"), probe_handler()) as port:
        seen = examine(port, "--certs", fleet / "client-0")
        seen.fails("tls", "the server refuses this client's certificate")


def test_wrong_name(fleet: Path, examine: Callable[..., Examination], tmp_path: Path) -> None:
    server = own_server(fleet, ["sampler.example.org"], tmp_path / "server")
    with serving(raw(server), probe_handler()) as port:
        for name in ("127.0.0.1", "localhost"):
            seen = examine(f"{name}:{port}", "--certs", fleet / "client-0")
            seen.fails("tls", rf"wrong name: .* not for {name} but for sampler.example.org \(.*--server-name {name}")


def test_expired(fleet: Path, examine: Callable[..., Examination], tmp_path: Path) -> None:
    past, future = datetime.now(UTC) - timedelta(days=400), datetime.now(UTC) + timedelta(days=2)
    cert_folders.init(tmp_path / "old", [], 1, now=past)
    cert_folders.issue(tmp_path / "old", 1, 1)
    with serving(raw(tmp_path / "old" / "server"), probe_handler()) as port:
        examine(port, "--certs", tmp_path / "old" / "client-1").fails("tls", "expired: the server's certificate")
        seen = examine(port, "--certs", tmp_path / "old" / "client-0")
        seen.fails("certificates", "cert.pem: expired on .*renew it")
        assert (seen.state["clock"], seen.state["tls"]) == ("failed", "skipped")
    server = own_server(fleet, ["localhost", "127.0.0.1"], tmp_path / "early", now=future)
    with serving(raw(server), probe_handler()) as port:
        examine(port, "--certs", fleet / "client-0").fails("tls", r"not valid yet: .*set this machine's clock")


def test_no_certificate_of_a_client(fleet: Path, examine: Callable[..., Examination], tmp_path: Path) -> None:
    shutil.copytree(fleet / "client-0", tmp_path / "device")
    (tmp_path / "device" / "cert.pem").unlink()
    with serving(credentials.server_credentials(fleet / "server"), probe_handler()) as port:
        seen = examine(port, "--certs", tmp_path / "device")
        seen.fails("certificates", "cert.pem: there is no such file; it comes from where the authority is")
        assert seen.state["tcp"] == "ok"
        examine(port, "--certs", fleet / "server").fails("certificates", "belongs to server; expected .* a client")
        trusted = grpc.ssl_channel_credentials((fleet / "ca" / "ca.pem").read_bytes())
        pair = ((fleet / "server" / "key.pem").read_bytes(), (fleet / "server" / "cert.pem").read_bytes())
        posing = grpc.ssl_channel_credentials((fleet / "ca" / "ca.pem").read_bytes(), *pair)
        for anybody in (trusted, posing):
            with grpc.secure_channel(f"127.0.0.1:{port}", anybody) as channel, pytest.raises(grpc.RpcError) as error:
                probe_call(channel)(ProbeRequest(protocol=PROTOCOL), timeout=5)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_client_does_not_pose_as_the_server(fleet: Path, examine: Callable[..., Examination]) -> None:
    with serving(raw(fleet / "client-1"), probe_handler()) as port:
        examine(port, "--certs", fleet / "client-0").fails("tls", "shows a client's certificate")
        ours = credentials.client_credentials(fleet / "client-0")
        with grpc.secure_channel(f"127.0.0.1:{port}", ours) as channel, pytest.raises(grpc.RpcError) as error:
            probe_call(channel)(ProbeRequest(protocol=PROTOCOL), timeout=5)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE


def test_another_version(fleet: Path, examine: Callable[..., Examination], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROTOCOL", PROTOCOL + 1)
    with serving(credentials.server_credentials(fleet / "server"), probe_handler()) as port:
        seen = examine(port, "--certs", fleet / "client-0")
        seen.fails("protocol", f"server speaks version {PROTOCOL} .* this machine {PROTOCOL + 1} .*install the same")


def test_another_service(fleet: Path, examine: Callable[..., Examination]) -> None:
    with serving(credentials.server_credentials(fleet / "server")) as port:
        seen = examine(port, "--certs", fleet / "client-0")
        seen.fails("service", "a gRPC server, but not one of fedsample")
        assert "the server did not say" in seen.detail["identity"]


def test_clock_and_number_of_clients(fleet: Path, examine: Callable[..., Examination]) -> None:
    late = probe_handler(lambda: 2, lambda: time.time() - 3600)
    with serving(credentials.server_credentials(fleet / "server"), late) as port:
        examine(port, "--certs", fleet / "client-0").fails("clock", r"this machine is 3600 s ahead of the server")
        seen = examine(port, "--certs", fleet / "client-2")
        assert seen.state["identity"] == "failed"
        assert "we are client 2, and the server expects 2 clients, 0 to 1" in seen.detail["identity"]
    assert credentials.load(fleet / "client-2", ClientIdentity).identity == ClientIdentity(2)
