"""Datasets: tables in csv and parquet files, and what bad ones are told."""

from __future__ import annotations

import decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import Y, assert_standard, config, csv, npz

from fedsample.data import load
from fedsample.errors import DataError

TABLE = "size,colour,flag,site,kind\n" + "".join(
    f"{i},{('red', 'blue', 'green')[i % 3]},{str(i % 4 == 0).lower()},"
    f"{'north' if i % 2 else 'south'},{'yes' if i < 12 else 'no'}\n"
    for i in range(20)
)


def test_csv(tmp_path: Path) -> None:
    given = config(kind="csv", file=csv(tmp_path, TABLE), target="kind", standardize=False, clients=3)
    data = load(given, seed=0)
    assert data.feature_names == (
        "size",
        "colour=blue",
        "colour=green",
        "colour=red",
        "flag",
        "site=north",
        "site=south",
    )
    assert data.class_names == ("no", "yes")
    assert (len(data.x), len(data.x_test)) == (16, 4)
    for row, label in zip(data.x, data.y, strict=True):
        i = int(row[0])
        colour = ("red", "blue", "green")[i % 3]
        want = [i, colour == "blue", colour == "green", colour == "red", i % 4 == 0, i % 2 == 1, i % 2 == 0]
        assert row.tolist() == want
        assert label == (i < 12)


def test_csv_defaults_to_standardised(tmp_path: Path) -> None:
    data = load(config(kind="csv", file=csv(tmp_path, TABLE), target="size"), seed=0, task="regression")
    raw = load(
        config(kind="csv", file=csv(tmp_path, TABLE), target="size", standardize=False), seed=0, task="regression"
    )
    moving = raw.x.std(0) > 0
    assert_standard(data.x[:, moving], raw.x[:, moving])
    assert_standard(data.y, raw.y)
    assert not data.x[:, ~moving].any()
    assert data.target_scale > 1


def test_csv_client_column_is_the_partition(tmp_path: Path) -> None:
    given = config(kind="csv", file=csv(tmp_path, TABLE), target="kind", client_column="site", partition="natural")
    data = load(given, seed=0)
    assert data.client_names == ("north", "south")
    assert not any(name.startswith("site") for name in data.feature_names)


def test_parquet_equals_csv(tmp_path: Path) -> None:
    import pyarrow.csv
    import pyarrow.parquet

    table = pyarrow.csv.read_csv(csv(tmp_path, TABLE))
    table = table.set_column(1, "colour", table["colour"].dictionary_encode())
    pyarrow.parquet.write_table(table, tmp_path / "some.parquet")
    one = load(config(kind="csv", file=str(tmp_path / "some.csv"), target="kind"), seed=0)
    other = load(config(kind="parquet", file=str(tmp_path / "some.parquet"), target="kind"), seed=0)
    np.testing.assert_array_equal(one.x, other.x)
    np.testing.assert_array_equal(one.y, other.y)
    assert one.feature_names == other.feature_names


def test_parquet_types(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    def write(values: Any, kind: Any = None) -> Any:
        table = pyarrow.table({"c": pyarrow.array(values, type=kind), "y": [0, 1]})
        pyarrow.parquet.write_table(table, tmp_path / "some.parquet")
        return config(
            kind="parquet",
            file=str(tmp_path / "some.parquet"),
            target="y",
            clients=1,
            test_fraction=0.0,
            standardize=False,
        )

    assert load(write([decimal.Decimal("1.5"), decimal.Decimal(2)]), seed=0).x[:, 0].tolist() == [1.5, 2]
    assert load(write([1, 2], pyarrow.uint8()), seed=0).x[:, 0].tolist() == [1, 2]
    for values, kind, message in (
        ([[1], [2]], None, "has type list"),
        ([0, 1], pyarrow.timestamp("s"), "has type timestamp"),
        ([1, None], None, "no value in row 1"),
        (["a", None], None, "no value in row 1"),
        ([None, None], None, "no value in row 0"),
        ([1, 2**63], pyarrow.uint64(), "below 2"),
    ):
        with pytest.raises(DataError, match=message):
            load(write(values, kind), seed=0)


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        (TABLE, {}, "data.target is not set.*'colour'"),
        (TABLE, {"target": "kinds"}, "Did you mean 'kind'.*'size', 'colour'"),
        (TABLE, {"target": "kind", "client_column": "sites"}, "client_column.*Did you mean 'site'"),
        (TABLE, {"target": "kind", "client_column": "kind"}, "two columns"),
        ("a,b\n1,2\n,3\n", {"target": "b"}, "column 'a' of some.csv has no value in row 1"),
        ("a,b\n1,2\nnan,3\n", {"target": "b"}, "column 'a' of some.csv has no value in row 1"),
        ("a,b\n1,2\ninf,3\n", {"target": "b"}, "column 'a' holds inf in row 1"),
        ("a,b\nx,2\n,3\n", {"target": "b"}, "column 'a' of some.csv has no value in row 1"),
        ("a,b\n1,u\n2,\n", {"target": "b"}, "column 'b' of some.csv has no value in row 1"),
        ("a,a,b\n1,2,3\n", {"target": "b"}, "more than one column called 'a'"),
        ("a,b\n", {"target": "b"}, "no rows"),
        ("b\n1\n", {"target": "b"}, "no column left"),
        ("a,b\n1,2\n1,2,3\n", {"target": "b"}, "cannot read some.csv as csv"),
        ("a;b\n1,5;2\n", {"target": "b"}, "cannot read some.csv as csv"),
        (
            "a;b\n1;2\n",
            {"target": "b"},
            "not separated by commas. Save it with commas, and numbers with decimal points",
        ),
        ("", {"target": "b"}, "cannot read some.csv as csv"),
        ("a,b,c\n1,2,0.5\n", {"target": "b", "client_column": "c"}, "holds fractions"),
        ("a,b\n" + "".join(f"{i},{i % 2}\n" for i in range(300)) + "3o,1\n", {"target": "b"}, "row 300.*'3o'"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(config(kind="csv", file=csv(tmp_path, text), **given), seed=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("größe,b\n1,2\n", "cannot read some.csv as csv.*UTF-8"), ("a,b\nä,1\nö,2\n", "column 'a'.*not UTF-8")],
)
def test_csv_in_another_encoding(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "some.csv"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=message):
        load(config(kind="csv", file=file, target="b"), seed=0)


def test_a_placeholder_among_numbers_makes_no_categories(tmp_path: Path) -> None:
    """One question mark in a column of measurements would otherwise turn each measurement into a column of its own."""
    lines = [f"{50 + i / 10},{i % 2}" for i in range(40)]
    lines[7] = "?,1"
    given = config(kind="csv", file=csv(tmp_path, "\n".join(["age,kind", *lines])), target="kind")
    with pytest.raises(
        DataError, match=r"column 'age' of some.csv holds 39 different numbers, but row 7 .* reads '\?'"
    ):
        load(given, seed=0)


def test_codes_among_numbers_stay_categories(tmp_path: Path) -> None:
    lines = [f"{('0', '1', '2', '3+')[i % 4]},{i % 2}" for i in range(40)]
    given = config(kind="csv", file=csv(tmp_path, "\n".join(["children,kind", *lines])), target="kind")
    assert load(given, seed=0).feature_names == ("children=0", "children=1", "children=2", "children=3+")


def test_values_too_large_to_standardise(tmp_path: Path) -> None:
    file = npz(tmp_path, X=np.array([[1e300], [-1e300]] * 2), y=Y)
    with pytest.raises(DataError, match="too large"):
        load(config(kind="npz", file=file, standardize=True), seed=0)
