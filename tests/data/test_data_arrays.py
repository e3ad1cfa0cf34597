"""Datasets: what is read, how test rows and clients come about, and what bad data are told."""

from __future__ import annotations

import decimal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import agree, gamma

from fedsample.data import FederatedData, QuadraticData, datasets, load, load_quadratic
from fedsample.data.partition import assign
from fedsample.errors import ConfigError, DataError

DEFAULTS: dict[str, Any] = {
    "name": None,
    "kind": "builtin",
    "file": None,
    "clients": 4,
    "partition": "dirichlet",
    "alpha": 0.3,
    "target": None,
    "client_column": None,
    "test_fraction": None,
    "standardize": None,
    "holdout": "pooled",
    "features": None,
    "labels": None,
}


def config(**given: Any) -> Any:
    """The section [data], without the checks that `fedsample.config` adds."""
    return SimpleNamespace(**{**DEFAULTS, **given})


def npz(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "some.npz", **arrays)
    return str(folder / "some.npz")


def csv(folder: Path, text: str) -> str:
    (folder / "some.csv").write_text(text)
    return str(folder / "some.csv")


# --- built-in sets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fact", datasets(), ids=lambda fact: fact.name)
def test_builtin_facts_hold(fact: Any) -> None:
    data = load(config(name=fact.name), seed=0)
    assert len(data.x) + len(data.x_test) == fact.rows
    assert len(data.x_test) == fact.test_rows
    assert data.x.shape[1:] == (fact.features,)
    assert data.classes == fact.classes
    assert data.task == fact.task
    assert data.clients == 4
    assert data.rows.sum() == len(data.x)


def test_digits_follow_the_fixed_rule() -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    test = np.random.default_rng(0).permutation(1797)[:360]
    data = load(config(name="digits", clients=10), seed=0)
    np.testing.assert_array_equal(data.x_test, x[test] / 16)
    np.testing.assert_array_equal(data.y_test, y[test])
    # The rest are the training rows, each exactly once, whoever holds them.
    rest = np.delete(x / 16, test, axis=0)
    assert sorted(map(tuple, data.x)) == sorted(map(tuple, rest))
    again = load(config(name="digits", clients=10, test_fraction=0.2), seed=0)
    np.testing.assert_array_equal(again.x_test, data.x_test)


def test_digits_partition_known_answer() -> None:
    # Pinned: stored runs resume only if the same seed still gives the same clients.
    data = load(config(name="digits", clients=10), seed=0)
    assert data.rows.tolist() == [71, 47, 140, 243, 298, 64, 162, 200, 140, 72]


