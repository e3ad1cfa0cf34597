"""The server's end of the streams against devices that do what they should not, at the worst moment."""

from __future__ import annotations

import asyncio
import itertools
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from fedsample.errors import ClientError
from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.framing.frames import PIECE, Assembler, Message, Name, pieces
from fedsample.fleets.grpc.framing.version import PROTOCOL, SERVICE
from fedsample.fleets.grpc.server import backpressure, streams
from fedsample.fleets.grpc.server import hub as hubs
from fedsample.fleets.grpc.server.client_record import Batch
from fedsample.fleets.grpc.server.dispatcher import Dispatcher
from fedsample.fleets.grpc.server.fleet import gather
from fedsample.fleets.grpc.server.hub import Hub
from fedsample.fleets.grpc.server.stream import Stream
from fedsample.fleets.grpc.server.streams import Identified, Invitation
from fedsample.protocol.recovery import Abandoned
from fedsample.protocol.wire import Array, Parcel, header

RUN = b"r" * 16
HELD = Parcel(header(held=True))
_PATIENCE = 20.0  # seconds after which a wait has failed


def octets(size: int) -> Parcel:
    return Parcel(header(), {"x": Array("int8", (size,), "fedsample.dense.v1", bytes(size))})


class Stub:
    """A device by hand: every frame is sent and read by the test."""

    def __init__(self, port: int, client: int, instance: bytes = b"", protocol: int = PROTOCOL) -> None:
        self.client = client
        self._out: queue.Queue[pb.DeviceFrame | None] = queue.Queue()
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])
        connect = self._channel.stream_stream(
            f"/{SERVICE}/Connect", pb.DeviceFrame.SerializeToString, pb.ServerFrame.FromString
        )
        self.frames = connect(iter(self._out.get, None), timeout=_PATIENCE)
        instance = instance or f"device {client}".encode()
        self.send(hello=pb.Hello(protocol=protocol, instance=instance, client=client))

    def send(self, **frame: Any) -> None:
        self._out.put(pb.DeviceFrame(**frame))

    def read(self, kind: str) -> Any:
        """The next frame of a kind; pings are answered on the way."""
        for frame in self.frames:
            found = frame.WhichOneof("frame")
            if found == kind:
                return getattr(frame, kind)
            if found == "ping":
                self.send(pong=pb.Pong(number=frame.ping.number))
        pytest.fail(f"the stream ended before a {kind}")

    def ready(self, *, term: int = 0, live: bool = False, run: bytes = RUN) -> Stub:
        self.read("welcome")
        self.send(ready=pb.Ready(run=run, term=term, live=live, schema="{}"))
        return self

    def request(self) -> Message:
        assembler = Assembler(1 << 30)
        while True:
            piece = self.read("piece")
            if assembler.expected is None:
                assembler.begin(piece)
            if (message := assembler.add(piece)) is not None:
                return message

    def answer(self, message: Message, parcel: Parcel = HELD) -> None:
        for piece in pieces(Message(message.name, message.kind, parcel)):
            self.send(piece=piece)

    def obey(self, *kinds: str) -> list[Message]:
        """Answer the next requests, which must be of these kinds."""
        found = []
        for kind in kinds:
            found.append(self.request())
            assert found[-1].kind == kind
            self.answer(found[-1])
        return found

    def close(self) -> None:
        self._out.put(None)
        self.frames.cancel()
        self._channel.close()


