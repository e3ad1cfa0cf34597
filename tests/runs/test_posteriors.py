"""Real posteriors end to end: linear regression against its closed form, and a mutant that misses it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fedsample
from fedsample.diagnostics.convergence import ess_bulk
from fedsample.problem import build_problem

pytestmark = pytest.mark.slow

DIABETES = {
    "dtype": "float64",
    "chains": 16,
    "rounds": 2000,
    "warmup": 300,
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
