"""`fedsample.run` and `fedsample simulate` from data to draws, as a user calls them."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import tomllib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import call, sets
from rounding import agree, assert_within, central_difference, gamma
from running_error import RunningError

import fedsample
from fedsample.config import Experiment, dump_toml, load
from fedsample.config.presets import PRESETS
from fedsample.diagnostics.convergence import ess_bulk
from fedsample.monitor import load_rounds, read_jsonl
from fedsample.problem import build_problem
from fedsample.runs import session
from fedsample.runs.api import Run

pytestmark = pytest.mark.slow

# What `summary.json` holds whatever the data are; scores of held-out rows come on top.
ALWAYS = {
    "rounds",
    "draws",
    "chains",
    "clients",
    "params",
    "seconds",
    "seconds_per_round",
    "rhat_max",
    "ess_bulk_min",
    "ess_tail_min",
    "predicted_variance_bias",
    "uplink_bytes_per_client",
    "downlink_bytes_per_client",
    "uplink_ratio",
}


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FEDSAMPLE_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


class Gaussians:
    """Quadratic clients and their posterior N(mean, 1 / precision), coordinate by coordinate."""

    def __init__(self, file: Path) -> None:
        draw = np.random.default_rng(1)
        self.lam, self.a = draw.uniform(0.2, 3, (5, 4)), draw.normal(size=(5, 4))
        np.savez(file, lam=self.lam, a=self.a)
        self.precision = self.lam.sum(0)
        self.mean = (self.lam * self.a).sum(0) / self.precision
        self.data = {"kind": "quadratic", "file": str(file)}


@pytest.fixture(scope="module")
def gaussians(folder: Path) -> Gaussians:
    return Gaussians(folder / "quadratic.npz")


@pytest.fixture(scope="module")
def regression(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Forty rows on four clients, twenty to be tested on."""
    draw = np.random.default_rng(2)
    x = draw.normal(size=(60, 3))
    y = x @ np.array([1.5, -1.0, 0.5]) + 0.3 + 0.5 * draw.normal(size=60)
    arrays = {"X": x[:40], "y": y[:40], "client": np.arange(40) % 4, "X_test": x[40:], "y_test": y[40:]}
    np.savez(folder / "regression.npz", **arrays)
    return arrays


def sample(folder: Path, name: str, **settings: Any) -> Run:
    base = {"rounds": 600, "warmup": 100, "monitor": {"tensorboard": False}}
    return fedsample.run({**base, **settings}, out=folder / name, progress="quiet")


def assert_moments(draws: torch.Tensor, mean: np.ndarray[Any, Any], variance: np.ndarray[Any, Any]) -> None:
    """Loosely: five Monte-Carlo errors for the mean and, with a tenth of bias allowed, for the variance."""
    flat = draws.double().flatten(0, 1).numpy()
    ess = ess_bulk(draws.double())
    assert ess.min() > 200, "the chains barely moved"
    assert (np.abs(flat.mean(0) - mean) < 5 * np.sqrt(variance / ess)).all()
    ratio = flat.var(0) / variance
    assert (np.abs(ratio - 1) < 0.1 + 5 * np.sqrt(2 / ess)).all(), ratio


# --- is it the posterior? ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prior_scale", "dtype"), [("flat", "float32"), (0.7, "float64")])
def test_quadratic_clients_against_their_closed_form(
    dtype: str, prior_scale: Any, gaussians: Gaussians, folder: Path
) -> None:
    run = sample(
        folder,
        f"moments-{dtype}-{prior_scale}",
        rounds=2500,
        warmup=200,
        thin=2,
        dtype=dtype,
        data=gaussians.data,
        model={"prior_scale": prior_scale},
        uplink={"k": 2},
    )
    assert run.draws.dtype == getattr(torch, dtype)
    prior = 0.0 if prior_scale == "flat" else prior_scale**-2
    precision = gaussians.precision + prior
    mean = gaussians.mean * gaussians.precision / precision
    assert_moments(run.draws, mean, 1 / precision)
    if prior_scale == "flat":
        with pytest.raises(AssertionError):
            assert_moments(run.draws, mean, 1.5 / precision)
        with pytest.raises(AssertionError):
            assert_moments(run.draws, mean + 0.5 / np.sqrt(precision), 1 / precision)
    summary = run.summary
    assert summary["rhat_max"] < 1.05
    assert summary["accuracy"] is summary.get("rmse") is None


