"""A relay on loopback between devices and their server, which keeps every frame that passes, as bytes.

It speaks gRPC without knowing a service: whatever method is called is called on, and messages stay bytes. So it sees
the same of any checkout, wherever that keeps its classes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

_OPTIONS = [("grpc.max_receive_message_length", 16 << 20), ("grpc.so_reuseport", 0)]
_PATIENT = [*_OPTIONS, ("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]


class Relay:
    """Between devices and a server that may not be there yet; a context manager.

    Args:
        server: its port. hold: called with every frame and whether it comes from a device; where it is true, the frame
            is kept back and `held` is set, until the device has gone.

    Attributes:
        port: where devices connect.
        frames: those that have passed, by number of the stream: (whether up, bytes).
        held: whether a frame was kept back.
    """

    def __init__(self, server: int, hold: Callable[[bytes, bool], bool] | None = None) -> None:
        """Nothing listens yet."""
        self._server, self._hold = server, hold
        self.port = 0
        self.frames: list[list[tuple[bool, bytes]]] = []
        self.held = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        """Listen."""
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all streams."""
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self) -> None:
        relay = self

        class Whatever(grpc.GenericRpcHandler):  # type: ignore[misc]
            def service(self, details: Any) -> Any:
                async def passing(_: Any, context: Any) -> None:
                    await relay._pass(details.method, context)

                return grpc.stream_stream_rpc_method_handler(passing)

        self._listening = grpc.aio.server(options=_OPTIONS)
        self._listening.add_generic_rpc_handlers((Whatever(),))
        self.port = self._listening.add_insecure_port("127.0.0.1:0")
        await self._listening.start()

    async def _end(self) -> None:
        await self._listening.stop(None)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _pass(self, method: str, context: Any) -> None:
        """One call, to its end on either side."""
        kept: list[tuple[bool, bytes]] = []
        self.frames.append(kept)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self._server}", options=_PATIENT) as channel:
            call = channel.stream_stream(method)(wait_for_ready=True)
            pumps = [
                asyncio.create_task(self._pump(context.read, call.write, True, kept)),
                asyncio.create_task(self._pump(call.read, context.write, False, kept)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait(pumps, timeout=0.2)  # what is still on its way: a farewell, say
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
                call.cancel()

    async def _pump(self, read: Any, write: Any, up: bool, kept: list[tuple[bool, bytes]]) -> None:
        try:
            while isinstance(raw := await read(), bytes):
                if self._hold is not None and self._hold(raw, up):
                    self.held.set()
                    await asyncio.Event().wait()  # until the other side of this stream ends
                kept.append((up, raw))
                await write(raw)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            pass  # one side is gone