class Chain:
    """The thread that asks."""

    def __init__(self, devices: int) -> None:
        self.hub = Hub(Invitation(RUN, b"n" * 16, "", devices), "127.0.0.1:0", None, lambda _, who: Identified(who))
        self.said: list[str] = []
        self.hub.say = self.said.append
        self.hub.start()
        self.dispatcher = Dispatcher(self.hub)
        self.stubs: list[Stub] = []
        self._pool = ThreadPoolExecutor(1)

    def stub(self, client: int, **options: Any) -> Stub:
        self.stubs.append(Stub(self.hub.port, client, **options))
        return self.stubs[-1]

    def gathered(self) -> list[Stub]:
        stubs = [self.stub(client).ready() for client in range(len(self.hub.records))]
        gather(self.hub)
        return stubs

    def do(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Future[Any]:
        return self._pool.submit(work, *arguments, **options)

    def close(self) -> None:
        self.hub.stopping = lambda: True
        for stub in self.stubs:
            stub.close()
        self.hub.stop("the test is over", finished=True)
        self._pool.shutdown()


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Chain]]:
    monkeypatch.setattr(hubs, "COMPLAIN", 0.5)
    made: list[Chain] = []

    def make(devices: int) -> Chain:
        made.append(Chain(devices))
        return made[-1]

    yield make
    for each in made:
        each.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def get(future: Future[Any]) -> Any:
    return future.result(_PATIENCE)


# --- newcomers --------------------------------------------------------------------------------------------------------


def test_a_device_that_dies_after_its_answer_is_told_again(chain: Callable[[int], Chain]) -> None:
    server = chain(2)
    one, two = server.gathered()
    told = server.do(server.dispatcher.tell, "fit", HELD)
    one.obey("fit")
    two.obey("fit")
    get(told)
    told = server.do(server.dispatcher.tell, "metric", HELD)
    one.obey("metric")
    until(lambda: server.hub.records[0].asked is None)
    one.close()
    again = server.stub(0, instance=b"another").ready()
    again.obey("fit", "metric")
    two.obey("metric")
    get(told)
    asked = server.do(server.dispatcher.broadcast, "train", HELD, 1)
    again.obey("train")
    two.obey("train")
    get(asked)


def test_a_device_that_is_not_yet_prepared_is_not_asked_when_its_stream_breaks(chain: Callable[[int], Chain]) -> None:
    server = chain(1)
    (one,) = server.gathered()
    for kind in ("fit", "metric"):
        told = server.do(server.dispatcher.tell, kind, HELD)
        one.obey(kind)
        get(told)
    one.close()
    asked = server.do(server.dispatcher.broadcast, "train", HELD, 1)
    half = server.stub(0, instance=b"another").ready()
    half.obey("fit")
    half.request()
    half.close()  # the same process comes back: it says that it is live, and in this term
    back = server.stub(0, instance=b"another").ready(term=server.hub.term, live=True)
    told_again = back.obey("fit", "metric", "train")
    numbers = [each.name.sequence for each in told_again]
    assert numbers == sorted(set(numbers))
    get(asked)


def fitted(chain: Callable[[int], Chain]) -> tuple[Chain, Stub]:
    """A server with one device, which was told the first thing."""
    server, (one,) = all_fitted(chain, 1)
    return server, one


def all_fitted(chain: Callable[[int], Chain], devices: int) -> tuple[Chain, list[Stub]]:
    """A server with devices, which were told the first thing."""
    server = chain(devices)
    stubs = server.gathered()
    told = server.do(server.dispatcher.tell, "fit", HELD)
    for stub in stubs:
        stub.obey("fit")
    get(told)
    return server, stubs


def test_what_is_asked_after_a_newcomer_was_told_has_a_higher_number(chain: Callable[[int], Chain]) -> None:
    """Or a device that has heard the question, and is told what comes before it, would take that for older."""
    server, one = fitted(chain)
    asked = server.do(server.dispatcher.tell, "spread", HELD)
    first = one.request()
    one.close()  # its answer is lost; the process lives on, but cannot be live before it has a scale
    back = server.stub(0).ready(term=server.hub.term)
    later = back.obey("fit", "spread", "spread")
    assert first.name.sequence < later[0].name.sequence < later[1].name.sequence < later[2].name.sequence
    assert later[2].name.digest == first.name.digest
    get(asked)


