"""A bounded queue between a run and the threads that write its metrics; it never makes the run wait."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Scalars = Mapping[str, float]


@dataclass(slots=True)
class Row:
    """The log of one round; `lazy` sets `late` in another thread, before `done`.

    `written` and `drawn`: whether the log and the curves have the row, or never will.
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
    """What is written once per run: the configuration and hyper-parameters."""

    config: str
    hparams: Mapping[str, bool | float | str]
    metrics: Sequence[str]


class DropQueue:
    """A bounded queue that drops its oldest item when full, and so never blocks a writer."""

    def __init__(self, limit: int) -> None:
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
        """Return the oldest item; None: none within `timeout` seconds, or the queue is closed and empty."""
        with self._ready:
            self._ready.wait_for(lambda: self._items or self._closed, timeout)
            return self._items.popleft() if self._items else None

    def close(self) -> None:
        """Close the queue: the reader gets the remaining items, then None."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()

    @property
    def ended(self) -> bool:
        """Whether the queue is closed and empty."""
        return self._closed and not self._items
