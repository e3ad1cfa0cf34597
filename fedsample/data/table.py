"""Rows as a source holds them, before anything is decided: the hand-over from the readers to `load`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedsample.data.base import Array, Task
from fedsample.errors import DataError


@dataclass(frozen=True, eq=False)
class Table:
    """What a reader found.

    Attributes:
        name: what to call the data.
        x: (N, ...features) float64 or float32, finite; of a column of text the positions of its values among its
            categories.
        y: (N,) integers, finite floats or text.
        feature_names: one a column; empty: an array, whose entries have no names.
        owners: (N,) integer or text label of each row's client; None where the source names no clients.
        x_test: (M, ...features) test rows that the source sets apart; None: the test rows come out of `x`.
        y_test: (M,), likewise.
        task: what the source says is predicted; None: its targets decide.
        test_rows: test rows of `x` that the source's own rule sets apart (see `load`); None: it has no such rule.
        standardize: what to do where the configuration does not say.
        categories: of each column that holds text its different values, sorted; None for numbers. Empty: all numbers.
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
    """The file that `data.file` names; it must exist.

    Raises:
        DataError: no file is named, or there is none of that name.
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
    """The hint `Did you mean 'x'?` with a space before it, where a known name is close; else nothing."""
    close = difflib.get_close_matches(name.lower(), {k.lower() for k in known}, n=1)
    original = {k.lower(): k for k in known}
    return f" Did you mean {original[close[0]]!r}?" if close else ""
