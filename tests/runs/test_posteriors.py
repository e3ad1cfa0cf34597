"""Real posteriors end to end: the main job against a long HMC run, linear regression against its closed form."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import fedsample
from fedsample.diagnostics.convergence import ess_bulk
from fedsample.problem import build_problem
from fedsample.runs.api import Run

pytestmark = pytest.mark.slow

REFERENCE = Path(__file__).parents[1] / "data" / "digits_hmc.npz"


@pytest.fixture(scope="module")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run once a session: a process that another one was faster than reads what that one wrote."""
    own = tmp_path_factory.getbasetemp()
    place = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "main-job"
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return fedsample.run(out=place, resume=place.exists(), progress="quiet")


class TestMainJob:
    def test_reaches_what_it_promises(self, main_job: Run) -> None:
        summary = main_job.summary
        assert summary["rhat_max"] <= 1.03
        assert summary["ess_bulk_min"] >= 400
        assert summary["uplink_ratio"] >= 15

    def test_predicts_as_hmc_does(self, main_job: Run) -> None:
        with np.load(REFERENCE) as reference:
            problem = build_problem(main_job.experiment)
            draws = main_job.draws.reshape(-1, problem.d)
            predictive = (problem.predict_test(draws) / len(draws)).numpy()
            assert abs(main_job.summary["accuracy"] - float(reference["accuracy"])) <= 0.01
            assert abs(main_job.summary["ece"] - float(reference["ece"])) <= 0.015
            assert 0.5 * np.abs(predictive - reference["probs"]).sum(1).mean() <= 0.01

    def test_is_wider_than_hmc_by_what_it_predicts(self, main_job: Run) -> None:
        """Accuracy cannot tell a posterior from its mode; spread and potential can (at the mode U is 319.6)."""
        with np.load(REFERENCE) as reference:
            draws = main_job.draws.to(torch.float64)
            ratio = (draws.var(dim=(0, 1)).numpy() / reference["sd"].astype(np.float64) ** 2).mean()
            predicted = main_job.summary["predicted_mean_bias"]
            assert abs(ratio - 1 - predicted) <= predicted / 3
            potential = main_job.target.potential(main_job.draws[:, ::10].reshape(-1, draws.shape[-1]))
            excess = float(potential.mean()) - float(reference["potential_mean"])
            heated = 325 * main_job.summary["predicted_variance_bias"]  # d / 2 = 325 is the thermal part of U
            assert -5 <= excess <= 5 + 1.5 * heated

    def test_bytes_add_up(self, main_job: Run) -> None:
        packets = main_job.experiment.rounds * 4 * 32 * 4  # chains x coordinates x bytes
        logged = main_job.experiment.rounds // main_job.experiment.monitor.every * 4 * 8  # potentials
        preparation = main_job.summary["preparation_uplink_bytes_per_client"]
        assert main_job.summary["uplink_bytes_per_client"] == packets + logged + preparation

    def test_logs_every_hundredth_round(self, main_job: Run) -> None:
        rows = [json.loads(line) for line in (main_job.path / "metrics.jsonl").read_text().splitlines()]
        assert sorted({row["round"] for row in rows}) == list(range(100, 8001, 100))


DIABETES = {
    "dtype": "float64",
    "chains": 16,
    "rounds": 3000,
    "warmup": 500,
    "thin": 5,
    "data": {"name": "diabetes", "clients": 8, "partition": "iid"},
    "model": {"name": "linear", "prior_scale": 1.0, "noise_scale": 0.7},
    "monitor": {"tensorboard": False},
}


def closed_form() -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the posterior from the rows themselves."""
    data = build_problem(fedsample.Experiment(**DIABETES)).data
    assert data is not None
    design = np.column_stack([data.x, np.ones(len(data.x))])
    precision = design.T @ design / 0.7**2 + np.eye(design.shape[1])
    return np.linalg.solve(precision, design.T @ data.y / 0.7**2), np.linalg.inv(precision)


@pytest.mark.parametrize("uplink", [{"name": "dense"}, {"name": "diana", "k": 3}, {"name": "marina", "k": 3}])
def test_linear_regression_has_its_closed_form(uplink: dict[str, object], tmp_path: Path) -> None:
    run = fedsample.run({**DIABETES, "uplink": uplink, "bias_tolerance": 0.02}, out=tmp_path / "run", progress="quiet")
    mean, covariance = closed_form()
    scaled = (run.draws.numpy() - mean) @ np.linalg.inv(np.linalg.cholesky(covariance)).T  # N(0, I) if all is right
    ess = ess_bulk(scaled)
    assert ess.min() > 400, f"the chains barely moved: {ess.min():.0f}"
    assert np.all(np.abs(scaled.mean((0, 1))) < 5 / np.sqrt(ess))
    variance_ess = ess_bulk(scaled**2)
    bias = run.summary["predicted_variance_bias"]
    assert bias <= 0.021
    deviation = scaled.var((0, 1)) - 1
    error = 5 * np.sqrt(2 / variance_ess)
    assert np.all(deviation > -error)
    assert np.all(deviation < error + 2 * run.summary["predicted_worst_heating"] + bias)
    assert abs(deviation.mean() - bias) < 0.02 + 5 * np.sqrt(2 / variance_ess.sum())


def test_a_wrong_noise_scale_is_seen(tmp_path: Path) -> None:
    """The mutant of the test above: a likelihood twice as sharp is not the closed form's."""
    wrong = {
        **DIABETES,
        "model": {**DIABETES["model"], "noise_scale": 0.6},
        "uplink": {"name": "dense"},
        "rounds": 1500,
    }  # type: ignore[dict-item]
    run = fedsample.run(wrong, out=tmp_path / "run", progress="quiet")
    mean, covariance = closed_form()
    scaled = (run.draws.numpy() - mean) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    assert abs(scaled.var((0, 1)).mean() - 1) > 8 * np.sqrt(2 / ess_bulk(scaled**2).sum())
