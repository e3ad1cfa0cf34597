"""Devices in a thread of this process, killed and started at will, behind a proxy that meddles with their messages.

The proxy is between every device and the server. It looks at each whole message, up or down, and a test decides what
becomes of it; see `Meddling`.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc
import grpc.aio
from device_pool import attendant

from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.device import connection
from fedsample.fleets.grpc.device.connection import Connection
from fedsample.fleets.grpc.framing.version import SERVICE
from fedsample.fleets.grpc.server import hub, streams

_SIZES = [("grpc.max_receive_message_length", 8 << 20)]


class Passing(NamedTuple):
    """A message on its way.

    Attributes:
        up: whether it comes from a device. client: whose. head: of it. frames: all of it, as sent.
        before: earlier messages of this client in this direction, of other streams too.
    """

    up: bool
    client: int
    head: pb.Head
    frames: list[bytes]
    before: list[list[bytes]]


class Cut(Exception):
    """The stream breaks here."""


Meddling = Callable[[Passing, "Laboratory"], Sequence[bytes | float]]
"""What is delivered in place of a message, a number: seconds later; may raise `Cut`, or have devices killed."""


def nothing(passing: Passing, laboratory: Laboratory) -> Sequence[bytes | float]:
    return passing.frames


class Laboratory:
    """Devices of one run and the proxy before their server; a context manager.

    Args:
        folder: for the devices' disks. devices: how many. server: its port. data: see `device_pool`; {} stands for the
            device's index. meddling: with every message.
    """

    def __init__(self, folder: Path, devices: int, server: int, data: str, meddling: Meddling = nothing) -> None:
        self.folder, self.devices, self.server, self.data, self.meddling = folder, devices, server, data, meddling
        self.errors: dict[int, BaseException] = {}
        self.kills = 0
        self._running: dict[int, tuple[Connection, asyncio.Task[Any]]] = {}
        self._before: dict[tuple[bool, int], list[list[bytes]]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._tasks: set[asyncio.Task[Any]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        self.port = self.call(self._listen())
        for index in range(self.devices):
            self.call(self._begin(index))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run something in the devices' thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def over(self) -> None:
        """Wait until every device has heard that the run has ended."""

        async def wait() -> None:
            await asyncio.gather(*self._tasks)
            await asyncio.gather(*(task for _, task in self._running.values()))

        self.call(wait())

    # --- devices ------------------------------------------------------------------------------------------------------

    def kill(self, index: int, *, disk: bool = False) -> None:
        """A device dies and is started again; without its disk if `disk`. From the devices' thread, or `call`ed."""
        self.kills += 1
        task = self._loop.create_task(self._again(index, disk=disk))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def again(self, index: int, *, disk: bool = False) -> None:
        """The same, for `call`."""
        self.kills += 1
        await self._again(index, disk=disk)

    async def _again(self, index: int, *, disk: bool) -> None:
        if index not in self._running:
            return  # it is being started again already
        await self._die(index)
        if disk:
            for folder in self.folder.glob(f"*-{index}"):
                shutil.rmtree(folder)
        await self._begin(index)

    async def _die(self, index: int) -> None:
        device, task = self._running.pop(index)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(device._pool.shutdown)  # a dead process computes nothing

    async def _begin(self, index: int) -> None:
        device = self.device(index)
        self._running[index] = device, asyncio.create_task(self._attend(index, device))

    def device(self, index: int, disk: str = "") -> Connection:
        target, data = f"127.0.0.1:{self.port}", self.data.format(index)
        return attendant(target, index, self.devices, self.folder / disk, data)

    async def _attend(self, index: int, device: Connection) -> None:
        try:
            await device.attend()
        except Exception as error:
            self.errors[index] = error

    async def _end(self) -> None:
        for index in list(self._running):
            await self._die(index)
        await self._proxy.stop(None)
        leftover = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in leftover:
            task.cancel()
        await asyncio.gather(*leftover, return_exceptions=True)

    # --- the proxy ----------------------------------------------------------------------------------------------------

    async def _listen(self) -> int:
        self._proxy = grpc.aio.server(options=[*_SIZES, ("grpc.so_reuseport", 0)])
        handlers = {"Connect": grpc.stream_stream_rpc_method_handler(self._connect)}
        self._proxy.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = self._proxy.add_insecure_port("127.0.0.1:0")
        await self._proxy.start()
        return int(port)

    async def _connect(self, frames: Any, context: Any) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.server}", options=_SIZES) as channel:
            call = channel.stream_stream(f"/{SERVICE}/Connect")()
            try:
                hello = await context.read()
                client = pb.DeviceFrame.FromString(hello).hello.client
                await call.write(hello)
                pumps = [
                    asyncio.create_task(self._pump(client, True, context.read, call.write, pb.DeviceFrame)),
                    asyncio.create_task(self._pump(client, False, call.read, context.write, pb.ServerFrame)),
                ]
                try:
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pump in pumps:
                        pump.cancel()
                    await asyncio.gather(*pumps, return_exceptions=True)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass  # the server is away
            finally:
                call.cancel()

    async def _pump(self, client: int, up: bool, read: Any, write: Any, kind: Any) -> None:
        frames: list[bytes] = []
        size, head = 0, pb.Head()
        before = self._before.setdefault((up, client), [])
        while isinstance(raw := await read(), bytes):
            frame = kind.FromString(raw)
            if frame.WhichOneof("frame") != "piece":
                await write(raw)
                continue
            if frame.piece.head:
                head = pb.Head.FromString(frame.piece.head)
                frames, size = [], sum(array.size for array in head.arrays)
            frames.append(raw)
            if frame.piece.offset + len(frame.piece.data) < size:
                continue
            for delivered in self.meddling(Passing(up, client, head, frames, before), self):
                await (asyncio.sleep(delivered) if isinstance(delivered, float) else write(delivered))
            before.append(frames)


