"""Curves, metrics, progress and the last table: right when read back, and unable to stop or slow a run."""

from __future__ import annotations

import builtins
import io
import logging
import math
import os
import re
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
from rich.console import Console
from rounding import gamma
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedsample.monitor import Progress, Recorder, quantiles, read_jsonl, summary_table
from fedsample.monitor import progress as progress_module
from fedsample.monitor import tensorboard as recorder_module
from fedsample.monitor.events import LAYOUT, EventWriter

SUMMARY = {
    "rounds": 8000,
    "draws": 1400,
    "chains": 4,
    "clients": 10,
    "params": 650,
    "seconds": 20.14,
    "seconds_per_round": 0.0025,
    "accuracy": 0.9583,
    "nll": 0.2012,
    "brier": 0.0587,
    "ece": 0.0312,
    "adaptive_ece": 0.0298,
    "rhat_max": 1.0142,
    "ess_bulk_min": 521.4,
    "ess_tail_min": 613.2,
    "predicted_variance_bias": 0.0123,
    "uplink_bytes_per_client": 4_200_000,
    "downlink_bytes_per_client": 83_200_000,
    "uplink_ratio": 19.8,
}


def rows(path: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(path / "metrics.jsonl"))


def curves(path: Path) -> EventAccumulator:
    # One accumulator reads all files of a run in order, as TensorBoard does.
    accumulator = EventAccumulator(str(path))
    accumulator.Reload()
    return accumulator


def points(path: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in curves(path).Scalars(tag)]


def points_by_bytes(path: Path, tag: str) -> list[tuple[int, float]]:
    return points(path / "bytes", "uplink_bytes/" + tag)


# Recorder


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


def test_no_chart_has_both_axes(tmp_path: Path) -> None:
    """TensorBoard draws all runs of a tag in one chart, and on the custom page all tags that match from their start."""
    everything = {
        tag: 1.0
        for tag in (
            *("round/accuracy", "round/rmse", "round/nll", "round/brier", "round/ece", "mcmc/rhat/max", "mcmc/ess/min"),
            *("mcmc/log_posterior", "client/upload_norm/p05", "client/upload_norm/p50", "client/upload_norm/p95"),
            *("comm/up_bytes", "comm/wire_up_bytes/payload", "fleet/arrived", "time/exchange"),
        )
    }
    with Recorder(tmp_path) as recorder:
        recorder.describe("seed = 3", {})
        recorder.submit(100, 5000, everything)
        recorder.submit(200, 9000, everything)
    by_round, by_bytes = curves(tmp_path), curves(tmp_path / "bytes")
    rounds, sent = (set(each.Tags()["scalars"]) for each in (by_round, by_bytes))
    assert rounds == set(everything)
    assert rounds.isdisjoint(sent)
    costs = {"comm/up_bytes", "comm/wire_up_bytes/payload", "fleet/arrived", "time/exchange"}
    assert sent == {f"uplink_bytes/{tag}" for tag in rounds - costs}
    charts = [
        [tag for tag in (*rounds, *sent) if any(re.match(pattern, tag) for pattern in patterns)]
        for category in LAYOUT.values()
        for patterns in category.values()
    ]
    assert all(charts)
    assert [c for c in charts if not (rounds.isdisjoint(c) or sent.isdisjoint(c))] == []
    assert sum(sent >= set(c) for c in charts) == 6


def test_the_page_of_hyper_parameters_shows_the_run_and_its_metric(tmp_path: Path) -> None:
    """Through TensorBoard's own reader of that page: a metric without a value there is the known trap."""
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

    (tmp_path / "run").mkdir()
    with Recorder(tmp_path / "run") as recorder:
        values = {"seed": 3, "uplink.name": "diana", "tensorboard": True, "step": 0.5, "none": None, "hidden": [32]}
        recorder.describe("seed = 3", values, ["round/nll"])
        recorder.submit(1, 10, {"round/nll": 0.75})
    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = backend_context.Context(TBContext(data_provider=provider))
    request = RequestContext()
    experiment = get_experiment.Handler(request, context, "", api_pb2.GetExperimentRequest()).run()
    assert {info.name for info in experiment.hparam_infos} == {"seed", "uplink.name", "tensorboard", "step", "hidden"}
    columns = [api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos]
    ask = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=9, col_params=columns, allowed_statuses=list(api_pb2.Status.values())
    )
    handler = list_session_groups.Handler(request, context, "", ask)
    (group,) = handler.run().session_groups
    (session,) = group.sessions
    assert session.name == "run"
    assert session.status == api_pb2.STATUS_SUCCESS
    assert [(metric.name.tag, metric.value) for metric in session.metric_values] == [("round/nll", 0.75)]
    assert group.hparams["uplink.name"].string_value == "diana"
    assert group.hparams["seed"].number_value == 3
    assert group.hparams["tensorboard"].bool_value is True