def test_seed_decides_the_partition_and_nothing_else() -> None:
    one, same, other = (load(config(name="iris"), seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.x, same.x)
    np.testing.assert_array_equal(one.offsets, same.offsets)
    assert one.rows.tolist() != other.rows.tolist()
    # The mean is summed over clients, so its rounding follows the partition; the rows themselves do not.
    # a mean over N rows, a deviation from N squares, a difference and a division: relative to the raw row and the mean
    raw = load(config(name="iris", standardize=False), seed=1)
    sizes = (np.abs(raw.x_test) + np.abs(raw.x).mean(0)) / raw.x.std(0)
    agree(one.x_test, other.x_test, 2 * len(one.x) + 8, sizes)
    raw, again = (load(config(name="iris", standardize=False), seed=seed) for seed in (1, 2))
    np.testing.assert_array_equal(raw.x_test, again.x_test)


def assert_standard(scaled: np.ndarray, raw: np.ndarray) -> None:
    """Mean 0 and deviation 1, to the rounding of sums of N numbers of the raw column's size over its deviation."""
    size = (np.abs(raw) + np.abs(raw).mean(0)).mean(0) / raw.std(0)
    bound = 2 * gamma(3 * len(raw) + 8) * size
    assert np.all(np.abs(scaled.mean(0)) <= bound)
    assert np.all(np.abs(scaled.std(0) - 1) <= bound)
    assert np.all(bound < 1e-9)


def test_training_rows_set_the_scale() -> None:
    data = load(config(name="diabetes"), seed=0)
    raw = load(config(name="diabetes", standardize=False), seed=0)
    assert_standard(data.x, raw.x)
    assert_standard(data.y, raw.y)
    assert abs(data.x_test.mean()) > 1e-3  # the test rows had no say
    from sklearn.datasets import load_diabetes

    y = load_diabetes(return_X_y=True)[1]
    test = np.random.default_rng(0).permutation(442)[:88]
    agree(data.y_test * data.target_scale + data.target_mean, y[test], 6, np.abs(y[test]) + abs(data.target_mean))
    raw = load(config(name="diabetes", standardize=False), seed=0)
    assert (raw.target_mean, raw.target_scale) == (0.0, 1.0)
    np.testing.assert_array_equal(raw.y_test, y[test])


def test_constant_pixels_survive_standardising() -> None:
    data = load(config(name="digits", standardize=True, test_fraction=0.0), seed=0)
    assert np.isfinite(data.x).all()
    assert (data.x[:, 0] == 0).all()
    assert len(data.x_test) == 0


def test_clients_keep_the_order_of_the_source(tmp_path: Path) -> None:
    x = np.arange(40.0)[:, None]
    y = np.arange(40) % 2
    for partition in ("dirichlet", "iid", "shards"):
        data = load(config(kind="npz", file=npz(tmp_path, X=x, y=y), partition=partition), seed=3)
        for client in range(4):
            rows = data.client(client).x[:, 0]
            assert (np.diff(rows) > 0).all()


@pytest.mark.parametrize("name", ["digit", None])
def test_unknown_set_names_the_known_ones(name: str | None) -> None:
    with pytest.raises(DataError, match="diabetes"):
        load(config(name=name), seed=0)


# --- tasks and labels -----------------------------------------------------------------------------------------------


def test_the_model_decides_the_task(tmp_path: Path) -> None:
    file = npz(tmp_path, X=np.zeros((8, 1)), y=np.array([-1, 1] * 4))
    labels = load(config(kind="npz", file=file), seed=0)
    assert (labels.classes, labels.class_names, labels.y.dtype) == (2, ("-1", "1"), np.int64)
    assert sorted(labels.y.tolist()) == [0] * 4 + [1] * 4
    numbers = load(config(kind="npz", file=file), seed=0, task="regression")
    assert numbers.classes is None
    assert sorted(numbers.y.tolist()) == [-1.0] * 4 + [1.0] * 4


def test_labels_map_to_sorted_classes_over_both_parts(tmp_path: Path) -> None:
    file = npz(tmp_path, X=np.zeros((4, 1)), y=[7, 3, 7, 3], X_test=np.zeros((2, 1)), y_test=[5, 3])
    data = load(config(kind="npz", file=file, clients=1), seed=0)
    assert data.class_names == ("3", "5", "7")
    assert data.y.tolist() == [2, 0, 2, 0]
    assert data.y_test.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("y", "task"),
    [
        ([0, 1, 0, 1], "classification"),
        ([0.0, 1.0, 0.0, 1.0], "classification"),
        ([0.5, 1.0, 0.0, 1.0], "regression"),
        ([1e300, 1.0, 1e300, 1.0], "regression"),
        ([10, 20, 30, 31], "regression"),
        (["b", "a", "b", "a"], "classification"),
        ([True, False, True, False], "classification"),
    ],
)
def test_values_decide_where_the_model_does_not(tmp_path: Path, y: list[Any], task: str) -> None:
    data = load(config(kind="npz", file=npz(tmp_path, X=np.zeros((4, 1)), y=np.array(y)), clients=2), seed=0)
    assert data.task == task


