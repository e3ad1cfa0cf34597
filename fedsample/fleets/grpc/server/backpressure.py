"""Backpressure for large answers that wait to be added to a sum: so many bytes, whoever sends them.

A device whose answer has no room is not read from, and so cannot send on: the network holds its answer, not the server.
"""

from __future__ import annotations

import asyncio

from fedsample.fleets.grpc.server.stream import Stream

STAGE, ANSWERS = 16 << 20, 2  # bytes of large answers that may wait, all clients together; or so many answers


class Backpressure:
    """Lives in the thread of the streams' loop.

    Attributes:
        taken: bytes of answers that have arrived or are arriving, and are not yet added.
        wanted: the client whose answer is added next, which always has room; any thread may set it, and then `knock`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Nothing is taken."""
        self.taken = 0
        self.wanted = -1
        self._loop, self._changed = loop, asyncio.Condition()

    async def take(self, client: int, stream: Stream, size: int) -> None:
        """Wait until there is room for so many bytes of a client's answer."""
        async with self._changed:
            while self.taken and self.taken + size > max(STAGE, ANSWERS * size) and self.wanted != client:
                stream.blocked = True
                await self._changed.wait()
            stream.blocked, stream.staged = False, size
            self.taken += size

    def release(self, size: int) -> None:
        """An answer was added, or is not wanted."""
        self.taken -= size
        self._look()

    def knock(self) -> None:
        """Whoever waits looks again, as another client is wanted; from any thread."""
        if self.taken:  # else nobody waits, and to wake the loop for nothing costs a tenth of a small round
            self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = self._loop.create_task(notify())
        task.add_done_callback(lambda done: done.exception())
