"""The devices as the chain's thread sees them: it asks, waits for answers, and decides on newcomers.

The streams themselves live in the thread of a loop; see `Streams`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import grpc
import grpc.aio

from fedsample.errors import ClientError, FedSampleError
from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.framing.frames import PIECE, Message
from fedsample.fleets.grpc.framing.headers import Damaged
from fedsample.fleets.grpc.framing.probe import probe_handler
from fedsample.fleets.grpc.framing.version import SERVICE
from fedsample.fleets.grpc.framing.zero_copy import device_frame, written
from fedsample.fleets.grpc.server.client_record import Asked, Batch
from fedsample.fleets.grpc.server.stream import Stream
from fedsample.fleets.grpc.server.streams import LEAVE, Identified, Invitation, Streams
from fedsample.protocol.recovery import Abandoned

COMPLAIN = 10.0  # seconds of waiting after which the user is told what is waited for
_WINDOW = 1 << 20  # bytes that a device may send before they are read; gRPC's own estimate takes several times that
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


class Hub:
    """The streams of n devices.

    Args:
        invitation: sent to each device that connects.
        address: host:port to listen at; port 0 takes a free one.
        credentials: the server's; None: plaintext.
        identify: identifies a connection's peer, from its call's context and the claim in its Hello.
    """

    def __init__(
        self,
        invitation: Invitation,
        address: str,
        credentials: grpc.ServerCredentials | None,
        identify: Callable[[grpc.aio.ServicerContext, int], Identified],
    ) -> None:
        self.invitation, self.address = invitation, address
        self._loop = asyncio.new_event_loop()
        self.streams = Streams(invitation, identify, self._loop)
        self.records, self.newcomers = self.streams.records, self.streams.newcomers
        self.port = 0
        self.say: Callable[[str], None] = lambda text: None
        self.streams.say = lambda text: self.say(text)
        self.remind: Callable[[str], None] = lambda text: self.say(text)  # called repeatedly with who is waited for
        self.stopping: Callable[[], bool] = lambda: False
        self._credentials = credentials
        self._thread = threading.Thread(target=self._loop.run_forever, name="streams", daemon=True)
        self._server: grpc.aio.Server | None = None

    @property
    def term(self) -> int:
        """The term, which increases whenever the run goes back; devices ignore requests of a lower one."""
        return self.streams.term

    @term.setter
    def term(self, value: int) -> None:
        self.streams.term = value

    # --- start and stop ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start to listen.

        Raises:
            FedSampleError: if the address cannot be listened at.
        """
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    async def _open(self) -> None:
        self._server = grpc.aio.server(options=_OPTIONS)
        handlers = {
            "Connect": grpc.stream_stream_rpc_method_handler(self.streams.connect, device_frame, written),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers), probe_handler(lambda: len(self.records)))
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
        """Say farewell to all devices and close; may be called twice."""
        if self._server is not None:
            asyncio.run_coroutine_threadsafe(self._close(reason, finished), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._server = None  # with it gRPC closes what the loop polls, so the loop must have stopped
            self._loop.close()

    async def _close(self, reason: str, finished: bool) -> None:
        for record in self.records:
            if record.stream is not None:
                record.stream.send(pb.ServerFrame(farewell=pb.Farewell(reason=reason, finished=finished)))
                record.stream.close(reason)
        if self._server is not None:
            await self._server.stop(LEAVE)
        if calls := asyncio.all_tasks() - {asyncio.current_task()}:  # gRPC's own too, which may have a step left to run
            _, late = await asyncio.wait(calls, timeout=LEAVE)
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
        """Ask clients, and yield their answers in client order.

        Args:
            messages: by client.
            limit: largest size of one answer's arrays in bytes.
            welcome: called with each newcomer while waiting; may raise. None: newcomers wait.
            deadline: seconds to wait for all clients before `enough` answers suffice; None: none.
            enough: number of answers after which no other is waited for; None: all.

        Raises:
            ClientError: if a client failed.
            Abandoned: if the run is to stop while a client is away.
        """
        batch = Batch(list(messages), spare=0 if enough is None else len(messages) - enough)
        asked = {client: Asked(message, limit, batch) for client, message in messages.items()}
        self._loop.call_soon_threadsafe(self.streams.post, batch, asked)
        until = None if deadline is None else time.monotonic() + deadline
        try:
            for client in sorted(messages):
                answer = self._wait(client, batch, welcome, until, enough, len(messages))
                if answer is not None:
                    yield client, answer
                    if answer.size > PIECE:
                        self._loop.call_soon_threadsafe(self.streams.backpressure.release, answer.size)
        finally:
            if batch.left or batch.answers:
                self._loop.call_soon_threadsafe(self.streams.withdraw, batch)

    def _wait(
        self, client: int, batch: Batch, welcome: Callable[[int], None] | None, until: float | None,
        enough: int | None, total: int,
    ) -> Message | None:  # fmt: skip
        """Wait for a client's answer; None: the client is left out."""
        said = time.monotonic()
        stop: float | None = None
        self._greet(welcome)
        while True:
            self._want(client)
            gone = client not in batch.left  # read first: an answer is stored before its client leaves
            if (answer := batch.answers.pop(client, None)) is not None:
                break
            now = time.monotonic()
            if gone:
                return None
            if enough is not None and (until is None or now >= until) and total - len(batch.left) >= enough:
                if (answer := batch.answers.pop(client, None)) is not None:
                    break  # it is among the answers that came
                self.records[client].late += 1
                return None
            if not batch.wake.wait(0.5 if until is None or until <= now else min(0.5, until - now)):
                now = time.monotonic()
                if now - said >= COMPLAIN:
                    said = now
                    waiting = [self.records[each].account(now) for each in sorted(batch.left)]
                    self.remind(f"waiting for {_listed(waiting)}")
                    self._loop.call_soon_threadsafe(self.streams.nudge, batch)
                if self.stopping():
                    stop = stop or now
                    if now - stop > 2.0:
                        away = [self.records[each].account(now) for each in sorted(batch.left)]
                        raise Abandoned(f"the round was given up while waiting for {_listed(away)}")
            batch.wake.clear()
            self._greet(welcome)
        if isinstance(answer, pb.Failure):
            self.records[client].failed += 1
            raise ClientError(client, answer.round, answer.stage, answer.detail)
        return answer

    def _want(self, client: int) -> None:
        """Give room to this client's answer from now on."""
        gate = self.streams.backpressure
        if gate.wanted != client:
            gate.wanted = client
            gate.knock()

    def _greet(self, welcome: Callable[[int], None] | None) -> None:
        """Let the chain decide on newcomers."""
        while welcome is not None:
            try:
                client = self.newcomers.get_nowait()
            except queue.Empty:
                return
            if self._waits(client):
                welcome(client)

    def _waits(self, client: int) -> bool:
        """Whether a newcomer is connected and waits for a decision."""
        stream = self.records[client].stream
        return stream is not None and stream.ready and not self.records[client].accepted

    def gather(self, missing: Callable[[], list[int]], welcome: Callable[[int], None]) -> None:
        """Wait until no client is missing; newcomers are welcomed.

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
                self.remind(f"waiting for {_listed([self.records[each].account(now) for each in missing()])}")
            if self.stopping():
                raise Abandoned("stopped while waiting for clients")

    def converse(self, client: int, stream: Stream, messages: list[Message], limit: int) -> list[Message]:
        """Ask one client several things over one stream, one after the other, accepted or not -> its answers.

        Its earlier request stays open.

        Raises:
            Damaged: if the stream ends meanwhile.
            ClientError, Abandoned: see `ask`.
        """
        answers = []
        for message in messages:
            batch = Batch([client], private=True)
            asked = Asked(message, limit, batch)
            before = self._call(self.streams.post_private, client, stream, asked)
            try:
                answer = self._wait(client, batch, None, None, None, 1)
            finally:
                self._call(self.streams.restore_private, client, before)
            if answer is None:
                raise Damaged(f"client {client} left while it was being prepared")
            if answer.size > PIECE:
                self._loop.call_soon_threadsafe(self.streams.backpressure.release, answer.size)
            answers.append(answer)
        return answers

    def accept(self, client: int, stream: Stream, sequence: int = 0) -> None:
        """Accept the client at the end of a stream: it is asked from now on, and its unanswered request is sent again.

        Args:
            client: the client's index.
            stream: its stream; nothing happens if it has ended.
            sequence: a new number for the unanswered request, after messages sent since; 0: its name is unchanged.
        """
        self._call(self.streams.accept, client, stream, sequence)

    def refuse(self, client: int, stream: Stream, reason: str, *, retry: bool) -> None:
        """Refuse a newcomer, and end its stream."""
        self._call(self.streams.refuse, client, stream, reason, retry)

    def excuse(self, client: int) -> None:
        """Drop a client's open request: `ask` goes on without its answer."""
        self._call(self.streams.excuse, client)

    def recount(self, counts: list[list[int]]) -> None:
        """Add the counts of an earlier server, by client; see `ClientRecord.counts`."""

        def add() -> None:
            for record, each in zip(self.records, counts, strict=True):
                record.add(each)

        self._call(add)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in the loop's thread and wait for its result."""

        async def run() -> Any:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()


def _listed(parts: list[str]) -> str:
    return ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")