RIDGE: dict[str, Any] = {"thin": 2, "model": {"name": "linear", "noise_scale": 0.5, "prior_scale": 2.0}}


@pytest.fixture(scope="module")
def ridge(regression: dict[str, np.ndarray[Any, Any]], folder: Path) -> Run:
    data = {"kind": "npz", "file": str(folder / "regression.npz")}
    return sample(folder, "ridge-npz", rounds=3000, data=data, **RIDGE)


def test_linear_regression_against_ridge(ridge: Run, regression: dict[str, np.ndarray[Any, Any]]) -> None:
    x = np.column_stack([regression["X"], np.ones(40)])
    precision = x.T @ x / 0.25 + np.eye(4) / 4
    covariance = np.linalg.inv(precision)
    assert_moments(ridge.draws, covariance @ x.T @ regression["y"] / 0.25, np.diag(covariance))
    assert ridge.summary["clients"] == 4
    assert 0.4 < ridge.summary["rmse"] < 0.75
    assert set(ridge.summary) >= ALWAYS | {"rmse", "nll"}
    last = {tag: value for row in read_jsonl(ridge.path / "metrics.jsonl") for tag, value in row.items()}
    # float32 predictions, products of four terms, in other batches; sums of them in float64
    single = 2 * gamma(64, torch.float32)
    assert last["round/rmse"] == pytest.approx(ridge.summary["rmse"], rel=single)
    assert last["round/nll"] == pytest.approx(ridge.summary["nll"], rel=single)
    layout = json.loads((ridge.path / "params.json").read_text())
    assert [(row["shape"], row["offset"]) for row in layout] == [([1, 3], 0), ([1], 3)]


def test_a_csv_of_the_same_rows_has_the_same_draws(
    ridge: Run, regression: dict[str, np.ndarray[Any, Any]], folder: Path
) -> None:
    rows = np.column_stack([regression["X"], regression["y"], regression["client"]])
    lines = ["a,b,c,out,owner", *(",".join(f"{v:.17g}" for v in row[:4]) + f",{int(row[4])}" for row in rows)]
    (folder / "regression.csv").write_text("\n".join(lines) + "\n")
    data = {"kind": "csv", "file": str(folder / "regression.csv"), "target": "out", "client_column": "owner"}
    run = sample(folder, "ridge-csv", data={**data, "standardize": False, "test_fraction": 0.0}, **RIDGE)
    assert torch.equal(run.draws, ridge.draws[:, : run.draws.shape[1]])
    assert run.draws.shape[1] == 250
    assert run.summary["clients"] == 4
    assert run.summary["rmse"] is run.summary["nll"] is None
    assert (run.path / "params.json").read_text() == (ridge.path / "params.json").read_text()


