"""One stream of a device, as the server sees it."""

from __future__ import annotations

import asyncio

from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.framing.frames import Message


class Stream:
    """One connection of a device; used in the loop's thread."""

    def __init__(self, instance: bytes) -> None:
        self.instance = instance
        self.queue: asyncio.Queue[pb.ServerFrame | Message | None] = asyncio.Queue()
        self.pong: asyncio.Event = asyncio.Event()
        self.pinged = 0.0  # when the first ping was sent that no frame has followed; 0: none
        self.busy = False
        self.ready = False  # whether it has sent Ready
        self.request: Message | None = None  # the request in the queue, or its successor
        self.staged = 0  # bytes of room taken by the answer that is arriving
        self.blocked = False  # whether reading is paused for lack of room
        self.reader: asyncio.Task[None] | None = None
        self.reason = ""  # why this side closed it

    def send(self, frame: pb.ServerFrame | Message) -> None:
        """Queue a frame, or a message in pieces; an earlier request that is still in the queue is dropped."""
        if isinstance(frame, Message):
            queued, self.request = self.request, frame
            if queued is not None:
                return
        self.queue.put_nowait(frame)

    def close(self, reason: str) -> None:
        """End the stream once everything queued is written."""
        self.reason = self.reason or reason
        self.queue.put_nowait(None)

    def abort(self, reason: str) -> None:
        """End the stream at once: its device may no longer read."""
        self.reason = self.reason or reason
        if self.reader is not None:
            self.reader.cancel()

    async def alive(self, seconds: float) -> bool:
        """Whether the device answers a ping in that time, or would if this side were reading what it sends."""
        if self.blocked:
            return True
        self.pong.clear()
        self.send(pb.ServerFrame(ping=pb.Ping(number=1)))
        try:
            await asyncio.wait_for(self.pong.wait(), seconds)
        except TimeoutError:
            return False
        return True
