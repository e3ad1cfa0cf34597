"""Schemas: what clients must agree on before their rows can be modelled together: features, target and scaling.

A schema travels as JSON between parties that do not trust each other, so `from_json` checks the type, bounds and order
of every field, and refuses anything else.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NoReturn, cast

from fedsample.data.base import default_feature_names
from fedsample.errors import DataError

MAX_CATEGORIES = 256  # a text column with more is far more often an identifier or a typo than a feature
MAX_LABELS = 1 << 16
_MAX_JSON = 1 << 25  # characters
_MAX_TEXT = 4096  # characters of a name, category or label
_MAX_AXES = 8
_MAX_SIZE = 1 << 26  # numbers per row
_MAX_ROWS = 1 << 53  # largest count that float64 holds exactly

Label = int | str


@dataclass(frozen=True)
class Feature:
    """A named column.

    Attributes:
        name: name of the column.
        categories: the texts that it may hold, sorted; None: it holds numbers.
    """

    name: str
    categories: tuple[str, ...] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that a model sees: the number itself, or one 0/1 column per category."""
        if self.categories is None:
            return (self.name,)
        return tuple(f"{self.name}={category}" for category in self.categories)


@dataclass(frozen=True)
class Target:
    """The target to predict.

    Attributes:
        kind: "number"; "labels"; or, for one client if the model leaves the choice open, "undecided": whole numbers,
            which are labels if all clients together repeat them often enough.
        values: the labels, sorted, all whole numbers or all text; empty for numbers.
    """

    kind: Literal["number", "labels", "undecided"]
    values: tuple[Label, ...] = ()


@dataclass(frozen=True)
class Schema:
    """The form of a client's data, or the form that all clients agreed on.

    Attributes:
        kind: "rows", or "quadratic": potentials without rows.
        shape: shape of a row as stored, where a column of text is one entry; (d,) for a quadratic.
        features: one per column, in order; empty: the row is an array whose entries have no names.
        target: the target to predict; None for a quadratic.
        rows: number of rows, held-out ones included; of all clients together in the agreed schema.
        standardize: whether features and a numeric target are scaled to mean 0 and variance 1.
    """

    kind: Literal["rows", "quadratic"]
    shape: tuple[int, ...]
    features: tuple[Feature, ...] = ()
    target: Target | None = None
    rows: int = 0
    standardize: bool = False

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row as a model sees it."""
        return (sum(len(feature.columns) for feature in self.features),) if self.features else self.shape

    @property
    def feature_names(self) -> tuple[str, ...]:
        """One name per number of the row that a model sees, row-major."""
        if not self.features:
            return default_feature_names(self.shape)
        return tuple(name for feature in self.features for name in feature.columns)

    @property
    def classes(self) -> int | None:
        """Number of classes; None where a number is predicted.

        Raises:
            DataError: if this is a client's own schema with an undecided target, or a quadratic.
        """
        if self.target is None or self.target.kind == "undecided":
            held = "a quadratic" if self.target is None else "one client's own schema"
            raise DataError(f"got {held}, expected rows whose clients have agreed on the target: merge their schemas")
        return None if self.target.kind == "number" else len(self.target.values)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The label of each class as text; empty where a number is predicted."""
        return () if self.classes is None or self.target is None else tuple(map(str, self.target.values))

    def to_json(self) -> str:
        """Write as JSON, for `Schema.from_json`."""
        target = None if self.target is None else {"kind": self.target.kind, "values": list(self.target.values)}
        features = [
            {"name": each.name, "categories": None if each.categories is None else list(each.categories)}
            for each in self.features
        ]
        fields = {"kind": self.kind, "shape": list(self.shape), "features": features, "target": target}
        return json.dumps({**fields, "rows": self.rows, "standardize": self.standardize})

    @classmethod
    def from_json(cls, text: str) -> Schema:
        """Read what `to_json` wrote, from a party that is not trusted.

        Raises:
            DataError: if `to_json` of a valid schema cannot have written the text.
        """
        if len(text) > _MAX_JSON:
            _refuse("schema", f"{len(text)} characters", f"at most {_MAX_JSON}")
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the schema is no JSON: {error}. Expected the output of Schema.to_json") from None
        _keys("schema", fields, ("kind", "shape", "features", "target", "rows", "standardize"))
        kind = _one_of("kind", fields["kind"], ("rows", "quadratic"))
        shape = tuple(_whole("shape", size, 1, _MAX_SIZE) for size in _list("shape", fields["shape"], _MAX_AXES))
        if not shape or math.prod(shape) > _MAX_SIZE or (kind == "quadratic" and len(shape) != 1):
            _refuse("shape", shape, f"at least one axis (for a quadratic exactly one), at most {_MAX_SIZE} numbers")
        features = tuple(_feature(each) for each in _list("features", fields["features"], _MAX_SIZE))
        if features and ((len(features),) != shape or len({each.name for each in features}) < len(features)):
            _refuse("features", f"{len(features)} columns", f"{shape} of them, with different names")
        if (kind == "quadratic") != (fields["target"] is None) or (kind == "quadratic" and features):
            _refuse("target", fields["target"], "one for rows; none, and no features, for a quadratic")
        standardize = fields["standardize"]
        if type(standardize) is not bool or (standardize and kind == "quadratic"):
            _refuse("standardize", standardize, "true or false, and false for a quadratic")
        return cls(
            cast(Literal["rows", "quadratic"], kind),
            shape,
            features,
            None if fields["target"] is None else _target(fields["target"]),
            _whole("rows", fields["rows"], 0, _MAX_ROWS),
            standardize,
        )


