"""Datasets: arrays in npz files, of rows and of quadratic clients, and what bad ones are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import X, Y, config, csv, npz

from fedsample.data import QuadraticData, load, load_quadratic
from fedsample.errors import ConfigError, DataError

# --- npz --------------------------------------------------------------------------------------------------------------


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


# --- quadratic clients ------------------------------------------------------------------------------------------------


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
