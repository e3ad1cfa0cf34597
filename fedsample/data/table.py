"""Rows as stored in a source: what the readers pass to `load`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedsample.data.base import Array, Task
from fedsample.errors import DataError


@dataclass(frozen=True, eq=False)
class Table:
    """A table as read from its source.

    Attributes:
        name: name of the data.
        x: (N, ...features) float64 or float32, finite; for a column of text, positions among its categories.
        y: (N,) targets: integers, finite floats or text.
        feature_names: one per column; empty: an array, whose entries have no names.
        owners: (N,) integer or text label of each row's client; None: the source names no clients.
        x_test: (M, ...features) test rows in the source; None: test rows are taken from `x`.
        y_test: (M,) their targets.
        task: the task according to the source; None: its targets decide.
        test_rows: number of rows of `x` that the source's own rule holds out (see `load`); None: no such rule.
        standardize: whether to standardise if the configuration leaves it open.
        categories: per column, the different values of a text column, sorted, or None for numbers; empty: all numbers.
    """

    name: str
    x: Array
    y: Array
    feature_names: tuple[str, ...]
    owners: Array | None = None
    x_test: Array | None = None
    y_test: Array | None = None
    task: Task | None = None
    test_rows: int | None = None
    standardize: bool = False
    categories: tuple[tuple[str, ...] | None, ...] = ()


def source_path(file: str | None, kind: str) -> Path:
    """Return the path that `data.file` names.

    Raises:
        DataError: if no file is named, or it does not exist.
    """
    if file is None:
        raise DataError(f'data.kind = "{kind}" reads a file, but data.file is not set: name the file')
    path = Path(file)
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise DataError(
            f"data.file = {file!r} {found}: expected a {kind} file; check the path (relative paths start here)"
        )
    return path


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint " Did you mean 'x'?" if a known name is close, else an empty text."""
    close = difflib.get_close_matches(name.lower(), {k.lower() for k in known}, n=1)
    original = {k.lower(): k for k in known}
    return f" Did you mean {original[close[0]]!r}?" if close else ""
