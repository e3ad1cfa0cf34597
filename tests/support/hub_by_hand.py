"""The server's end of the streams, with devices by hand: every frame is sent and read by the test."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.framing.frames import Assembler, Message, pieces
from fedsample.fleets.grpc.framing.version import PROTOCOL, SERVICE
from fedsample.fleets.grpc.server.dispatcher import Dispatcher
from fedsample.fleets.grpc.server.fleet import gather
from fedsample.fleets.grpc.server.hub import Hub
from fedsample.fleets.grpc.server.streams import Identified, Invitation
from fedsample.protocol.wire import Parcel, header

RUN = b"r" * 16
HELD = Parcel(header(held=True))
PATIENCE = 20.0  # seconds after which a wait has failed


class Stub:
    """A device by hand: every frame is sent and read by the test."""

    def __init__(self, port: int, client: int, instance: bytes = b"", protocol: int = PROTOCOL) -> None:
        self.client = client
        self._out: queue.Queue[pb.DeviceFrame | None] = queue.Queue()
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])
        connect = self._channel.stream_stream(
            f"/{SERVICE}/Connect", pb.DeviceFrame.SerializeToString, pb.ServerFrame.FromString
        )
        self.frames = connect(iter(self._out.get, None), timeout=PATIENCE)
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


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def get(future: Future[Any]) -> Any:
    return future.result(PATIENCE)


def all_fitted(chain: Callable[[int], Chain], devices: int) -> tuple[Chain, list[Stub]]:
    """A server with devices, which were told the first thing."""
    server = chain(devices)
    stubs = server.gathered()
    told = server.do(server.dispatcher.tell, "fit", HELD)
    for stub in stubs:
        stub.obey("fit")
    get(told)
    return server, stubs
