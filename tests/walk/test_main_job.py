"""What the README's first command leaves in its run directory: the posterior that it promises, and all of its bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from blocks import ROOT

import fedsample
from fedsample.problem import build_problem
from fedsample.runs.api import Run

pytestmark = pytest.mark.timeout(600)

REFERENCE = ROOT / "tests" / "data" / "digits_hmc.npz"


@pytest.fixture(scope="module")
def finished(clone: Path, main_job: str) -> Run:
    """The run that the command made, as Python reads it."""
    (made,) = (clone / "runs").iterdir()
    return fedsample.run(out=made, resume=True, progress="quiet")


class TestMainJob:
    def test_reaches_what_it_promises(self, finished: Run) -> None:
        summary = finished.summary
        assert summary["rhat_max"] <= 1.03
        assert summary["ess_bulk_min"] >= 400
        assert summary["uplink_ratio"] >= 15

    def test_predicts_as_hmc_does(self, finished: Run) -> None:
        with np.load(REFERENCE) as reference:
            problem = build_problem(finished.experiment)
            draws = finished.draws.reshape(-1, problem.d)
            predictive = (problem.predict_test(draws) / len(draws)).numpy()
            assert abs(finished.summary["accuracy"] - float(reference["accuracy"])) <= 0.01
            assert abs(finished.summary["ece"] - float(reference["ece"])) <= 0.015
            assert 0.5 * np.abs(predictive - reference["probs"]).sum(1).mean() <= 0.01

    def test_is_wider_than_hmc_by_what_it_predicts(self, finished: Run) -> None:
        """Accuracy cannot tell a posterior from its mode; spread and potential can (at the mode U is 319.6)."""
        with np.load(REFERENCE) as reference:
            draws = finished.draws.to(torch.float64)
            ratio = (draws.var(dim=(0, 1)).numpy() / reference["sd"].astype(np.float64) ** 2).mean()
            predicted = finished.summary["predicted_mean_bias"]
            assert abs(ratio - 1 - predicted) <= predicted / 3
            potential = finished.target.potential(finished.draws[:, ::10].reshape(-1, draws.shape[-1]))
            excess = float(potential.mean()) - float(reference["potential_mean"])
            heated = 325 * finished.summary["predicted_variance_bias"]  # d / 2 = 325 is the thermal part of U
            assert -5 <= excess <= 5 + 1.5 * heated

    def test_bytes_add_up(self, finished: Run) -> None:
        packets = finished.experiment.rounds * 4 * 32 * 4  # chains x coordinates x bytes
        logged = finished.experiment.rounds // finished.experiment.monitor.every * 4 * 8  # potentials
        preparation = finished.summary["preparation_uplink_bytes_per_client"]
        assert finished.summary["uplink_bytes_per_client"] == packets + logged + preparation

    def test_logs_every_hundredth_round(self, finished: Run) -> None:
        rows = [json.loads(line) for line in (finished.path / "metrics.jsonl").read_text().splitlines()]
        assert sorted({row["round"] for row in rows}) == list(range(100, 8001, 100))