@pytest.mark.parametrize(
    ("y", "task", "message"),
    [
        ([0.5, 1.0, 0.0, 1.0], "classification", r"0\.5 in row 0"),
        (["b", "a", "b", "a"], "regression", "text"),
        ([3, 3, 3, 3], "classification", "at least two classes"),
    ],
)
def test_targets_that_do_not_fit_the_task(tmp_path: Path, y: list[Any], task: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(config(kind="npz", file=npz(tmp_path, X=np.zeros((4, 1)), y=np.array(y))), seed=0, task=task)


def test_diabetes_has_no_classes() -> None:
    with pytest.raises(DataError, match="regression set"):
        load(config(name="diabetes"), seed=0, task="classification")


# --- partitions -----------------------------------------------------------------------------------------------------

FEW = settings(max_examples=25, deadline=None, derandomize=True)


@FEW
@given(
    scheme=st.sampled_from(["dirichlet", "iid", "shards"]),
    rows=st.integers(1, 60),
    share=st.floats(0, 1),
    classes=st.integers(0, 5),
    alpha=st.floats(0.01, 100),
    seed=st.integers(0, 2**63 - 1),
)
def test_partition_covers_every_row_once(
    scheme: str, rows: int, share: float, classes: int, alpha: float, seed: int
) -> None:
    rng = np.random.default_rng(rows)
    targets = rng.integers(0, classes, rows) if classes else rng.normal(size=rows)
    clients = 1 + int(share * (rows - 1))
    owners = assign(scheme, targets, clients, alpha, seed)
    assert owners.shape == (rows,)
    assert owners.min() >= 0
    assert owners.max() < clients
    sizes = np.bincount(owners, minlength=clients)
    if scheme == "iid":
        assert sizes.max() - sizes.min() <= 1
    if scheme != "dirichlet":
        assert sizes.min() >= 1
    np.testing.assert_array_equal(owners, assign(scheme, targets, clients, alpha, seed))


@pytest.mark.parametrize("scheme", ["dirichlet", "iid", "shards"])
def test_columns_are_fetched_whole_and_not_row_by_row(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million rows fetched one by one took minutes."""
    import datasets

    calls, fetch = [], datasets.Dataset._getitem

    def counted(self: Any, *given: Any, **named: Any) -> Any:
        calls.append(given)
        return fetch(self, *given, **named)

    monkeypatch.setattr(datasets.Dataset, "_getitem", counted)
    owners = assign(scheme, np.arange(3000) % 3, 4, 5.0, 0)
    assert len(np.unique(owners)) == 4
    assert 0 < len(calls) < 40


def test_small_alpha_skews_labels_and_large_alpha_does_not() -> None:
    y = np.repeat(np.arange(4), 500)

    def distance(alpha: float) -> float:
        owners = assign("dirichlet", y, 4, alpha, seed=0)
        table = np.array([np.bincount(y[owners == i], minlength=4) for i in range(4)])  # (clients, classes)
        return float(np.abs(table / np.maximum(table.sum(axis=1, keepdims=True), 1) - 0.25).sum(axis=1).mean() / 2)

    assert distance(0.05) > 0.5
    assert distance(1e4) < 0.02


def test_dirichlet_gives_every_client_a_row_where_it_can() -> None:
    y = np.arange(200) % 10
    assert min(np.bincount(assign("dirichlet", y, 10, 0.3, seed), minlength=10).min() for seed in range(10)) >= 1


def test_clients_without_rows_are_allowed() -> None:
    data = load(config(name="iris", clients=60, alpha=0.05), seed=0)
    assert data.rows.min() == 0
    empty = data.client(int(data.rows.argmin()))
    assert empty.x.shape == (0, 4)
    assert empty.y.shape == (0,)


def test_dirichlet_on_numbers_uses_quantile_bins() -> None:
    data = load(config(name="diabetes", clients=5, alpha=0.1), seed=0)
    means = [data.client(i).y.mean() for i in range(5)]
    assert max(means) - min(means) > 0.5  # in standard deviations of the target


def test_shards_sort_by_target() -> None:
    owners = assign("shards", np.arange(100) % 10, 10, 0.3, seed=0)
    classes = [len(np.unique(np.flatnonzero(owners == i) % 10)) for i in range(10)]
    assert max(classes) == 2


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"clients": 121}, DataError, "only 120 training rows"),
        ({"clients": 0}, ConfigError, "at least 1"),
        ({"alpha": 0.0}, ConfigError, "above 0"),
        ({"alpha": -1.0}, ConfigError, "above 0"),
        ({"alpha": float("nan")}, ConfigError, "above 0"),
        ({"alpha": 1e300}, ConfigError, "at most 1e"),
        ({"partition": "even"}, ConfigError, '"iid"'),
        ({"partition": "natural"}, ConfigError, "client_column"),
        ({"test_fraction": 1.0}, ConfigError, "test_fraction"),
        ({"kind": "quadratic"}, ConfigError, "load_quadratic"),
    ],
)
def test_impossible_options(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(config(name="iris", **given), seed=0)


def test_negative_seed() -> None:
    with pytest.raises(ConfigError, match="seed = -1"):
        load(config(name="iris"), seed=-1)


# --- npz ------------------------------------------------------------------------------------------------------------


def test_npz_is_used_as_it_is_and_split_by_its_clients(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(6, 2, 2)).astype(np.float32)
    file = npz(tmp_path, X=x, y=[[0], [1], [0], [1], [0], [1]], client=["b", "a", "b", "c", "a", "b"])
    data = load(config(kind="npz", file=file), seed=0)
    assert data.name == "some"
    assert data.client_names == ("a", "b", "c")
    assert data.rows.tolist() == [2, 3, 1]
    np.testing.assert_array_equal(data.x, x[[1, 4, 0, 2, 5, 3]].astype(np.float64))
    assert data.y.tolist() == [1, 0, 0, 0, 1, 1]
    assert data.x_test.shape == (0, 2, 2)
    assert data.feature_names == ("x[0,0]", "x[0,1]", "x[1,0]", "x[1,1]")
    share = data.client(1)
    np.testing.assert_array_equal(share.x, data.x[2:5])
    assert share.client_names == ("b",)
    assert (share.clients, len(share.x_test)) == (1, 0)
    with pytest.raises(DataError, match="clients 0 to 2"):
        data.client(3)


def test_integer_clients_sort_as_numbers(tmp_path: Path) -> None:
    file = npz(tmp_path, X=np.zeros((4, 1)), y=[0, 1, 0, 1], client=[10, 9, 10, 2])
    data = load(config(kind="npz", file=file, partition="natural", name="mine"), seed=0)
    assert data.name == "mine"
    assert data.client_names == ("2", "9", "10")


def test_a_client_whose_rows_are_all_held_out_stays_a_client(tmp_path: Path) -> None:
    client = np.arange(10)
    file = npz(tmp_path, X=client[:, None] * 1.0, y=np.arange(10) % 2, client=client)
    data = load(config(kind="npz", file=file, test_fraction=0.5), seed=0)
    assert data.clients == 10
    assert sorted(data.rows.tolist()) == [0] * 5 + [1] * 5
    for i in np.flatnonzero(data.rows):
        assert data.client(int(i)).x.tolist() == [[float(data.client_names[i])]]


X = np.zeros((4, 1))
Y = np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": X}, "no array 'y'"),
        ({"x": X, "y": Y}, "Did you mean 'X'"),
        ({"X": X, "y": Y, "clients": Y}, "Did you mean 'client'"),
        ({"X": X[:, 0], "y": Y}, "expected real numbers of shape"),
        ({"X": X, "y": Y[:3]}, r"expected \(4,\)"),
        ({"X": X, "y": Y, "client": Y[:3]}, "client has shape"),
        ({"X": X, "y": Y, "client": Y * 0.5}, "client has shape"),
        ({"X": X, "y": Y, "X_test": X}, "only one of"),
        ({"X": X, "y": Y, "X_test": np.zeros((2, 3)), "y_test": Y[:2]}, "X_test has rows of shape"),
        ({"X": X, "y": Y, "X_test": X, "y_test": np.array(["a"] * 4)}, "same kind"),
        ({"X": X[:0], "y": Y[:0]}, "no rows"),
        ({"X": X + 1j, "y": Y}, "complex128"),
        ({"X": X, "y": np.array([None] * 4)}, "pickled"),
        ({"X": np.array([[0.0, 1.0], [0.0, np.nan]]), "y": Y[:2]}, r"column 'x1' holds nan in row 1"),
        ({"X": X, "y": np.array([0, 1, np.inf, 0])}, r"column 'y' holds inf in row 2"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(config(kind="npz", file=npz(tmp_path, **arrays)), seed=0)


def test_files_that_are_not_there_or_not_archives(tmp_path: Path) -> None:
    for file, message in ((None, "data.file is not set"), (str(tmp_path), "directory"), ("no.npz", "does not exist")):
        with pytest.raises(DataError, match=message):
            load(config(kind="npz", file=file), seed=0)
    with pytest.raises(DataError, match="as a numpy archive"):
        load(config(kind="npz", file=csv(tmp_path, "a,b\n1,2\n")), seed=0)
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(DataError, match="single array"):
        load(config(kind="npz", file=str(tmp_path / "one.npy")), seed=0)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_archive(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "some.npz"
    np.savez_compressed(path, X=np.random.default_rng(0).normal(size=(100, 4)), y=np.arange(100) % 2)
    raw = bytearray(path.read_bytes())
    path.write_bytes(
        raw[: len(raw) // 2] if damage == "cut" else raw[:500] + bytes(255 - b for b in raw[500:600]) + raw[600:]
    )
    with pytest.raises(DataError, match="as a numpy archive"):
        load(config(kind="npz", file=str(path)), seed=0)


def test_own_test_rows_and_a_fraction_contradict(tmp_path: Path) -> None:
    file = npz(tmp_path, X=X, y=Y, X_test=X, y_test=Y)
    with pytest.raises(ConfigError, match="X_test"):
        load(config(kind="npz", file=file, test_fraction=0.5), seed=0)
    with pytest.raises(ConfigError, match="iid"):
        load(config(kind="npz", file=npz(tmp_path, X=X, y=Y, client=Y), partition="iid"), seed=0)


# --- csv and parquet ------------------------------------------------------------------------------------------------

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


# --- FederatedData itself -------------------------------------------------------------------------------------------


def test_shares_round_trip() -> None:
    data = load(config(name="wine", clients=5), seed=0)
    shares = [data.client(i) for i in range(5)]
    for name in ("x", "y"):
        together = np.concatenate([getattr(share, name) for share in shares])
        np.testing.assert_array_equal(together, getattr(data, name))
    assert np.cumsum([0, *(len(share.x) for share in shares)]).tolist() == data.offsets.tolist()
    assert "array" not in repr(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((4, 1), dtype=np.float16)}, "float16"),
        ({"x": np.array([[0.0], [1], [np.nan], [0]])}, "column 'x0' holds nan in row 2"),
        ({"y": np.zeros(4)}, "int64"),
        ({"y": np.array([0, 1, 2, 0])}, "labels 0 to 2"),
        ({"y": np.array([0, 1, -1, 0])}, "labels -1 to 1"),
        ({"offsets": np.array([0, 3])}, "rise from 0 to the 4 rows"),
        ({"offsets": np.array([0, 3, 2, 4])}, "rise from 0"),
        ({"offsets": np.array([4])}, "clients"),
        ({"classes": 1}, "at least 2"),
        ({"x_test": np.zeros((0, 2))}, "x_test has rows"),
        ({"client_names": ("a",)}, "client_names has 1 entries, expected 2"),
    ],
)
def test_invariants(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "name": "toy",
        "x": X,
        "y": Y,
        "offsets": np.array([0, 3, 4]),
        "x_test": X[:0],
        "y_test": Y[:0],
        "classes": 2,
    }
    FederatedData(**good)
    with pytest.raises(DataError, match=message):
        FederatedData(**{**good, **change})


# --- quadratic clients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "lam", "a"),
    [
        ({"lam": [1, 2], "a": [0.5, -1]}, [[1], [2]], [[0.5], [-1]]),
        ({"lam": [1, 2], "a": [[0, 1], [2, 3]]}, [[1, 1], [2, 2]], [[0, 1], [2, 3]]),
        ({"lam": [[1, 0], [0, 2]], "a": [[0, 1], [2, 3]]}, [[1, 0], [0, 2]], [[0, 1], [2, 3]]),
        (
            {"H": [[[2, 1], [1, 2]], [[0, 0], [0, 0]]], "a": [[0, 1], [2, 3]]},
            [[[2, 1], [1, 2]], [[0, 0], [0, 0]]],
            [[0, 1], [2, 3]],
        ),
        ({"H": [[[1, 1], [1, 1]], [[1, -1], [-1, 1]]], "a": [[0, 1], [2, 3]]}, None, None),
        ({"lam": [[[2, 1], [1, 2]], [[1, 0], [0, 1]]], "a": [[0, 1], [2, 3]]}, None, None),
    ],
)
def test_quadratic(tmp_path: Path, arrays: dict[str, Any], lam: Any, a: Any) -> None:
    data = load_quadratic(config(kind="quadratic", file=npz(tmp_path, **arrays)))
    assert data.lam.dtype == data.a.dtype == np.float64
    assert (data.clients, data.dim, data.dense, data.name) == (2, data.a.shape[1], data.lam.ndim == 3, "some")
    assert data.dense == (np.ndim(arrays.get("H", arrays.get("lam"))) == 3)
    if lam is not None:
        np.testing.assert_array_equal(data.lam, lam)
        np.testing.assert_array_equal(data.a, a)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"lam": [1, 2]}, "expected 'a'"),
        ({"lam": [1], "H": [[[1]]], "a": [1]}, "one of 'lam' or 'H'"),
        ({"lam": [1, 2, 3], "a": [1, 2]}, r"expected \(2, 1\)"),
        ({"H": [[1]], "a": [1]}, r"expected \(clients, d, d\)"),
        ({"lam": [1, -2], "a": [1, 2]}, "client 1 has curvature -2"),
        ({"H": [[[1, 2], [2, 1]]], "a": [[0, 0]]}, "client 0 has curvature -1"),
        ({"H": [[[1, 2], [0, 1]]], "a": [[0, 0]]}, "not symmetric"),
        ({"lam": [[1, 0], [1, 0]], "a": [[0, 0], [0, 0]]}, "improper"),
        ({"H": [[[1, 1], [1, 1]]], "a": [[0, 0]]}, "improper"),
        ({"lam": [1, np.nan], "a": [1, 2]}, "holds nan in row 1"),
        ({"lam": [1, 2], "a": [np.inf, 2]}, "holds inf in row 0"),
        ({"lam": ["u"], "a": [1]}, "real numbers"),
        ({"lam": [], "a": []}, "a has shape"),
    ],
)
def test_bad_quadratic(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_quadratic(config(kind="quadratic", file=npz(tmp_path, **arrays)))


def test_a_prior_can_make_the_sum_proper() -> None:
    data = QuadraticData(np.array([[1.0, 0.0]]), np.zeros((1, 2)), prior_precision=1.0)
    assert data.clients == 1


# --- imports --------------------------------------------------------------------------------------------------------


def test_the_tables_load_nothing_heavy() -> None:
    code = (
        "import sys, fedsample.data, fedsample.models; fedsample.data.datasets(); fedsample.models.models();"
        "print(sorted({'torch', 'flwr', 'flwr_datasets', 'datasets', 'sklearn', 'pyarrow'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