def test_the_same_process_may_come_back_while_it_is_being_prepared(chain: Callable[[int], Chain]) -> None:
    server, one = fitted(chain)
    one.close()
    asked = server.do(server.dispatcher.broadcast, "train", HELD, 1)
    first = server.stub(0, instance=b"another").ready()
    assert first.request().kind == "fit"
    second = server.stub(0, instance=b"another").ready()  # the first stream is still open
    second.obey("fit", "train")
    get(asked)


def test_two_newcomers_are_prepared_one_after_the_other(chain: Callable[[int], Chain]) -> None:
    server, stubs = all_fitted(chain, 2)
    for stub in stubs:
        stub.close()
    asked = server.do(server.dispatcher.broadcast, "train", HELD, 1)
    one = server.stub(0, instance=b"new 0").ready()
    question = one.request()
    two = server.stub(1, instance=b"new 1").ready()
    one.close()  # dies while it is being prepared
    two.obey("fit", "train")
    last = server.stub(0, instance=b"newer 0").ready()
    last.obey("fit", "train")
    get(asked)
    assert question.kind == "fit"


@pytest.mark.parametrize("steps", range(8))
def test_a_device_whose_call_is_cancelled_just_after_it_closed_its_end_has_left(steps: int) -> None:
    hub = Hub(Invitation(RUN, b"n" * 16, "", 1), "127.0.0.1:0", None, lambda _, who: Identified(who))

    async def visit() -> None:
        frames = iter([pb.DeviceFrame(hello=pb.Hello(protocol=PROTOCOL, instance=b"one", client=0)), grpc.aio.EOF])
        closed = asyncio.Event()

        class Call:
            async def read(self) -> Any:
                frame = next(frames)
                if frame is grpc.aio.EOF:
                    closed.set()
                return frame

            async def write(self, frame: Any) -> None: ...

        call = asyncio.create_task(hub.streams.connect(None, Call()))  # type: ignore[arg-type]
        await closed.wait()
        for _ in range(steps):  # of the loop
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait({call})

    hub._loop.close()  # of a hub that was never started
    asyncio.run(visit())
    assert hub.records[0].connections == 1
    assert hub.records[0].stream is None


def test_a_newcomer_that_cannot_take_part_is_sent_away_and_the_run_waits(chain: Callable[[int], Chain]) -> None:
    server, one = fitted(chain)
    one.close()
    asked = server.do(server.dispatcher.broadcast, "train", HELD, 1)
    wrong = server.stub(0, instance=b"wrong").ready()
    question = wrong.request()
    wrong.send(failure=pb.Failure(digest=question.name.digest, stage="data", detail="Traceback\nDataError: no column"))
    refusal = wrong.read("refusal")
    assert (refusal.reason, refusal.retry) == ("DataError: no column", False)
    right = server.stub(0, instance=b"right").ready()
    right.obey("fit", "train")
    get(asked)
    assert "client 0 is back, but cannot take part: DataError: no column" in server.said


