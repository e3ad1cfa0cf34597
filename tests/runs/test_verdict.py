"""What no run may pass over in silence: improper and unresolvable posteriors, chains that have not mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsample
from fedsample.errors import ConfigError, DeviceMemoryError, DivergenceError
from fedsample.monitor import summary_table
from fedsample.runs.plan import plan
from fedsample.runs.verdict import run_warnings

SHORT = {"rounds": 60, "warmup": 10, "monitor": {"tensorboard": False}}
SUMMARY = {
    "draws": 100,
    "chains": 4,
    "rhat_max": 1.01,
    "ess_bulk_min": 400.0,
    "relaxation_rounds": 20.0,
    "predicted_variance_bias": 0.1,
    "step_size": 0.1,
    "largest_stable_step": 0.5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run_warnings")
    draw = np.random.default_rng(0)
    x, client = draw.normal(size=(40, 2)), np.arange(40) % 2
    np.savez(folder / "apart.npz", X=x, y=(x[:, 0] > 0).astype(int), client=client)
    np.savez(folder / "mixed.npz", X=x, y=(x[:, 0] + draw.normal(size=40) > 0).astype(int), client=client)
    np.savez(folder / "huge.npz", X=x * 1e8, y=(x[:, 0] + draw.normal(size=40) > 0).astype(int), client=client)
    np.savez(folder / "target.npz", X=x, y=1e6 * (3 + x[:, 0] + draw.normal(size=40)), client=client)
    np.savez(folder / "far.npz", lam=np.ones((2, 3)), a=1e8 + draw.normal(size=(2, 3)))
    return folder


def settings(folder: Path, file: str, model: str = "logistic", **more: Any) -> dict[str, Any]:
    data = {"kind": "quadratic" if file == "far.npz" else "npz", "file": str(folder / file)}
    prior = {"prior_scale": more.pop("prior")} if "prior" in more else {}
    return {**SHORT, "data": data, "model": {"name": model, **prior} if file != "far.npz" else prior, **more}


def sample(folder: Path, out: Path, *given: Any, **more: Any) -> fedsample.Run:
    return fedsample.run(settings(folder, *given, **more), out=out / "run", progress="quiet")


@pytest.mark.parametrize("metric", ["hessian", "identity"])
def test_classes_that_a_hyperplane_separates_have_no_posterior_under_a_flat_prior(
    metric: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="better for ever: the posterior has no finite mass"):
        sample(folder, tmp_path, "apart.npz", prior="flat", metric={"name": metric})
    sample(folder, tmp_path, "mixed.npz", prior="flat", metric={"name": metric})


@pytest.mark.parametrize("metric", ["hessian", "diagonal", "kronecker", "identity"])
def test_a_posterior_too_narrow_for_the_dtype(metric: str, folder: Path, tmp_path: Path) -> None:
    """Beside U = 1e16 no step of length one lowers a float32: only a metric's Newton steps find the mode."""
    says = r"1e\+08 at the mode, where float32 has numbers 12 apart, but .* 0\.\d+, expected .* 'float64', or centre"
    says = r"the mode was not found: .* 'float64'" if metric == "identity" else says
    with pytest.raises(ConfigError, match=says):
        sample(folder, tmp_path, "far.npz", metric={"name": metric})
    run = sample(folder, tmp_path, "far.npz", metric={"name": metric}, dtype="float64")
    assert run.summary["draws"] == 10


def test_a_step_that_suits_is_not_blamed_for_a_divergence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"is below the stability limit for .*model.noise_scale"):
        sample(folder, tmp_path, "target.npz", "linear", dtype="float64")


def test_chains_that_have_not_mixed_are_said_not_to_have(folder: Path, tmp_path: Path) -> None:
    run = sample(folder, tmp_path, "huge.npz", rounds=200)
    (warning,) = run.summary["warnings"]
    assert "the chains have not mixed: worst R-hat" in warning
    assert "rounds, and 190 were kept: raise rounds and warmup, or scale the data" in warning
    from rich.console import Console

    console = Console(width=400)
    with console.capture() as shown:
        console.print(summary_table(run.summary, run.path))
    assert warning in shown.get()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"rhat_max": 1.2}, "worst R-hat 1.20, expected at most 1.1: raise rounds and warmup"),
        ({"rhat_max": float("nan"), "ess_bulk_min": 5.0}, "did not move as far as float32 tells"),
        ({"rhat_max": None, "ess_bulk_min": None}, "did not move"),
        ({"draws": 3, "rhat_max": None, "ess_bulk_min": None}, "3 draws per chain tell nothing of their mixing"),
        ({"chains": 1, "rhat_max": None}, None),
        ({"chains": 1, "rhat_max": None, "ess_bulk_min": 9.0}, "of the one chain is 9, expected at least 50"),
        ({"step_size": 0.6, "predicted_variance_bias": None}, "no stationary variance is predicted (the largest"),
        ({"predicted_variance_bias": None}, "at step 0.1 no stationary variance is predicted"),
        ({"predicted_variance_bias": 0.3}, "variance bias of +30.00%, expected at most bias_tolerance = 10.00%: lower"),
    ],
)
def test_each_doubt(change: dict[str, Any], says: str | None) -> None:
    found = run_warnings(fedsample.Experiment(), SUMMARY | change)
    assert len(found) == (says is not None)
    assert says is None or says in found[0]


@pytest.mark.parametrize(("uplink", "advised"), [("diana", False), ("ef21", False), ("direct", True), ("marina", True)])
def test_an_uplink_with_a_memory_is_not_advised_to_who_has_one(uplink: str, advised: bool) -> None:
    experiment = fedsample.Experiment.model_validate({"uplink": {"name": uplink, "compressor": "randk"}})
    (found,) = run_warnings(experiment, SUMMARY | {"predicted_variance_bias": 0.3})
    assert ("such as diana" in found) is advised


@pytest.mark.parametrize(
    ("schedule", "doubted"),
    [
        ({"schedule": "polynomial", "offset": 10.0}, False),  # 0.04 in the first round that is kept
        ({"schedule": "polynomial", "offset": 1e6}, True),
        ({"schedule": "cyclical", "period": 500}, True),  # begins again while draws are kept
        ({"schedule": "cyclical", "period": 100_000}, True),
        ({"schedule": "constant"}, True),
    ],
)
def test_a_schedule_is_judged_by_its_steps_while_draws_are_kept(schedule: dict[str, Any], doubted: bool) -> None:
    experiment = fedsample.Experiment.model_validate({"step_size": {"initial": 0.6, **schedule}})
    found = run_warnings(experiment, SUMMARY | {"step_size": 0.6, "predicted_variance_bias": 2.0})
    assert bool(found) is doubted
    assert not doubted or "no stationary variance is predicted" in found[0]


def test_nothing_is_doubted_where_nothing_is_drawn() -> None:
    assert run_warnings(fedsample.Experiment(temperature=0), SUMMARY | {"rhat_max": 9.0}) == []


def test_what_the_memory_does_not_hold_is_no_defect(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceMemoryError, match=r"out of memory on cpu: take fewer chains.*tried to allocate"):
        sample(folder, tmp_path, "mixed.npz", chains=10**13)
    given = settings(folder, "mixed.npz", "mlp", metric={"name": "identity"})
    given["model"]["hidden"] = [10**13]
    for ask in (fedsample.build_target, plan):
        with pytest.raises(DeviceMemoryError, match="out of memory on cpu"):
            ask(given)
