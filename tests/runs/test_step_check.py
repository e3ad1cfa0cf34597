"""The step check: what halving a step says, on draws whose variances are known, and end to end on quadratics."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from rounding import near
from torch import Tensor

import fedsample
from fedsample.config import load
from fedsample.errors import ConfigError
from fedsample.monitor.summary_table import summary_table
from fedsample.random import key
from fedsample.runs.step_check import compare, half, verdict


def normal(variance: float, seed: int, count: int = 4000) -> Tensor:
    """(C, n, m) independent draws."""
    draws = key(seed, purpose="draws").fold(torch.arange(4 * count)).normal(20, torch.float64)
    return math.sqrt(variance) * draws.view(4, count, 20)


def test_the_bias_is_what_halving_removes_times_the_power_of_the_step() -> None:
    seen = compare(normal(1.08, 0), normal(1.02, 1), "mean", (0.08, 0.02))  # as h^2
    assert seen.predicted_change == near(1.08 / 1.02 - 1, 4, 2.0)
    assert abs(seen.change - (1.08 / 1.02 - 1)) < 4 * seen.error
    assert seen.error == pytest.approx(1.08 / 1.02 * math.sqrt(2 * 2 / (16000 * 20)), rel=0.25)
    assert seen.bias == near(seen.change * 0.08 / (1.08 / 1.02 - 1), 8 / (1.08 / 1.02 - 1))
    assert compare(normal(1.08, 0), normal(1.02, 1), "mean").bias == near(2 * seen.change, 8 / (1.08 / 1.02 - 1))


def test_verdicts() -> None:
    def of(one: float, two: float, count: int = 4000, rhat: float | None = 1.0) -> str:
        return verdict([compare(normal(one, 0, count), normal(two, 1, count), "mean")], 0.1, rhat)[0]

    assert of(1.05, 1.025) == "confirmed"
    assert of(1.3, 1.1) == "not confirmed"
    assert of(1.05, 1.025, count=10) == "undecided"
    assert of(1.05, 1.025, count=4) == "undecided"  # too few for an error
    assert of(1.05, 1.025, rhat=1.5) == "undecided"
    assert of(1.05, 1.025, rhat=None) == "confirmed"  # a single chain has none


def test_the_error_sees_autocorrelation() -> None:
    """A chain that stays where it is for ten draws has ten times fewer: its error is three times as large."""
    fresh = normal(1.0, 0, 400)
    slow = compare(fresh.repeat_interleave(10, 1), normal(1.0, 1), "mean")
    assert slow.error == pytest.approx(compare(fresh, normal(1.0, 1, 40000), "mean").error, rel=0.3)


@pytest.fixture(scope="module")
def quadratic(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four equal clients in 30 dimensions, curvature 1 in all: langevin's variance is 1 / (1 - h / 2)."""
    file = tmp_path_factory.mktemp("data") / "q.npz"
    np.savez(file, lam=np.full(4, 0.25), a=np.random.default_rng(0).normal(size=(4, 30)))
    return {
        "preset": "langevin-diana",
        "dtype": "float64",
        "uplink": {"name": "dense"},
        "data": {"kind": "quadratic", "file": str(file)},
        "model": {"prior_scale": None},
        "rounds": 3000,
        "warmup": 200,
        "thin": 4,
        "monitor": {"tensorboard": False},
    }


def test_an_automatic_step_is_confirmed(quadratic: dict[str, Any], tmp_path: Path) -> None:
    """Bias 10 %: h = 2 (1 - 1 / 1.1); at half of it the variance is 1 / (1 - h / 4)."""
    run = fedsample.run(quadratic, out=tmp_path / "run", progress="quiet", check_step=True)
    step = 2 * (1 - 1 / 1.1)
    assert run.summary["step_size"] == pytest.approx(step, rel=2e-3)
    checked = run.summary["step_check"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step_check"] == checked
    assert checked["verdict"] == "confirmed", checked
    assert checked["half_step_size"] == run.summary["step_size"] / 2
    (mean,) = checked["comparisons"]  # no direction is stiffer than another
    want = 1.1 * (1 - step / 4) - 1
    assert mean["predicted_change"] == pytest.approx(want, rel=5e-3)
    assert abs(mean["change"] - want) < 4 * mean["error"]
    assert abs(mean["bias"] - 0.1) < 4 * mean["bias_error"]
    below = json.loads((tmp_path / "run" / "check-step" / "summary.json").read_text())
    assert (below["rounds"], below["draws"]) == (6000, run.summary["draws"])
    again = fedsample.run(out=tmp_path / "run", resume=True, progress="quiet", check_step=True)
    assert again.summary["step_check"]["comparisons"] == checked["comparisons"]


def test_a_step_far_too_large_is_not(quadratic: dict[str, Any], tmp_path: Path) -> None:
    """Variance 4 at h = 1.5 where the posterior's is 1."""
    run = fedsample.run({**quadratic, "step_size": 1.5}, out=tmp_path / "run", progress="quiet", check_step=True)
    checked = run.summary["step_check"]
    assert checked["verdict"] == "not confirmed"
    (mean,) = checked["comparisons"]
    assert abs(mean["change"] - (4 * (1 - 1.5 / 4) - 1)) < 4 * mean["error"]
    assert "take a smaller step" in checked["why"]
    console = Console(width=1000, file=io.StringIO())
    console.print(summary_table(run.summary, run.path))
    assert "not confirmed: against half the step variances grow" in console.file.getvalue()  # type: ignore[attr-defined]


def test_what_cannot_be_halved_is_refused_before_anything_runs(quadratic: dict[str, Any], tmp_path: Path) -> None:
    for change, words in (
        ({"step_size": {"schedule": "polynomial"}}, "halves one constant step"),
        ({"temperature": 0.0}, "at temperature 0 there are none"),
    ):
        with pytest.raises(ConfigError, match=words):
            fedsample.run({**quadratic, **change}, out=tmp_path / "run", progress="quiet", check_step=True)
    assert not (tmp_path / "run").exists()


def test_half_is_as_long_in_time() -> None:
    experiment = load({"step_size": 0.05, "seed": 3}, environment={})
    other = half(experiment)
    assert (other.step_size, other.seed) == (0.025, 4)
    assert (other.rounds, other.warmup, other.thin) == (16000, 2000, 10)
    assert other.draws == experiment.draws
