"""Datasets: how clients come about, and what FederatedData holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from data_files import X, Y, config
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsample.data import FederatedData, load, partition
from fedsample.data.partition import assign
from fedsample.errors import ConfigError, DataError

# --- partitions -------------------------------------------------------------------------------------------------------


FEW = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def _drawn_anew() -> Iterator[None]:
    """What the whole suite remembers of partitions (`conftest.py`) is not remembered where they are tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "_dirichlet", partition._dirichlet.__wrapped__)  # type: ignore[attr-defined]
        yield


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


# --- FederatedData itself ---------------------------------------------------------------------------------------------


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
