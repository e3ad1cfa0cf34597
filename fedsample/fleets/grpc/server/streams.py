"""The server's end of all streams, in the thread of their loop: who comes, what is sent, what arrives.

A device that lost its connection and comes back as the same process, with its state in memory, is asked again what it
had not answered. Any other newcomer is announced to the chain's thread, which decides how the run goes on with it.
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
from fedsample.fleets.grpc.server.backpressure import Room
from fedsample.fleets.grpc.server.client_record import Asked, Batch, Seat
from fedsample.fleets.grpc.server.stream import Stream

_LINE = 500  # characters of a device's own words that are shown
_HELLO, _PONG, _REPLACE = 30.0, 30.0, 5.0  # seconds for a first frame, an overdue pong, a rival's pong
LEAVE = 2.0  # seconds that a device has to read the last word and go
_TERMS = 1 << 62  # no run goes back so often


class Identified(NamedTuple):
    """Who is at the other end of a connection: a client, or why not."""

    client: int
    refusal: str = ""


class Invitation(NamedTuple):
    """What every device is told when it comes.

    Attributes:
        run, nonce: 16 bytes each. config: TOML. clients: n.
    """

    run: bytes
    nonce: bytes
    config: str
    clients: int


class Streams:
    """The streams of n devices. All methods run in the loop's thread.

    Args:
        invitation: what devices are told. identify: who a connection's peer is, from its call's context and what its
            Hello claims. loop: in which all happens.

    Attributes:
        seats: of the clients. newcomers: who waits for the chain's word. term: devices in a lower one hear nothing.
        room: for large answers. batch: asked last, of everyone. say: tells whoever watches.
    """

    def __init__(
        self,
        invitation: Invitation,
        identify: Callable[[grpc.aio.ServicerContext, int], Identified],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Nobody is here."""
        self.invitation, self._identify = invitation, identify
        self.seats = [Seat(client) for client in range(invitation.clients)]
        self.newcomers: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.term = 0
        self.room = Room(loop)
        self.batch: Batch | None = None
        self.say: Callable[[str], None] = lambda text: None

    # --- what is asked ------------------------------------------------------------------------------------------------

    def post(self, batch: Batch, asked: dict[int, Asked]) -> None:
        """Ask clients; who is not here is asked when it is accepted."""
        self.batch = batch
        for client, each in asked.items():
            seat = self.seats[client]
            seat.asked = each
            if seat.accepted:
                self._send(seat, each.message)

    def post_private(self, client: int, stream: Stream, asked: Asked) -> Asked | None:
        """Ask one client over one stream, accepted or not -> what it was asked before."""
        seat = self.seats[client]
        before, seat.asked = seat.asked, asked
        if seat.stream is not stream:
            asked.batch.left.discard(client)
            asked.batch.wake.set()
        else:
            self._send(seat, asked.message)
        return before

    def restore_private(self, client: int, before: Asked | None) -> None:
        """After `post_private`: what it was asked before is asked again."""
        self.seats[client].asked = before

    def excuse(self, client: int) -> None:
        """What a client was asked is no longer wanted."""
        seat = self.seats[client]
        if seat.asked is not None and not seat.asked.batch.private:
            seat.asked.batch.left.discard(client)
            seat.asked.batch.wake.set()
            seat.asked = None

    def withdraw(self, batch: Batch) -> None:
        """Nobody waits for these answers any more."""
        for seat in self.seats:
            if seat.asked is not None and seat.asked.batch is batch:
                seat.asked = None
        for answer in batch.answers.values():
            if isinstance(answer, Message) and answer.size > PIECE:
                self.room.release(answer.size)

    def nudge(self, batch: Batch) -> None:
        """Ask who has not answered for long whether it is there; who never answers has lost its connection."""
        for client in batch.left:
            seat = self.seats[client]
            stream, now = seat.stream, time.monotonic()
            if stream is None or stream.blocked:
                continue
            if stream.pinged and now - stream.pinged > _PONG:
                stream.abort(f"silent for {_PONG:g} s")
            else:
                stream.pinged = stream.pinged or now
                stream.send(pb.ServerFrame(ping=pb.Ping(number=2)))

    def accept(self, client: int, stream: Stream, sequence: int = 0) -> None:
        """A newcomer is asked from now on, also what it had not answered, under a new number if one is given."""
        seat = self.seats[client]
        if seat.stream is not stream:
            return  # it left again, and will be a newcomer
        seat.accepted, seat.member = True, stream.instance
        if seat.asked is not None:
            message = seat.asked.message
            if sequence:
                seat.asked.message = message._replace(name=message.name._replace(term=self.term, sequence=sequence))
            self._send(seat, seat.asked.message)

    def refuse(self, client: int, stream: Stream, reason: str, retry: bool) -> None:
        """End a newcomer's stream."""
        stream.send(pb.ServerFrame(refusal=pb.Refusal(reason=reason, retry=retry)))
        stream.close(reason)
        self._leave(self.seats[client], stream)

    def _send(self, seat: Seat, message: Message) -> None:
        if seat.stream is not None:
            seat.stream.send(message)

    # --- who comes ----------------------------------------------------------------------------------------------------

    async def connect(self, frames: Any, context: grpc.aio.ServicerContext) -> None:
        """One stream from its Hello to its end."""
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
        elif not problem and not 0 <= who.client < len(self.seats):
            problem = (
                f"client {who.client} is none of the run's {len(self.seats)}, which are 0 to {len(self.seats) - 1}: "
                "raise data.clients on the server, or use another client's certificate"
            )
        if problem:
            await context.write(_refusal(problem, retry=False))
            return
        seat = self.seats[who.client]
        if not await self._vacant(seat, hello.instance):
            rival = f"client {seat.client} is connected already, from another process that answers"
            seat.error = "another process that says it is this device was turned away, as this one answers"
            await context.write(_refusal(rival, retry=True))
            return
        await self._serve(seat, Stream(hello.instance), context)

    async def _vacant(self, seat: Seat, instance: bytes) -> bool:
        """Whether a newcomer may have the seat: who sits there is the same process, or does not answer."""
        stream = seat.stream
        if stream is None:
            return True
        if stream.instance != instance and await stream.alive(_REPLACE):
            return False
        stream.abort("replaced by a newer connection")
        self._leave(seat, stream)
        return seat.stream is None

    async def _serve(self, seat: Seat, stream: Stream, context: grpc.aio.ServicerContext) -> None:
        seat.stream, seat.accepted, seat.since = stream, False, time.monotonic()
        seat.connections += 1
        invitation = self.invitation
        stream.send(
            pb.ServerFrame(
                welcome=pb.Welcome(
                    protocol=PROTOCOL, software=SOFTWARE, run=invitation.run,
                    nonce=invitation.nonce, config=invitation.config, client=seat.client, clients=invitation.clients,
                )
            )
        )  # fmt: skip
        reader = stream.reader = asyncio.create_task(self._read(seat, stream, context))
        writer = asyncio.create_task(self._write(seat, stream, context))
        try:
            done, _ = await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if writer in done and not writer.cancelled() and writer.exception() is None:
                # What the device still writes would fail if the call were over, and with it what it has not yet read.
                await asyncio.wait({reader}, timeout=LEAVE)
            for task in done:
                if not task.cancelled() and (error := task.exception()) is not None and seat.stream is stream:
                    seat.error = str(error) or type(error).__name__
        finally:
            for task in (reader, writer):
                task.cancel()
            try:
                await asyncio.gather(reader, writer, return_exceptions=True)
            finally:
                self._leave(seat, stream)  # also if the call is cancelled just now: its device has closed both ways

    def _leave(self, seat: Seat, stream: Stream) -> None:
        """A stream is over, whoever ended it; what was asked over it alone is given up."""
        if seat.stream is not stream:
            return
        seat.stream, seat.accepted, seat.since = None, False, time.monotonic()
        seat.error = stream.reason or seat.error
        if seat.asked is not None and seat.asked.batch.private:
            seat.asked.batch.left.discard(seat.client)
            seat.asked.batch.wake.set()

    # --- what travels -------------------------------------------------------------------------------------------------

    async def _write(self, seat: Seat, stream: Stream, context: grpc.aio.ServicerContext) -> None:
        while (item := await stream.queue.get()) is not None:
            if isinstance(item, Message):
                item, stream.request = stream.request or item, None
                seat.sent[0] += item.size
                for frame in frames(item):
                    seat.sent[1] += len(frame)
                    if item.size <= PIECE:
                        await asyncio.sleep(0)  # all frames of a round are made before the first is encrypted and sent
                    await context.write(frame)
            else:
                seat.sent[1] += item.ByteSize()
                await context.write(item)

    async def _read(self, seat: Seat, stream: Stream, context: grpc.aio.ServicerContext) -> None:
        assembler = Assembler(0)
        try:
            await self._listen(seat, stream, context, assembler)
        finally:
            if stream.staged:  # half of a large answer
                self.room.release(stream.staged)

    async def _listen(
        self, seat: Seat, stream: Stream, context: grpc.aio.ServicerContext, assembler: Assembler
    ) -> None:
        while True:
            frame = await context.read()
            stream.pinged = 0.0
            if isinstance(frame, Piece):
                seat.received[1] += frame.size
                await self._piece(seat, stream, assembler, frame)
                continue
            if not isinstance(frame, pb.DeviceFrame):
                return  # the device closed its end
            seat.received[1] += frame.ByteSize()
            kind = frame.WhichOneof("frame")
            if kind == "pong":
                stream.busy = frame.pong.busy
                stream.pong.set()
                asked = seat.asked
                if frame.pong.number == 2 and not frame.pong.busy and asked is not None:
                    if seat.accepted or asked.batch.private:
                        self._send(seat, asked.message)  # it got lost
            elif kind == "ready":
                self._ready(seat, stream, frame.ready)
            elif kind == "failure":
                if not frame.failure.digest:  # of no request: the device cannot take part, and leaves
                    reason = last_line(frame.failure.detail)[:_LINE]
                    self.say(f"client {seat.client} cannot take part: {reason}")
                    stream.close(reason)
                elif seat.asked is not None and seat.asked.message.name.digest == frame.failure.digest:
                    asked, seat.asked = seat.asked, None
                    seat.error = last_line(frame.failure.detail)
                    asked.batch.put(seat.client, frame.failure, soon=True)

    async def _piece(self, seat: Seat, stream: Stream, assembler: Assembler, piece: Piece) -> None:
        seat.received[0] += len(piece.data)
        if assembler.expected is None:
            asked = seat.asked
            assembler.limit = PIECE if asked is None else max(asked.limit, PIECE)
            size = assembler.begin(piece)
            if size > PIECE:
                await self.room.take(seat.client, stream, size)
        message = assembler.add(piece)
        if message is None:
            return
        stream.staged = 0  # it is released when it has been added
        asked = seat.asked
        if asked is None or message.name != asked.message.name:  # it was answered, or is no longer asked
            if message.size > PIECE:
                self.room.release(message.size)
            return
        seat.asked = None
        seat.latencies.append(time.monotonic() - asked.since)
        seat.answers += 1
        seat.round = message.name.round
        asked.batch.put(seat.client, message, soon=message.size > PIECE)

    def _ready(self, seat: Seat, stream: Stream, ready: pb.Ready) -> None:
        if ready.term >= _TERMS:
            raise Damaged(f"a device in term {ready.term}, expected less than {_TERMS}")
        seat.ready, stream.ready = ready, True
        mine = ready.run == self.invitation.run
        if mine and ready.live and ready.term == self.term and seat.member == stream.instance:
            self.accept(seat.client, stream)
        else:
            if mine and ready.term > self.term:
                self.term = ready.term + 1  # it hears nothing of a lower one
            self.newcomers.put(seat.client)
            if seat.asked is not None:
                seat.asked.batch.wake.set()
            elif self.batch is not None:
                self.batch.wake.set()


def last_line(detail: str) -> str:
    """What a traceback says in the end."""
    return (detail.strip().splitlines() or ["failed"])[-1]


def _refusal(reason: str, *, retry: bool) -> pb.ServerFrame:
    return pb.ServerFrame(refusal=pb.Refusal(reason=reason, retry=retry))
