"""Devices that hold their own rows do to the bit what the simulation does: problems and scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from device_rows import SIZES, experiment, federate, read_device, total, write
from rounding import ELEMENTARY, near

from fedsample.config import Experiment
from fedsample.data.device_files import DeviceRows, agreed_schema
from fedsample.data.schema import Schema, Target
from fedsample.diagnostics import calibration
from fedsample.diagnostics.counts import Evaluator, length, scores
from fedsample.errors import ConfigError, DataError
from fedsample.problem import Problem, build_problem
from fedsample.problem.remote import device_problem, remote_problem

# --- problems ---------------------------------------------------------------------------------------------------------


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


# --- scores -----------------------------------------------------------------------------------------------------------


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
