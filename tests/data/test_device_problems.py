"""Devices that hold their own rows: they agree on a schema, and do to the bit what the simulation does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rounding import ELEMENTARY, agree, gamma, near

from fedsample.clients.device_data import DataSource, DeviceData
from fedsample.config import Experiment, load
from fedsample.data import FederatedData, device_files
from fedsample.data import load as load_data
from fedsample.data.device_files import DeviceRows, Potential, Rows, agreed_schema
from fedsample.data.schema import Feature, Schema, Target
from fedsample.data.schema_merge import merge
from fedsample.data.standardize import Scale, first_sums, second_sums
from fedsample.diagnostics import calibration
from fedsample.diagnostics.counts import Evaluator, length, scores
from fedsample.errors import ConfigError, DataError
from fedsample.models import task_of
from fedsample.numerics.tree_sum import TreeSum
from fedsample.problem import Problem, build_problem
from fedsample.problem.remote import device_problem, remote_problem

SIZES = (11, 4, 17)


def experiment(**settings: Any) -> Experiment:
    return load(settings, environment={})


def total(terms: list[torch.Tensor]) -> torch.Tensor:
    tree = TreeSum()
    for term in terms:
        tree.add(term)
    return tree.total()


def read_device(settings: Experiment, index: int, **source: Any) -> DeviceRows:
    """What a device holds, for the experiment's model."""
    return device_files.read_device(settings, index, task=task_of(settings.model.name), **source)


def federate(settings: Experiment, holdings: list[DeviceRows]) -> tuple[Schema, list[FederatedData | Potential]]:
    """What server and devices do together, every message of it."""
    agreed = agreed_schema(settings, [Schema.from_json(holding.schema.to_json()) for holding in holdings])
    agreed = Schema.from_json(agreed.to_json())
    shares: list[Any] = [holding.fit(agreed) for holding in holdings]
    if agreed.standardize:
        first = total([first_sums(share) for share in shares])
        second = total([second_sums(share, first) for share in shares])
        shares = [Scale.of(first, second).apply(share) for share in shares]
    return agreed, shares


