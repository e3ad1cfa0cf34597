"""One client as the server sees it: its stream, what it is asked, and how it has behaved."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.frames import Message

LATENCIES = 256  # answers whose times are kept


@dataclass
class Asked:
    """A request to one client, until it is answered.

    Attributes:
        message: the request. limit: bytes that the answer's arrays may have. batch: where the answer goes.
        since: when it was asked, seconds of `time.monotonic`.
    """

    message: Message
    limit: int
    batch: Batch
    since: float = field(default_factory=time.monotonic)


class Batch:
    """Requests that are asked together. The loop's thread fills in answers, the chain's thread waits for them."""

    def __init__(self, clients: list[int], *, private: bool = False) -> None:
        """Nobody has answered; a private one is given up when its client leaves."""
        self.private = private
        self.left = set(clients)
        self.answers: dict[int, Message | pb.Failure] = {}
        self.wake = threading.Event()
        self.next = -1  # the client whose answer is wanted first

    def put(self, client: int, answer: Message | pb.Failure, *, soon: bool) -> None:
        """One answer; wakes the chain's thread when it is the last, or when it should make room `soon`."""
        self.answers[client] = answer
        self.left.discard(client)
        if soon or not self.left:
            self.wake.set()


class Stream:
    """One connection of a device; lives in the loop's thread."""

    def __init__(self, instance: bytes) -> None:
        """Nothing is queued."""
        self.instance = instance
        self.queue: asyncio.Queue[pb.ServerFrame | Message | None] = asyncio.Queue()
        self.heard = time.monotonic()
        self.pong: asyncio.Event = asyncio.Event()
        self.busy = False
        self.reason = ""  # why it was closed, if this side did it

    def send(self, frame: pb.ServerFrame | Message) -> None:
        """Queue a frame, or a message in pieces."""
        self.queue.put_nowait(frame)

    def close(self, reason: str) -> None:
        """End the stream once everything queued is written."""
        self.reason = self.reason or reason
        self.queue.put_nowait(None)

    async def alive(self, seconds: float) -> bool:
        """Whether the device answers a ping in that time."""
        self.pong.clear()
        self.send(pb.ServerFrame(ping=pb.Ping(number=1)))
        try:
            await asyncio.wait_for(self.pong.wait(), seconds)
        except TimeoutError:
            return False
        return True


@dataclass
class Seat:
    """What the server knows of one client.

    Attributes:
        client: its index. stream: the open one. instance: the process that was here last. accepted: whether it is
            asked; a newcomer is not until the chain says so. asked: what it has not answered. ready: its last Ready.
        sent, received: bytes on the wire, (payload, all). answers, late, failed, connections: counts.
        latencies: seconds from request to answer, the last few. error: the last thing that went wrong.
        since: when it came or went.
    """

    client: int
    stream: Stream | None = None
    instance: bytes = b""
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
    def state(self) -> str:
        """In a word or two."""
        if self.stream is None:
            return "away" if self.connections else "not here yet"
        if not self.accepted:
            return "joining"
        return "working" if self.asked is not None else "idle"

    def account(self, now: float) -> str:
        """What is waited for, in words."""
        if self.stream is None:
            return f"client {self.client} ({self.state}, {now - self.since:.0f} s)"
        asked = "joining" if self.asked is None else f"asked {now - self.asked.since:.0f} s ago"
        return f"client {self.client} ({asked})"
