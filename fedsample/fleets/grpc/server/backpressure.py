"""Backpressure for large answers that wait to be added to a sum: a limit in bytes over all clients.

A device whose answer has no room is not read from, and so cannot send on: its answer waits in the network.
"""

from __future__ import annotations

import asyncio

from fedsample.fleets.grpc.server.stream import Stream

STAGE, ANSWERS = 16 << 20, 2  # bytes of large answers that may wait, over all clients; or this many answers


class Backpressure:
    """Room for large answers; used in the thread of the streams' loop.

    Attributes:
        taken: bytes of answers that are arriving, or have arrived and are not yet added.
        wanted: the client whose answer is added next, which always has room; any thread may set it, and then `knock`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.taken = 0
        self.wanted = -1
        self._loop, self._changed = loop, asyncio.Condition()

    async def take(self, client: int, stream: Stream, size: int) -> None:
        """Wait until there is room for `size` bytes of a client's answer."""
        async with self._changed:
            while self.taken and self.taken + size > max(STAGE, ANSWERS * size) and self.wanted != client:
                stream.blocked = True
                await self._changed.wait()
            stream.blocked, stream.staged = False, size
            self.taken += size

    def release(self, size: int) -> None:
        """Free the room of an answer that was added, or is no longer wanted."""
        self.taken -= size
        self._look()

    def knock(self) -> None:
        """Wake those that wait for room, as `wanted` has changed; may be called from any thread."""
        if self.taken:  # else nobody waits, and waking the loop in vain costs a tenth of a small round
            self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = self._loop.create_task(notify())
        task.add_done_callback(lambda done: done.exception())
