"""The recorder: rows that are right when read back, and nothing that stops or slows a run."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded import curves, rows
from rounding import gamma

from fedsample.monitor import Recorder, quantiles
from fedsample.monitor import tensorboard as recorder_module


def points(path: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in curves(path).Scalars(tag)]


def points_by_bytes(path: Path, tag: str) -> list[tuple[int, float]]:
    return points(path / "bytes", "uplink_bytes/" + tag)


# --- rows and lazy values ---------------------------------------------------------------------------------------------


def test_rows_and_curves_hold_what_was_submitted(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for k in (1, 2, 3):
            recorder.submit(k * 100, k * 5000, {"round/nll": 1.0 / k, "mcmc/step_size": torch.tensor(0.5)})
    assert rows(tmp_path) == [
        {"round": k * 100, "bytes": k * 5000, "round/nll": 1.0 / k, "mcmc/step_size": 0.5} for k in (1, 2, 3)
    ]
    values = [pytest.approx(1.0 / k, rel=gamma(1, torch.float32)) for k in (1, 2, 3)]  # event files hold float32
    assert points(tmp_path, "round/nll") == list(zip((100, 200, 300), values, strict=True))
    assert points_by_bytes(tmp_path, "round/nll") == list(zip((5000, 10000, 15000), values, strict=True))


def test_a_missing_value_is_null_in_the_row_and_no_point_of_the_curve(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.submit(1, 10, {"mcmc/rhat/max": math.nan, "round/nll": 1.0})
        recorder.submit(2, 20, {"mcmc/rhat/max": 1.5, "round/nll": math.inf})
    assert [(row["mcmc/rhat/max"], row["round/nll"]) for row in rows(tmp_path)] == [(None, 1.0), (1.5, None)]
    assert points(tmp_path, "mcmc/rhat/max") == [(2, 1.5)]
    assert points(tmp_path, "round/nll") == [(1, 1.0)]


def test_a_lazy_value_is_computed_elsewhere_and_joins_its_row(tmp_path: Path) -> None:
    threads = []

    def compute() -> dict[str, float]:
        threads.append(threading.current_thread())
        return {"mcmc/rhat/max": 1.25}

    with Recorder(tmp_path) as recorder:
        recorder.submit(7, 70, {"round/nll": 2.0}, lazy=compute)
        recorder.submit(8, 80, {"round/nll": 1.0})
    assert rows(tmp_path) == [
        {"round": 7, "bytes": 70, "round/nll": 2.0, "mcmc/rhat/max": 1.25},
        {"round": 8, "bytes": 80, "round/nll": 1.0},
    ]
    assert points(tmp_path, "mcmc/rhat/max") == [(7, 1.25)]
    assert points_by_bytes(tmp_path, "mcmc/rhat/max") == [(70, 1.25)]
    assert threads[0] is not threading.main_thread()


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until a thread has done its part; the bound only ends a test that has failed."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the thread did not do its part"
        time.sleep(0.005)


def test_a_slow_lazy_value_delays_no_row_and_follows_for_its_own_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "HOLD", 0.05)
    release = threading.Event()

    def compute() -> dict[str, float]:
        assert release.wait(20)
        return {"mcmc/ess/min": 400.0}

    recorder = Recorder(tmp_path)
    recorder.submit(1, 10, {"round/nll": 2.0}, lazy=compute)
    recorder.submit(2, 20, {"round/nll": 1.0})
    wait_until(lambda: len(rows(tmp_path)) == 2)  # while the value is still being computed
    release.set()
    recorder.close()
    assert rows(tmp_path) == [
        {"round": 1, "bytes": 10, "round/nll": 2.0},
        {"round": 2, "bytes": 20, "round/nll": 1.0},
        {"round": 1, "bytes": 10, "mcmc/ess/min": 400.0},
    ]


def test_closing_waits_for_lazy_values_and_gives_up_in_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    recorder = Recorder(tmp_path)
    recorder.submit(1, 10, {}, lazy=lambda: {"mcmc/rhat/max": 1.0} if release.wait(20) else {})
    recorder.close(timeout=0.2)
    assert "left behind" in caplog.text
    release.set()

    (tmp_path / "second").mkdir()
    recorder = Recorder(tmp_path / "second")
    slow = threading.Event()
    threading.Timer(0.3, slow.set).start()
    recorder.submit(1, 10, {}, lazy=lambda: {"mcmc/rhat/max": 1.0} if slow.wait(20) else {})
    recorder.close()
    assert rows(tmp_path / "second") == [{"round": 1, "bytes": 10, "mcmc/rhat/max": 1.0}]


def test_submit_never_waits_and_the_oldest_rows_go_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    recorder = Recorder(tmp_path, queue=10, lazy_queue=2)
    lines = recorder._lines
    append = lines.append

    def slow_disk(row: dict[str, Any]) -> None:
        assert release.wait(20)
        append(row)

    lines.append = slow_disk  # type: ignore[method-assign,assignment]
    begin = time.perf_counter()
    for k in range(1000):
        recorder.submit(k, k, {"round/nll": 1.0}, lazy=lambda: {})
    assert time.perf_counter() - begin < 1
    release.set()
    recorder.close()
    stored = [row["round"] for row in rows(tmp_path)]
    assert stored[-10:] == list(range(990, 1000))
    assert recorder.dropped == 1000 - len(stored) >= 980
    assert recorder.dropped_lazy >= 990
    assert f"{recorder.dropped} rows of metrics" in caplog.text
    assert f"{recorder.dropped_lazy} lazy values" in caplog.text


def test_closing_does_not_wait_for_a_lazy_value_that_was_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorder_module, "HOLD", 0.0)
    started, release = threading.Event(), threading.Event()

    def compute() -> dict[str, float]:
        started.set()
        return {"mcmc/rhat/max": 1.0} if release.wait(20) else {}

    recorder = Recorder(tmp_path, queue=4)
    recorder.submit(1, 1, {"round/nll": 1.0}, lazy=compute)
    assert started.wait(20)
    for k in range(2, 9):  # they push the second lazy value out of the queue of the busy thread
        recorder.submit(k, k, {"round/nll": 1.0}, lazy=(lambda: {"mcmc/rhat/max": 2.0}) if k == 2 else None)
        wait_until(lambda: not recorder._rows._items)
    release.set()
    recorder.close(timeout=20)
    assert "left behind" not in caplog.text
    assert [(row["round"], row["mcmc/rhat/max"]) for row in rows(tmp_path) if "mcmc/rhat/max" in row] == [(1, 1.0)]
    assert recorder.dropped_lazy == 1


def test_lazy_values_are_taken_again_once_the_thread_has_caught_up(tmp_path: Path) -> None:
    with Recorder(tmp_path, lazy_queue=1) as recorder:
        for k in range(20):
            recorder.submit(k, k, {}, lazy=lambda: {"mcmc/rhat/max": 1.0})
            wait_until(lambda: recorder._lazy_done == recorder._lazy_sent)
    assert recorder.dropped_lazy == 0
    assert len(rows(tmp_path)) == 20


def test_resume_replaces_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.describe("rounds = 9", {"seed": 1})
        for k in range(1, 8):
            recorder.submit(k, 10 * k, {"round/nll": float(k)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"round": 8, "by')  # killed here
    with Recorder(tmp_path, purge_step=5) as recorder:
        recorder.describe("rounds = 9", {"seed": 1})
        for k in range(5, 9):
            recorder.submit(k, 10 * k, {"round/nll": -float(k)})
    expected = [1.0, 2.0, 3.0, 4.0, -5.0, -6.0, -7.0, -8.0]
    assert [(row["round"], row["round/nll"]) for row in rows(tmp_path)] == list(enumerate(expected, 1))
    assert points(tmp_path, "round/nll") == list(enumerate(expected, 1))
    assert points_by_bytes(tmp_path, "round/nll") == [(10 * k, value) for k, value in enumerate(expected, 1)]
    assert len(curves(tmp_path).Tensors("config")) == 1  # said once, and not purged
    names = sorted(file.name for file in tmp_path.glob("events.out.tfevents.*"))
    assert len(names) == 2


# --- what fails -------------------------------------------------------------------------------------------------------


def test_a_failing_disk_is_reported_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    missing = tmp_path / "gone"
    recorder = Recorder(missing, enabled=False)
    recorder.submit(1, 1, {"round/nll": 1.0})
    wait_until(lambda: recorder.error is not None)
    recorder.submit(2, 2, {"round/nll": 0.5})
    wait_until(lambda: not recorder._rows._items)
    missing.mkdir()
    recorder.submit(3, 3, {"round/nll": 0.25})
    recorder.close()
    assert recorder.error is None
    assert [row["round"] for row in rows(missing)] == [1, 2, 3]  # the rows were kept until there was room
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_row_that_stays_unwritten_is_an_error_of_the_recorder(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "gone", enabled=False)
    recorder.submit(1, 1, {"round/nll": 1.0})
    recorder.close()
    assert recorder.error is not None
    assert "metrics.jsonl cannot be written" in str(recorder.error)


def test_a_broken_metric_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> dict[str, float]:
        raise ZeroDivisionError("no draws")

    with Recorder(tmp_path, enabled=False) as recorder:
        recorder.submit(1, 1, {"round/nll": 1.0}, lazy=broken)
        recorder.submit(2, 2, {"round/nll": "not a number"})  # type: ignore[dict-item]
        recorder.submit(3, 3, {"round/nll": 3.0})
    assert [row["round"] for row in rows(tmp_path)] == [1, 3]
    assert "round 1 could not be computed" in caplog.text
    assert "round 2 are no numbers" in caplog.text


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = (
        "import sys, fedsample.monitor\n"
        "print([name for name in ('torch', 'tensorboard', 'rich', 'numpy', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_quantiles_leave_absent_clients_out() -> None:
    values = torch.tensor([math.nan, *range(101)])
    assert quantiles("client/loss", values) == {
        "client/loss/p05": 5.0,
        "client/loss/p50": 50.0,
        "client/loss/p95": 95.0,
    }
    assert quantiles("client/loss", np.array([math.nan])) == {}
