"""The server's end of all streams, in their loop's thread: connections, sending and receiving.

A device that lost its connection and comes back as the same process, with its state in memory, is sent its unanswered
request again. Any other newcomer is announced to the chain's thread, which decides how the run goes on with it.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc.aio

from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.framing.frames import PIECE, Assembler, Message, frames
from fedsample.fleets.grpc.framing.headers import Damaged
from fedsample.fleets.grpc.framing.probe import SOFTWARE
from fedsample.fleets.grpc.framing.version import PROTOCOL
from fedsample.fleets.grpc.framing.zero_copy import Piece
from fedsample.fleets.grpc.server.backpressure import Backpressure
from fedsample.fleets.grpc.server.client_record import Asked, Batch, ClientRecord
from fedsample.fleets.grpc.server.stream import Stream

_LINE = 500  # characters of a device's error message that are shown
_HELLO, _PONG, _REPLACE = 30.0, 30.0, 5.0  # seconds for a first frame, an overdue pong, a rival's pong
LEAVE = 2.0  # seconds for a device to read the last frame and leave
_TERMS = 1 << 62  # largest term: no run goes back so often


class Identified(NamedTuple):
    """The peer of a connection: a client's index, or why it is refused."""

    client: int
    refusal: str = ""


class Invitation(NamedTuple):
    """What each device is sent when it connects.

    Attributes:
        run: the run's id, 16 bytes.
        nonce: 16 random bytes, from which the id is made.
        config: the configuration as TOML.
        clients: n, the number of clients.
    """

    run: bytes
    nonce: bytes
    config: str
    clients: int


