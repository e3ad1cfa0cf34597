"""What a run has recorded as it is read back: rows, curves, and a console's text."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedsample.monitor import read_jsonl


def rows(path: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(path / "metrics.jsonl"))


def curves(path: Path) -> EventAccumulator:
    # One accumulator reads all files of a run in order, as TensorBoard does.
    accumulator = EventAccumulator(str(path))
    accumulator.Reload()
    return accumulator


def console(terminal: bool = False, width: int = 200) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
