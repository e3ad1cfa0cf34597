"""Merge the clients' schemas into one: what must be equal on all, and what is the union over all.

Columns are matched by name, in the order of client 0. Categories and labels of some clients belong to all: the merged
schema is the schema of all clients' rows in one file.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedsample.data.base import Task
from fedsample.data.labels import target_of
from fedsample.data.schema import MAX_CATEGORIES, MAX_LABELS, Feature, Label, Schema, Target
from fedsample.data.table import Table, nearest
from fedsample.errors import ConfigError, DataError


def table_schema(table: Table, task: Task | None, standardize: bool | None, rows: int | None = None) -> Schema:
    """Make the schema of one source.

    Args:
        table: the table as read from its source.
        task: what the model predicts (`fedsample.models.task_of`).
        standardize: the setting; None: the source's own rule.
        rows: number of the source's rows that are this client's; None: all.

    Raises:
        DataError: if the targets do not fit the task.
    """
    categories = table.categories or (None,) * len(table.feature_names)
    features = tuple(map(Feature, table.feature_names, categories))
    test = 0 if table.y_test is None else len(table.y_test)
    return Schema(
        kind="rows",
        shape=tuple(table.x.shape[1:]),
        features=features,
        target=target_of(table, task),
        rows=len(table.y) + test if rows is None else rows,
        standardize=table.standardize if standardize is None else standardize,
    )


def merge(
    schemas: Sequence[Schema],
    features: Sequence[str] | None = None,
    labels: Sequence[Label] | None = None,
    names: Sequence[str] = (),
) -> Schema:
    """Merge the schemas of all clients.

    Args:
        schemas: one per client, in client order.
        features: the names of the columns in the order to use, where the experiment states them.
        labels: all labels that may occur, where the experiment states them.
        names: names of the clients in errors; empty: client 0, client 1, ...

    Raises:
        DataError: if clients differ in what must be equal; names the client and the column.
        ConfigError: if the experiment states features or labels that nothing could hold.
    """
    if not schemas:
        raise DataError("got no schemas: at least one client is needed")
    names = names or [f"client {client}" for client in range(len(schemas))]
    first = schemas[0]
    for name, schema in zip(names[1:], schemas[1:], strict=True):
        _alike(name, schema, names[0], first)
    if first.kind == "quadratic":
        if features is not None or labels is not None:
            raise ConfigError("data.features and data.labels describe rows, but the clients are quadratic: drop them")
        return Schema("quadratic", first.shape, rows=sum(schema.rows for schema in schemas))
    rows = sum(schema.rows for schema in schemas)
    target = _target([schema.target or Target("number") for schema in schemas], names, rows, labels)
    agreed = _features(schemas, names, features)
    for name, schema in zip(names[1:], schemas[1:], strict=True):
        _alike_scale(name, schema, names[0], first)
    return Schema("rows", first.shape, agreed, target, rows, first.standardize)


def check_names(who: str, got: Sequence[str], expected: Sequence[str], whose: str) -> None:
    """Refuse a missing or an extra column, naming the nearest.

    Raises:
        DataError: if the names differ as sets.
    """
    missing = [name for name in expected if name not in set(got)]
    extra = [name for name in got if name not in set(expected)]
    if missing:
        hint = nearest(missing[0], extra or got)
        raise DataError(
            f"{who} has no column {missing[0]!r}, which {whose} has.{hint} Every client needs the same columns: rename "
            "or add it"
        )
    if extra:
        raise DataError(
            f"{who} has a column {extra[0]!r}, which {whose} has not.{nearest(extra[0], expected)} Every client needs "
            "the same columns: rename or drop it"
        )


def _alike(client: str, schema: Schema, other: str, first: Schema) -> None:
    """Refuse differences in kind or shape, which no union resolves."""
    if schema.kind != first.kind or bool(schema.features) != bool(first.features):
        forms = [
            "a quadratic" if each.kind == "quadratic" else "named columns" if each.features else "arrays"
            for each in (schema, first)
        ]
        raise DataError(f"{client} holds {forms[0]}, {other} {forms[1]}: give all clients one kind of data")
    if not schema.features and schema.shape != first.shape:
        what = "parameters" if schema.kind == "quadratic" else "rows"
        raise DataError(
            f"{client} has {what} of shape {schema.shape}, {other} of shape {first.shape}: expected the same"
        )


def _alike_scale(client: str, schema: Schema, other: str, first: Schema) -> None:
    """Refuse clients that differ in whether their rows are standardised."""
    if schema.standardize != first.standardize:
        does = ("is", "is not") if schema.standardize else ("is not", "is")
        raise DataError(
            f"by its kind of source {client} {does[0]} standardised, and {other} {does[1]}: set "
            "data.standardize to true or false"
        )


def _features(schemas: Sequence[Schema], names: Sequence[str], stated: Sequence[str] | None) -> tuple[Feature, ...]:
    """Merge the columns, in order, each with the categories of all clients."""
    if not schemas[0].features:
        if stated is not None:
            raise ConfigError("data.features names columns, but the clients hold arrays without names: drop it")
        return ()
    order = [feature.name for feature in schemas[0].features] if stated is None else list(stated)
    if len(set(order)) < len(order):
        raise ConfigError(f"data.features names a column twice: {order}; expected each once")
    held = []
    for client, schema in zip(names, schemas, strict=True):
        found = {feature.name: feature for feature in schema.features}
        whose = "data.features" if stated is not None else names[0]
        check_names(client, list(found), order, whose)
        held.append(found)
    return tuple(_feature(name, [found[name] for found in held], names) for name in order)


def _feature(name: str, held: Sequence[Feature], names: Sequence[str]) -> Feature:
    union: set[str] = set()
    for client, feature in zip(names, held, strict=True):
        if (feature.categories is None) != (held[0].categories is None):
            kinds = ["text" if each.categories is not None else "numbers" for each in (feature, held[0])]
            raise DataError(
                f"column {name!r} holds {kinds[0]} on {client} and {kinds[1]} on {names[0]}: store it alike (a "
                "CSV column whose every value reads as a number holds numbers; Parquet keeps text as text)"
            )
        union.update(feature.categories or ())
    if len(union) > MAX_CATEGORIES:
        raise DataError(
            f"column {name!r} holds text with {len(union)} different values over all clients, expected at most "
            f"{MAX_CATEGORIES} categories: drop it if it is an identifier"
        )
    return Feature(name, None if held[0].categories is None else tuple(sorted(union)))


def _target(targets: Sequence[Target], names: Sequence[str], rows: int, stated: Sequence[Label] | None) -> Target:
    """Merge the targets: numbers, or the labels of all clients."""
    if stated is not None:
        return _stated(targets, names, stated)
    kinds = [target.kind for target in targets]
    if "number" in kinds:
        if "labels" in kinds:
            client, other = names[kinds.index("labels")], names[kinds.index("number")]
            raise DataError(f"{client} has labels to predict, {other} numbers: expected the same on all clients")
        return Target("number")
    for client, target in zip(names, targets, strict=True):
        if type(target.values[0]) is not type(targets[0].values[0]):
            raise DataError(
                f"{client} has labels such as {target.values[0]!r}, {names[0]} such as {targets[0].values[0]!r}: "
                "expected whole numbers on all clients, or text on all"
            )
    values = sorted({value for target in targets for value in target.values})
    if "labels" not in kinds and (2 * len(values) > rows or len(values) > MAX_LABELS):
        return Target("number")
    if len(values) < 2:
        whose = names[0] if len(names) == 1 else "all clients"
        raise DataError(f"every row of {whose} has the label {values[0]!r}: expected at least two classes")
    if len(values) > MAX_LABELS:
        raise DataError(f"the clients have {len(values)} labels together, expected at most {MAX_LABELS}")
    return Target("labels", tuple(values))


def _stated(targets: Sequence[Target], names: Sequence[str], stated: Sequence[Label]) -> Target:
    """Return the labels that the experiment states, if every client's labels are among them."""
    if not 2 <= len(set(stated)) == len(stated) <= MAX_LABELS or len({type(label) for label in stated}) > 1:
        raise ConfigError(
            f"data.labels = {list(stated)[:10]}, expected 2 to {MAX_LABELS} different labels, all whole numbers or all "
            "text"
        )
    for client, target in zip(names, targets, strict=True):
        if target.kind == "number":
            raise DataError(f"{client} has numbers to predict, but data.labels states labels: drop it")
        wrong = [value for value in target.values if value not in set(stated)]
        if wrong:
            raise DataError(
                f"{client} has the label {wrong[0]!r}, expected one of data.labels = {list(stated)[:10]}: "
                "correct its data or add the label"
            )
    return Target("labels", tuple(sorted(stated)))
