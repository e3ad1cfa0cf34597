"""Devices that hold their own rows agree on a schema, and trust none from a stranger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from device_rows import experiment, read_device, write

from fedsample.data.device_files import Rows
from fedsample.data.schema import Feature, Schema, Target
from fedsample.data.schema_merge import merge
from fedsample.errors import ConfigError, DataError

# --- agreement --------------------------------------------------------------------------------------------------------


def schema(*names: str, target: Target | None = None, standardize: bool = True, rows: int = 10, **text: Any) -> Schema:
    features = tuple(Feature(name, text.get(name)) for name in names)
    return Schema("rows", (len(names),), features, target or Target("labels", (0, 1)), rows, standardize)


def test_what_the_clients_agree_on() -> None:
    one = schema("age", "site", site=("a", "c"), target=Target("labels", (0, 3)))
    two = schema("site", "age", site=("b",), target=Target("labels", (1,)))
    agreed = merge([one, two])
    assert agreed.feature_names == ("age", "site=a", "site=b", "site=c")
    assert agreed.class_names == ("0", "1", "3")
    assert agreed.row_shape == (4,)
    assert agreed.rows == 20
    stated = merge([one, two], ["site", "age"], [3, 2, 1, 0])
    assert stated.feature_names == ("site=a", "site=b", "site=c", "age")
    assert stated.class_names == ("0", "1", "2", "3")


def test_all_rows_together_decide_what_no_client_can() -> None:
    apart = [schema("age", target=Target("undecided", tuple(range(i, i + 4))), rows=7) for i in (0, 1)]
    assert merge(apart[:1]).classes is None  # 4 labels, 7 rows
    assert merge(apart).class_names == ("0", "1", "2", "3", "4")
    assert merge([apart[0], schema("age", target=Target("number"))]).classes is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (schema("agee", "site"), r"client 1 has no column 'age', which client 0 has. Did you mean 'agee'\?"),
        (schema("age", "site", "wage"), r"client 1 has a column 'wage', which client 0 has not. Did you mean 'age'\?"),
        (schema("age", "site", site=("a",)), "column 'site' holds text on client 1 and numbers on client 0"),
        (schema("age", "site", target=Target("labels", ("a",))), "labels such as 'a', client 0 such as 0"),
        (schema("age", "site", target=Target("number")), "client 0 has labels to predict, client 1 numbers"),
        (schema("age", "site", standardize=False), "data.standardize"),
        (Schema("rows", (2,), target=Target("labels", (0, 1))), "client 1 holds arrays, client 0 named columns"),
        (Schema("quadratic", (2,)), "client 1 holds a quadratic"),
    ],
)
def test_what_clients_cannot_agree_on(other: Schema, message: str) -> None:
    with pytest.raises(DataError, match=message):
        merge([schema("age", "site"), other])


def test_what_the_experiment_states_binds_every_client() -> None:
    held = schema("age", "site")
    with pytest.raises(
        DataError, match=r"client 0 has no column 'sit', which data.features has. Did you mean 'site'\?"
    ):
        merge([held], ["age", "sit"])
    with pytest.raises(DataError, match=r"client 0 has the label 1, expected one of data\.labels"):
        merge([held], None, [0, 2])
    for features, labels in ((["age", "age", "site"], None), (None, [0]), (None, [0, 0, 1]), (None, [0, 1, "a"])):
        with pytest.raises(ConfigError, match=r"data\.(features|labels)"):
            merge([held], features, labels)
    arrays = Schema("rows", (2, 3), target=Target("labels", (0, 1)))
    with pytest.raises(ConfigError, match="without names"):
        merge([arrays], ["age"])
    with pytest.raises(DataError, match="shape"):
        merge([arrays, Schema("rows", (3, 2), target=Target("labels", (0, 1)))])
    with pytest.raises(DataError, match="at least two classes"):
        merge([schema("age", target=Target("labels", (0,)))] * 2)


def test_rows_that_left_the_agreement(tmp_path: Path) -> None:
    _, files, _ = write(tmp_path, "parquet", "kind")
    holding = read_device(experiment(), 0, data=files[0], target="kind")
    assert isinstance(holding, Rows)
    agreed = merge([holding.schema])
    for change, message in (
        (
            {"features": (*agreed.features[:1], Feature("colour", ("red",)), agreed.features[2])},
            "'blue', which is none",
        ),
        ({"features": (Feature("age", ("1",)), *agreed.features[1:])}, "holds numbers, but the clients agreed on text"),
        ({"features": (Feature("ages"), *agreed.features[1:])}, "no column 'ages'"),
        ({"features": (), "shape": (3,)}, "arrays without names"),
        ({"target": Target("labels", ("maybe", "no"))}, "is 'yes' in row 1"),
        ({"target": Target("labels", (0, 1))}, "agreed on the labels 0, 1"),
        ({"target": Target("number")}, "agreed on numbers"),
        ({"kind": "quadratic", "features": (), "target": None, "shape": (3,)}, "quadratics"),
    ):
        other: Any = {**{name: getattr(agreed, name) for name in agreed.__dataclass_fields__}, **change}
        with pytest.raises(DataError, match=message):
            holding.fit(Schema(**other))


# --- a schema from a stranger -----------------------------------------------------------------------------------------


GOOD = schema("age", "site", site=("a", "b"))


def test_schemas_travel() -> None:
    for one in (GOOD, Schema("quadratic", (4,), rows=1), schema("x", target=Target("undecided", (-(2**63), 5)))):
        assert Schema.from_json(one.to_json()) == one


def with_feature(**change: Any) -> dict[str, Any]:
    return {"features": [{"name": "age", "categories": None}, {"name": "site", "categories": ["a", "b"], **change}]}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "row"},
        {"kind": ["rows"]},
        {"kind": "quadratic"},
        {"shape": [3]},
        {"shape": []},
        {"shape": [-2]},
        {"shape": [True, 2]},
        {"shape": [2.0]},
        {"shape": [2] * 9},
        {"shape": [1 << 20, 1 << 20], "features": []},
        {"shape": "22"},
        {"features": [1, 2]},
        with_feature(name="age"),
        with_feature(name="a" * 5000),
        with_feature(name="nul\0"),
        with_feature(name="half\ud800"),
        with_feature(categories=[]),
        with_feature(categories=["b", "a"]),
        with_feature(categories=["a", "a"]),
        with_feature(categories=["", "a"]),
        with_feature(categories=["a", 1]),
        with_feature(categories=[f"{i:03}" for i in range(257)]),
        with_feature(more=1),
        {"target": None},
        {"target": {"kind": "number", "values": [1]}},
        {"target": {"kind": "labels", "values": []}},
        {"target": {"kind": "labels", "values": [1, 0]}},
        {"target": {"kind": "labels", "values": [0, True]}},
        {"target": {"kind": "labels", "values": [0, "a"]}},
        {"target": {"kind": "labels", "values": [0, 1.0]}},
        {"target": {"kind": "labels", "values": [1 << 63]}},
        {"target": {"kind": "labels", "values": list(range((1 << 16) + 1))}},
        {"target": {"kind": "undecided", "values": ["a"]}},
        {"rows": -1},
        {"rows": 1 << 60},
        {"rows": None},
        {"standardize": 1},
        {"extra": 1},
    ],
    ids=str,
)
def test_hostile_schemas(change: dict[str, Any]) -> None:
    fields = {**json.loads(GOOD.to_json()), **change}
    with pytest.raises(DataError, match="the schema's"):
        Schema.from_json(json.dumps(fields))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "1" * 5000, "[" * 100_000, "null", '{"kind": NaN}', " " * (1 << 25) + "1"]
)
def test_what_is_no_schema(text: str) -> None:
    with pytest.raises(DataError, match="schema"):
        Schema.from_json(text)
