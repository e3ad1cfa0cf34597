"""Live tables of a fleet: the server's, a row per device, and a device's own; on a terminal, else plain lines."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fedsample.monitor.progress import LIVE, Progress, size_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from fedsample.fleets.grpc.device.connection import Watching
    from fedsample.fleets.grpc.server.client_record import ClientRecord

_ROWS = 40  # rows that fit on a screen; with more devices, those that need attention come first
_ORDER = {"not here yet": 0, "away": 1, "joining": 2, "ready": 3, "working": 4, "idle": 5}
_ERRORS = 5  # lines of errors below the table
_STALE = 2.0  # seconds without a round after which missing devices are shown in place of the rate
_SOON, _SELDOM = 10.0, 600.0  # seconds between two reminders, at first and later
_STATUS = 60.0  # seconds between two status lines of a device


class FleetProgress(Progress):
    """Progress of a run with devices: on a terminal a progress line under a live table."""

    _seats: Sequence[ClientRecord] = ()
    _words = ""
    _stage = ""
    _when = 0.0  # time of the last drawing
    _gap = _SOON
    _due = 0.0

    def watch(self, records: Sequence[ClientRecord]) -> None:
        """Show these devices from now on, on a terminal."""
        from rich.live import Live

        self._seats = records
        console = self._terminal()
        if self._mode != "auto" or not console.is_terminal or console.is_dumb_terminal:
            return
        live = Live(
            get_renderable=self._picture, console=console, refresh_per_second=1 / LIVE, redirect_stdout=False,
            transient=False,
        )  # fmt: skip
        live.start()
        self._bar = (live, None)  # type: ignore[assignment] # what `close` stops

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage as in any run; on a terminal the line under the table names it meanwhile."""
        self._stage = name
        try:
            with super().stage(name):
                yield
        finally:
            self._stage = ""

    def remind(self, text: str) -> None:
        """Print what is waited for, less and less often; a live table shows it anyway."""
        now = time.monotonic()
        if self._bar is None and now >= self._due:
            self.note(text)
            self._due, self._gap = now + self._gap, min(_SELDOM, 2 * self._gap)

    def _draw_bar(self, console: Console, text: str) -> None:
        if self._bar is None:
            super()._draw_bar(console, text)
            return
        self._words, self._when = text, time.monotonic()

    def _draw(self) -> None:
        self._due, self._gap = 0.0, _SOON  # a round is done
        super()._draw()

    def _picture(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        return Group(fleet_table(self._seats), Text(self._line(), overflow="ellipsis", no_wrap=True))

    def _line(self) -> str:
        """The line under the table."""
        now = time.monotonic()
        away = [record for record in self._seats if record.stream is None]
        missing = ", ".join(record.account(now) for record in away[:8]) + (", ..." if len(away) > 8 else "")
        if self._stage:
            still = f"; missing: {missing}" if away and not self._stage.startswith("waiting") else ""
            return f"{self._stage} ...{still}"
        if not self._when:
            return "preparing ..." + (f" waiting for {missing}" if away else "")
        line = f"round {self._round}/{self.total}  {self._round / max(1, self.total):4.0%}  "
        return line + (f"waiting for {missing}" if away and now - self._when > _STALE else self._words)


def fleet_table(records: Sequence[ClientRecord]) -> RenderableType:
    """A row per device: state, round, latency, bytes, connections; below, a line for each device's last error."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    now = time.monotonic()
    table = Table(box=SIMPLE_HEAD)
    for name in ("device", "state", "round", "latency", "up", "down", "connections"):
        table.add_column(name, no_wrap=True, justify="left" if name == "state" else "right")
    shown = (
        sorted(records, key=lambda record: (_ORDER.get(record.state, 9), record.client))
        if len(records) > _ROWS
        else records
    )
    for record in shown[:_ROWS]:
        lag = f"{1e3 * statistics.median(list(record.latencies)):.1f} ms" if record.latencies else "-"
        state = record.state
        table.add_row(
            str(record.client), Text(f"away {span(now - record.since)}", style="red") if state == "away" else state,
            str(record.round or "-"), lag, size_of(record.received[1]), size_of(record.sent[1]),
            str(record.connections),
        )  # fmt: skip
    if len(records) > _ROWS:
        table.caption = f"and {len(records) - _ROWS} more"
    wrong = [record for record in shown if record.error][:_ERRORS]
    errors = [
        Text(f"last error of {record.client}: {record.error}", overflow="ellipsis", no_wrap=True) for record in wrong
    ]
    return Group(table, *errors)


def device_table(watching: Watching) -> RenderableType:
    """Lay out a device's state as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    for name in ("device", "server", "round", "computing", "answers", "up", "down", "connections"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("device", "server") else "right")
    took = f"{1e3 * statistics.median(list(watching.latencies)):.1f} ms" if watching.latencies else "-"
    table.add_row(
        "-" if watching.client < 0 else f"{watching.client} of {watching.clients}", watching.server,
        str(watching.round or "-"), took, str(watching.answers), size_of(watching.sent), size_of(watching.received),
        str(watching.connections),
    )  # fmt: skip
    lines = [Text(_state(watching))]
    if watching.error:
        ago = span(time.monotonic() - watching.erred)
        lines.append(Text(f"last error, {ago} ago: {watching.error}", style="red" if _apart(watching) else "dim"))
    return Group(table, *lines)


def _apart(watching: Watching) -> bool:
    return watching.state in ("connecting", "waiting to connect again")


def _state(watching: Watching) -> str:
    """Describe the state, with what will happen next."""
    text = "connected" if watching.state == "computing" else watching.state  # showing "computing" would flicker
    if watching.state == "waiting to connect again":
        text += f", in {max(0.0, watching.until - time.monotonic()):.0f} s"
    return text + (f" ({watching.farewell})" if watching.farewell and _apart(watching) else "")


@contextlib.contextmanager
def device_display(watching: Watching, console: Console, *, quiet: bool) -> Iterator[None]:
    """Show a device while the block runs: a live table on a terminal, changes of state elsewhere."""
    if quiet:
        yield
        return
    watching.say = lambda text: console.print(text, markup=False, highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        with _lines(watching, console):
            yield
        return
    from rich.live import Live

    with Live(get_renderable=lambda: device_table(watching), console=console, refresh_per_second=1 / LIVE):
        yield


@contextlib.contextmanager
def _lines(watching: Watching, console: Console) -> Iterator[None]:
    """Print a line when the state or the error that keeps it changes, and one per minute."""
    import threading

    over, said = threading.Event(), [""]

    def changed() -> None:
        if watching.state in ("starting", "connecting", "computing"):
            return
        line = watching.state
        if _apart(watching):
            line += f" ({watching.farewell or watching.error})"
        if line != said[0]:
            said[0] = line
            with contextlib.suppress(OSError, ValueError):  # a closed pipe or stream
                console.out(line, highlight=False)

    def status() -> None:
        while not over.wait(_STATUS):
            with contextlib.suppress(OSError, ValueError):
                console.out(f"{_state(watching)}, round {watching.round}, {watching.answers} answers", highlight=False)

    watching.changed = changed
    thread = threading.Thread(target=status, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def span(seconds: float) -> str:
    """Format a duration for people to read: 12 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