def test_a_device_that_has_heard_of_a_higher_term_is_asked_in_a_higher_one(chain: Callable[[int], Chain]) -> None:
    server = chain(2)
    one, two = server.gathered()
    one.close()
    asked = server.do(server.dispatcher.broadcast, "train", HELD, 1)
    old = server.stub(0, instance=b"another").ready(term=77, live=True)
    assert old.obey("train")[0].name.term > 77
    two.obey("train")
    get(asked)


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_rival_is_refused_while_the_older_answers(
    chain: Callable[[int], Chain], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_REPLACE", 0.5)
    server = chain(1)
    (one,) = server.gathered()
    rival = server.stub(0, instance=b"rival")
    assert one.read("ping").number == 1
    one.send(pong=pb.Pong(number=1))
    refusal = rival.read("refusal")
    assert refusal.retry
    assert "is connected already, from another process that answers" in refusal.reason
    assert "another process that says it is this device was turned away" in server.hub.records[0].error
    asked = server.do(server.dispatcher.broadcast, "train", HELD, 1)
    one.obey("train")
    get(asked)
    asked = server.do(server.dispatcher.broadcast, "train", HELD, 2)
    newer = server.stub(0, instance=b"newer").ready()  # the older does not answer its ping: its place is taken
    newer.obey("train")
    get(asked)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ({"hello": pb.Hello(protocol=PROTOCOL + 1, client=0)}, "speaks protocol"),
        ({"hello": pb.Hello(protocol=PROTOCOL, client=1)}, "client 1 is none of the run's 1"),
        ({"ready": pb.Ready()}, "expected a Hello"),
    ],
)
def test_who_does_not_belong_here_is_told_why(
    chain: Callable[[int], Chain], frame: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = chain(1)
    real = Stub.send

    def first(self: Stub, **_: Any) -> None:
        monkeypatch.setattr(Stub, "send", real)
        real(self, **frame)

    monkeypatch.setattr(Stub, "send", first)
    refusal = server.stub(0).read("refusal")
    assert words in refusal.reason
    assert not refusal.retry


def test_nothing_that_a_device_sends_stops_the_server(chain: Callable[[int], Chain]) -> None:
    server = chain(1)
    (one,) = server.gathered()
    asked = server.do(server.dispatcher.broadcast, "train", HELD, 1)
    question = one.request()
    name = question.name
    hostile: list[dict[str, Any]] = [
        {"ready": pb.Ready(run=RUN, term=(1 << 64) - 1)},
        {"piece": pb.Piece(head=b"x", crc=3)},
        {"piece": next(pieces(Message(name, "train", octets(PIECE + 1))))},  # more than it may have
    ]
    for frame in hostile:
        one.send(**frame)
        with pytest.raises(pytest.fail.Exception, match="the stream ended"):
            one.read("nothing")
        one = server.stub(0).ready(term=server.hub.term, live=True)
        assert one.request().name == name
    harmless: list[dict[str, Any]] = [
        {"pong": pb.Pong(number=9)},
        {"failure": pb.Failure(digest=b"other", detail="x")},
        {"ready": pb.Ready(run=b"other", snapshots=list(range(1000)))},
        {"hello": pb.Hello()},
    ]
    for frame in harmless:
        one.send(**frame)
    for other in (
        name._replace(round=5),
        name._replace(sequence=1 << 50),
        name._replace(term=0),
        name._replace(run=b""),
    ):
        one.answer(Message(other, "train", HELD), octets(3))
    one.answer(question)
    one.answer(question, octets(3))  # again
    assert [reply.arrays for reply in get(asked)] == [{}]
    asked = server.do(server.dispatcher.broadcast, "train", HELD, 2)
    one.obey("train")
    assert [reply.arrays for reply in get(asked)] == [{}]
    assert server.hub.records[0].answers == 2  # five others were to no request


@pytest.mark.parametrize(
    ("detail", "last"), [("", "failed"), (" \n ", "failed"), ("a\nValueError: b\n", "ValueError: b")]
)
def test_a_failure_is_the_runs_whatever_it_says(chain: Callable[[int], Chain], detail: str, last: str) -> None:
    server = chain(1)
    (one,) = server.gathered()
    asked = server.do(server.dispatcher.broadcast, "train", HELD, 3)
    digest = one.request().name.digest
    one.send(failure=pb.Failure(digest=digest, stage="gradient", detail=detail, round=3))
    with pytest.raises(ClientError, match="client 0 failed in round 3 while computing its gradient"):
        get(asked)
    assert server.hub.records[0].error == last


def test_the_last_word_is_read_before_the_call_is_over(chain: Callable[[int], Chain]) -> None:
    server = chain(2)
    one, two = server.gathered()
    stopped = server.do(server.hub.stop, "the end", finished=True)
    two.close()
    for number in range(50):
        one.send(pong=pb.Pong(number=number))  # whatever is still on its way
    assert one.read("farewell").finished
    one.send(pong=pb.Pong())
    time.sleep(0.1)
    assert not stopped.done()
    assert one.frames.is_active()
    one.close()
    began = time.monotonic()
    get(stopped)
    assert time.monotonic() - began < 1


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_a_wait_says_what_it_waits_for_and_ends_when_the_run_is_to_stop(chain: Callable[[int], Chain]) -> None:
    server = chain(2)
    one, two = server.gathered()
    asked = server.do(server.dispatcher.broadcast, "train", HELD, 1)
    one.obey("train")
    two.close()
    until(lambda: any(each.startswith("waiting for client 1 (away") for each in server.said))
    server.hub.stopping = lambda: True
    with pytest.raises(Abandoned, match=r"while waiting for client 1 \(away"):
        get(asked)


def test_who_has_lost_a_request_gets_it_again(chain: Callable[[int], Chain]) -> None:
    server = chain(1)
    (one,) = server.gathered()
    asked = server.do(server.dispatcher.broadcast, "train", HELD, 1)
    first = one.request()
    assert one.request() == first  # it has said, to a ping, that it is not busy
    one.answer(first)
    get(asked)


def test_silence_is_counted_from_a_ping(chain: Callable[[int], Chain], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the last word: a device that nobody has asked anything has nothing to say."""
    monkeypatch.setattr(streams, "_PONG", 1.2)
    server = chain(1)
    (one,) = server.gathered()
    time.sleep(1.3)  # idle for longer than a pong may take
    asked = server.do(server.dispatcher.broadcast, "train", HELD, 1)
    assert one.read("ping").number == 2  # the stream is still there
    one.answer(one_request := Message(Name(RUN, 0, 0, 0, b"", 0), "late", HELD))  # any word will do
    assert one_request.kind == "late"
    assert one.read("ping").number == 2
    for frame in one.frames:  # and now no word follows
        assert frame.WhichOneof("frame") == "ping"
    assert "silent for 1.2 s" in server.hub.records[0].error
    back = server.stub(0).ready(term=server.hub.term, live=True)
    back.obey("train")
    get(asked)


def test_an_answer_that_comes_while_it_is_looked_for_is_not_lost() -> None:
    hub = Hub(Invitation(RUN, b"n" * 16, "", 1), "127.0.0.1:0", None, lambda _, who: Identified(who))
    answer = Message(Name(RUN, 1, 1, 0, b"", 1), "train", HELD)
    for moment in range(6):
        batch = Batch([0])
        count = itertools.count()

        def put(batch: Batch = batch, count: Any = count, moment: int = moment) -> None:
            if next(count) == moment:
                batch.put(0, answer, soon=False)

        class Left(set[int]):
            def __contains__(self, item: object, put: Callable[[], None] = put) -> bool:
                put()
                found = set.__contains__(self, item)
                put()
                return found

        class Answers(dict[int, Any]):
            def pop(self, *arguments: Any, put: Callable[[], None] = put) -> Any:  # type: ignore[override]
                put()
                found = dict.pop(self, *arguments)
                put()
                return found

        batch.left, batch.answers = Left([0]), Answers()
        assert hub._wait(0, batch, None, None, None, 1) is answer
    hub._loop.close()


def test_enough_answers_are_enough(chain: Callable[[int], Chain]) -> None:
    server = chain(3)
    stubs = server.gathered()
    for _ in range(8):
        began = time.monotonic()
        asked = server.do(
            lambda: [i for i, _ in server.dispatcher.ask("train", dict.fromkeys(range(3), HELD), 1, 0, quorum=2)]
        )
        for stub in stubs[:2]:
            stub.obey("train")
        assert get(asked) == [0, 1]
    assert time.monotonic() - began < 0.4
    newest = [stubs[2].request() for _ in range(8)][-1]
    asked = server.do(server.dispatcher.broadcast, "snapshot", HELD, 8)
    stubs[2].answer(newest)  # too late
    for stub in stubs:
        stub.obey("snapshot")
    get(asked)


def test_a_device_that_does_not_read_is_not_sent_more_and_more() -> None:
    stream = Stream(b"")
    messages = [Message(Name(RUN, 1, round, 0, b"", round), "train", HELD) for round in range(50)]
    for message in messages:
        stream.send(message)
    assert stream.queue.qsize() == 1
    assert stream.request is messages[-1]


# --- large answers ----------------------------------------------------------------------------------------------------


def test_large_answers_wait_for_room(chain: Callable[[int], Chain], monkeypatch: pytest.MonkeyPatch) -> None:
    """Backpressure for two: the last clients answer first, and the first, whom all wait for, has room all the same."""
    size = 3 * PIECE
    monkeypatch.setattr(backpressure, "STAGE", 2 * size)
    monkeypatch.setattr(streams, "_PONG", 1.0)
    server = chain(5)
    stubs = server.gathered()
    most = 0

    def ask() -> list[int]:
        nonlocal most
        found = []
        for client, _ in server.dispatcher.ask("train", dict.fromkeys(range(5), HELD), 1, size):
            most = max(most, server.hub.streams.room.taken)
            found.append(client)
        return found

    asked = server.do(ask)
    for stub in stubs[:0:-1]:
        stub.answer(stub.request(), octets(size))
    blocked = lambda: sum(seat.stream is not None and seat.stream.blocked for seat in server.hub.records)  # noqa: E731
    until(lambda: blocked() == 2)
    time.sleep(2.5)  # longer than silence may last: who is not read from is not silent
    assert blocked() == 2
    stubs[1].close()
    late = server.stub(1).ready(term=server.hub.term, live=True)
    late.answer(late.request(), octets(size))
    first = server.stub(0).ready(term=server.hub.term, live=True)  # silent in the meantime, and sent away
    first.answer(first.request(), octets(size))
    assert get(asked) == list(range(5))
    assert size <= most <= 3 * size
    until(lambda: server.hub.streams.room.taken == 0)


def test_half_an_answer_gives_its_room_back(chain: Callable[[int], Chain], monkeypatch: pytest.MonkeyPatch) -> None:
    size = 3 * PIECE
    monkeypatch.setattr(backpressure, "STAGE", size)
    server = chain(1)
    (one,) = server.gathered()
    asked = server.do(lambda: list(server.dispatcher.ask("train", {0: HELD}, 1, size)))
    for _ in range(3):
        question = one.request()
        one.send(piece=next(pieces(Message(question.name, "train", octets(size)))))
        until(lambda: server.hub.streams.room.taken == size)
        one.close()
        one = server.stub(0).ready(term=server.hub.term, live=True)
    one.answer(one.request(), octets(size))
    get(asked)
    until(lambda: server.hub.streams.room.taken == 0)


def test_what_a_newcomer_answers_has_room_whatever_waits(
    chain: Callable[[int], Chain], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 3 * PIECE
    monkeypatch.setattr(backpressure, "STAGE", size)
    server, stubs = all_fitted(chain, 4)
    stubs[3].close()
    asked = server.do(lambda: list(server.dispatcher.ask("train", dict.fromkeys(range(4), HELD), 1, size)))
    for stub in stubs[1:3]:
        stub.answer(stub.request(), octets(size))
    until(lambda: server.hub.streams.room.taken == 2 * size)  # all that there is
    new = server.stub(3, instance=b"new").ready()
    new.answer(new.request(), octets(size))
    for stub in (stubs[0], new):
        stub.answer(stub.request(), octets(size))
    assert [client for client, _ in get(asked)] == [0, 1, 2, 3]
    until(lambda: server.hub.streams.room.taken == 0)
