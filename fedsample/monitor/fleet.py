"""Live tables of a fleet: the server's, a row a device, and a device's own; on a terminal only, lines elsewhere."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fedsample.monitor.progress import LIVE, Progress, size_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from fedsample.fleets.grpc.attend import Watching
    from fedsample.fleets.grpc.seat import Seat

_ROWS = 40  # devices that fit on a screen; then those that need attention come first
_ORDER = {"not here yet": 0, "away": 1, "joining": 2, "ready": 3, "working": 4, "idle": 5}


class FleetProgress(Progress):
    """The progress of a run with devices: on a terminal a line of progress over a table that renews itself."""

    def watch(self, seats: Sequence[Seat]) -> None:
        """Show these devices from now on, where there is a terminal."""
        from rich.console import Group
        from rich.live import Live
        from rich.text import Text

        console = self._terminal()
        if self._mode != "auto" or not console.is_terminal or console.is_dumb_terminal:
            return
        self._words = "gathering devices"

        def picture() -> RenderableType:
            return Group(fleet_table(seats), Text(self._words, overflow="ellipsis", no_wrap=True))

        self._live = Live(
            get_renderable=picture, console=console, refresh_per_second=1 / LIVE, redirect_stdout=False, transient=False
        )
        self._live.start()
        self._bar = (self._live, None)  # type: ignore[assignment] # what `close` stops

    def _draw_bar(self, console: Console, text: str) -> None:
        if self._bar is None:
            super()._draw_bar(console, text)
            return
        share = self._round / max(1, self.total)
        self._words = f"round {self._round}/{self.total}  {share:4.0%}  {text}"


def fleet_table(seats: Sequence[Seat]) -> RenderableType:
    """A row a device: state, round, latency, bytes, last error."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, title_justify="left")
    for name in ("device", "state", "round", "latency", "up", "down", "streams", "last error"):
        words = name in ("state", "last error")
        table.add_column(name, no_wrap=name != "last error", justify="left" if words else "right")
    shown = sorted(seats, key=lambda seat: (_ORDER.get(seat.state, 9), seat.client)) if len(seats) > _ROWS else seats
    for seat in shown[:_ROWS]:
        lag = f"{1e3 * statistics.median(list(seat.latencies)):.1f} ms" if seat.latencies else "-"
        table.add_row(
            str(seat.client),
            Text(seat.state, style="red" if seat.stream is None and seat.connections else ""),
            str(seat.round or "-"),
            lag,
            size_of(seat.received[1]),
            size_of(seat.sent[1]),
            str(seat.connections),
            Text(seat.error[:80], overflow="ellipsis"),
        )
    if len(seats) > _ROWS:
        table.caption = f"and {len(seats) - _ROWS} more"
    return table


def device_table(watching: Watching) -> RenderableType:
    """What one device shows of itself."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    for name in ("device", "server", "state", "round", "computing", "answers", "up", "down", "streams", "last error"):
        table.add_column(name)
    took = f"{1e3 * statistics.median(list(watching.latencies)):.1f} ms" if watching.latencies else "-"
    table.add_row(
        "-" if watching.client < 0 else str(watching.client), watching.server, watching.state,
        str(watching.round or "-"), took, str(watching.answers), size_of(watching.sent), size_of(watching.received),
        str(watching.connections), Text(watching.error[:80], overflow="ellipsis"),
    )  # fmt: skip
    return table


@contextlib.contextmanager
def device_display(watching: Watching, console: Console, *, quiet: bool) -> Iterator[None]:
    """Show a device while the block runs: a table that renews itself on a terminal, changes of state elsewhere."""
    import threading

    if quiet:
        yield
        return
    over = threading.Event()
    live = console.is_terminal and not console.is_dumb_terminal

    def lines() -> None:
        said, next_line = "", 0.0
        while not over.wait(0.2):
            state = "connected" if watching.state == "computing" else watching.state
            now = time.monotonic()
            if state != said or now >= next_line:
                said, next_line = state, now + 30.0
                console.out(f"{state}, round {watching.round}, {watching.answers} answers", highlight=False)

    if not live:
        thread = threading.Thread(target=lines, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        return
    from rich.live import Live

    with Live(get_renderable=lambda: device_table(watching), console=console, refresh_per_second=1 / LIVE):
        yield
