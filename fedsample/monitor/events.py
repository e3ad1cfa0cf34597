"""TensorBoard event files, written with nothing but TensorBoard's own message types.

`torch.utils.tensorboard` takes a second to import and starts a thread for every file; the message types load in ten
milliseconds, and a record is a length, the message, and a checksum of each. What TensorBoard asks of a run:

- hyper-parameters lie in the run itself, not in a sub-run, and each metric named there also exists as a scalar;
- the layout of the custom-scalars page and the texts are written once, not again on resume;
- a resumed run opens a new file, whose name sorts after the others, and first says from which step on it replaces
  what they hold (`purge_step`). That voids every curve of the run, so curves over another kind of step need a run, and
  a writer, of their own; a chart shows all runs that have its tag, so they need tags of their own too.

Reference: TensorFlow's `record_writer.h` (record format); RFC 3720, appendix B.4 (CRC-32C).
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BYTES = "uplink_bytes/"  # prefix of tags whose steps are the bytes sent per client
LAYOUT: dict[str, dict[str, Sequence[str]]] = {
    "Quality": {
        "held-out accuracy": ["round/accuracy"],
        "held-out NLL": ["round/nll"],
        "Brier score": ["round/brier"],
        "ECE": ["round/ece"],
    },
    "Mixing": {"R-hat": ["mcmc/rhat/.*"], "effective sample size": ["mcmc/ess/.*"]},
    "Clients": {"upload norm": ("client/upload_norm/p50", "client/upload_norm/p05", "client/upload_norm/p95")},
    "Cost": {"bytes": ["comm/.*_bytes"], "seconds by phase": ["time/.*"]},
    "Against the bytes that a client has sent": {
        "held-out accuracy by bytes": [BYTES + "round/accuracy"],
        "held-out NLL by bytes": [BYTES + "round/nll"],
        "Brier score by bytes": [BYTES + "round/brier"],
        "ECE by bytes": [BYTES + "round/ece"],
        "R-hat by bytes": [BYTES + "mcmc/rhat/.*"],
        "effective sample size by bytes": [BYTES + "mcmc/ess/.*"],
    },
}


class EventWriter:
    """Appends to one new event file in `folder`.

    folder: of the run; created if missing.
        folder: the run, made if need be.
        purge_step: events of earlier files from this step on are void; None for a new run.

    Raises:
        ImportError: TensorBoard is not installed.
        OSError: the file cannot be written; all methods raise it too.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / _next_name(folder), "xb")
        self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(self._event(wall_time=time.time(), step=purge_step, session_log=start))
        self.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve; values that are not finite are left out."""
        finite = [(tag, float(value)) for tag, value in values.items() if math.isfinite(value)]
        if finite:
            self._add(step, [self._summary.Value(tag=tag, simple_value=value) for tag, value in finite])

    def text(self, tag: str, text: str) -> None:
        """Add a page of text (Markdown)."""
        self._add(0, [self._tensor(tag, text.encode(), "text", shape=[1])])

    def layout(self) -> None:
        """Arrange the custom-scalars page: category -> chart -> tags; a tuple is (middle, lower, upper) of a band."""
        from tensorboard.plugins.custom_scalar import layout_pb2

        def chart(title: str, tags: Sequence[str]) -> Any:
            if isinstance(tags, tuple):
                value, lower, upper = tags
                band = layout_pb2.MarginChartContent.Series(value=value, lower=lower, upper=upper)
                return layout_pb2.Chart(title=title, margin=layout_pb2.MarginChartContent(series=[band]))
            return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=tags))

        page = layout_pb2.Layout(
            category=[
                layout_pb2.Category(title=title, chart=[chart(*item) for item in charts.items()])
                for title, charts in LAYOUT.items()
            ]
        )
        self._add(0, [self._tensor("custom_scalars__config__", page.SerializeToString(), "custom_scalars", shape=[])])

    def hparams(self, values: Mapping[str, bool | float | str], metrics: Sequence[str]) -> None:
        """Register the run on the hyper-parameters page.

        Args:
            values: flat names, such as `uplink.k`, to plain values.
            metrics: tags of scalars that this run also writes.
        """
        from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

        kinds = {bool: "DATA_TYPE_BOOL", int: "DATA_TYPE_FLOAT64", float: "DATA_TYPE_FLOAT64", str: "DATA_TYPE_STRING"}
        start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        infos = []
        for name, value in values.items():
            infos.append(api_pb2.HParamInfo(name=name, type=api_pb2.DataType.Value(kinds[type(value)])))
            if isinstance(value, bool):
                start.hparams[name].bool_value = value
            elif isinstance(value, str):
                start.hparams[name].string_value = value
            else:
                start.hparams[name].number_value = value
        experiment = api_pb2.Experiment(
            hparam_infos=infos, metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics]
        )
        self._hparams("experiment", experiment=experiment)
        self._hparams("session_start_info", session_start_info=start)

    def finished(self) -> None:
        """Mark the run as complete on the hyper-parameters page; TensorBoard believes the first mark only."""
        from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.Value("STATUS_SUCCESS"), end_time_secs=time.time())
        self._hparams("session_end_info", session_end_info=end)

    def flush(self) -> None:
        """Flush to the operating system, where TensorBoard sees it."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()

    def _hparams(self, name: str, **content: Any) -> None:
        from tensorboard.plugins.hparams import plugin_data_pb2

        data = plugin_data_pb2.HParamsPluginData(version=0, **content)
        self._add(0, [self._summary.Value(tag=f"_hparams_/{name}", metadata=self._metadata("hparams", data))])

    def _tensor(self, tag: str, content: bytes, plugin: str, shape: list[int]) -> Any:
        from tensorboard.compat.proto import tensor_pb2, tensor_shape_pb2, types_pb2

        dims = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=n) for n in shape])
        tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[content], tensor_shape=dims)
        return self._summary.Value(tag=tag, tensor=tensor, metadata=self._metadata(plugin))

    def _metadata(self, plugin: str, data: Any = None) -> Any:
        from tensorboard.compat.proto import summary_pb2

        content = b"" if data is None else data.SerializeToString()
        named = summary_pb2.SummaryMetadata.PluginData(plugin_name=plugin, content=content)
        return summary_pb2.SummaryMetadata(plugin_data=named)

    def _add(self, step: int, values: Sequence[Any]) -> None:
        self._write(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def _write(self, event: Any) -> None:
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(length + _masked_crc(length) + data + _masked_crc(data))


def _next_name(folder: Path) -> str:
    """Name a file to sort after the folder's other event files: TensorBoard reads them in order and never goes back."""
    others = sorted(file.name for file in folder.glob("events.out.tfevents.*.fedsample"))
    second = int(time.time())
    if others:
        second = max(second, int(others[-1].split(".")[3]) + 1)
    return f"events.out.tfevents.{second:010d}.fedsample"


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