def test_classification_of_a_table(folder: Path) -> None:
    draw = np.random.default_rng(3)
    x = draw.normal(size=(200, 2))
    names = np.array(["blue", "green", "red"])[np.argmax(x @ draw.normal(size=(2, 3)) * 3, axis=1)]
    lines = [f"{a},{b},{'north' if a * b > 0 else 'south'},{name}" for (a, b), name in zip(x, names, strict=True)]
    (folder / "flowers.csv").write_text("\n".join(["length,width,place,colour", *lines]) + "\n")
    run = sample(
        folder,
        "table",
        data={"kind": "csv", "file": str(folder / "flowers.csv"), "target": "colour", "clients": 3, "partition": "iid"},
        model={"prior_scale": 3.0},
    )
    summary = run.summary
    assert set(summary) >= ALWAYS | {"accuracy", "nll", "brier", "ece", "adaptive_ece"}
    assert summary["accuracy"] > 0.85  # one colour for all: about a half
    assert 0 <= summary["ece"] < 0.2
    assert 0 < summary["nll"] < 0.6
    assert summary["params"] == 3 * (2 + 2 + 1)  # two numbers, two places, an intercept
    assert run.draws.shape == (4, 100, 15)
    last = {tag: value for row in read_jsonl(run.path / "metrics.jsonl") for tag, value in row.items()}
    assert last["round/brier"] == pytest.approx(summary["brier"], rel=1e-4)
    assert "held-out accuracy" in {str(cell) for column in run.table().columns for cell in column.cells}


@pytest.mark.parametrize("preset", ["federated-gd", "underdamped-diana"])
def test_at_temperature_zero_the_chains_end_at_the_mode(preset: str, gaussians: Gaussians, folder: Path) -> None:
    run = sample(
        folder,
        f"cold-{preset}",
        preset=preset,
        temperature=0.0,
        dtype="float64",
        rounds=900,
        data=gaussians.data,
        start={"at": "zeros"},
    )
    assert run.draws[:, -1].numpy() == pytest.approx(np.tile(gaussians.mean, (len(run.draws), 1)), abs=1e-6)
    assert np.abs(run.draws[:, 0].numpy() - gaussians.mean).max() < 1
    assert run.summary["predicted_variance_bias"] is None
    if preset == "federated-gd":
        assert run.draws.shape == (1, 800, 4)
        assert run.summary["uplink_ratio"] == 1.0


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_on_the_same_data(preset: str, gaussians: Gaussians, folder: Path) -> None:
    run = sample(folder, f"preset-{preset}", preset=preset, data=gaussians.data, rounds=200, warmup=50, thin=10)
    assert run.experiment.preset == run.summary["preset"] == preset
    assert run.draws.shape == (run.experiment.chains, 15, 4)
    assert bool(torch.isfinite(run.draws).all())
    metrics = [row for row in read_jsonl(run.path / "metrics.jsonl") if "mcmc/step_size" in row]
    assert [row["round"] for row in metrics] == [100, 200]
    missing = {tag for row in metrics for tag, value in row.items() if value is None}
    assert missing <= ({"mcmc/rhat/max", "mcmc/ess/min"} if run.experiment.chains == 1 else set())


def test_build_target_needs_no_sampling(gaussians: Gaussians, regression: Any, folder: Path) -> None:
    target = fedsample.build_target({"data": gaussians.data, "dtype": "float64", "model": {"prior_scale": 2.0}})
    theta = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    lam, a = torch.from_numpy(gaussians.lam)[:, None], torch.from_numpy(gaussians.a)[:, None]
    size = theta.abs() + a.abs()
    agree(target.client_gradient(theta), lam * (theta - a), 3, lam * size)
    agree(target.client_potential(theta), 0.5 * (lam * (theta - a).square()).sum(-1), 10, (lam * size.square()).sum(-1))
    agree(target.prior_potential(theta), theta.square().sum(-1) / 8, 8)
    data = {"kind": "npz", "file": str(folder / "regression.npz")}
    network = fedsample.build_target({"data": data, "dtype": "float64", "model": {"name": "mlp", "hidden": [3]}})
    point = 0.1 * torch.arange(network.d, dtype=torch.float64)
    with RunningError() as analysis:
        values, gradient = network.client_potential(point), network.client_gradient(point)
    own = float(analysis.error(values).max())
    slope, error = central_difference(network.client_potential, point, torch.eye(network.d).double(), 1e-5, own)
    assert_within(gradient, slope, error + analysis.error(gradient), sees=1e-3)
    assert not list(folder.glob("runs"))


# --- what goes in -----------------------------------------------------------------------------------------------------


