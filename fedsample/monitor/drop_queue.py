"""What waits between a run and the threads that write its metrics: rows, in a queue that never makes the run wait."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Scalars = Mapping[str, float]


@dataclass(slots=True)
class Row:
    """What is logged of a round; `late` is set by `lazy` in another thread, before `done`.

    `written` and `drawn`: whether the log and the curves have it, or never will.
    """

    round: int
    bytes_sent: int
    scalars: dict[str, float]
    lazy: Callable[[], Scalars] | None = None
    born: float = field(default_factory=time.monotonic)
    late: dict[str, float] = field(default_factory=dict)
    done: threading.Event | None = None
    written: bool = False
    drawn: bool = False


@dataclass(slots=True)
class Description:
    """What is said once a run."""

    config: str
    hparams: Mapping[str, bool | float | str]
    metrics: Sequence[str]


class DropQueue:
    """A bounded queue that drops its oldest item where it is full, and so never makes a writer wait."""

    def __init__(self, limit: int) -> None:
        """Hold at most `limit` items."""
        self.dropped = 0
        self._limit = limit
        self._items: deque[Row | Description] = deque()
        self._ready = threading.Condition()
        self._closed = False

    def put(self, item: Row | Description) -> Row | Description | None:
        """Add an item and return the one that was dropped for it."""
        lost = None
        with self._ready:
            if len(self._items) >= self._limit:
                lost = self._items.popleft()
                self.dropped += 1
            self._items.append(item)
            self._ready.notify()
        return lost

    def get(self, timeout: float | None) -> Row | Description | None:
        """The oldest item; None after `timeout` seconds without one, or where the queue is closed and empty."""
        with self._ready:
            self._ready.wait_for(lambda: self._items or self._closed, timeout)
            return self._items.popleft() if self._items else None

    def close(self) -> None:
        """Let the reader take what is left, and then end."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()

    @property
    def ended(self) -> bool:
        """Closed and empty."""
        return self._closed and not self._items