class Streams:
    """The streams of n devices. All methods run in the loop's thread.

    Args:
        invitation: sent to each device that connects.
        identify: identifies a connection's peer, from its call's context and the claim in its Hello.
        loop: the loop in whose thread all methods run.

    Attributes:
        records: the clients' records.
        newcomers: clients that wait for the chain's decision.
        term: requests of a lower term are ignored by devices.
        room: limits large answers.
        batch: the last one that was asked of all.
        say: prints a message for the user.
    """

    def __init__(
        self,
        invitation: Invitation,
        identify: Callable[[grpc.aio.ServicerContext, int], Identified],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.invitation, self._identify = invitation, identify
        self.records = [ClientRecord(client) for client in range(invitation.clients)]
        self.newcomers: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.term = 0
        self.backpressure = Backpressure(loop)
        self.batch: Batch | None = None
        self.say: Callable[[str], None] = lambda text: None

    # --- requests -----------------------------------------------------------------------------------------------------

    def post(self, batch: Batch, asked: dict[int, Asked]) -> None:
        """Ask clients; those not connected are asked when they are accepted."""
        self.batch = batch
        for client, each in asked.items():
            record = self.records[client]
            record.asked = each
            if record.accepted:
                self._send(record, each.message)

    def post_private(self, client: int, stream: Stream, asked: Asked) -> Asked | None:
        """Ask one client over one stream, accepted or not -> its open request."""
        record = self.records[client]
        before, record.asked = record.asked, asked
        if record.stream is not stream:
            asked.batch.left.discard(client)
            asked.batch.wake.set()
        else:
            self._send(record, asked.message)
        return before

    def restore_private(self, client: int, before: Asked | None) -> None:
        """Ask the request from before `post_private` again."""
        self.records[client].asked = before

    def excuse(self, client: int) -> None:
        """Drop a client's open request."""
        record = self.records[client]
        if record.asked is not None and not record.asked.batch.private:
            record.asked.batch.left.discard(client)
            record.asked.batch.wake.set()
            record.asked = None

    def withdraw(self, batch: Batch) -> None:
        """Drop all open requests of a batch."""
        for record in self.records:
            if record.asked is not None and record.asked.batch is batch:
                record.asked = None
        for answer in batch.answers.values():
            if isinstance(answer, Message) and answer.size > PIECE:
                self.backpressure.release(answer.size)

    def nudge(self, batch: Batch) -> None:
        """Ping clients that have not answered for long; one that does not reply has lost its connection."""
        for client in batch.left:
            record = self.records[client]
            stream, now = record.stream, time.monotonic()
            if stream is None or stream.blocked:
                continue
            if stream.pinged and now - stream.pinged > _PONG:
                stream.abort(f"silent for {_PONG:g} s")
            else:
                stream.pinged = stream.pinged or now
                stream.send(pb.ServerFrame(ping=pb.Ping(number=2)))

    def accept(self, client: int, stream: Stream, sequence: int = 0) -> None:
        """Accept a newcomer, and send its unanswered request again, under a new number if one is given."""
        record = self.records[client]
        if record.stream is not stream:
            return  # it left again, and will be a newcomer
        record.accepted, record.member = True, stream.instance
        if record.asked is not None:
            message = record.asked.message
            if sequence:
                record.asked.message = message._replace(name=message.name._replace(term=self.term, sequence=sequence))
            self._send(record, record.asked.message)

    def refuse(self, client: int, stream: Stream, reason: str, retry: bool) -> None:
        """Refuse a newcomer, and end its stream."""
        stream.send(pb.ServerFrame(refusal=pb.Refusal(reason=reason, retry=retry)))
        stream.close(reason)
        self._leave(self.records[client], stream)

    def _send(self, record: ClientRecord, message: Message) -> None:
        if record.stream is not None:
            record.stream.send(message)

    # --- connections --------------------------------------------------------------------------------------------------

    async def connect(self, frames: Any, context: grpc.aio.ServicerContext) -> None:
        """Handle one stream, from its Hello to its end."""
        try:
            first = await asyncio.wait_for(context.read(), _HELLO)
        except TimeoutError:
            return
        if not isinstance(first, pb.DeviceFrame) or first.WhichOneof("frame") != "hello":
            await context.write(_refusal("expected a Hello", retry=False))
            return
        hello, who = first.hello, self._identify(context, first.hello.client)
        problem = who.refusal
        if hello.protocol != PROTOCOL:
            problem = f"this server speaks protocol {PROTOCOL}, the device {hello.protocol}: install the same fedsample"
        elif not problem and not 0 <= who.client < len(self.records):
            problem = (
                f"client {who.client} is none of the run's {len(self.records)}, which are 0 to "
                f"{len(self.records) - 1}: "
                "raise data.clients on the server, or use another client's certificate"
            )
        if problem:
            await context.write(_refusal(problem, retry=False))
            return
        record = self.records[who.client]
        if not await self._vacant(record, hello.instance):
            rival = f"client {record.client} is connected already, from another process that answers"
            record.error = "another process that says it is this device was turned away, as this one answers"
            await context.write(_refusal(rival, retry=True))
            return
        await self._serve(record, Stream(hello.instance), context)

    async def _vacant(self, record: ClientRecord, instance: bytes) -> bool:
        """Whether a newcomer may take the record: its holder is the same process, or does not answer."""
        stream = record.stream
        if stream is None:
            return True
        if stream.instance != instance and await stream.alive(_REPLACE):
            return False
        stream.abort("replaced by a newer connection")
        self._leave(record, stream)
        return record.stream is None

    async def _serve(self, record: ClientRecord, stream: Stream, context: grpc.aio.ServicerContext) -> None:
        record.stream, record.accepted, record.since = stream, False, time.monotonic()
        record.connections += 1
        invitation = self.invitation
        stream.send(
            pb.ServerFrame(
                welcome=pb.Welcome(
                    protocol=PROTOCOL, software=SOFTWARE, run=invitation.run,
                    nonce=invitation.nonce, config=invitation.config, client=record.client, clients=invitation.clients,
                )
            )
        )  # fmt: skip
        reader = stream.reader = asyncio.create_task(self._read(record, stream, context))
        writer = asyncio.create_task(self._write(record, stream, context))
        try:
            done, _ = await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if writer in done and not writer.cancelled() and writer.exception() is None:
                # If the call were over, what the device still writes would fail, and what it has not read be lost.
                await asyncio.wait({reader}, timeout=LEAVE)
            for task in done:
                if not task.cancelled() and (error := task.exception()) is not None and record.stream is stream:
                    record.error = str(error) or type(error).__name__
        finally:
            for task in (reader, writer):
                task.cancel()
            try:
                await asyncio.gather(reader, writer, return_exceptions=True)
            finally:
                self._leave(record, stream)  # also if the call is cancelled just now: its device has closed both ways

    def _leave(self, record: ClientRecord, stream: Stream) -> None:
        """Handle the end of a stream, whichever side ended it; requests asked over it alone are given up."""
        if record.stream is not stream:
            return
        record.stream, record.accepted, record.since = None, False, time.monotonic()
        record.error = stream.reason or record.error
        if record.asked is not None and record.asked.batch.private:
            record.asked.batch.left.discard(record.client)
            record.asked.batch.wake.set()

    # --- frames -------------------------------------------------------------------------------------------------------

    async def _write(self, record: ClientRecord, stream: Stream, context: grpc.aio.ServicerContext) -> None:
        while (item := await stream.queue.get()) is not None:
            if isinstance(item, Message):
                item, stream.request = stream.request or item, None
                record.sent[0] += item.size
                for frame in frames(item):
                    record.sent[1] += len(frame)
                    if item.size <= PIECE:
                        await asyncio.sleep(0)  # all frames of a round are made before the first is encrypted and sent
                    await context.write(frame)
            else:
                record.sent[1] += item.ByteSize()
                await context.write(item)

    async def _read(self, record: ClientRecord, stream: Stream, context: grpc.aio.ServicerContext) -> None:
        assembler = Assembler(0)
        try:
            await self._listen(record, stream, context, assembler)
        finally:
            if stream.staged:  # part of a large answer
                self.backpressure.release(stream.staged)

    async def _listen(
        self, record: ClientRecord, stream: Stream, context: grpc.aio.ServicerContext, assembler: Assembler
    ) -> None:
        while True:
            frame = await context.read()
            stream.pinged = 0.0
            if isinstance(frame, Piece):
                record.received[1] += frame.size
                await self._piece(record, stream, assembler, frame)
                continue
            if not isinstance(frame, pb.DeviceFrame):
                return  # the device closed its end
            record.received[1] += frame.ByteSize()
            kind = frame.WhichOneof("frame")
            if kind == "pong":
                stream.busy = frame.pong.busy
                stream.pong.set()
                asked = record.asked
                if frame.pong.number == 2 and not frame.pong.busy and asked is not None:
                    if record.accepted or asked.batch.private:
                        self._send(record, asked.message)  # it was lost
            elif kind == "ready":
                self._ready(record, stream, frame.ready)
            elif kind == "failure":
                if not frame.failure.digest:  # of no request: the device cannot take part, and leaves
                    reason = last_line(frame.failure.detail)[:_LINE]
                    self.say(f"client {record.client} cannot take part: {reason}")
                    stream.close(reason)
                elif record.asked is not None and record.asked.message.name.digest == frame.failure.digest:
                    asked, record.asked = record.asked, None
                    record.error = last_line(frame.failure.detail)
                    asked.batch.put(record.client, frame.failure, soon=True)

    async def _piece(self, record: ClientRecord, stream: Stream, assembler: Assembler, piece: Piece) -> None:
        record.received[0] += len(piece.data)
        if assembler.expected is None:
            asked = record.asked
            assembler.limit = PIECE if asked is None else max(asked.limit, PIECE)
            size = assembler.begin(piece)
            if size > PIECE:
                await self.backpressure.take(record.client, stream, size)
        message = assembler.add(piece)
        if message is None:
            return
        stream.staged = 0  # the room is released when the answer has been added
        asked = record.asked
        if asked is None or message.name != asked.message.name:  # already answered, or no longer asked
            if message.size > PIECE:
                self.backpressure.release(message.size)
            return
        record.asked = None
        record.latencies.append(time.monotonic() - asked.since)
        record.answers += 1
        record.round = message.name.round
        asked.batch.put(record.client, message, soon=message.size > PIECE)

    def _ready(self, record: ClientRecord, stream: Stream, ready: pb.Ready) -> None:
        if ready.term >= _TERMS:
            raise Damaged(f"a device in term {ready.term}, expected less than {_TERMS}")
        record.ready, stream.ready = ready, True
        mine = ready.run == self.invitation.run
        if mine and ready.live and ready.term == self.term and record.member == stream.instance:
            self.accept(record.client, stream)
        else:
            if mine and ready.term > self.term:
                self.term = ready.term + 1  # it ignores requests of a lower term
            self.newcomers.put(record.client)
            if record.asked is not None:
                record.asked.batch.wake.set()
            elif self.batch is not None:
                self.batch.wake.set()


def last_line(detail: str) -> str:
    """The last line of a traceback."""
    return (detail.strip().splitlines() or ["failed"])[-1]


def _refusal(reason: str, *, retry: bool) -> pb.ServerFrame:
    return pb.ServerFrame(refusal=pb.Refusal(reason=reason, retry=retry))
