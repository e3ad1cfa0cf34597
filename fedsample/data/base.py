"""A dataset partitioned over clients, from which targets, fleets and devices are built.

The rows of all clients are in one array, sorted by client, and `offsets` marks where each client's rows begin. So
unequal shares need no padding, client i is a view, and a client without rows is an empty slice, not a special case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedsample.errors import DataError

Task = Literal["classification", "regression"]
Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class FederatedData:
    """Training rows by client, and the test rows that the server scores on.

    Attributes:
        name: name of the data in tables and logs.
        x: (N, ...features) training rows, client after client; float64, or float32 if stored so.
        y: (N,) int64 labels 0 .. classes - 1, or float64 targets where `classes` is None.
        offsets: (n + 1,) int64; client i owns rows offsets[i]:offsets[i + 1], possibly none.
        x_test: (M, ...features) test rows, likewise; M may be 0.
        y_test: (M,) test targets, as `y`.
        classes: number of classes, >= 2; None for regression.
        feature_names: one per feature, row-major over the feature axes; empty: x0, x1, ...
        client_names: one per client; empty: "0", "1", ...
        class_names: each class's label in the source; empty: "0", "1", ...
        target_mean: subtracted from a regression target before it was stored here.
        target_scale: what it was then divided by; an error in the source's units is `target_scale` times the error
            here.

    Raises:
        DataError: if shapes, dtypes, offsets or labels do not fit, or there is NaN or infinity (names column and row).
    """

    name: str
    x: Array = field(repr=False)
    y: Array = field(repr=False)
    offsets: Array = field(repr=False)
    x_test: Array = field(repr=False)
    y_test: Array = field(repr=False)
    classes: int | None
    feature_names: tuple[str, ...] = field(default=(), repr=False)
    client_names: tuple[str, ...] = field(default=(), repr=False)
    class_names: tuple[str, ...] = field(default=(), repr=False)
    target_mean: float = 0.0
    target_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the arrays and fill in missing names."""
        _check_rows("x", self.x, "y", self.y, self.classes)
        _check_rows("x_test", self.x_test, "y_test", self.y_test, self.classes)
        if self.x_test.shape[1:] != self.x.shape[1:]:
            raise DataError(
                f"x_test has rows of shape {self.x_test.shape[1:]}, but x has rows of shape {self.x.shape[1:]}: "
                "give both the same features"
            )
        _check_offsets(self.offsets, len(self.x))
        for attribute, count, names in (
            ("feature_names", math.prod(self.x.shape[1:]), default_feature_names(self.x.shape[1:])),
            ("client_names", self.clients, tuple(str(i) for i in range(self.clients))),
            ("class_names", self.classes or 0, tuple(str(i) for i in range(self.classes or 0))),
        ):
            given = getattr(self, attribute)
            if given and len(given) != count:
                raise DataError(f"{attribute} has {len(given)} entries, expected {count} or none")
            object.__setattr__(self, attribute, tuple(given) or names)
        check_finite(self.x, self.feature_names, f"the training rows of {self.name}")
        check_finite(self.y, ("y",), f"the training rows of {self.name}")
        check_finite(self.x_test, self.feature_names, f"the test rows of {self.name}")
        check_finite(self.y_test, ("y",), f"the test rows of {self.name}")

    @property
    def clients(self) -> int:
        """Number of clients n, including those without rows."""
        return len(self.offsets) - 1

    @property
    def rows(self) -> Array:
        """Number of training rows of each client, (n,) int64."""
        return np.diff(self.offsets)

    @property
    def task(self) -> Task:
        """Task: classification or regression."""
        return "regression" if self.classes is None else "classification"

    def client(self, index: int) -> FederatedData:
        """Return one client's share as its device holds it: its training rows (views), no test rows."""
        if not 0 <= index < self.clients:
            raise DataError(f"there is no client {index}: {self.name} has clients 0 to {self.clients - 1}")
        first, last = int(self.offsets[index]), int(self.offsets[index + 1])
        return FederatedData(
            name=self.name,
            x=self.x[first:last],
            y=self.y[first:last],
            offsets=np.array([0, last - first], dtype=np.int64),
            x_test=self.x_test[:0],
            y_test=self.y_test[:0],
            classes=self.classes,
            feature_names=self.feature_names,
            client_names=(self.client_names[index],),
            class_names=self.class_names,
            target_mean=self.target_mean,
            target_scale=self.target_scale,
        )


def default_feature_names(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Default names: x0, x1, ... for rows of one axis; x[0,0], x[0,1], ... for images."""
    if len(shape) == 1:
        return tuple(f"x{i}" for i in range(shape[0]))
    return tuple(f"x[{','.join(map(str, index))}]" for index in np.ndindex(*shape))


def check_finite(values: Array, columns: Sequence[str], where: str) -> None:
    """Refuse NaN and infinity, naming the first column and row that holds one.

    Args:
        values: (N, ...features) of any dtype; only floats can fail.
        columns: one name per feature, row-major.
        where: description of the rows, for the message.

    Raises:
        DataError: if a value is not finite.
    """
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return
    flat = values.reshape(len(values), -1)
    row, column = (int(i) for i in np.argwhere(~np.isfinite(flat))[0])
    count = int((~np.isfinite(flat)).sum())
    more = f"and {count - 1} more like it" if count > 1 else "the only one"
    raise DataError(
        f"column {columns[column]!r} holds {flat[row, column]} in row {row} of {where} (the first row is 0; "
        f"{more}): expected finite numbers; drop such rows or fill them in"
    )


def _check_rows(x_name: str, x: Array, y_name: str, y: Array, classes: int | None) -> None:
    """Check shapes and dtypes of features and targets, and the range of the labels."""
    if x.ndim < 2 or x.dtype not in (np.float64, np.float32):
        raise DataError(
            f"{x_name} has shape {x.shape} and dtype {x.dtype}, expected (rows, ...features) in float64 or float32"
        )
    want = np.float64 if classes is None else np.int64
    if y.shape != (len(x),) or y.dtype != want:
        raise DataError(
            f"{y_name} has shape {y.shape} and dtype {y.dtype}, expected ({len(x)},) in {np.dtype(want)}, one per row"
        )
    if classes is None:
        return
    if classes < 2:
        raise DataError(f"classes = {classes}, expected at least 2: with one class there is nothing to learn")
    if y.size and not (0 <= y.min() and y.max() < classes):
        raise DataError(f"{y_name} holds labels {y.min()} to {y.max()}, expected 0 to {classes - 1}")


def _check_offsets(offsets: Array, rows: int) -> None:
    """Check that offsets are (n + 1,) int64 and rise from 0 to the number of rows."""
    if offsets.ndim != 1 or len(offsets) < 2 or offsets.dtype != np.int64:
        raise DataError(
            f"offsets has shape {offsets.shape} and dtype {offsets.dtype}, expected (clients + 1,) in int64"
        )
    if offsets[0] != 0 or offsets[-1] != rows or (np.diff(offsets) < 0).any():
        raise DataError(f"offsets must rise from 0 to the {rows} rows, got {offsets.tolist()}")