def write(folder: Path, kind: str, target: str) -> tuple[str, list[str], list[dict[str, list[Any]]]]:
    """A file with a client column, and one file per client: other column orders, not all categories and labels."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    def save(columns: dict[str, list[Any]], path: Path) -> str:
        table = pyarrow.table(columns)
        if kind == "csv":
            pyarrow.csv.write_csv(table, path)
        else:
            pyarrow.parquet.write_table(table, path)
        return str(path)

    rng = np.random.default_rng(5)
    parts: list[dict[str, list[Any]]] = []
    for client, size in enumerate(SIZES):
        colours = ("red", "blue") if client == 1 else ("red", "green", "blue")
        kinds = ("no", "yes") if client == 0 else ("maybe", "no", "yes")
        parts.append(
            {
                "age": rng.integers(20, 80, size).tolist() if client == 1 else (rng.normal(size=size) * 9).tolist(),
                "colour": [colours[i % len(colours)] for i in range(size)],
                "wage": (rng.normal(size=size) * 1e4 + 1e6).tolist(),
                "kind": [kinds[i % len(kinds)] for i in range(size)],
                "price": rng.normal(loc=50.0, size=size).tolist(),
            }
        )
    for part in parts:
        del part["price" if target == "kind" else "kind"]
    owners = rng.permutation(np.repeat(range(3), SIZES)).tolist()  # rows of different clients lie mixed
    queues = [iter(zip(*part.values(), strict=True)) for part in parts]
    rows = [next(queues[owner]) for owner in owners]
    pooled = {name: [row[at] for row in rows] for at, name in enumerate(parts[0])}
    pooled["who"] = [f"c{owner}" for owner in owners]
    files = []
    for client, part in enumerate(parts):
        names = list(part)[::-1] if client else list(part)
        files.append(save({name: part[name] for name in names}, folder / f"own{client}.{kind}"))
    return save(pooled, folder / f"all.{kind}"), files, parts


# --- files of their own ---------------------------------------------------------------------------------------------


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


# --- shares of what everybody has -----------------------------------------------------------------------------------


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


# --- problems -------------------------------------------------------------------------------------------------------


def _digits(folder: Path) -> tuple[Experiment, list[DeviceRows]]:
    settings = experiment(data={"clients": 3})
    return settings, [read_device(settings, i, data="digits", partition=i, partitions=3) for i in range(3)]


def _iris_network(folder: Path) -> tuple[Experiment, list[DeviceRows]]:
    settings = experiment(data={"name": "iris", "clients": 3}, model={"name": "mlp", "hidden": [5]})
    return settings, [read_device(settings, i, partition=i) for i in range(3)]


def _files(model: str, target: str) -> Callable[[Path], tuple[Experiment, list[DeviceRows]]]:
    def make(folder: Path) -> tuple[Experiment, list[DeviceRows]]:
        file, files, parts = write(folder, "parquet", target)
        if model == "logistic":
            import pyarrow
            import pyarrow.parquet

            every = {name: [value for part in parts for value in part[name]] for name in parts[0]}
            every["who"] = [i for i, size in enumerate(SIZES) for _ in range(size)]
            for path, columns in zip([*files, file], [*parts, every], strict=True):
                columns["kind"] = [int(kind == "yes") for kind in columns["kind"]]
                pyarrow.parquet.write_table(pyarrow.table(columns), path)
        data = {"kind": "parquet", "file": file, "target": target, "client_column": "who", "holdout": "keyed"}
        settings = experiment(data=data, model={"name": model})
        return settings, [read_device(settings, i, data=files[i]) for i in range(3)]

    return make


def _quadratic(folder: Path) -> tuple[Experiment, list[DeviceRows]]:
    rng = np.random.default_rng(0)
    np.savez(folder / "q.npz", lam=rng.uniform(0, 2, size=(3, 4)), a=rng.normal(size=(3, 4)))
    np.savez(folder / "q0.npz", **{name: value[:1] for name, value in np.load(folder / "q.npz").items()})
    settings = experiment(data={"kind": "quadratic", "file": str(folder / "q.npz")})
    rest = [read_device(settings, i, data=str(folder / "q.npz"), partition=i) for i in (1, 2)]
    return settings, [read_device(settings, 0, data=str(folder / "q0.npz")), *rest]


CASES = {
    "digits": _digits,
    "network": _iris_network,
    "logistic": _files("logistic", "kind"),
    "linear": _files("linear", "price"),
    "quadratic": _quadratic,
}


@pytest.mark.parametrize("case", CASES)
def test_a_device_computes_what_its_client_does(tmp_path: Path, case: str) -> None:
    settings, holdings = CASES[case](tmp_path)
    want = build_problem(settings)
    agreed, shares = federate(settings, holdings)
    server = remote_problem(settings, agreed, 3)
    assert (server.d, server.layout, server.prior) == (want.d, want.layout, want.prior)
    assert (server.clients.n, server.likelihood) == (3, want.likelihood)
    assert [block.tolist() for block in server.clients.blocks()] == [b.tolist() for b in want.clients.blocks()]
    assert torch.equal(server.start_scale, want.start_scale)
    points = torch.randn(2, want.d, generator=torch.Generator().manual_seed(0)).to(want.clients.dtype)
    vector = points.flip(0).contiguous()
    functionals = server.functionals(points)
    assert functionals.shape == (2, 2 + min(32, want.d))
    assert torch.equal(functionals[:, 1], points.double().square().sum(-1))
    assert not server.clients.gradient(points).any()
    assert server.fingerprint == remote_problem(settings, agreed, 3).fingerprint != want.fingerprint
    for i, share in enumerate(shares):
        own, simulated = device_problem(settings, share).clients, want.clients.client(i)
        assert torch.equal(own.gradient(points), simulated.gradient(points))
        assert torch.equal(own.hvp(points, vector), simulated.hvp(points, vector))
        assert torch.equal(own.potential(points), simulated.potential(points))
        assert own.rows.tolist() == simulated.rows.tolist()


def test_a_schema_and_a_model_that_do_not_fit() -> None:
    quadratic = Schema("quadratic", (3,), rows=1)
    with pytest.raises(ConfigError, match="quadratic goes with"):
        remote_problem(experiment(), quadratic, 2)
    with pytest.raises(ConfigError, match="holds potentials"):
        agreed_schema(experiment(), [quadratic])
    rows = Schema("rows", (2,), target=Target("labels", (0, 1, 2)))
    with pytest.raises(ConfigError, match="takes two classes"):
        remote_problem(experiment(model={"name": "logistic"}), rows, 2)
    with pytest.raises(ConfigError, match="at least 1"):
        remote_problem(experiment(), rows, 0)
    renamed = Schema("rows", (2,), target=Target("labels", (0, 1, 3)))
    found = [remote_problem(experiment(), each, 2).fingerprint for each in (rows, renamed)]
    assert found[0] != found[1]
    undecided = Schema("rows", (2,), target=Target("undecided", (0, 1, 2)))
    with pytest.raises(DataError, match="merge"):
        remote_problem(experiment(), undecided, 2)


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model"), [("digits", "softmax"), ("breast_cancer", "logistic"), ("diabetes", "linear")]
)
def test_sums_of_counts_are_the_scores_of_all_rows(name: str, model: str) -> None:
    # In float32 the product of fewer rows may round differently; in float64 that is far below the bound.
    settings = experiment(data={"name": name, "clients": 3}, model={"name": model}, dtype="float64")
    pooled = build_problem(settings)
    _, shares = federate(settings, [read_device(settings, i, partition=i) for i in range(3)])
    draws = 0.3 * torch.randn(7, pooled.d, generator=torch.Generator().manual_seed(0)).to(pooled.clients.dtype)
    counts = []
    for share in shares:
        problem = device_problem(settings, share)
        one, other = Evaluator(problem), Evaluator(problem)
        one.see(draws[:3])
        other.restore(one.state())
        one.see(draws[3:])
        other.see(draws[3:])
        assert torch.equal(one.counts(), other.counts())
        counts.append(one.counts())
    got = scores(total(counts), pooled.likelihood)
    assert pooled.test is not None
    predicted = pooled.predict_test(draws)
    if model == "linear":
        want = {
            "rmse": calibration.rmse(predicted.mean(0), pooled.test[1]),
            "nll": calibration.gaussian_nll(predicted, pooled.test[1], pooled.noise_scale),
        }
    else:
        judged = (predicted / len(draws), pooled.test[1])
        want = {score: getattr(calibration, score)(*judged) for score in ("accuracy", "nll", "brier", "ece")}
    # each score is a mean over the rows of a mean over draws, of logarithms and exponentials of products of d terms: a
    # probability is off by the roundings of its logits, which are no larger than the sizes in them
    rows = len(pooled.test[1])
    logits = float(draws.abs().sum(1).max() * max(1.0, float(pooled.test[0].abs().max())))
    roundings = (pooled.d + 2 * ELEMENTARY) * max(1.0, logits) + rows + len(draws) + 8
    assert roundings < 1e6
    assert got == {score: near(value, roundings, max(1.0, abs(value))) for score, value in want.items()}


def test_scores_without_rows_and_of_strangers() -> None:
    settings = experiment(data={"name": "iris", "clients": 3, "test_fraction": 0.0})
    problem: Problem = build_problem(settings)
    evaluator = Evaluator(problem)
    with pytest.raises(DataError, match="no draw"):
        evaluator.counts()
    evaluator.see(torch.zeros(1, problem.d))
    assert scores(evaluator.counts(), "categorical") == {"accuracy": None, "nll": None, "brier": None, "ece": None}
    assert scores(torch.zeros(3), "gaussian") == {"rmse": None, "nll": None}
    with pytest.raises(DataError, match="held-out rows have changed"):
        evaluator.restore({"seen": torch.tensor(2), "total": torch.zeros(4, 3)})
    good = torch.zeros(length("categorical"))
    for at, value in ((0, 0.5), (0, -1.0), (0, torch.nan), (1, 2.0), (1, -1.0)):
        bad = good.clone()
        bad[at] = value
        with pytest.raises(DataError, match="got counts"):
            scores(bad, "categorical")
    with pytest.raises(DataError, match="shape"):
        scores(good[1:], "categorical")


# --- agreement ------------------------------------------------------------------------------------------------------


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


# --- a schema from a stranger ---------------------------------------------------------------------------------------

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


# --- sums and options that make no sense ----------------------------------------------------------------------------


def test_sums_by_hand() -> None:
    shares = [(np.array([[1e9, 3.0, 0.1]]), np.array([0.5])), (np.zeros((0, 3)), np.zeros(0))]
    shares.append((np.array([[1e9 + 2, 4.0, 0.1], [1e9 + 4, 8.0, 0.1]]), np.array([1.5, 4.0])))
    x, y = (np.concatenate(each) for each in zip(*shares, strict=True))
    data = FederatedData("some", x, y, np.array([0, 1, 1, 3]), x[:0], y[:0], None)
    parts = [data.client(i) for i in range(3)]
    first = total([first_sums(part) for part in parts])
    assert first.tolist() == [3.0, 3e9 + 6, 15.0, near(0.3, 4), 6.0]
    second = total([second_sums(part, first) for part in parts])
    assert second.tolist() == [8.0, 14.0, pytest.approx(0, abs=3 * (2 * gamma(4) * 0.1) ** 2), 6.5]
    scaled = Scale.of(first, second).apply(data)
    agree(scaled.x[:, 0], np.array([-2, 0, 2]) / np.sqrt(8 / 3), 4)
    assert np.abs(scaled.x[:, 2]).max() <= 2 * gamma(4) * 0.1  # constant but for rounding: not blown up
    assert (scaled.target_mean, scaled.target_scale) == (2.0, np.sqrt(6.5 / 3))
    nobody = torch.zeros(5, dtype=torch.float64)
    with pytest.raises(DataError, match="0 training rows"):
        second_sums(parts[1], nobody)


def test_sums_of_strangers() -> None:
    data = load_data(experiment(data={"name": "iris", "clients": 2}).data, 0)
    first = first_sums(data.client(0))
    for bad in (first[1:], torch.cat([torch.zeros(1), first[1:]]), first * torch.nan, first + 0.5):
        with pytest.raises(DataError, match=r"first sums|training rows together"):
            second_sums(data.client(0), bad)
    for second in (-torch.ones(4).double(), torch.full((4,), torch.inf).double()):
        with pytest.raises(DataError, match="sums of squares"):
            Scale.of(first, second)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--data FILE"),
        ({"data": "digits"}, "--partition and --partitions"),
        ({"data": "digits", "partition": 3, "partitions": 3}, "clients 0 to 2"),
        ({"data": "digits", "partition": -1, "partitions": 3}, "at least 0"),
        ({"data": "digits", "partition": 0, "partitions": 3, "target": "y"}, "--target y"),
        ({"data": "digit"}, "Did you mean 'digits'"),
        ({"data": "own.npz", "partition": 0}, "all rows of own.npz are this device's"),
        ({"data": "own.npz", "target": "y"}, "--target y"),
        ({"partition": 0, "partitions": 4}, "data.clients = 10"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("own.npz", X=np.zeros((4, 1)), y=[0, 1, 0, 1])
    with pytest.raises(ConfigError, match=message):
        read_device(experiment(), 0, **given)


def test_files_that_cannot_be_this_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("own.npz", X=np.zeros((4, 1)), y=[0, 1, 0, 1], client=[0, 1, 0, 1])
    np.savez("q.npz", lam=np.ones((2, 3)), a=np.ones((2, 3)))
    with pytest.raises(DataError, match="drop 'client'"):
        read_device(experiment(), 0, data="own.npz")
    with pytest.raises(DataError, match="does not exist"):
        read_device(experiment(), 0, data="no.csv")
    with pytest.raises(DataError, match="no array 'X'"):
        read_device(experiment(), 0, data="q.npz")
    settings = experiment(data={"kind": "quadratic", "file": "q.npz"})
    with pytest.raises(DataError, match="expected 'a'"):
        read_device(settings, 0, data="own.npz")
    with pytest.raises(ConfigError, match="clients 0 to 1"):
        read_device(settings, 0, partition=2)
    with pytest.raises(ConfigError, match="holds 2 potentials"):
        read_device(settings, 0, data="q.npz")


def test_a_device_with_a_file_needs_little(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("a,b,y\n" + "".join(f"{i},{'uv'[i % 2]},{i % 3}\n" for i in range(12)))
    script = """
import sys
from fedsample.config import load
from fedsample.data.device_files import agreed_schema, read_device
from fedsample.data.standardize import Scale, first_sums, second_sums
from fedsample.diagnostics.counts import Evaluator
from fedsample.problem.remote import device_problem, remote_problem
settings = load({}, environment={})
holding = read_device(settings, 0, task=None, data="own.csv", target="y")
agreed = agreed_schema(settings, [holding.schema])
share = holding.fit(agreed)
first = first_sums(share)
share = Scale.of(first, second_sums(share, first)).apply(share)
problem = device_problem(settings, share)
theta = problem.start_mean.to(problem.clients.dtype).unsqueeze(0)
problem.clients.gradient(theta)
evaluator = Evaluator(problem)
evaluator.see(theta)
evaluator.counts()
remote_problem(settings, agreed, 3)
heavy = {"flwr", "ray", "opacus", "tensorboard", "sklearn", "datasets", "flwr_datasets", "scipy"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
