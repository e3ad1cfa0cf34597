"""The server's end of the streams: devices that break them, and answers that are large."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hub_by_hand import HELD, RUN, Chain, Stub, all_fitted, get, until

from fedsample.errors import ClientError
from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.framing.frames import PIECE, Message, pieces
from fedsample.fleets.grpc.framing.version import PROTOCOL
from fedsample.fleets.grpc.server import backpressure, streams
from fedsample.protocol.wire import Array, Parcel, header


def octets(size: int) -> Parcel:
    return Parcel(header(), {"x": Array("int8", (size,), "fedsample.dense.v1", bytes(size))})


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
            most = max(most, server.hub.streams.backpressure.taken)
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
    until(lambda: server.hub.streams.backpressure.taken == 0)


def test_half_an_answer_gives_its_room_back(chain: Callable[[int], Chain], monkeypatch: pytest.MonkeyPatch) -> None:
    size = 3 * PIECE
    monkeypatch.setattr(backpressure, "STAGE", size)
    server = chain(1)
    (one,) = server.gathered()
    asked = server.do(lambda: list(server.dispatcher.ask("train", {0: HELD}, 1, size)))
    for _ in range(3):
        question = one.request()
        one.send(piece=next(pieces(Message(question.name, "train", octets(size)))))
        until(lambda: server.hub.streams.backpressure.taken == size)
        one.close()
        one = server.stub(0).ready(term=server.hub.term, live=True)
    one.answer(one.request(), octets(size))
    get(asked)
    until(lambda: server.hub.streams.backpressure.taken == 0)


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
    until(lambda: server.hub.streams.backpressure.taken == 2 * size)  # all that there is
    new = server.stub(3, instance=b"new").ready()
    new.answer(new.request(), octets(size))
    for stub in (stubs[0], new):
        stub.answer(stub.request(), octets(size))
    assert [client for client, _ in get(asked)] == [0, 1, 2, 3]
    until(lambda: server.hub.streams.backpressure.taken == 0)
