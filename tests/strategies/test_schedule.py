"""Step-size schedules: values, TOML, the resolved configuration, and a run that goes on."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rounding import ELEMENTARY, near

import fedsample
from fedsample.config import ScheduleConfig, dump_toml, load, trace
from fedsample.errors import ConfigError
from fedsample.strategies.schedule import Constant, Cyclical, Polynomial


def test_values() -> None:
    assert [Constant(0.1).at(round) for round in (1, 10, 10_000)] == [0.1, 0.1, 0.1]
    falling = Polynomial(0.1, power=0.5, offset=100.0)
    assert falling.at(1) == 0.1
    assert falling.at(101) == near(0.1 / math.sqrt(2), ELEMENTARY)
    assert falling.at(301) == near(0.05, ELEMENTARY)
    steps = [Polynomial(0.1).at(round) for round in range(1, 100)]
    assert steps == sorted(steps, reverse=True)
    waves = Cyclical(0.1, period=4)
    want = [0.05 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert [waves.at(round) for round in range(1, 9)] == near(want * 2, ELEMENTARY + 4)
    assert waves.at(1) == waves.at(5) == 0.1
    assert min(waves.at(round) for round in range(1, 9)) > 0


@pytest.mark.parametrize(
    "text",
    [
        'step_size = {schedule = "polynomial", initial = 0.01, power = 0.6, offset = 200.0}',
        'step_size = {schedule = "cyclical", period = 50}',
        '[step_size]\nschedule = "constant"\ninitial = 0.2',
    ],
)
def test_a_schedule_survives_toml(text: str, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(text)
    experiment, origins = trace(file, environment={})
    assert isinstance(experiment.step_size, ScheduleConfig)
    assert origins["step_size"] == str(file)
    dumped = dump_toml(experiment, origins)
    assert tomllib.loads(dumped)["step_size"] == experiment.step_size.model_dump()
    assert load(tomllib.loads(dumped), environment={}) == load(experiment) == experiment
    table = text.removeprefix("step_size = ").strip()
    if table.startswith("{"):
        assert load({}, [f"step_size={table}"], {}) == load({}, [], {"FEDSAMPLE_STEP_SIZE": table}) == experiment
    assert load(experiment, ["step_size=0.1"]).step_size == 0.1


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"schedule": "linear"}, r'schedule = "linear"; expected one of "constant", "polynomial", "cyclical"'),
        ({"initial": 0.0}, r'initial = 0\.0; expected a number > 0 or "auto"'),
        ({"initial": "fast"}, r'initial = "fast"; expected a number > 0 or "auto"'),
        ({"power": -1.0}, r"power = -1\.0; expected a number > 0"),
        ({"offset": 0.0}, r"offset = 0\.0; expected a number > 0"),
        ({"period": 0}, r"period = 0; expected a whole number >= 1"),
        ({"powr": 1.0}, r"unknown key; the nearest known key is power"),
        (0.0, r'step_size: got 0\.0; expected a number > 0 or "auto" or a table with schedule, initial'),
    ],
)
def test_a_wrong_schedule_says_what_is_wrong(table: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load({"step_size": table}, environment={})


@pytest.mark.parametrize("schedule", ["polynomial", "cyclical"])
def test_a_run_resolves_its_initial_step_and_goes_on_with_its_schedule(schedule: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "q.npz", lam=rng.uniform(0.5, 2, (3, 4)), a=rng.normal(size=(3, 4)))
    settings: dict[str, Any] = {
        "preset": "langevin-diana",
        "data": {"kind": "quadratic", "file": str(tmp_path / "q.npz")},
        "uplink": {"k": 2},
        "step_size": {"schedule": schedule, "period": 7, "offset": 10.0},
        "warmup": 0,
        "thin": 1,
    }
    whole = fedsample.run({**settings, "rounds": 30}, out=tmp_path / "whole", progress="quiet")
    half = fedsample.run({**settings, "rounds": 11}, out=tmp_path / "half", progress="quiet")
    config = (half.path / "config.toml").read_text()
    stored = tomllib.loads(config)["step_size"]
    assert stored["schedule"] == schedule
    assert stored["initial"] == whole.summary["step_size"] > 0
    (half.path / "config.toml").write_text(config.replace("rounds = 11", "rounds = 30"))
    resumed = fedsample.run(out=half.path, resume=True, progress="quiet")
    assert torch.equal(torch.as_tensor(resumed.draws), torch.as_tensor(whole.draws))
    steady = fedsample.run(
        {**settings, "rounds": 30, "step_size": stored["initial"]}, out=tmp_path / "steady", progress="quiet"
    )
    draws = torch.as_tensor(steady.draws)
    assert torch.equal(draws[:, 0], torch.as_tensor(whole.draws)[:, 0])
    assert not torch.equal(draws[:, 5], torch.as_tensor(whole.draws)[:, 5])
