"""A device's end of the stream against a server by hand."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from fedsample.clients.message_handler import Trace
from fedsample.errors import ConfigError, DataError, FedSampleError, RunDirectoryError
from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.device import connection as attends
from fedsample.fleets.grpc.device.connection import Connection, Refused, Watching
from fedsample.fleets.grpc.device.replica import Standing
from fedsample.fleets.grpc.framing.frames import PIECE, Assembler, Message, Name, pieces
from fedsample.fleets.grpc.framing.version import PROTOCOL, SERVICE
from fedsample.protocol.wire import Array, Parcel

RUN = b"r" * 16
WELCOME = pb.Welcome(protocol=PROTOCOL, run=RUN, clients=1)


class Half:
    """In place of a `Replica`: takes its time, and answers with as many bytes as the round says MiB."""

    def __init__(self) -> None:
        self.trace, self.round = Trace(0), 0
        self.go = threading.Event()
        self.go.set()
        self.heard: list[int] = []

    standing = Standing(3, True, [20, 10], "{}")

    def answer(self, message: Message) -> Message | None:
        self.heard.append(message.name.sequence)
        assert self.go.wait(10)
        if message.kind == "bad":
            raise ValueError("no good")
        self.round = message.name.round
        data = bytes(message.name.round * PIECE + 1)
        return Message(message.name, "x", Parcel({}, {"x": Array("int8", (len(data),), "s", data)}))


class Line:
    """One stream, from the server's side."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.pongs: list[pb.Pong] = []
        self.frames = 0

    async def write(self, **frame: Any) -> None:
        await self._context.write(pb.ServerFrame(**frame))

    async def read(self, kind: str) -> Any:
        while isinstance(frame := await self._context.read(), pb.DeviceFrame):
            self.frames += 1
            found = frame.WhichOneof("frame")
            if found == "pong":
                self.pongs.append(frame.pong)
            if found == kind:
                return getattr(frame, kind)
        pytest.fail(f"the stream ended before a {kind}")

    async def over(self, *, finished: bool = True) -> None:
        """The last word; then the device goes."""
        await self.write(farewell=pb.Farewell(reason="the end", finished=finished))
        while isinstance(await self._context.read(), pb.DeviceFrame):
            pass

    async def enter(self) -> Any:
        await self.read("hello")
        await self.write(welcome=WELCOME)
        return await self.read("ready")

    async def ask(self, sequence: int, round: int = 0, kind: str = "train") -> None:
        for piece in pieces(Message(Name(RUN, 3, round, 0, b"d" * 16, sequence), kind, Parcel({}))):
            await self.write(piece=piece)

    async def answer(self) -> Message:
        assembler = Assembler(1 << 30)
        while True:
            piece = await self.read("piece")
            if assembler.expected is None:
                assembler.begin(piece)
            if (message := assembler.add(piece)) is not None:
                return message


Script = Callable[[Line], Awaitable[None]]


def meet(
    *scripts: Script,
    half: Half | None = None,
    found: Callable[[pb.Welcome], Any] | None = None,
    attempts: int = 5,
    watching: Watching | None = None,
) -> str:
    """Let a device attend streams that go one after the other as scripts say -> how it ended."""
    mine = half or Half()

    async def go() -> str:
        left, failures = list(scripts), []

        async def connect(_: Any, context: Any) -> None:
            try:
                if left:
                    await left.pop(0)(Line(context))
            except (Exception, pytest.fail.Exception) as error:
                failures.append(error)

        server = grpc.aio.server()
        handlers = {
            "Connect": grpc.stream_stream_rpc_method_handler(
                connect, pb.DeviceFrame.FromString, pb.ServerFrame.SerializeToString
            )
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        device = Connection(
            f"127.0.0.1:{port}", None, 0, found or (lambda _: mine), attempts=attempts, watching=watching
        )
        try:
            return await asyncio.wait_for(device.attend(), 20)
        finally:
            device.close()
            await server.stop(0)
            for failure in failures:
                raise failure

    return asyncio.run(go())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attends, "FIRST", 0.01)
    return


async def farewell(line: Line) -> None:
    await line.enter()
    await line.over()


def test_it_says_what_it_holds_and_ends_with_the_run() -> None:
    async def script(line: Line) -> None:
        ready = await line.enter()
        assert (ready.run, ready.term, ready.live, list(ready.snapshots)) == (RUN, 3, True, [20, 10])
        await line.ask(1, 1)
        assert (await line.answer()).size == PIECE + 1
        await line.over()

    assert meet(script) == "the end"


def test_pings_are_answered_while_it_computes_and_between_pieces_of_an_answer() -> None:
    half = Half()

    async def script(line: Line) -> None:
        await line.enter()
        half.go.clear()
        await line.ask(1, 24)
        await line.write(ping=pb.Ping(number=7))
        assert (await line.read("pong")) == pb.Pong(number=7, busy=True)
        half.go.set()
        for number in range(200):
            await line.write(ping=pb.Ping(number=number))
        answer = await line.answer()
        assert answer.size == 24 * PIECE + 1
        assert all(pong.busy for pong in line.pongs)  # or the server would ask again
        assert line.pongs
        await line.over()

    assert meet(script, half=half) == "the end"