def test_a_dict_a_file_and_an_experiment_are_the_same_run(gaussians: Gaussians, folder: Path) -> None:
    settings = {
        "rounds": 200,
        "warmup": 100,
        "data": gaussians.data,
        "model": {"prior_scale": 1.0},  # the default elsewhere, but not of quadratic data: it must not get lost
        "monitor": {"tensorboard": False},
    }
    experiment = Experiment(**settings)
    assert load(experiment) == experiment
    (folder / "run.toml").write_text(dump_toml(experiment))
    runs = [
        fedsample.run(source, out=folder / f"source-{number}", progress="quiet")
        for number, source in enumerate([settings, folder / "run.toml", str(folder / "run.toml"), experiment])
    ]
    for run in runs[1:]:
        assert run.experiment == runs[0].experiment
        assert torch.equal(run.draws, runs[0].draws)
    resolved = tomllib.loads((runs[0].path / "config.toml").read_text())
    assert resolved["model"]["prior_scale"] == 1.0
    assert resolved["step_size"] == runs[0].summary["step_size"]
    assert resolved["fleet"]["threads"] == 1
    again = fedsample.run(runs[0].path / "config.toml", out=folder / "source-again", progress="quiet")
    assert torch.equal(again.draws, runs[0].draws)


@pytest.mark.parametrize(("rounds", "warmup", "thin"), [(100, 10, 7), (64, 0, 1), (50, 49, 1)])
def test_the_draws_are_those_after_the_warm_up(
    rounds: int, warmup: int, thin: int, gaussians: Gaussians, folder: Path
) -> None:
    run = sample(
        folder, f"draws-{rounds}", rounds=rounds, warmup=warmup, thin=thin, chains=3, data=gaussians.data, seed=4
    )
    count = (rounds - warmup) // thin
    assert run.draws.shape == (3, count, 4)
    assert load_rounds(run.path).tolist() == [warmup + thin * (i + 1) for i in range(count)]
    assert (run.summary["draws"], run.summary["chains"], run.summary["params"]) == (count, 3, 4)
    assert run.summary["clients"] == 5
    assert json.loads((run.path / "summary.json").read_text()).keys() == run.summary.keys()
    assert run.summary["downlink_bytes_per_client"] > rounds * 3 * 4 * 4


def test_the_seed_decides(gaussians: Gaussians, folder: Path) -> None:
    one, same, other = (
        sample(folder, f"seed-{name}", seed=seed, rounds=150, data=gaussians.data).draws
        for name, seed in (("one", 7), ("same", 7), ("other", 8))
    )
    assert torch.equal(one, same)
    assert not (one == other).any()
    assert not (one[0] == one[1]).any()


@pytest.mark.parametrize("engine", ["batched", "by-client"])
def test_clients_come_and_go(engine: str, gaussians: Gaussians, folder: Path) -> None:
    fleet = {"engine": engine, "participation": 2, "loss": 0.2, "dropout": 0.1, "dropout_rounds": 3.0}
    run = sample(folder, f"weather-{engine}", rounds=200, data=gaussians.data, fleet=fleet, seed=3)
    rows = list(read_jsonl(run.path / "participation.jsonl"))
    assert [row["round"] for row in rows] == sorted(row["round"] for row in rows)
    assert len(rows) > 150
    assert all(set(row["clients"]) < set(range(5)) for row in rows)
    if engine == "by-client":
        batched = sample(
            folder, "weather", rounds=200, data=gaussians.data, fleet=fleet | {"engine": "batched"}, seed=3
        )
        assert torch.equal(run.draws, batched.draws)


