"""The run's recorder: `metrics.jsonl` and TensorBoard curves, written by threads that the run never waits for.

    submit -> [queue] -> rows thread: one line per logged round -> [queue] -> events thread: lazy values, event files

`submit` takes microseconds, never blocks and never raises. A full queue drops its oldest rows, a slow disk or import
delays curves and nothing else, and an error is logged once. Slow values, such as R-hat over all draws, are submitted
as a function (`lazy`) and computed in the events thread; a row waits for them at most `HOLD` seconds, and later ones
follow as a second object of the same round.

Curves against rounds lie in the run directory itself. Those against uplink bytes have tags of their own,
`uplink_bytes/<tag>`, in its sub-run `bytes`: two axes in one chart would make the rounds a vertical line at 0.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedsample.errors import RunDirectoryError
from fedsample.monitor.drop_queue import Description, DropQueue, Row, Scalars
from fedsample.monitor.events import BYTES, EventWriter
from fedsample.monitor.jsonl import JsonLines, read_jsonl, truncate_jsonl

QUEUE = 1024
LAZY_QUEUE = 3
HOLD = 0.8  # metrics.jsonl promises each row within a second
_BY_ROUND_ONLY = ("comm/", "fleet/", "time/")  # costs and participation: plotted against bytes they are meaningless
_log = logging.getLogger(__name__)


class Recorder:
    """Writes the metrics of a run; submit from one thread only.

    Args:
        path: the run directory.
        purge_step: on resume the first round that will be run again; later rows and points are void. None: a new run.
        enabled: whether to write TensorBoard files; `metrics.jsonl` is written in any case.
        queue: rows that may wait.
        lazy_queue: lazy values that may wait; further ones are dropped.

    Attributes:
        error: why `metrics.jsonl` lacks rows; None: it lacks none.

    Raises:
        RunDirectoryError: on resume, `metrics.jsonl` cannot be cut back.
    """

    def __init__(
        self,
        path: str | Path,
        purge_step: int | None = None,
        enabled: bool = True,
        *,
        queue: int = QUEUE,
        lazy_queue: int = LAZY_QUEUE,
    ) -> None:
        self.path = Path(path)
        self.error: RunDirectoryError | None = None
        metrics = self.path / "metrics.jsonl"
        self._purge_step, self._purge_bytes = purge_step, 0
        if purge_step is not None:
            truncate_jsonl(metrics, purge_step - 1)
            self._purge_bytes = 1 + max((int(row.get("bytes", -1)) for row in read_jsonl(metrics)), default=-1)
            if self._purge_bytes == 0:  # no row was kept: the description, if there is one, is written again
                self._purge_step = 0
        self._enabled = enabled
        self._finished = False
        self._deadline: float | None = None
        # Each is written by one thread only: the caller's, the events thread, the rows thread, the caller's.
        self._lazy_sent = self._lazy_done = self._lazy_lost = self._lazy_refused = 0
        self._lazy_limit = lazy_queue
        self._warned: set[str] = set()
        self._submitted: list[Row] = []
        self._lines = JsonLines(metrics)
        self._rows, self._events = DropQueue(queue), DropQueue(queue)
        self._threads = [
            threading.Thread(target=self._write_rows, name="fedsample-metrics", daemon=True),
            threading.Thread(target=self._write_events, name="fedsample-events", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def dropped(self) -> int:
        """Number of rows dropped from a full queue so far."""
        return self._rows.dropped

    @property
    def dropped_lazy(self) -> int:
        """Number of lazy values dropped so far because the events thread was behind."""
        return self._lazy_refused + self._lazy_lost

    def describe(
        self, config: str, hparams: Mapping[str, bool | float | str], metrics: Sequence[str] = ("round/nll",)
    ) -> None:
        """Write once per run the resolved configuration, hyper-parameters and layout; nothing on resume.

        Args:
            config: the configuration as TOML.
            hparams: flat names to plain values; other types are written as text, None is left out.
            metrics: tags for the hyper-parameters page; each must also be submitted as a scalar.
        """
        if not self._purge_step:  # None, or a run that starts again from round 0
            plain = {
                name: value if isinstance(value, (bool, int, float, str)) else str(value)
                for name, value in hparams.items()
                if value is not None
            }
            self._rows.put(Description(config, plain, tuple(metrics)))

    def submit(
        self,
        round: int,
        bytes_sent: int,
        scalars: Scalars,
        lazy: Callable[[], Scalars] | None = None,
    ) -> None:
        """Log a round; returns at once.

        Args:
            round: increasing.
            bytes_sent: uplink bytes per client so far, the steps of the curves `uplink_bytes/...`.
            scalars: tag to number; 0-d tensors are read later, so do not change them in place.
            lazy: computes further scalars in a thread; it must only read data that no longer change.
        """
        if lazy is not None and self._lazy_sent - self._lazy_done - self._lazy_lost >= self._lazy_limit:
            lazy = None
            self._lazy_refused += 1
        row = Row(round, int(bytes_sent), dict(scalars), lazy)
        if lazy is not None:
            row.done = threading.Event()
            self._lazy_sent += 1
        if scalars:
            self._submitted.append(row)
        lost = self._rows.put(row)
        if isinstance(lost, Row):
            lost.written = lost.drawn = True
            if lost.lazy is not None:
                self._lazy_sent -= 1
                self._lazy_refused += 1
        if len(self._submitted) > QUEUE:
            self.unwritten()

    def unwritten(self) -> list[tuple[int, int, dict[str, float]]]:
        """Round, bytes and scalars of rows that the log or the curves still lack; a checkpoint must contain them."""
        self._submitted = [row for row in self._submitted if not (row.written and row.drawn)]
        return [(r.round, r.bytes_sent, {tag: float(v) for tag, v in r.scalars.items()}) for r in self._submitted]

    def close(self, finished: bool = False, timeout: float = 30.0) -> None:
        """Write pending rows, and report what was lost; may be called twice.

        Args:
            finished: the run is complete, not interrupted.
            timeout: seconds to wait for lazy values and slow disks before abandoning them.
        """
        self._finished = self._finished or finished
        if self._deadline is None:
            self._deadline = time.monotonic() + timeout
        self._rows.close()
        for thread in self._threads:
            thread.join(max(0.0, self._deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            self._warn("close", "the last metrics were still being written after %.0f s and are left behind", timeout)
        lost = (self.dropped, self._events.dropped, self.dropped_lazy)
        if any(lost):
            self._warn(
                "dropped",
                "dropped because the disk or the processor was behind: %d rows of metrics, %d further points of curves "
                "and %d lazy values; the draws are complete. A larger monitor.every logs less",
                *lost,
            )

    def __enter__(self) -> Self:
        """Return itself, already running."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; the run counts as finished unless there was an exception."""
        self.close(finished=kind is None)

    def _write_rows(self) -> None:
        waiting: list[Row] = []  # written, but without their lazy values
        while not self._rows.ended:
            item = self._rows.get(0.1 if waiting else None)
            if item is not None:
                lost = self._events.put(item)
                if isinstance(lost, Row):
                    lost.drawn = True
                    if lost.done is not None:
                        self._lazy_lost += 1
                        lost.done.set()
            if isinstance(item, Row):
                if item.done is None or item.done.wait(max(0.0, self._hold(item) - time.monotonic())):
                    self._append(item, item.scalars | item.late)
                else:
                    self._append(item, item.scalars)
                    waiting.append(item)
            waiting = [row for row in waiting if not self._append_late(row)]
        for row in waiting:
            if row.done is not None:
                row.done.wait(max(0.0, (self._deadline or 0.0) - time.monotonic()))
            self._append_late(row)
        self._events.close()
        try:
            self._lines.close()
        except RunDirectoryError as error:
            self.error = error

    def _hold(self, row: Row) -> float:
        """When to stop waiting for a row's lazy values; at once when the run is closing, as nobody reads along then."""
        return row.born + HOLD if self._deadline is None else self._deadline

    def _append_late(self, row: Row) -> bool:
        if row.done is None or not row.done.is_set():
            return False
        self._append(row, row.late)
        return True

    def _append(self, row: Row, scalars: Mapping[str, Any]) -> None:
        if not scalars:
            return
        try:
            values = {tag: float(value) for tag, value in scalars.items()}
            self._lines.append({"round": row.round, "bytes": row.bytes_sent, **values})
            row.written = True
            self.error = None
        except RunDirectoryError as error:
            self.error = error
            self._warn("metrics", "%s; the run goes on, and the rows are tried again", error)
        except Exception as error:
            row.written = True
            self._warn("row", "the metrics of round %d are no numbers and were left out: %s", row.round, error)

    def _write_events(self) -> None:
        writers: list[EventWriter] = []
        while not self._events.ended:
            item = self._events.get(None)
            if isinstance(item, Row) and item.lazy is not None:
                self._evaluate(item)
            if item is not None and self._enabled:
                with self._curves():
                    for folder, purge in self._places()[len(writers) :]:
                        writers.append(EventWriter(folder, purge))
                    self._emit(writers, item)
            if isinstance(item, Row):
                item.drawn = True
        if writers and self._enabled and self._finished:
            with self._curves():
                writers[0].finished()
        for writer in writers:
            with self._curves():
                writer.close()

    def _evaluate(self, row: Row) -> None:
        try:
            row.late = dict(row.lazy()) if row.lazy is not None else {}
        except Exception as error:
            self._warn("lazy", "a metric of round %d could not be computed and is left out: %s", row.round, error)
        self._lazy_done += 1
        if row.done is not None:
            row.done.set()

    def _places(self) -> list[tuple[Path, int | None]]:
        """The folders of the two runs that TensorBoard sees, and the step from which each replaces earlier events."""
        again = self._purge_step is not None
        return [(self.path, self._purge_step), (self.path / "bytes", self._purge_bytes if again else None)]

    def _emit(self, writers: list[EventWriter], item: Row | Description) -> None:
        by_round, by_bytes = writers
        if isinstance(item, Description):
            by_round.text("config", f"```toml\n{item.config}\n```")
            by_round.hparams(item.hparams, item.metrics)
            by_round.layout()
        else:
            scalars = item.scalars | item.late
            by_round.scalars(item.round, scalars)
            bought = {BYTES + tag: value for tag, value in scalars.items() if not tag.startswith(_BY_ROUND_ONLY)}
            by_bytes.scalars(item.bytes_sent, bought)
        for writer in writers:
            writer.flush()

    @contextlib.contextmanager
    def _curves(self) -> Iterator[None]:
        """Turn an error into the end of the curves, and of nothing else."""
        try:
            yield
        except Exception as error:
            self._enabled = False
            advice = "install it with: pip install tensorboard" if isinstance(error, ImportError) else "check the disk"
            message = "TensorBoard curves end here (%s): %s. The run goes on; metrics.jsonl has all rows"
            self._warn("curves", message, error, advice)

    def _warn(self, topic: str, message: str, *values: object) -> None:
        """Log one warning per topic."""
        if topic not in self._warned:
            self._warned.add(topic)
            _log.warning(message, *values)


def quantiles(tag: str, values: Any) -> dict[str, float]:
    """Summarise one number per client: `<tag>/p05`, `/p50`, `/p95`; NaN (an absent client) is left out.

    Args:
        tag: such as `client/upload_norm`.
        values: array or tensor of any shape.
    """
    import numpy as np

    flat = np.asarray(values, dtype=np.float64).ravel()
    flat = flat[np.isfinite(flat)]
    if flat.size == 0:
        return {}
    low, middle, high = np.quantile(flat, (0.05, 0.5, 0.95))
    return {f"{tag}/p05": float(low), f"{tag}/p50": float(middle), f"{tag}/p95": float(high)}