def test_texts_and_layout_can_be_read(tmp_path: Path) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2

    with Recorder(tmp_path) as recorder:
        recorder.describe("seed = 3", {})
        recorder.submit(4, 10, {"round/nll": 1.0})
    accumulator = curves(tmp_path)
    assert b"seed = 3" in accumulator.Tensors("config")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(accumulator.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    band = {chart.title: chart for category in layout.category for chart in category.chart}["upload norm"].margin
    assert (band.series[0].lower, band.series[0].value) == ("client/upload_norm/p05", "client/upload_norm/p50")


def test_event_records_carry_the_checksums_of_the_format(tmp_path: Path) -> None:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    writer = EventWriter(tmp_path)
    writer.scalars(1, {"round/nll": 1.0})
    writer.close()
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    begin = records = 0
    while begin < len(data):
        length = int.from_bytes(data[begin : begin + 8], "little")
        body = data[begin + 12 : begin + 12 + length]
        assert int.from_bytes(data[begin + 8 : begin + 12], "little") == masked_crc32c(data[begin : begin + 8])
        assert int.from_bytes(data[begin + 12 + length : begin + 16 + length], "little") == masked_crc32c(body)
        begin += 16 + length
        records += 1
    assert records == 2


def test_a_second_file_sorts_after_the_first_even_if_the_clock_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for clock in (1000.0, 1000.0, 500.0):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        EventWriter(tmp_path).close()
        names.append((set(os.listdir(tmp_path)) - set(names)).pop())
    assert names == sorted(names)


def test_without_tensorboard_the_run_goes_on_with_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("tensorboard"):
            raise ImportError("No module named 'tensorboard'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with Recorder(tmp_path) as recorder:
        recorder.describe("", {})
        for k in range(5):
            recorder.submit(k, k, {"round/nll": 1.0})
        recorder.submit(5, 5, {}, lazy=lambda: {"mcmc/rhat/max": 1.0})
    assert [row["round"] for row in rows(tmp_path)] == list(range(6))
    assert len(caplog.records) == 1
    assert "pip install tensorboard" in caplog.text


def test_curves_can_be_switched_off(tmp_path: Path) -> None:
    with Recorder(tmp_path, enabled=False) as recorder:
        recorder.submit(1, 1, {"round/nll": 1.0}, lazy=lambda: {"mcmc/rhat/max": 1.0})
    assert rows(tmp_path) == [{"round": 1, "bytes": 1, "round/nll": 1.0, "mcmc/rhat/max": 1.0}]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


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


# Progress


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


def console(terminal: bool = False, width: int = 200) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


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


# Report


def report(summary: dict[str, Any], path: str = "runs/one") -> str:
    out = console(width=100)
    out.print(summary_table(summary, path))
    return written(out)


def test_the_table_says_everything_a_person_asks() -> None:
    text = report(SUMMARY)
    for words in (
        "4 chains of 1,400 draws: 8,000 rounds, 10 clients, 650 parameters",
        "held-out accuracy       │ 0.9583",
        "held-out NLL            │ 0.2012 nats",
        "0.0312",
        "worst R-hat             │ 1.0142",
        "smallest bulk ESS       │ 521",
        "smallest tail ESS       │ 613",
        "Brier score             │ 0.0587",
        "adaptive ECE            │ 0.0298",
        "+1.23%",
        "uplink per client       │ 4.200 MB",
        "downlink per client     │ 83.200 MB",
        "19.8 times fewer bytes",
        "20.1 s",
        "2.500 ms",
        "runs/one",
        "fedsample monitor runs/one",
    ):
        assert words in text
    assert "RMSE" not in text


def test_a_regression_shows_its_own_scores() -> None:
    summary = {key: value for key, value in SUMMARY.items() if key not in ("accuracy", "ece")} | {"rmse": 53.25}
    text = report(summary)
    assert "held-out RMSE" in text
    assert "53.25" in text
    assert "accuracy" not in text


def test_what_is_missing_says_why() -> None:
    text = report(SUMMARY | {"chains": 1, "rhat_max": None, "accuracy": None, "predicted_variance_bias": math.nan})
    assert "worst R-hat             │ - (needs two chains)" in text
    assert "held-out accuracy       │ - (no held-out data)" in text
    assert "predicted variance bias │ - (not predicted for minibatches, drop-outs, temperature 0" in text
    assert "1 chain of 1,400 draws: 8,000 rounds" in text
    text = report(SUMMARY | {"adaptive_ece": None, "brier": None, "ess_tail_min": None})
    assert "adaptive ECE            │ - (needs all held-out rows in one process)" in text
    assert "Brier score             │ - (no held-out data)" in text
    assert "smallest tail ESS       │ - (nothing moved)" in text


def test_the_command_can_be_pasted_whatever_the_directory_is_called() -> None:
    assert "fedsample monitor 'my [bold]runs'" in report(SUMMARY, "my [bold]runs")
