"""The server's end of the streams: devices that come, die, and come again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from hub_by_hand import HELD, RUN, Chain, Stub, all_fitted, get, until

from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.framing.version import PROTOCOL
from fedsample.fleets.grpc.server.hub import Hub
from fedsample.fleets.grpc.server.streams import Identified, Invitation


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
