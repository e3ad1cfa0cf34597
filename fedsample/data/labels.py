"""What is predicted: labels become classes 0 .. K - 1, measurements stay numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedsample.data.base import Array, Task
from fedsample.data.table import Table
from fedsample.errors import DataError


class Targets(NamedTuple):
    """Targets in the form that a model takes.

    Attributes:
        y: (N,) int64 classes, or float64.
        y_test: (M,) likewise; None where the table sets no test rows apart.
        class_names: the source's label of each class, in class order; empty for regression.
    """

    y: Array
    y_test: Array | None
    class_names: tuple[str, ...]

    @property
    def classes(self) -> int | None:
        """Number of classes; None for regression."""
        return len(self.class_names) or None


def targets(table: Table, task: Task | None) -> Targets:
    """Targets of a table for a task.

    The model decides the task: `linear` is regression even on whole numbers, `softmax` and `logistic` are
    classification. Where it leaves the choice open (an MLP, a convolutional network) the source decides, and failing
    that the values: text and whole numbers are labels, unless more than half of the whole numbers differ from each
    other; anything else is a measurement. Labels are any integers or text, {-1, 1} as well as {0, 1}; their sorted
    order gives the classes. Labels of training and test rows together make the classes.

    Args:
        table: what a reader found.
        task: "classification", "regression", or None to let the table decide.

    Raises:
        DataError: text or one repeated label where numbers or labels are needed.
    """
    y, y_test = table.y, table.y_test
    every = y if y_test is None else np.concatenate([y, y_test])
    if not len(y):
        raise DataError(f"{table.name} has no rows: expected at least one")
    task = task or table.task or _guess(every)
    if task == "regression":
        if every.dtype.kind == "U":
            raise DataError(
                f"the target of {table.name} is text such as {str(every[0])!r}, but the model predicts a number: "
                "choose model.name = softmax or logistic, or a numeric target"
            )
        return Targets(y.astype(np.float64), None if y_test is None else y_test.astype(np.float64), ())
    if table.task == "regression":
        raise DataError(f"{table.name} is a regression set, but the model predicts a class: choose model.name = linear")
    if every.dtype.kind == "f":
        odd = np.flatnonzero(~_whole(every))
        if len(odd):
            raise DataError(
                f"the target of {table.name} is {every[odd[0]]} in row {int(odd[0])}, but the model predicts a class: "
                "expected integers or text as labels; for numbers choose model.name = linear"
            )
        every = every.astype(np.int64)
    labels, codes = np.unique(every, return_inverse=True)
    if len(labels) < 2:
        raise DataError(f"every row of {table.name} has the label {labels[0].item()!r}: expected at least two classes")
    codes = codes.astype(np.int64)
    return Targets(
        codes[: len(y)],
        None if y_test is None else codes[len(y) :],
        tuple(str(label) for label in labels),
    )


def _whole(values: Array) -> Array:
    """(N,) bool: which floats are integers that int64 holds exactly."""
    return np.asarray((values == np.round(values)) & (np.abs(values) <= 2.0**53))


def _guess(values: Array) -> Task:
    """Labels or measurements, from the values alone."""
    if values.dtype.kind == "U":
        return "classification"
    whole = values.dtype.kind == "i" or bool(_whole(values).all())
    return "classification" if whole and 2 * len(np.unique(values)) <= len(values) else "regression"
