"""One client as the server sees it: its stream, its open request, and its counts of traffic and failures."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.framing.frames import Message
from fedsample.fleets.grpc.server.stream import Stream

LATENCIES = 256  # number of answers whose latencies are kept


@dataclass
class Asked:
    """A request to one client, until it is answered.

    Attributes:
        message: the request.
        limit: bytes that the answer's arrays may have.
        batch: collects the answers.
        since: when it was asked, seconds of `time.monotonic`.
    """

    message: Message
    limit: int
    batch: Batch
    since: float = field(default_factory=time.monotonic)


class Batch:
    """Requests asked together. The loop's thread fills in answers, the chain's thread waits for them."""

    def __init__(self, clients: list[int], *, private: bool = False, spare: int = 0) -> None:
        """Start without answers; a private batch ends when its client leaves, `spare` clients need not answer."""
        self.private, self.spare = private, spare
        self.left = set(clients)
        self.answers: dict[int, Message | pb.Failure] = {}
        self.wake = threading.Event()

    def put(self, client: int, answer: Message | pb.Failure, *, soon: bool) -> None:
        """Store an answer; wake the chain's thread if it is the last, or if the thread should make room `soon`."""
        self.answers[client] = answer  # before the client is removed from `left`: the reader relies on this order
        self.left.discard(client)
        if soon or len(self.left) <= self.spare:
            self.wake.set()


@dataclass
class ClientRecord:
    """The server's record of one client.

    Attributes:
        client: its index.
        stream: the open stream.
        member: the process that was accepted last.
        accepted: whether it is asked; a newcomer is not until the chain accepts it.
        asked: the request that it has not answered.
        ready: its last Ready.
        sent: bytes sent on the wire, (payload, all).
        received: bytes received on the wire, (payload, all).
        answers: number of answers.
        late: number of late answers.
        failed: number of failures.
        connections: number of connections.
        latencies: seconds from request to answer, of the last ones.
        error: the last error.
        since: when it connected or disconnected.
    """

    client: int
    stream: Stream | None = None
    member: bytes = b""
    accepted: bool = False
    asked: Asked | None = None
    ready: pb.Ready | None = None
    sent: list[int] = field(default_factory=lambda: [0, 0])
    received: list[int] = field(default_factory=lambda: [0, 0])
    answers: int = 0
    late: int = 0
    failed: int = 0
    connections: int = 0
    round: int = 0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES))
    error: str = ""
    since: float = field(default_factory=time.monotonic)

    @property
    def counts(self) -> list[int]:
        """Everything counted since the run began."""
        return [*self.sent, *self.received, self.answers, self.late, self.failed, self.connections]

    def add(self, counts: Sequence[int]) -> None:
        """Add the `counts` of an earlier server."""
        sent, every_sent, received, every_received, answers, late, failed, connections = counts
        self.sent[0], self.sent[1] = self.sent[0] + sent, self.sent[1] + every_sent
        self.received[0], self.received[1] = self.received[0] + received, self.received[1] + every_received
        self.answers, self.late, self.failed = self.answers + answers, self.late + late, self.failed + failed
        self.connections += connections

    @property
    def state(self) -> str:
        """Describe the state in a word or two."""
        if self.stream is None:
            return "away" if self.connections else "not here yet"
        if not self.accepted:
            return "ready" if self.stream.ready else "joining"
        return "working" if self.asked is not None else "idle"

    def account(self, now: float) -> str:
        """Describe what is waited for."""
        if self.stream is None:
            last = f"; {self.error}" if self.error else ""
            return f"client {self.client} ({self.state}, {now - self.since:.0f} s{last})"
        asked = "joining" if self.asked is None else f"asked {now - self.asked.since:.0f} s ago"
        return f"client {self.client} ({asked})"
