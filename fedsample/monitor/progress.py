"""Progress of a run: a live bar on a terminal, a line every few seconds elsewhere, or nothing.

`update` is called every round and costs a reading of the clock; it draws at most every `LIVE` or `PLAIN` seconds, in
the calling thread. Nothing here can fail a run: if the terminal goes away, progress is silent.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from fedsample.errors import Interrupted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

LIVE = 0.25
PLAIN = 5.0
WINDOW = 20  # drawings over which the rate is averaged: follows a change of pace without flickering

Mode = Literal["auto", "plain", "quiet"]


class Progress:
    """Shows the rounds of a run, and the stages before and after them; use as a context manager.

    Args:
        total: rounds of the run.
        start: rounds already done by an earlier part of the run.
        mode: "auto" is a bar on a terminal and lines elsewhere; "plain" is lines; "quiet" is nothing.
        console: where to show it; None: standard error.
    """

    def __init__(self, total: int, start: int = 0, mode: Mode = "auto", console: Console | None = None) -> None:
        self.total = total
        self._mode = mode
        self._console = console
        self._round, self._up, self._down = start, 0, 0
        self._history: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._begun = False
        self._drawn: int | None = None
        self._bar: tuple[Bar, TaskID] | None = None
        self._open = False  # whether the line of a stage is unfinished
        self._next = 0.0 if mode != "quiet" else float("inf")

    def update(self, round: int, up_bytes: int, down_bytes: int) -> None:
        """Report the round that is done and the bytes sent so far, up and down; draw if it is time."""
        if round < self._round:  # rolled back: earlier drawings no longer measure the rate
            self._history.clear()
        self._round, self._up, self._down = round, up_bytes, down_bytes
        if time.monotonic() >= self._next:
            self._draw()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage that is no round, such as "finding the mode", and report how long it took."""
        begin = time.monotonic()
        if self._begun and self._drawn != self._round:
            self._draw()
        inline = self._bar is None
        try:
            if inline:
                self._print(f"{name} ... ", end="")
                self._open = True
            yield
        except BaseException as error:
            self._end(name, "stopped" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed")
            raise
        self._end(name, f"done in {_seconds(time.monotonic() - begin)}")

    def note(self, text: str) -> None:
        """Print a message on a line of its own."""
        if self._open:
            self._open = False
            self._print("")
        self._print(text)

    def _end(self, name: str, how: str) -> None:
        """Finish a stage's line; on a new line if something was printed meanwhile."""
        self._print(how if self._open else f"{name} ... {how}")
        self._open = False

    def close(self) -> None:
        """Draw the last state and leave the terminal as it was; may be called twice."""
        if self._mode != "quiet" and self._begun and self._drawn != self._round:
            self._draw()
        with contextlib.suppress(OSError, ValueError):
            if self._bar is not None:
                self._bar[0].stop()
        self._bar, self._next, self._begun = None, float("inf"), False

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the terminal, also if the run fails or is interrupted."""
        self.close()

    def _draw(self) -> None:
        if not self._begun:  # time before the first round does not measure the rate
            self._history.append((time.monotonic(), self._round))
            self._begun = True
        rate = self._rate()
        words = []
        if rate > 0:
            pace = f"{rate:,.0f} rounds/s" if rate >= 10 else f"{rate:.2g} rounds/s"
            words = [pace, f"ETA {_clock((self.total - self._round) / rate)}"]
        words.append(f"up {size_of(self._up)}, down {size_of(self._down)}")
        try:
            console = self._terminal()
            live = self._mode == "auto" and console.is_terminal and not console.is_dumb_terminal
            if live:
                self._draw_bar(console, "  ".join(words))
            else:
                share = self._round / max(1, self.total)
                console.out(f"round {self._round}/{self.total}  {share:4.0%}  " + "  ".join(words), highlight=False)
            self._next = time.monotonic() + (LIVE if live else PLAIN)
        except (OSError, ValueError):  # a closed pipe or stream
            self._mode, self._next = "quiet", float("inf")
        self._drawn = self._round

    def _draw_bar(self, console: Console, text: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        if self._bar is None:
            columns = (
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            )
            # Standard output may be a pipe while this is a terminal: what is printed there stays there.
            bar = Bar(*columns, console=console, auto_refresh=False, redirect_stdout=False)
            self._bar = bar, bar.add_task("sampling", total=self.total, text="")
            bar.start()
        bar, task = self._bar
        bar.update(task, completed=self._round, text=text, refresh=True)

    def _rate(self) -> float:
        """Rounds per second since the oldest of the last drawings; 0: not known yet."""
        if not self._history or self._history[-1][1] != self._round:
            self._history.append((time.monotonic(), self._round))
        (then, first), (last, current) = self._history[0], self._history[-1]
        return (current - first) / (last - then) if last > then else 0.0

    def _print(self, text: str, end: str = "\n") -> None:
        if self._mode != "quiet":
            with contextlib.suppress(OSError, ValueError):
                self._terminal().print(text, end=end, markup=False, highlight=False, soft_wrap=True)

    def _terminal(self) -> Console:
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True)
        return self._console


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else _clock(seconds)


def _clock(seconds: float) -> str:
    """Format seconds as 1:02:03 or 2:03."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def size_of(count: int) -> str:
    """Format a number of bytes for people to read."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