def test_only_the_last_request_is_still_wanted() -> None:
    half = Half()

    async def script(line: Line) -> None:
        await line.enter()
        half.go.clear()
        await line.ask(1)
        while half.heard != [1]:
            await asyncio.sleep(0.005)
        for sequence in (2, 5, 3):
            await line.ask(sequence)
        await line.write(ping=pb.Ping())
        await line.read("pong")  # all of them have arrived
        half.go.set()
        assert [(await line.answer()).name.sequence for _ in range(2)] == [1, 5]
        assert half.heard == [1, 5]
        await line.over()

    assert meet(script, half=half) == "the end"


def test_a_failure_is_reported_and_the_next_request_answered() -> None:
    async def script(line: Line) -> None:
        await line.enter()
        await line.ask(1, kind="bad")
        failure = await line.read("failure")
        assert failure.digest == b"d" * 16
        assert "ValueError: no good" in failure.detail
        await line.ask(2)
        await line.answer()
        await line.over()

    watching, said = Watching("server"), list[str]()
    watching.say = said.append
    assert meet(script, watching=watching) == "the end"
    assert len(said) == 1  # whoever reads the device's own log learns it too
    assert said[0].endswith("ValueError: no good")


def test_data_are_read_once_whatever_happens_to_the_stream_meanwhile() -> None:
    calls, read = [], threading.Event()

    def found(welcome: pb.Welcome) -> Half:
        calls.append(welcome.run)
        assert read.wait(10)
        return Half()

    async def breaks(line: Line) -> None:
        await line.read("hello")
        await line.write(welcome=WELCOME)
        await line.write(ping=pb.Ping(number=2))
        assert not (await line.read("pong")).busy  # reading takes long, and the server wants to know

    async def goes_on(line: Line) -> None:
        await line.read("hello")
        await line.write(welcome=WELCOME)
        read.set()
        await line.read("ready")
        await line.over()

    assert meet(breaks, breaks, goes_on, found=found) == "the end"
    assert calls == [RUN]


async def _drop(line: Line) -> None:
    await line.read("hello")


async def _damaged(line: Line) -> None:
    await line.enter()
    await line.write(piece=pb.Piece(head=b"x", crc=1))
    await asyncio.sleep(0.05)


async def _stops(line: Line) -> None:
    await line.enter()
    await line.over(finished=False)


async def _refuses_for_now(line: Line) -> None:
    await line.read("hello")  # as a server does: a stream that ends while its first frame is written ends in an error
    await line.write(refusal=pb.Refusal(reason="later", retry=True))


@pytest.mark.parametrize("first", [_drop, _damaged, _stops, _refuses_for_now])
def test_it_comes_back_after(first: Script) -> None:
    assert meet(first, farewell) == "the end"


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL])
def test_it_comes_back_after_any_status(code: grpc.StatusCode) -> None:
    async def ends(line: Line) -> None:
        await line.enter()
        line._context.set_code(code)
        line._context.set_details("gone")

    assert meet(ends, farewell) == "the end"


def test_it_gives_up_after_as_many_failures_in_a_row_as_it_is_told() -> None:
    async def good(line: Line) -> None:
        await line.enter()

    with pytest.raises(
        FedSampleError, match=r"could not be reached in 2 attempts; the last: later\. `fedsample doctor net"
    ):
        meet(_refuses_for_now, good, good, good, _refuses_for_now, _refuses_for_now, farewell, attempts=2)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ({"refusal": pb.Refusal(reason="nobody knows you")}, "refuses this device: nobody knows you"),
        ({"welcome": pb.Welcome(protocol=PROTOCOL + 1, run=RUN)}, "speaks protocol"),
    ],
)
def test_it_ends_where_it_will_never_be_wanted(frame: dict[str, Any], words: str) -> None:
    async def script(line: Line) -> None:
        await line.read("hello")
        await line.write(**frame)
        await asyncio.sleep(0.2)

    began = time.monotonic()
    with pytest.raises(Refused, match=words):
        meet(script, farewell)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("error", [ConfigError, DataError, RunDirectoryError])
def test_why_it_cannot_take_part_is_said_to_the_server(error: type[FedSampleError]) -> None:
    told: list[pb.Failure] = []

    def found(welcome: pb.Welcome) -> Any:
        raise error("the disk is read-only")

    async def script(line: Line) -> None:
        await line.read("hello")
        await line.write(welcome=WELCOME)
        told.append(await line.read("failure"))

    with pytest.raises(error, match="the disk is read-only"):
        meet(script, farewell, found=found)
    assert [(each.detail, each.digest) for each in told] == [("the disk is read-only", b"")]


def test_data_that_cannot_be_used_end_it() -> None:
    def found(welcome: pb.Welcome) -> Any:
        raise FedSampleError("no such file")

    async def script(line: Line) -> None:
        await line.read("hello")
        await line.write(welcome=WELCOME)
        await asyncio.sleep(0.2)

    with pytest.raises(FedSampleError, match="no such file"):
        meet(script, farewell, found=found)