def _feature(value: Any) -> Feature:
    _keys("feature", value, ("name", "categories"))
    name = _text("feature name", value["name"])
    if value["categories"] is None:
        return Feature(name)
    categories = [_text("category", each) for each in _list("categories", value["categories"], MAX_CATEGORIES)]
    if not categories or not all(categories):
        _refuse("categories", categories, "at least one, none of them empty")
    return Feature(name, tuple(_rising("categories", categories)))


def _target(value: Any) -> Target:
    _keys("target", value, ("kind", "values"))
    kind = _one_of("target", value["kind"], ("number", "labels", "undecided"))
    found = _list("labels", value["values"], MAX_LABELS)
    values: list[Any]
    if found and isinstance(found[0], str):
        values = [_text("label", each) for each in found]
    else:
        values = [_whole("label", each, -(1 << 63), (1 << 63) - 1) for each in found]
    if bool(values) == (kind == "number") or (kind == "undecided" and isinstance(values[0], str)):
        _refuse("labels", values[:3], "none for numbers, else at least one, and whole numbers where undecided")
    return Target(cast(Literal["number", "labels", "undecided"], kind), tuple(_rising("labels", values)))


def _refuse(what: str, got: Any, expected: str) -> NoReturn:
    shown = repr(got)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise DataError(f"the schema's {what}: got {shown}, expected {expected}; run one version of fedsample everywhere")


def _keys(what: str, value: Any, names: tuple[str, ...]) -> None:
    if not isinstance(value, dict) or set(value) != set(names):
        _refuse(what, list(value) if isinstance(value, dict) else value, f"a table with {', '.join(names)}")


def _list(what: str, value: Any, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        _refuse(what, len(value) if isinstance(value, list) else value, f"a list of at most {most}")
    return value


def _one_of(what: str, value: Any, names: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in names:
        _refuse(what, value, f"one of {', '.join(names)}")
    return value


def _whole(what: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        _refuse(what, value, f"a whole number from {least} to {most}")
    return int(value)


def _text(what: str, value: Any) -> str:
    # numpy drops zeros at the end of a text, and lone surrogates can be neither printed nor stored.
    broken = not isinstance(value, str) or "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)
    if broken or len(value) > _MAX_TEXT:
        _refuse(what, value, f"text of at most {_MAX_TEXT} characters, without the character 0 and half characters")
    return str(value)


def _rising(what: str, values: list[Any]) -> list[Any]:
    if any(first >= second for first, second in pairwise(values)):
        _refuse(what, values, "different ones in rising order")
    return values
