"""Progress while a run goes on: lines, a live line, and silence."""

from __future__ import annotations

import math
import time

import pytest
from recorded import console, written

from fedsample.monitor import Progress
from fedsample.monitor import progress as progress_module


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_plain_lines_come_seconds_apart_and_say_where_the_run_is(clock: Clock) -> None:
    out = console()
    with Progress(1000, console=out) as progress:
        for round in range(1, 601):
            clock.now += 0.02
            progress.update(round, 1000 * round, 200_000 * round)
    lines = written(out).splitlines()
    assert len(lines) == 4  # at 0, 5, 10 and, at the end, 12 seconds
    assert lines[0].startswith("round 1/1000    0%  up 1 kB")
    assert lines[-1] == "round 600/1000   60%  50 rounds/s  ETA 0:08  up 600 kB, down 120.0 MB"


def test_a_resumed_run_counts_its_own_pace(clock: Clock) -> None:
    out = console()
    with Progress(1000, start=900, console=out) as progress:
        progress.update(901, 0, 0)
        clock.now += 10
        progress.update(921, 0, 0)
    assert "round 921/1000   92%  2 rounds/s  ETA 0:40" in written(out)


def test_a_terminal_shows_one_live_line_and_gets_its_cursor_back(clock: Clock) -> None:
    out = console(terminal=True)
    with Progress(100, console=out) as progress:
        for round in range(1, 101):
            clock.now += 0.1
            progress.update(round, 10_000 * round, 0)
    text = written(out)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert "100/100" in text
    assert "10 rounds/s" in text
    assert "up 1.0 MB" in text
    assert 20 < text.count("\x1b[2K") < 60  # four drawings a second


def test_the_terminal_is_given_back_when_a_run_is_interrupted(clock: Clock) -> None:
    out = console(terminal=True)

    def run() -> None:
        with Progress(100, console=out) as progress:
            progress.update(1, 0, 0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert written(out).count("\x1b[?25h") == 1


def test_stages_say_how_long_they_took(clock: Clock) -> None:
    out = console()
    with Progress(10, console=out) as progress:
        with progress.stage("finding the mode"):
            clock.now += 0.8
        with pytest.raises(ValueError, match="broken"), progress.stage("whitening"):
            raise ValueError("broken")
    assert written(out) == "finding the mode ... done in 0.8 s\nwhitening ... failed\n"


def test_quiet_is_silent_and_a_closed_stream_stops_nothing(clock: Clock) -> None:
    out = console(terminal=True)
    with Progress(10, mode="quiet", console=out) as progress, progress.stage("finding the mode"):
        progress.update(1, 0, 0)
    assert written(out) == ""
    closed = console()
    closed.file.close()
    with Progress(10, console=closed) as progress:
        with progress.stage("finding the mode"):
            progress.update(1, 0, 0)
        progress.update(2, 0, 0)


def test_plain_mode_draws_no_bar_on_a_terminal(clock: Clock) -> None:
    out = console(terminal=True)
    with Progress(10, mode="plain", console=out) as progress:
        progress.update(1, 0, 0)
    assert "\x1b" not in written(out)


def test_an_update_that_draws_nothing_costs_microseconds() -> None:
    progress = Progress(10, console=console())
    progress.update(1, 0, 0)
    best = math.inf
    for _ in range(20):
        begin = time.perf_counter()
        for round in range(1000):
            progress.update(round, 0, 0)
        best = min(best, (time.perf_counter() - begin) / 1000)
    assert best < 5e-6
