"""Targets: labels become classes 0 .. K - 1, measurements stay numbers."""

from __future__ import annotations

import numpy as np

from fedsample.data.base import Array, Task
from fedsample.data.schema import MAX_LABELS, Target
from fedsample.data.table import Table
from fedsample.errors import DataError


def target_of(table: Table, task: Task | None) -> Target:
    """Determine whether a table's targets are labels or numbers, for a task.

    The model decides the task: `linear` is regression even on whole numbers, `softmax` and `logistic` are
    classification. If it leaves the choice open (an MLP, a convolutional network) the source decides, and failing
    that the values of all clients together: text and whole numbers are labels, unless more than half of the whole
    numbers differ from each other; anything else is a measurement. Labels are any integers or text, {-1, 1} as well as
    {0, 1}; their sorted order gives the classes. Labels of training and test rows together make the classes.

    Args:
        table: the table as read from its source.
        task: "classification", "regression", or None to let the data decide.

    Raises:
        DataError: if there are no rows, text where numbers are needed, fractions where labels are needed, or too many
            labels.
    """
    if not len(table.y):
        raise DataError(f"{table.name} has no rows: expected at least one")
    every = table.y if table.y_test is None else np.concatenate([table.y, table.y_test])
    if (task or table.task) == "regression":
        if every.dtype.kind == "U":
            raise DataError(
                f"the target of {table.name} is text such as {str(every[0])!r}, but the model predicts a number: "
                "choose model.name = softmax or logistic, or a numeric target"
            )
        return Target("number")
    if table.task == "regression":
        raise DataError(f"{table.name} is a regression set, but the model predicts a class: choose model.name = linear")
    odd = np.flatnonzero(~_whole(every)) if every.dtype.kind == "f" else np.array([], dtype=np.int64)
    if len(odd) and task is None:
        return Target("number")
    if len(odd):
        raise DataError(
            f"the target of {table.name} is {every[odd[0]]} in row {int(odd[0])}, but the model predicts a class: "
            "expected integers or text as labels; for numbers choose model.name = linear"
        )
    text = every.dtype.kind == "U"
    labels = np.unique(every if text else every.astype(np.int64))
    decided = (task or table.task) is not None or text
    if len(labels) > MAX_LABELS:
        if not decided:
            return Target("number")
        raise DataError(
            f"the target of {table.name} has {len(labels)} different labels, expected at most {MAX_LABELS}: for "
            "numbers choose model.name = linear"
        )
    return Target("labels" if decided else "undecided", tuple(labels.tolist()))


def encode(y: Array, target: Target, name: str) -> Array:
    """Encode targets for a model: (N,) int64 positions in the agreed labels, or float64 numbers.

    Args:
        y: (N,) integers, floats or text, as stored in the source.
        target: the target that the clients agreed on.
        name: name of the data, for the message.

    Raises:
        DataError: if a target is not among the agreed labels, or is of another kind.
    """
    text = y.dtype.kind == "U"
    if target.kind == "number":
        if text:
            raise DataError(f"the target of {name} is text, but the clients agreed on numbers: convert it")
        return y.astype(np.float64)
    known = np.asarray(target.values)
    shown = ", ".join(map(repr, target.values[:10])) + (", ..." if len(target.values) > 10 else "")
    if text != (known.dtype.kind == "U") or (y.dtype.kind == "f" and not _whole(y).all()):
        raise DataError(f"the target of {name} has dtype {y.dtype}, but the clients agreed on the labels {shown}")
    y = y if text else y.astype(np.int64)
    codes = np.searchsorted(known, y).clip(max=len(known) - 1)
    wrong = np.flatnonzero(known[codes] != y)
    if len(wrong):
        raise DataError(
            f"the target of {name} is {y[wrong[0]].item()!r} in row {int(wrong[0])} (the first row is 0), but the "
            f"clients agreed on the labels {shown}: correct it, or start again with this client's labels"
        )
    return codes.astype(np.int64)


def _whole(values: Array) -> Array:
    """Mask (N,) bool of floats that are exact integers, at most 2^53."""
    return np.asarray((values == np.round(values)) & (np.abs(values) <= 2.0**53))