def test_the_environment_and_set_go_over_the_file(gaussians: Gaussians, tmp_path: Path) -> None:
    config = {"rounds": 90, "warmup": 10, "chains": 2, "seed": 1, "data": gaussians.data}
    (tmp_path / "run.toml").write_text(dump_toml(load(config)))
    variables = {"FEDSAMPLE_CHAINS": "3", "FEDSAMPLE_SEED": "2", "FEDSAMPLE_UPLINK__K": "2"}
    words = ["run.toml", "--set", "seed=3", "--rounds", "80", "--out", "run"]
    done = call(tmp_path, "simulate", *words, environment=variables)
    assert done.code == 0, done.err
    resolved = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert [resolved[key] for key in ("rounds", "warmup", "chains", "seed")] == [80, 10, 3, 3]
    assert resolved["uplink"]["k"] == 2


# --- what comes out ---------------------------------------------------------------------------------------------------


def settings_of(gaussians: Gaussians, **more: object) -> list[str]:
    return sets(data__kind="quadratic", data__file=gaussians.data["file"], rounds=120, warmup=20, **more)


def test_json_is_one_document_and_progress_is_elsewhere(gaussians: Gaussians, tmp_path: Path) -> None:
    done = call(tmp_path, "simulate", "--json", "--out", "run", *settings_of(gaussians))
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert set(summary) >= ALWAYS
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert done.err.splitlines()[0].startswith("reading the data ... done in ")
    assert "round 120/120  100%" in done.err
    assert done.err.index("round 120/120") < done.err.index("summing up ... done in ")


def test_quiet_says_nothing_but_the_table(gaussians: Gaussians, tmp_path: Path) -> None:
    done = call(tmp_path, "simulate", "--quiet", "--out", "my run", *settings_of(gaussians))
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("4 chains of 20 draws: 120 rounds, 5 clients, 4 parameters")
    for words in ("worst R-hat", "smallest bulk ESS", "uplink saved", "fedsample monitor 'my run'"):
        assert words in done.out
    done = call(tmp_path, "simulate", "--quiet", "--json", "--out", "other", *settings_of(gaussians))
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["draws"] == 20


def test_the_default_directory_is_named_after_the_preset(gaussians: Gaussians, tmp_path: Path) -> None:
    for _ in range(2):
        assert call(tmp_path, "simulate", "--quiet", *settings_of(gaussians, preset="langevin-diana")).code == 0
    found = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(found) == 2
    assert all("langevin-diana" in name for name in found)
    refused = call(tmp_path, "simulate", "--quiet", *settings_of(gaussians, uplink__k=9))
    assert refused.code == 2
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == found


@pytest.mark.parametrize("words", [[], ["--json"], ["--out", "run"]])
def test_a_dry_run_writes_nothing(words: list[str], gaussians: Gaussians, tmp_path: Path) -> None:
    wide = {"COLUMNS": "400"}
    done = call(tmp_path, "simulate", "--dry-run", *words, *settings_of(gaussians, uplink__k=2), environment=wide)
    assert (done.code, done.err) == (0, "")
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    for text in (
        "4 parameters",
        "diana",
        "randblock",
        "120 (20 of warm-up), 20 draws per chain",
        "32 bytes (dense: 64)",
    ):
        assert text in done.out
    if words == ["--json"]:
        assert json.loads(done.out)["sampler"] == "baoab, 4 chains, temperature 1"
    refused = call(tmp_path, "simulate", "--dry-run", *words, *settings_of(gaussians, uplink__k=9))
    assert refused.code == 2
    assert "k = 9 coordinates of 4 parameters" in refused.error


# --- what a run leaves alone ------------------------------------------------------------------------------------------


def test_a_run_leaves_its_process_as_it_was(gaussians: Gaussians, folder: Path) -> None:
    def world() -> list[Any]:
        return [
            torch.get_rng_state().tolist(),
            str(np.random.get_state()),  # noqa: NPY002 - the legacy generator is what must stay untouched
            random.getstate(),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
            warnings.filters[:],
            dict(os.environ),
            os.getcwd(),
            {thread.name for thread in threading.enumerate()},
        ]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = world()
        sample(folder, "alone", data=gaussians.data, rounds=200, monitor={"tensorboard": True, "every": 50})
        assert world() == before
        with pytest.raises(fedsample.DivergenceError):
            sample(folder, "fails", data=gaussians.data, rounds=200, step_size=99.0)
        assert world() == before
    finally:
        torch.set_num_threads(threads)


