"""Devices that hold their own rows: files of their own, and shares of what everybody has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_rows import SIZES, experiment, federate, read_device, write

from fedsample.clients.device_data import DataSource, DeviceData
from fedsample.data import FederatedData
from fedsample.data import load as load_data
from fedsample.data.device_files import Rows
from fedsample.models import task_of
from fedsample.problem import build_problem

# --- files of their own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(("model", "target"), [("softmax", "kind"), ("linear", "price"), ("mlp", "kind")])
def test_devices_with_files_are_the_simulation(tmp_path: Path, kind: str, model: str, target: str) -> None:
    file, files, _ = write(tmp_path, kind, target)
    data = {"kind": kind, "file": file, "target": target, "client_column": "who", "holdout": "keyed"}
    settings = experiment(data=data, model={"name": model, "hidden": [3]}, seed=3)
    want = build_problem(settings)
    assert want.data is not None
    holdings = [read_device(settings, i, data=files[i], target=target) for i in range(3)]
    agreed, shares = federate(settings, holdings)
    assert agreed.feature_names == want.data.feature_names
    assert agreed.class_names == want.data.class_names
    assert agreed.rows == sum(SIZES)
    for i, share in enumerate(shares):
        assert isinstance(share, FederatedData)
        np.testing.assert_array_equal(share.x, want.data.client(i).x)
        np.testing.assert_array_equal(share.y, want.data.client(i).y)
        assert (share.target_mean, share.target_scale) == (want.data.target_mean, want.data.target_scale)
        assert len(share.x_test) == int(0.2 * SIZES[i] + 0.5)
    held: Any = shares
    np.testing.assert_array_equal(np.concatenate([share.x_test for share in held]), want.data.x_test)
    np.testing.assert_array_equal(np.concatenate([share.y_test for share in held]), want.data.y_test)


def test_another_seed_and_another_client_hold_out_other_rows(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", X=np.arange(40.0)[:, None], y=np.arange(40) % 2)

    def held(seed: int, client: int) -> list[int]:
        settings = experiment(data={"test_fraction": 0.25}, seed=seed)
        holding = read_device(settings, client, data=str(tmp_path / "own.npz"))
        assert isinstance(holding, Rows)
        assert sorted([*holding.split.train[0], *holding.split.test]) == list(range(40))
        assert (np.diff(holding.split.train[0]) > 0).all()
        return holding.split.test.tolist()  # type: ignore[no-any-return]

    assert len(held(0, 0)) == 10
    assert held(0, 0) == held(0, 0)
    assert held(0, 0) != held(1, 0)
    assert held(0, 0) != held(0, 1)


def test_the_same_numbers_under_other_names_are_other_data(tmp_path: Path) -> None:
    settings = experiment(data={"kind": "csv", "clients": 1, "target": "y"}, fleet={"name": "grpc"})
    rows = "".join(f"{i},{i * i},{'uv'[i % 2]},{i % 3 % 2}\n" for i in range(20))
    found = []
    for number, names in enumerate(("a,b,c,y", "b,a,c,y", "a,b,c,y")):
        file = tmp_path / f"{number}.csv"
        file.write_text(f"{names}\n{rows}")
        found.append(DeviceData(settings, 0, 1, DataSource(str(file))).fingerprint)
    assert found[0] == found[2] != found[1]


def test_npz_is_used_as_it_is(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(6, 2, 2))
    np.savez(tmp_path / "own.npz", X=x, y=[3, 1, 3, 1, 1, 1], X_test=x[:2], y_test=[7, 1])
    holding = read_device(experiment(), 0, data=str(tmp_path / "own.npz"))
    agreed, (share,) = federate(experiment(), [holding])
    assert agreed.row_shape == (2, 2)
    assert agreed.class_names == ("1", "3", "7")
    assert isinstance(share, FederatedData)
    np.testing.assert_array_equal(share.x, x)
    assert share.y_test.tolist() == [2, 0]
    assert isinstance(holding, Rows)
    np.testing.assert_array_equal(holding.arrays[2], x[:2])
    assert [len(array) for array in holding.arrays] == [6, 6, 2, 2]
    assert holding.arrays[3].tolist() == [7, 1]


# --- shares of what everybody has -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model", "holdout"),
    [("digits", "softmax", "pooled"), ("iris", "softmax", "keyed"), ("diabetes", "linear", "pooled")],
)
def test_shares_of_builtin_sets_are_the_simulation(name: str, model: str, holdout: str) -> None:
    settings = experiment(data={"name": name, "clients": 3, "holdout": holdout}, model={"name": model})
    want = load_data(settings.data, settings.seed, task_of(model))
    # A server without data has another section [data]; one with the same section lends it to its devices.
    bare = experiment(data={"holdout": holdout}, model={"name": model})
    named = [read_device(bare, i, data=name, partition=i, partitions=3) for i in range(3)]
    lent = [read_device(settings, i, partition=i) for i in range(3)]
    held = 0
    for one in (named, lent):
        _, shares = federate(settings, one)
        for i, share in enumerate(shares):
            assert isinstance(share, FederatedData)
            np.testing.assert_array_equal(share.x, want.client(i).x)
            np.testing.assert_array_equal(share.y, want.client(i).y)
            if holdout == "pooled":
                np.testing.assert_array_equal(share.x_test, want.x_test[i::3])
                np.testing.assert_array_equal(share.y_test, want.y_test[i::3])
            held += len(share.x_test)
    assert held == 2 * len(want.x_test)


def test_what_is_predicted_does_not_depend_on_who_asks(tmp_path: Path) -> None:
    # 8 labels in 14 rows are numbers to predict; counted once for each of three clients they would be classes.
    (tmp_path / "all.csv").write_text("a,y\n" + "".join(f"{i},{i % 8}\n" for i in range(14)))
    data = {"kind": "csv", "file": str(tmp_path / "all.csv"), "target": "y", "clients": 3, "partition": "iid"}
    settings = experiment(data=data, model={"name": "mlp"})
    agreed, _ = federate(settings, [read_device(settings, i, partition=i, partitions=3) for i in range(3)])
    assert agreed.classes is None
    assert load_data(settings.data, 0).classes is None