# --- what can happen to messages --------------------------------------------------------------------------------------


def damaged(frame: bytes, up: bool) -> bytes:
    """A frame whose piece lacks half of its data, or, where it has none, of its head."""
    kind: Any = pb.DeviceFrame if up else pb.ServerFrame
    found = kind.FromString(frame)
    if found.piece.data:
        found.piece.data = found.piece.data[: len(found.piece.data) // 2]
    else:
        found.piece.head = found.piece.head[: len(found.piece.head) // 2]
    whole: bytes = found.SerializeToString()
    return whole


TROUBLES = ("again", "old first", "old last", "late", "truncated", "cut", "swapped", "short")


def troubles(chance: random.Random, share: float, done: Counter[str]) -> Meddling:
    """A share of all messages is delivered twice, after older ones, late, truncated, in another order or not at all."""

    def meddle(passing: Passing, laboratory: Laboratory) -> Sequence[bytes | float]:
        frames, before = passing.frames, passing.before
        if chance.random() >= share:
            return frames
        what = chance.choice(TROUBLES if len(frames) > 1 else TROUBLES[:-2])
        done[what] += 1
        old = chance.choice(before) if before else []
        at = chance.randrange(len(frames))
        if what == "again":
            return [*frames, *frames]
        if what == "old first":
            return [*old, *frames]
        if what == "old last":
            return [*frames, *old]
        if what == "late":
            return [chance.random() * 0.05, *frames, *old]
        if what == "swapped":
            return [*frames[:at], *frames[at + 1 :], frames[at]]
        if what == "truncated":
            return [*frames[:at], damaged(frames[at], passing.up), *frames[at + 1 :]]
        if what == "short":
            return frames[:-1]
        raise Cut

    return meddle


def quick(monkeypatch: Any) -> None:
    """Waits in proportion: a run of a second need not wait for half a second."""
    constants: Mapping[Any, dict[str, float]] = {
        connection: {"FIRST": 0.02, "LONGEST": 0.2},
        hub: {"COMPLAIN": 0.5},
        streams: {"_REPLACE": 1.0},
    }
    for module, values in constants.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
