"""Datasets: the built-in ones, tasks and labels, and what reading them imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import assert_standard, config, npz
from rounding import agree

from fedsample.data import datasets, load
from fedsample.errors import DataError

# --- built-in sets ----------------------------------------------------------------------------------------------------


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


# --- tasks and labels -------------------------------------------------------------------------------------------------


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


# --- imports ----------------------------------------------------------------------------------------------------------


def test_the_tables_load_nothing_heavy() -> None:
    code = (
        "import sys, fedsample.data, fedsample.models; fedsample.data.datasets(); fedsample.models.models();"
        "print(sorted({'torch', 'flwr', 'flwr_datasets', 'datasets', 'sklearn', 'pyarrow'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
