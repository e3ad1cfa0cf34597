"""A device's end of the stream: connect, answer, and reconnect whatever happens.

The model computes in a thread of its own, so that pings are answered meanwhile; once estimates have taken less than
`BRIEF` many times in a row, they are computed in the loop's thread, as handing them over takes longer. A stream that
breaks is opened again with full-jitter back-off (Brooker 2015, AWS Architecture Blog), for ever unless a number of
attempts is given; an answer that could not be sent is kept, and sent when it is asked for again.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import grpc.aio
import torch

from fedsample.errors import ConfigError, DataError, FedSampleError, RunDirectoryError
from fedsample.fleets.compute_thread import ComputingThread
from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.framing.frames import Assembler, Message, frames
from fedsample.fleets.grpc.framing.headers import Damaged
from fedsample.fleets.grpc.framing.probe import DIRECT, SOFTWARE
from fedsample.fleets.grpc.framing.version import PROTOCOL, SERVICE
from fedsample.fleets.grpc.framing.zero_copy import Piece, server_frame, written
from fedsample.protocol import TRAIN

if TYPE_CHECKING:
    from fedsample.clients.message_handler import Trace
    from fedsample.fleets.grpc.device.replica import Standing

LIMIT = 1 << 33  # largest size of a request's arrays in bytes
BRIEF, STEADY = 5e-3, 32  # an estimate shorter than so many seconds, so often in a row, is not handed over
FIRST, LONGEST = 0.5, 30.0  # largest back-off in seconds, after the first failure and after many
_HINT = 8  # consecutive failures to connect after which the user is told how to find the cause
_GRACE = 0.5  # seconds for a running computation to end when the device stops
_LEAVE = 2.0  # seconds for the server to read why a device leaves
_OPTIONS = [
    *DIRECT,
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


_NOWHERE = re.compile(r"last error: \w+: \S+ (?:Failed to connect to remote host: )?(.{1,200})")
_BROKEN = (grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError, Damaged, OSError)


class Refused(FedSampleError):
    """The server refuses this device for good."""


class Answering(Protocol):
    """A device's part of one run.

    Attributes:
        trace: the stage that the last request has reached.
        round: the round of the last request that was answered.
    """

    trace: Trace
    round: int

    @property
    def standing(self) -> Standing:
        """What the server must know to continue with this device."""
        ...

    def answer(self, message: Message) -> Message | None:
        """Return the answer to a request; None: the request is no longer wanted."""
        ...


@dataclass
class Watching:
    """The state that a device displays.

    Attributes:
        state: a short description of the state.
        round: the last round that was answered.
        answers: number of answers.
        connections: number of connections.
        received: bytes of frames received.
        sent: bytes of frames sent.
        latencies: seconds of computing of the last answers.
        error: the last error.
        erred: when it happened.
        until: when the next attempt to connect is due.
        farewell: why the server left; cleared when it is back.
        changed: called when the state changes.
        say: prints a message for the user.
    """

    server: str = ""
    client: int = -1
    clients: int = 0
    state: str = "starting"
    round: int = 0
    answers: int = 0
    connections: int = 0
    received: int = 0
    sent: int = 0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    error: str = ""
    erred: float = 0.0
    until: float = 0.0
    farewell: str = ""
    changed: Callable[[], None] = lambda: None
    say: Callable[[str], None] = lambda text: None

    def to(self, state: str) -> None:
        """Change the state."""
        if state != self.state:
            self.state = state
            self.changed()

    def fail(self, reason: str) -> None:
        """Record an error."""
        self.error, self.erred = reason, time.monotonic()


class Connection:
    """One device of a fleet, until the run ends.

    Args:
        target: host:port.
        credentials: the device's; None: plaintext.
        claimed: the client's index, for plaintext connections without a certificate.
        found: makes the device's part of a run from the server's Welcome; called in the computing thread.
        attempts: consecutive failures to connect after which it gives up; None: never.
        watching: the state to display; None: nobody watches.
        doctor: the command that examines the connection to the server.
    """

    def __init__(
        self,
        target: str,
        credentials: grpc.ChannelCredentials | None,
        claimed: int,
        found: Callable[[pb.Welcome], Answering],
        *,
        attempts: int | None = None,
        watching: Watching | None = None,
        doctor: str = "",
    ) -> None:
        self.target, self.claimed, self.attempts = target, claimed, attempts
        self.watching = watching or Watching(target)
        self._advice = f". `{doctor or f'fedsample doctor net {target}'}` names the step that fails"
        self._credentials, self._found = credentials, found
        self._instance = secrets.token_bytes(16)
        self._resident: tuple[bytes, asyncio.Future[Answering]] | None = None  # the run, and this device's part of it
        self._writing = asyncio.Lock()
        self._pool = ComputingThread("compute")
        self._busy = False
        self._brief = 0  # estimates in a row that took less than `BRIEF`
        self._threads = 1  # the number of threads that they were computed with

    async def attend(self) -> str:
        """Serve until the run has ended -> the server's farewell.

        Raises:
            Refused: if the server refuses this device.
            ConfigError, DataError, RunDirectoryError: if the run's configuration, this device's data or its folder
                cannot be used.
            FedSampleError: after too many attempts.
        """
        failures = 0
        while True:
            welcomed = self.watching.connections
            try:
                farewell = await self._visit()
                if farewell is not None:
                    return farewell
                reason = "the stream ended"
            except _BROKEN as error:
                reason = _reason(error)
            failures = 0 if self.watching.connections > welcomed else failures + 1
            if self.attempts is not None and failures >= self.attempts:
                raise FedSampleError(
                    f"{self.target} could not be reached in {failures} attempts; the last: {reason}{self._advice}"
                )
            self.watching.fail(reason + (self._advice if failures >= _HINT else ""))
            pause = secrets.SystemRandom().uniform(0, min(LONGEST, FIRST * 2 ** min(failures, 16)))
            self.watching.until = time.monotonic() + pause
            self.watching.to("waiting to connect again")
            await asyncio.sleep(pause)

    def close(self) -> None:
        """End the computing thread, even during a computation: the process ends even if a model or an app hangs."""
        self._pool.leave(_GRACE)

    async def _visit(self) -> str | None:
        """Run one stream, from Hello to its end; None: it broke, and should be opened again."""
        self.watching.to("connecting")
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(self.target, options=_OPTIONS)
        else:
            channel = grpc.aio.secure_channel(self.target, self._credentials, options=_OPTIONS)
        async with channel:
            connect = channel.stream_stream(
                f"/{SERVICE}/Connect",
                request_serializer=written,
                response_deserializer=server_frame,
            )
            call = connect()
            try:
                hello = pb.Hello(
                    protocol=PROTOCOL,
                    software=SOFTWARE,
                    instance=self._instance,
                    client=max(0, self.claimed),
                )
                await call.write(pb.DeviceFrame(hello=hello))
                return await self._converse(call)
            finally:
                call.cancel()

    async def _converse(self, call: Any) -> str | None:
        """Listen and answer, until either side ends the stream."""
        self._writing = asyncio.Lock()
        requests: asyncio.Queue[Message] = asyncio.Queue()
        welcome: asyncio.Future[pb.Welcome] = asyncio.get_running_loop().create_future()
        listening = asyncio.create_task(self._listen(call, requests, welcome))
        working = asyncio.create_task(self._work(call, requests, welcome))
        try:
            await asyncio.wait({listening, working}, return_when=asyncio.FIRST_COMPLETED)
            if self._unfit():
                await asyncio.wait({listening}, timeout=_LEAVE)  # the server closes when it has read why
                await working
            over = listening if listening.done() else working
            return None if over.cancelled() else over.result()  # gRPC cancels the reader when the other side has ended
        finally:
            for task in (listening, working):
                task.cancel()
            await asyncio.gather(listening, working, return_exceptions=True)

    def _unfit(self) -> bool:
        """Whether this device has found that it cannot take part."""
        found = None if self._resident is None else self._resident[1]
        return found is not None and found.done() and not found.cancelled() and found.exception() is not None

    async def _listen(
        self, call: Any, requests: asyncio.Queue[Message], welcome: asyncio.Future[pb.Welcome]
    ) -> str | None:
        """Receive frames, until the stream ends or the server says farewell."""
        assembler = Assembler(LIMIT)
        while True:
            frame = await call.read()
            if isinstance(frame, Piece):
                self.watching.received += frame.size
                if assembler.expected is None:
                    assembler.begin(frame)
                message = assembler.add(frame)
                if message is not None:
                    requests.put_nowait(message)
                continue
            if not isinstance(frame, pb.ServerFrame):
                await _status(call)
                return None
            self.watching.received += frame.ByteSize()
            kind = frame.WhichOneof("frame")
            if kind == "welcome" and not welcome.done():
                welcome.set_result(frame.welcome)
            elif kind == "ping":
                busy = self._busy or not requests.empty()
                await self._send(call, pb.DeviceFrame(pong=pb.Pong(number=frame.ping.number, busy=busy)))
            elif kind == "refusal":
                if not frame.refusal.retry:
                    raise Refused(f"{self.target} refuses this device: {frame.refusal.reason}")
                raise Damaged(frame.refusal.reason)
            elif kind == "farewell":
                self.watching.farewell = str(frame.farewell.reason)
                return self.watching.farewell if frame.farewell.finished else None

    async def _enter(self, call: Any, welcome: pb.Welcome) -> Answering:
        """Join the server's run."""
        if welcome.protocol != PROTOCOL:
            raise Refused(f"{self.target} speaks protocol {welcome.protocol}, this device {PROTOCOL}: install the same")
        watching = self.watching
        watching.client, watching.clients = welcome.client, welcome.clients
        watching.connections, watching.farewell = watching.connections + 1, ""
        if self._resident is None or self._resident[0] != welcome.run:
            self._resident = welcome.run, asyncio.ensure_future(self._compute(self._found, welcome))
            self._resident[1].add_done_callback(lambda done: done.cancelled() or done.exception())
        watching.to("reading the data")
        try:  # it is read once, even if the stream breaks meanwhile
            replica = await asyncio.shield(self._resident[1])
        except (ConfigError, DataError, RunDirectoryError) as error:
            await self._send(call, pb.DeviceFrame(failure=pb.Failure(stage="data", detail=str(error), round=-1)))
            await call.done_writing()
            raise
        standing = replica.standing
        ready = pb.Ready(
            run=welcome.run, term=standing.term, live=standing.live, snapshots=standing.snapshots,
            schema=standing.schema,
        )  # fmt: skip
        await self._send(call, pb.DeviceFrame(ready=ready))
        watching.to("connected")
        return replica

    async def _work(
        self, call: Any, requests: asyncio.Queue[Message], welcome: asyncio.Future[pb.Welcome]
    ) -> str | None:
        """Answer requests one by one until the stream ends; only the latest request is still wanted."""
        replica, watching = await self._enter(call, await welcome), self.watching
        while True:
            self._busy = False
            message = await requests.get()
            while not requests.empty():
                message = max(message, requests.get_nowait(), key=lambda each: (each.name.term, each.name.sequence))
            self._busy, began = True, time.monotonic()
            watching.to("computing")
            try:
                answer = await self._answered(replica, message)
            except Exception as error:
                trace = replica.trace
                reason = f"{type(error).__name__}: {error}"
                plain = isinstance(error, RunDirectoryError)  # a full disk is no defect of the program: no traceback
                failure = pb.Failure(
                    digest=message.name.digest, stage=trace.stage, round=trace.round,
                    detail=reason if plain else traceback.format_exc(),
                )  # fmt: skip
                watching.fail(reason)
                watching.say(f"failed in round {trace.round} ({trace.stage}): {reason}")  # a log has no table
                await self._send(call, pb.DeviceFrame(failure=failure))
                continue
            watching.latencies.append(time.monotonic() - began)
            if answer is not None:
                for frame in frames(answer):
                    await self._send(call, frame)
                watching.round, watching.answers = replica.round, watching.answers + 1
            watching.to("connected")

    async def _answered(self, replica: Answering, message: Message) -> Message | None:
        """Compute the answer to a request, and track how long estimates take."""
        if message.kind != TRAIN:
            return (await self._compute(_timed, replica.answer, message))[0]  # type: ignore[no-any-return]
        if self._brief < STEADY:
            timed: tuple[Message | None, float, int] = await self._compute(_timed, replica.answer, message)
            answer, spent, self._threads = timed
        else:
            torch.set_num_threads(self._threads)  # the setting is per thread, and sums depend on it
            began = time.perf_counter()
            answer = replica.answer(message)
            spent = time.perf_counter() - began
            await asyncio.sleep(0)  # the next device of this process computes first, its code and data still at hand
        self._brief = self._brief + 1 if spent < BRIEF else 0
        return answer

    async def _send(self, call: Any, frame: bytes | pb.DeviceFrame) -> None:
        self.watching.sent += len(frame) if isinstance(frame, bytes) else frame.ByteSize()
        async with self._writing:  # pongs are sent between the pieces of an answer
            await call.write(frame)

    async def _compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


def _timed(function: Callable[[Message], Message | None], message: Message) -> tuple[Message | None, float, int]:
    """Call a function -> its result, the seconds that it took in this thread, and PyTorch's number of threads."""
    began = time.thread_time()
    result = function(message)
    return result, time.thread_time() - began, torch.get_num_threads()


async def _status(call: Any) -> None:
    """Raise the error that ended a stream, if there was one."""
    code = await call.code()
    if code not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
        raise Damaged(f"{code.name.lower()}: {await call.details()}")


def _reason(error: BaseException) -> str:
    """Say in one line why a stream ended."""
    if isinstance(error, grpc.aio.AioRpcError):
        text = " ".join(str(error.details() or "").split())
        if (found := _NOWHERE.search(text)) is not None:
            return f"cannot connect: {found.group(1)}"
        return f"{error.code().name.lower()}: {text[:200]}"
    return str(error) or type(error).__name__


def prepare_threads(count: int) -> None:
    """Set the computing thread's number of threads, and let the numerical library choose its code paths in it alone."""
    from fedsample.numerics.math_library import choose_paths

    torch.set_num_threads(1)
    choose_paths()
    torch.set_num_threads(count)
