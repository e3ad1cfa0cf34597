"""The server's end of the streams: how long it waits, and for whom."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
from hub_by_hand import HELD, RUN, Chain, get, until

from fedsample.fleets.grpc.framing.frames import Message, Name
from fedsample.fleets.grpc.server import streams
from fedsample.fleets.grpc.server.client_record import Batch
from fedsample.fleets.grpc.server.hub import Hub
from fedsample.fleets.grpc.server.stream import Stream
from fedsample.fleets.grpc.server.streams import Identified, Invitation
from fedsample.protocol.recovery import Abandoned


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
