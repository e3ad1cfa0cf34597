"""The recorder's curves: right when read back by TensorBoard, and none without it."""

from __future__ import annotations

import builtins
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from recorded import curves, rows

from fedsample.monitor import Recorder
from fedsample.monitor.events import LAYOUT, EventWriter


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
