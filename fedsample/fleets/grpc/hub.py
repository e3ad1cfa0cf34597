"""The server's end of all streams, in a thread of its own; the chain's thread asks, and waits for answers.

A device that lost its connection and comes back as the same process, with its state in memory, is asked again what it
had not answered. Any other newcomer is announced to the chain's thread, which decides how the run goes on with it.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import grpc
import grpc.aio

from fedsample.errors import ClientError, FedSampleError
from fedsample.exchange import Abandoned
from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.frames import PIECE, Assembler, Message, frames
from fedsample.fleets.grpc.heads import Damaged
from fedsample.fleets.grpc.packing import Piece, device_frame, written
from fedsample.fleets.grpc.probe import SOFTWARE, probe_handler
from fedsample.fleets.grpc.seat import Asked, Batch, Seat, Stream
from fedsample.fleets.grpc.version import PROTOCOL, SERVICE

STAGE, ANSWERS = 16 << 20, 2  # bytes of large answers that may wait to be added, all clients together; or so many
COMPLAIN = 10.0  # seconds of waiting after which it is said what is waited for
_LINE = 500  # characters of a device's own words that are shown
_HELLO, _PONG, _REPLACE = 30.0, 30.0, 5.0  # seconds for a first frame, an overdue pong, a rival's pong
_LEAVE = 2.0  # seconds that a device has to read the last word and go
_TERMS = 1 << 62  # no run goes back so often
_WINDOW = 1 << 20  # bytes that a device may send before they are read; gRPC's own guess takes several times that
_OPTIONS = [
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", _WINDOW),
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
]


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


class Hub:
    """The streams of n devices.

    Args:
        invitation: what devices are told. address: host:port to listen at; port 0 takes a free one. credentials: of the
            server; None: plaintext. identify: who a connection's peer is, from its call's context and what its Hello
            claims.
    """

    def __init__(
        self,
        invitation: Invitation,
        address: str,
        credentials: grpc.ServerCredentials | None,
        identify: Callable[[grpc.aio.ServicerContext, int], Identified],
    ) -> None:
        """Nothing is open yet; see `start`."""
        self.invitation, self.address = invitation, address
        self.seats = [Seat(client) for client in range(invitation.clients)]
        self.newcomers: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.term = 0
        self.port = 0
        self.say: Callable[[str], None] = lambda text: None
        self.remind: Callable[[str], None] = lambda text: self.say(text)  # of who is waited for, again and again
        self.stopping: Callable[[], bool] = lambda: False
        self.duplicates = 0  # answers that came again
        self._credentials, self._identify = credentials, identify
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="streams", daemon=True)
        self._server: grpc.aio.Server | None = None
        self._staged = 0
        self._room: asyncio.Condition | None = None
        self._batch: Batch | None = None

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen.

        Raises:
            FedSampleError: if the address cannot be listened at.
        """
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    async def _open(self) -> None:
        self._room = asyncio.Condition()
        self._server = grpc.aio.server(options=_OPTIONS)
        handlers = {
            "Connect": grpc.stream_stream_rpc_method_handler(self._connect, device_frame, written),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers), probe_handler(lambda: len(self.seats)))
        )
        try:
            if self._credentials is None:
                self.port = self._server.add_insecure_port(self.address)
            else:
                self.port = self._server.add_secure_port(self.address, self._credentials)
        except RuntimeError as error:
            self.port = 0
            reason = str(error)
        else:
            reason = "the address is in use, or not this machine's"
        if self.port == 0:
            raise FedSampleError(f"cannot listen at {self.address}: {reason}; choose another with --listen")
        await self._server.start()

    def stop(self, reason: str, *, finished: bool) -> None:
        """Say farewell to everyone and close; harmless a second time."""
        if self._server is not None:
            asyncio.run_coroutine_threadsafe(self._close(reason, finished), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._server = None  # with it gRPC closes what the loop polls, so the loop must have stopped
            self._loop.close()

    async def _close(self, reason: str, finished: bool) -> None:
        for seat in self.seats:
            if seat.stream is not None:
                seat.stream.send(pb.ServerFrame(farewell=pb.Farewell(reason=reason, finished=finished)))
                seat.stream.close(reason)
        if self._server is not None:
            await self._server.stop(_LEAVE)
        if calls := asyncio.all_tasks() - {asyncio.current_task()}:  # gRPC's own too, which may have a step to go
            _, late = await asyncio.wait(calls, timeout=_LEAVE)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    # --- the chain's thread -------------------------------------------------------------------------------------------

    def ask(
        self,
        messages: Mapping[int, Message],
        limit: int,
        *,
        welcome: Callable[[int], None] | None = None,
        deadline: float | None = None,
        enough: int | None = None,
    ) -> Generator[tuple[int, Message]]:
        """Ask clients, and yield their answers in the order of clients.

        Args:
            messages: by client. limit: bytes that the arrays of one answer may have. welcome: called with each newcomer
                while waiting; may raise. None: newcomers wait. enough: answers after which nobody else is waited for;
                None: all are. deadline: seconds that all are waited for all the same; None: none.

        Raises:
            ClientError: if a client failed. Abandoned: if the run is to stop while someone is away.
        """
        batch = Batch(list(messages), spare=0 if enough is None else len(messages) - enough)
        asked = {client: Asked(message, limit, batch) for client, message in messages.items()}
        self._loop.call_soon_threadsafe(self._post, batch, asked)
        until = None if deadline is None else time.monotonic() + deadline
        try:
            for client in sorted(messages):
                answer = self._wait(client, batch, welcome, until, enough, len(messages))
                if answer is not None:
                    yield client, answer
                    if answer.size > PIECE:
                        self._loop.call_soon_threadsafe(self._release, answer.size)
        finally:
            if batch.left or batch.answers:
                self._loop.call_soon_threadsafe(self._withdraw, batch)

    def _wait(
        self, client: int, batch: Batch, welcome: Callable[[int], None] | None, until: float | None,
        enough: int | None, total: int,
    ) -> Message | None:  # fmt: skip
        """The answer of a client; None if it is left out."""
        batch.next = client
        said = time.monotonic()
        stop: float | None = None
        self._greet(welcome)
        if self._staged:
            self._loop.call_soon_threadsafe(self._wake_staged)  # this client's answer has room now
        while True:
            gone = client not in batch.left  # looked at first: an answer is there before its client is gone
            if (answer := batch.answers.pop(client, None)) is not None:
                break
            now = time.monotonic()
            if gone:
                return None
            if enough is not None and (until is None or now >= until) and total - len(batch.left) >= enough:
                if (answer := batch.answers.pop(client, None)) is not None:
                    break  # it is one of them
                self.seats[client].late += 1
                return None
            if not batch.wake.wait(0.5 if until is None or until <= now else min(0.5, until - now)):
                now = time.monotonic()
                if now - said >= COMPLAIN:
                    said = now
                    waiting = [self.seats[each].account(now) for each in sorted(batch.left)]
                    self.remind(f"waiting for {_listed(waiting)}")
                    self._loop.call_soon_threadsafe(self._nudge, batch)
                if self.stopping():
                    stop = stop or now
                    if now - stop > 2.0:
                        away = [self.seats[each].account(now) for each in sorted(batch.left)]
                        raise Abandoned(f"the round was given up while waiting for {_listed(away)}")
            batch.wake.clear()
            self._greet(welcome)
            if batch.answers and self._room is not None:
                self._loop.call_soon_threadsafe(self._wake_staged)
        if isinstance(answer, pb.Failure):
            self.seats[client].failed += 1
            raise ClientError(client, answer.round, answer.stage, answer.detail)
        return answer

    def _greet(self, welcome: Callable[[int], None] | None) -> None:
        """Let the chain decide about newcomers."""
        while welcome is not None:
            try:
                client = self.newcomers.get_nowait()
            except queue.Empty:
                return
            if self._waits(client):
                welcome(client)

    def _waits(self, client: int) -> bool:
        """Whether a newcomer is here and waits for a word."""
        stream = self.seats[client].stream
        return stream is not None and stream.ready and not self.seats[client].accepted

    def gather(self, missing: Callable[[], list[int]], welcome: Callable[[int], None]) -> None:
        """Wait until nobody is missing; newcomers are welcomed.

        Raises:
            Abandoned: if the run is to stop meanwhile.
        """
        said = time.monotonic()
        while missing():
            try:
                client = self.newcomers.get(timeout=0.5)
            except queue.Empty:
                client = -1
            if client >= 0 and self._waits(client):
                welcome(client)
            now = time.monotonic()
            if missing() and now - said >= COMPLAIN:
                said = now
                self.remind(f"waiting for {_listed([self.seats[each].account(now) for each in missing()])}")
            if self.stopping():
                raise Abandoned("stopped while waiting for clients")

    def converse(self, client: int, stream: Stream, messages: list[Message], limit: int) -> list[Message]:
        """Ask one client several things over one stream, one after the other, accepted or not; its answers.

        What it was asked before stays asked.

        Raises:
            Damaged: if the stream ends meanwhile. ClientError, Abandoned: see `ask`.
        """
        answers = []
        for message in messages:
            batch = Batch([client], private=True)
            asked = Asked(message, limit, batch)
            before = self._call(self._post_private, client, stream, asked)
            try:
                answer = self._wait(client, batch, None, None, None, 1)
            finally:
                self._call(self._restore_private, client, before)
            if answer is None:
                raise Damaged(f"client {client} left while it was being prepared")
            if answer.size > PIECE:
                self._loop.call_soon_threadsafe(self._release, answer.size)
            answers.append(answer)
        return answers

    def accept(self, client: int, stream: Stream, sequence: int = 0) -> None:
        """From now on the client at the end of a stream is asked; also what it had not answered.

        Args:
            client: which. stream: nothing happens if it has ended. sequence: a new number for what it had not answered,
                after what it was told since; 0: it keeps its name.
        """
        self._call(self._accept, client, stream, sequence)

    def refuse(self, client: int, stream: Stream, reason: str, *, retry: bool) -> None:
        """End a newcomer's stream."""
        self._call(self._refuse, client, stream, reason, retry)

    def excuse(self, client: int) -> None:
        """What a client was asked is no longer wanted: `ask` goes on without its answer."""
        self._call(self._excuse, client)

    def recount(self, counts: list[list[int]]) -> None:
        """Go on from what an earlier server has counted, by client; see `Seat.counts`."""

        def add() -> None:
            for seat, each in zip(self.seats, counts, strict=True):
                seat.add(each)

        self._call(add)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in the loop's thread and wait for it."""

        async def run() -> Any:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    # --- the loop's thread --------------------------------------------------------------------------------------------

    def _post(self, batch: Batch, asked: dict[int, Asked]) -> None:
        self._batch = batch
        for client, each in asked.items():
            seat = self.seats[client]
            seat.asked = each
            if seat.accepted:
                self._send(seat, each.message)

    def _post_private(self, client: int, stream: Stream, asked: Asked) -> Asked | None:
        seat = self.seats[client]
        before, seat.asked = seat.asked, asked
        if seat.stream is not stream:
            asked.batch.left.discard(client)
            asked.batch.wake.set()
        else:
            self._send(seat, asked.message)
        return before

    def _restore_private(self, client: int, before: Asked | None) -> None:
        self.seats[client].asked = before

    def _excuse(self, client: int) -> None:
        seat = self.seats[client]
        if seat.asked is not None and not seat.asked.batch.private:
            seat.asked.batch.left.discard(client)
            seat.asked.batch.wake.set()
            seat.asked = None

    def _withdraw(self, batch: Batch) -> None:
        """Nobody waits for these answers any more."""
        for seat in self.seats:
            if seat.asked is not None and seat.asked.batch is batch:
                seat.asked = None
        for answer in batch.answers.values():
            if isinstance(answer, Message) and answer.size > PIECE:
                self._release(answer.size)

    def _nudge(self, batch: Batch) -> None:
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

    def _accept(self, client: int, stream: Stream, sequence: int = 0) -> None:
        seat = self.seats[client]
        if seat.stream is not stream:
            return  # it left again, and will be a newcomer
        seat.accepted, seat.member = True, stream.instance
        if seat.asked is not None:
            message = seat.asked.message
            if sequence:
                seat.asked.message = message._replace(name=message.name._replace(term=self.term, sequence=sequence))
            self._send(seat, seat.asked.message)

    def _refuse(self, client: int, stream: Stream, reason: str, retry: bool) -> None:
        stream.send(pb.ServerFrame(refusal=pb.Refusal(reason=reason, retry=retry)))
        stream.close(reason)
        self._leave(self.seats[client], stream)

    def _send(self, seat: Seat, message: Message) -> None:
        if seat.stream is not None:
            seat.stream.send(message)

    def _release(self, size: int) -> None:
        self._staged -= size
        self._wake_staged()

    def _wake_staged(self) -> None:
        async def notify() -> None:
            if self._room is not None:
                async with self._room:
                    self._room.notify_all()

        task = self._loop.create_task(notify())
        task.add_done_callback(lambda done: done.exception())

    async def _connect(self, frames: Any, context: grpc.aio.ServicerContext) -> None:
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
                await asyncio.wait({reader}, timeout=_LEAVE)
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
                self._release(stream.staged)

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
                await self._stage(seat.client, stream, size)
        message = assembler.add(piece)
        if message is None:
            return
        stream.staged = 0  # it is released when it has been added
        asked = seat.asked
        if asked is None or message.name != asked.message.name:
            self.duplicates += 1  # to a request that was answered, or is no longer asked
            if message.size > PIECE:
                self._release(message.size)
            return
        seat.asked = None
        seat.latencies.append(time.monotonic() - asked.since)
        seat.answers += 1
        seat.round = message.name.round
        asked.batch.put(seat.client, message, soon=message.size > PIECE)

    async def _stage(self, client: int, stream: Stream, size: int) -> None:
        """Wait until there is room for a large answer; the one that is wanted next always has room."""
        if self._room is None:
            return
        async with self._room:
            while self._staged and self._staged + size > max(STAGE, ANSWERS * size):
                if self._batch is not None and self._batch.next == client:
                    break
                stream.blocked = True
                await self._room.wait()
            stream.blocked, stream.staged = False, size
            self._staged += size

    def _ready(self, seat: Seat, stream: Stream, ready: pb.Ready) -> None:
        if ready.term >= _TERMS:
            raise Damaged(f"a device in term {ready.term}, expected less than {_TERMS}")
        seat.ready, stream.ready = ready, True
        mine = ready.run == self.invitation.run
        if mine and ready.live and ready.term == self.term and seat.member == stream.instance:
            self._accept(seat.client, stream)
        else:
            if mine and ready.term > self.term:
                self.term = ready.term + 1  # it hears nothing of a lower one
            self.newcomers.put(seat.client)
            if seat.asked is not None:
                seat.asked.batch.wake.set()
            elif self._batch is not None:
                self._batch.wake.set()


def last_line(detail: str) -> str:
    """What a traceback says in the end."""
    return (detail.strip().splitlines() or ["failed"])[-1]


def _refusal(reason: str, *, retry: bool) -> pb.ServerFrame:
    return pb.ServerFrame(refusal=pb.Refusal(reason=reason, retry=retry))


def _listed(parts: list[str]) -> str:
    return ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")
