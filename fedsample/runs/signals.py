"""Ctrl-C and SIGTERM: during the rounds they end a run after the current one, with a checkpoint; otherwise at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from fedsample.errors import Interrupted

Phase = Literal["before", "in", "after"]  # the first round, during the rounds, after the last
_WHEN = {"before": "while it was being prepared", "after": "after the last round"}


class Stop:
    """Whether a run was asked to end.

    Attributes:
        phase: where the run is; the run updates it.
        signal: the name of the signal that asked; None: none did.
    """

    def __init__(self) -> None:
        self.phase: Phase = "before"
        self.signal: str | None = None

    @contextmanager
    def listening(self, advice: Callable[[], str]) -> Iterator[None]:
        """Record signals; a second one acts as if nobody listened. Off the main thread nothing is changed.

        Args:
            advice: tells how to continue the run.

        Raises:
            Interrupted: at a signal outside the rounds.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: object) -> None:
            self.signal = signal.Signals(number).name
            for each, handler in before.items():
                signal.signal(each, handler)
            if self.phase != "in":
                raise Interrupted(f"stopped by {self.signal} {_WHEN[self.phase]}; everything is kept. {advice()}")

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
