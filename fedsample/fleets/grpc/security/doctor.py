"""Diagnosis of the connection to a server: steps, each with what it found and what to do.

    certificates -> dns -> tcp -> tls -> service -> clock -> identity -> protocol -> round trip

A step that depends on a failed one is skipped and says which. The TLS step uses Python's own `ssl`, not gRPC, which
says "handshake failed" and nothing more (`handshake.py`).
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import grpc

from fedsample.errors import AddressError, CertificateError
from fedsample.fleets.grpc.fedsample_pb2 import ProbeReply, ProbeRequest
from fedsample.fleets.grpc.framing.probe import DIRECT, SOFTWARE, probe_call
from fedsample.fleets.grpc.framing.version import PROTOCOL
from fedsample.fleets.grpc.security.address import check_insecure, parse_address
from fedsample.fleets.grpc.security.credentials import Material, client_credentials, day, examine, load
from fedsample.fleets.grpc.security.handshake import HandshakeFailed, handshake
from fedsample.fleets.grpc.security.identity import ClientIdentity

# A certificate holds for hours and days; logs of two machines are compared in seconds.
CLOCK_LIMIT_S = 60.0
PROBES = 5


class Step(NamedTuple):
    """One line: its name, "ok", "failed" or "skipped", what was found and what to do, and its duration (ms)."""

    name: str
    state: str
    detail: str
    milliseconds: float


class _Failed(Exception):
    """A step failed; the text says why, and what to do."""


class _Skipped(Exception):
    """A step does not apply; the text says why."""


def examine_net(address: str, certs: Path | None, *, insecure: bool = False, timeout: float = 5.0) -> Iterator[Step]:
    """Check the connection to the server, step by step; yield each step as it ends.

    Args:
        address: `host:port` of the server.
        certs: this client's folder; not used over plaintext.
        insecure: plaintext, on loopback only.
        timeout: seconds that each step may wait for the network.

    Raises:
        AddressError: the address is invalid, plaintext is asked for beyond loopback, or neither `certs` nor `insecure`
            is given.
    """
    where = check_insecure(address) if insecure else parse_address(address)
    if (certs is None) != insecure:
        raise AddressError("doctor net: give either --certs DIR, this client's folder, or --insecure on loopback")
    walk = _Walk(where.host, where.port, str(where), certs, timeout)
    return walk.steps()


class _Walk:
    """State shared by the steps."""

    def __init__(self, host: str, port: int, target: str, certs: Path | None, timeout: float) -> None:
        self.host, self.port, self.target, self.certs, self.timeout = host, port, target, certs, timeout
        self.material: Material | None = None
        self.found: list[str] = []
        self.peer: tuple[str, int] | None = None
        self.replies: list[tuple[float, float, ProbeReply]] = []  # (wall clock in the middle, seconds, answer)

    def steps(self) -> Iterator[Step]:
        """Run every step, in order; one that depends on a failed one is skipped."""
        table: list[tuple[str, tuple[str, ...], Callable[[], str]]] = [
            ("certificates", (), self.certificates),
            ("dns", (), self.dns),
            ("tcp", ("dns",), self.tcp),
            ("tls", ("certificates", "tcp"), self.tls),
            ("service", ("certificates", "tcp", "tls"), self.service),
            ("clock", (), self.clock),
            ("identity", ("certificates",), self.identity),
            ("protocol", ("service",), self.protocol),
            ("round trip", ("service",), self.round_trip),
        ]
        plaintext = {"certificates", "tls", "identity"} if self.certs is None else set()
        passed = set(plaintext)
        for name, needs, look in table:
            missing = [need for need in needs if need not in passed]
            start = time.perf_counter()
            try:
                if name in plaintext:
                    raise _Skipped("plaintext on loopback: nobody proves who they are")
                if missing:
                    raise _Skipped(f"needs {missing[0]}")
                state, detail = "ok", look()
                passed.add(name)
            except _Skipped as reason:
                state, detail = "skipped", str(reason)
            except (_Failed, CertificateError, HandshakeFailed) as reason:
                state, detail = "failed", str(reason)
            yield Step(name, state, detail, (time.perf_counter() - start) * 1000)

    def certificates(self) -> str:
        """Check that this client's own folder can be used."""
        assert self.certs is not None
        self.material = examine(self.certs)
        load(self.certs, ClientIdentity)
        return f"{self.certs}: key, certificate and authority belong together, until {day(self.material.expires)}"

    def dns(self) -> str:
        """Resolve the name to addresses."""
        try:
            entries = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise _Failed(
                f"{self.host} has no address: {error.strerror or error}; check the spelling, this machine's name "
                "server, or add the name to /etc/hosts"
            ) from None
        self.found = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
        return f"{self.host} is {', '.join(self.found)}"

    def tcp(self) -> str:
        """Find the first address that accepts a connection."""
        failures = []
        for host in self.found:
            try:
                with socket.create_connection((host, self.port), timeout=self.timeout):
                    self.peer = (host, self.port)
                    return f"{host} port {self.port} accepts connections"
            except ConnectionRefusedError:
                failures.append(
                    f"nothing listens on {host} port {self.port}; is the server started, and is this its port?"
                )
            except TimeoutError:
                failures.append(
                    f"{host} port {self.port} did not answer within {self.timeout:g} s; a firewall may drop the "
                    "packets: let TCP through to this port"
                )
            except OSError as error:
                failures.append(f"{host} port {self.port}: {error.strerror or error}; check this machine's network")
        raise _Failed(" | ".join(failures))

    def tls(self) -> str:
        """Shake hands with this client's certificate."""
        assert self.certs is not None
        assert self.peer is not None
        return handshake(self.peer, self.host, self.certs, self.timeout)

    def service(self) -> str:
        """Call the probe over gRPC, several times on one connection."""
        if self.certs is None:
            channel = grpc.insecure_channel(self.target, options=DIRECT)
        else:
            channel = grpc.secure_channel(self.target, client_credentials(self.certs), options=DIRECT)
        with channel:
            call = probe_call(channel)
            try:
                call(ProbeRequest(protocol=PROTOCOL), timeout=self.timeout)  # the first one pays for the connection
                for _ in range(PROBES):
                    before, start = time.time(), time.perf_counter()
                    reply = call(ProbeRequest(protocol=PROTOCOL), timeout=self.timeout)
                    seconds = time.perf_counter() - start
                    self.replies.append((before + seconds / 2, seconds, reply))
            except grpc.RpcError as error:
                raise _Failed(self._unanswered(error)) from None
        server = self.replies[0][2]
        return f"{server.software} answers" + (f" for {server.clients} clients" if server.clients else "")

    def _unanswered(self, error: grpc.RpcError) -> str:
        code, details = error.code(), error.details()
        if code == grpc.StatusCode.UNIMPLEMENTED:
            return f"a gRPC server, but not one of fedsample ({details}); check host and port, and the server's version"
        if code == grpc.StatusCode.UNAUTHENTICATED:
            return f"the server does not know this certificate: {details}"
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"no answer within {self.timeout:g} s; the server is overloaded, or this is no gRPC server"
        advice = "is it a gRPC server"
        if self.certs is None:
            advice += ", and without TLS? One with certificates needs --certs DIR in place of --insecure"
        return f"no gRPC answer: {code.name}: {details}; {advice}"

    def clock(self) -> str:
        """Compare this machine's clock with its certificate, and with the server's if that answered."""
        now, said = datetime.now(UTC), []
        if self.material is not None:
            certificate = self.material.certificate
            start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
            if not start <= now <= end:
                raise _Failed(
                    f"this machine says {day(now)}, outside its certificate's {day(start)} to {day(end)}; set the "
                    "clock (NTP), or renew the certificate if the clock is right"
                )
            said.append(f"{day(now)}, within the certificate's validity ({(end - now).days} days left)")
        if self.replies:
            middle, seconds, reply = min(self.replies, key=lambda row: row[1])
            ahead = middle - reply.unix_ms / 1000
            if abs(ahead) > CLOCK_LIMIT_S:
                raise _Failed(
                    f"this machine is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server; expected "
                    f"at most {CLOCK_LIMIT_S:.0f} s: set both clocks (NTP)"
                )
            said.append(f"{ahead:+.3f} s against the server's, known to {seconds / 2 + 0.001:.3f} s")
        if not said:
            raise _Skipped("neither a certificate nor a server to compare with")
        return "; ".join(said)

    def identity(self) -> str:
        """Compare the identity in this certificate with that which the server sees."""
        assert self.material is not None
        ours = self.material.identity
        assert ours is not None
        if not self.replies:
            return f"{ours} ({ours.uri}); the server did not say"
        theirs, clients = self.replies[0][2].you, self.replies[0][2].clients
        if theirs != ours.uri:
            raise _Failed(f"we are {ours.uri} and the server takes us for {theirs!r}; is a proxy between us?")
        if isinstance(ours, ClientIdentity) and clients and ours.client >= clients:
            raise _Failed(
                f"we are {ours}, and the server expects {clients} clients, 0 to {clients - 1}; start it with more "
                "clients, or use the certificate of one of these"
            )
        return f"{ours} ({ours.uri}), to the server too"

    def protocol(self) -> str:
        """Check that both speak the same version."""
        server = self.replies[0][2]
        if server.protocol != PROTOCOL:
            raise _Failed(
                f"the server speaks version {server.protocol} ({server.software}), this machine {PROTOCOL} "
                f"({SOFTWARE}); install the same fedsample on both"
            )
        return f"version {PROTOCOL} on both sides"

    def round_trip(self) -> str:
        """Measure a call on an open connection."""
        times = sorted(seconds * 1000 for _, seconds, _ in self.replies)
        return f"median {statistics.median(times):.2f} ms, worst {times[-1]:.2f} ms of {len(times)}"
