"""Read tables of named columns, CSV and Parquet, with pyarrow.

Numbers and booleans are kept; a column of text becomes positions among its categories, which are sorted. Once the
clients have agreed on the categories, `fit` turns it into one 0/1 column per category.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedsample.data.base import Array, check_finite
from fedsample.data.schema import MAX_CATEGORIES
from fedsample.data.table import Table, nearest
from fedsample.errors import DataError

_MANY_NUMBERS = 20  # a text column with more numbers than this is a measurement with a placeholder or typo


def read_columns(path: Path, kind: str, target: str | None, client_column: str | None) -> Table:
    """Read a CSV (with a header line) or Parquet file.

    Args:
        path: the file.
        kind: "csv" or "parquet".
        target: name of the column to predict: numbers, or text for classification.
        client_column: name of the column with each row's client; None: the file names no clients.

    Raises:
        DataError: if the file is unreadable, a column is unknown or repeated, has missing values or is no feature.
    """
    frame = _read_frame(path, kind)
    names = [str(name) for name in frame.column_names]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path.name} has more than one column called {repeated[0]!r}: give each its own name")
    if frame.num_rows == 0:
        raise DataError(f"{path.name} has a header but no rows: expected at least one row")
    if target is None:
        raise DataError(f"data.target is not set: name the column of {path.name} to predict, one of {_listed(names)}")
    for option, name in (("target", target), ("client_column", client_column)):
        if name is not None and name not in names:
            raise DataError(
                f"{path.name} has no column {name!r} (data.{option}).{nearest(name, names)} It has {_listed(names)}"
                + _separated(names)
            )
    if target == client_column:
        raise DataError(f"data.target and data.client_column are both {target!r}: expected two columns")

    blocks: list[Array] = []
    feature_names: list[str] = []
    categories: list[tuple[str, ...] | None] = []
    for name in names:
        if name not in (target, client_column):
            block, texts = _feature(_values(frame.column(name), name, path), name, path)
            blocks.append(block)
            feature_names.append(name)
            categories.append(texts)
    if not blocks:
        raise DataError(f"{path.name} has no column left for features besides {target!r}: add at least one")
    owners = None
    if client_column is not None:
        owners = _values(frame.column(client_column), client_column, path)
        if owners.dtype.kind == "f":
            raise DataError(
                f"column {client_column!r} of {path.name} holds fractions, expected integers or text to name clients"
            )
    return Table(
        name=path.stem,
        x=np.stack(blocks, axis=1),
        y=_values(frame.column(target), target, path),
        feature_names=tuple(feature_names),
        owners=owners,
        test_rows=frame.num_rows // 5,
        standardize=True,
        categories=tuple(categories),
    )


def _read_frame(path: Path, kind: str) -> Any:
    """Read a pyarrow.Table (pyarrow has no type stubs)."""
    import pyarrow

    try:
        if kind == "csv":
            import pyarrow.csv

            frame = pyarrow.csv.read_csv(str(path))
        else:
            import pyarrow.parquet

            frame = pyarrow.parquet.read_table(str(path))
        frame.column_names  # noqa: B018  decoded only when asked for
        return frame
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {path.name} as {kind}: {error}. Save it as UTF-8") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path.name} as {kind}: {error}. Check data.kind and the file") from error


def _values(column: Any, name: str, path: Path) -> Array:
    """Convert a column without missing values to (N,) int64, float64 or text."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    numeric = pyarrow.types.is_integer(kind) or pyarrow.types.is_boolean(kind)
    real = pyarrow.types.is_floating(kind) or pyarrow.types.is_decimal(kind)
    text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
    if pyarrow.types.is_binary(kind):
        raise DataError(f"column {name!r} of {path.name} holds text that is not UTF-8: save the file as UTF-8")
    if not (numeric or real or text or pyarrow.types.is_null(kind)):
        raise DataError(
            f"column {name!r} of {path.name} has type {kind}, expected numbers, booleans or text: convert it or drop it"
        )
    missing = np.array(column.is_null(nan_is_null=True).to_numpy(), dtype=bool)
    if text:
        values = np.asarray(column.to_pylist(), dtype=object)
        missing |= np.array([not value for value in values], dtype=bool)  # an empty field of a CSV file is no category
    if missing.any():
        raise DataError(
            f"column {name!r} of {path.name} has no value in row {int(missing.argmax())} (the first row is 0; "
            f"{int(missing.sum())} of {len(missing)} rows in all): drop those rows or fill them in"
        )
    if text:
        return values.astype(np.str_)
    try:
        array: Array = column.cast(pyarrow.int64() if numeric else pyarrow.float64()).to_numpy()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"column {name!r} of {path.name}: {error}; expected integers below 2^63") from error
    check_finite(array, (name,), path.name)
    return array


def _feature(values: Array, name: str, path: Path) -> tuple[Array, tuple[str, ...] | None]:
    """Convert to (N,) float64: numbers and None, or positions among the categories and the categories."""
    if values.dtype.kind != "U":
        return values.astype(np.float64), None
    categories, codes = np.unique(values, return_inverse=True)
    if len(categories) > MAX_CATEGORIES:
        odd = next((row for row, value in enumerate(values) if not _is_number(str(value))), 0)
        raise DataError(
            f"column {name!r} of {path.name} holds text with {len(categories)} different values, expected at most "
            f"{MAX_CATEGORIES} categories: drop it if it is an identifier; if it should hold numbers, row {odd} (the "
            f"first row is 0) reads {str(values[odd])!r}"
        )
    numbers = np.array([_is_number(str(category)) for category in categories], dtype=bool)
    if _MANY_NUMBERS < numbers.sum() < len(numbers) and 2 * numbers[codes].sum() > len(codes):
        odd = int(np.flatnonzero(~numbers[codes])[0])
        raise DataError(
            f"column {name!r} of {path.name} holds {int(numbers.sum())} different numbers, but row {odd} (the first "
            f"row is 0) reads {str(values[odd])!r}: expected numbers alone; correct that cell, or drop the row"
        )
    return codes.astype(np.float64), tuple(categories.tolist())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _listed(names: list[str]) -> str:
    """List column names, shortened beyond 40."""
    shown = ", ".join(map(repr, names[:40]))
    return shown if len(names) <= 40 else f"{shown} and {len(names) - 40} more"


def _separated(names: list[str]) -> str:
    """Advice for a file whose separators are not commas, so that it has a single column."""
    if len(names) > 1 or not any(mark in names[0] for mark in ";\t|"):
        return ""
    return ": its columns are not separated by commas. Save it with commas, and numbers with decimal points"
