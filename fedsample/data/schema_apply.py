"""Apply the agreed schema to rows: columns by name, text as indicators, labels as classes."""

from __future__ import annotations

import numpy as np

from fedsample.data.base import Array, FederatedData
from fedsample.data.labels import encode
from fedsample.data.schema import Schema, Target
from fedsample.data.schema_merge import check_names
from fedsample.data.split import Split
from fedsample.data.table import Table, nearest
from fedsample.errors import DataError


def fit(table: Table, schema: Schema, split: Split) -> FederatedData:
    """Convert the rows of some clients to the form that a model takes, not yet standardised.

    Args:
        table: the table as read from its source.
        schema: the schema that all clients agreed on (`merge`).
        split: the training and held-out rows, by client.

    Raises:
        DataError: if a column, category, label or shape is not in the agreed schema.
    """
    x, y = _features(table, table.x, schema), encode(table.y, _target(schema), table.name)
    if table.x_test is None or table.y_test is None:
        x_test, y_test = x[split.test], y[split.test]
    else:
        x_test = _features(table, table.x_test, schema)[split.test]
        y_test = encode(table.y_test, _target(schema), table.name)[split.test]
    order = np.concatenate(split.train)
    if not np.array_equal(order, np.arange(len(x))):  # do not copy rows that are already sorted by client
        x, y = x[order], y[order]
    return FederatedData(
        name=table.name,
        x=x,
        y=y,
        offsets=np.cumsum([0, *(len(rows) for rows in split.train)], dtype=np.int64),
        x_test=x_test,
        y_test=y_test,
        classes=schema.classes,
        feature_names=schema.feature_names if schema.features else (),
        client_names=split.names,
        class_names=schema.class_names,
    )


def _target(schema: Schema) -> Target:
    if schema.target is None:
        raise DataError("the clients agreed on quadratics, which have no rows: expected a schema of rows")
    return schema.target


def _features(table: Table, x: Array, schema: Schema) -> Array:
    """Convert rows (N, ...) as stored to (N, *schema.row_shape), contiguous; float64 if columns have names."""
    if schema.kind != "rows" or bool(table.feature_names) != bool(schema.features):
        forms = {"quadratic": "quadratics", "rows": "named columns" if schema.features else "arrays without names"}
        has = "named columns" if table.feature_names else "an array without names"
        raise DataError(f"{table.name} holds {has}, but the clients agreed on {forms[schema.kind]}: convert it")
    if not schema.features:
        if x.shape[1:] != schema.shape:
            raise DataError(
                f"{table.name} has rows of shape {x.shape[1:]}, but the clients agreed on {schema.shape}: reshape it"
            )
        return np.ascontiguousarray(x)
    names = table.feature_names
    check_names(table.name, names, [feature.name for feature in schema.features], "the agreed schema")
    held = table.categories or (None,) * len(names)
    place = {name: at for at, name in enumerate(names)}
    result = np.empty((len(x), *schema.row_shape))
    at = 0
    for feature in schema.features:
        column, own = x[:, place[feature.name]], held[place[feature.name]]
        if (own is None) != (feature.categories is None):
            kinds = ("numbers", "text") if own is None else ("text", "numbers")
            raise DataError(
                f"column {feature.name!r} of {table.name} holds {kinds[0]}, but the clients agreed on {kinds[1]}: "
                "store it alike on all clients"
            )
        width = len(feature.columns)
        if own is None or feature.categories is None:
            result[:, at] = column
        else:
            codes = _codes(table.name, feature.name, own, feature.categories)[column.astype(np.int64)]
            result[:, at : at + width] = np.eye(width)[codes]
        at += width
    return result


def _codes(table: str, column: str, own: tuple[str, ...], agreed: tuple[str, ...]) -> Array:
    """Position of each of a client's own categories among the agreed ones."""
    place = {category: at for at, category in enumerate(agreed)}
    for category in own:
        if category not in place:
            raise DataError(
                f"column {column!r} of {table} holds {category!r}, which is none of the {len(agreed)} agreed "
                f"categories.{nearest(category, agreed)} Correct it, or start again with this client's categories"
            )
    return np.array([place[category] for category in own], dtype=np.int64)