def test_curves_disturb_no_gradient(regression: Any, folder: Path) -> None:
    """The monitor looks at draws in a thread, through the very clients that the chain asks for gradients."""
    data = {"kind": "npz", "file": str(folder / "regression.npz")}
    problem = build_problem(load({"data": data, "model": {"name": "mlp", "hidden": [3]}}))
    theta = torch.linspace(-1, 1, 2 * problem.d).view(2, -1)
    gradient, functionals = problem.clients.gradient(theta), problem.functionals(2 - theta)
    seen: list[bool] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.append(torch.equal(problem.functionals(2 - theta), functionals))

    thread = threading.Thread(target=look)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        same = [torch.equal(problem.clients.gradient(theta), gradient) for _ in range(300)]
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert all(same)
    assert seen
    assert all(seen)


def test_code_paths_are_chosen_before_there_are_two_threads(
    gaussians: Gaussians, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MKL's first call of exp or log by two threads at a time is wrong in the sixth digit, once in fifty runs."""
    seen: list[int] = []
    choose, prepare = session.choose_paths, session.prepare
    monkeypatch.setattr(session, "choose_paths", lambda: (seen.append(torch.get_num_threads()), choose()))
    monkeypatch.setattr(session, "prepare", lambda *a: (seen.append(torch.get_num_threads()), prepare(*a))[1])
    run = sample(folder, "threads", data=gaussians.data, fleet={"threads": 2})
    assert seen == [1, 2]
    assert run.experiment.fleet.threads == 2


def test_a_run_in_another_thread(gaussians: Gaussians, folder: Path) -> None:
    """Signals are not asked for there, and the draws are the same."""
    found: list[Run] = []
    thread = threading.Thread(target=lambda: found.append(sample(folder, "thread", rounds=150, data=gaussians.data)))
    thread.start()
    thread.join(60)
    assert torch.equal(found[0].draws, sample(folder, "main", rounds=150, data=gaussians.data).draws)


def test_summary_scores_are_those_of_other_libraries(folder: Path) -> None:
    """From the draws on the disk, with averaged predictions; functionals are the run's own."""
    from arviz_stats.base import array_stats
    from sklearn.metrics import brier_score_loss

    data = {"kind": "builtin", "name": "breast_cancer", "clients": 3}
    model = {"name": "logistic", "prior_scale": 10.0}
    run = sample(folder, "scores", data=data, model=model, dtype="float64", rounds=300, warmup=60)
    problem = build_problem(run.experiment)
    flat = run.draws.flatten(0, 1)
    functionals = problem.functionals(flat).unflatten(0, run.draws.shape[:2]).numpy()
    functionals = functionals[..., np.ptp(functionals, axis=(0, 1)) > 0]
    tails = array_stats.ess(functionals, method="tail", prob=(0.05, 0.95), chain_axis=0, draw_axis=1)
    assert run.summary["ess_tail_min"] == pytest.approx(np.nanmin(tails), rel=1e-9)
    assert problem.test is not None
    labels = problem.test[1].numpy()
    predictive = (problem.predict_test(flat) / len(flat)).numpy()
    want = 2 * brier_score_loss(labels, predictive[:, 1])
    assert run.summary["brier"] == pytest.approx(want, rel=1e-9)
    confidence, correct = predictive.max(1), predictive.argmax(1) == labels
    gaps = np.array_split((correct - confidence)[np.argsort(confidence, kind="stable")], 15)
    want = sum(abs(part.sum()) for part in gaps) / len(labels)
    assert run.summary["adaptive_ece"] == pytest.approx(want, rel=1e-9)
    assert run.summary["ece"] != pytest.approx(want, rel=0.01)  # bins err to both sides, so it matters where they end
