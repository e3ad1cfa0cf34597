"""A device needs what requirements-device.txt names, and no more."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import slim
import torch
from federation import CONFIG, ENVIRONMENT, Federation

import fedsample
from fedsample.monitor import load_draws

ROOT = Path(__file__).parents[2]
HEAVY = {"flwr", "ray", "opacus", "tensorboard", "scikit-learn", "scipy", "datasets", "flwr-datasets"}


def test_the_versions_are_those_that_are_tested() -> None:
    names = slim.required(slim.REQUIREMENTS.read_text())
    pinned = set((ROOT / "constraints.txt").read_text().replace("_", "-").lower().splitlines())
    for line in slim.REQUIREMENTS.read_text().splitlines():
        assert line.startswith("#") or line in pinned
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {slim.normal(re.split(r"[<>=\[]", each)[0]) for each in project["dependencies"]}
    assert set(names) <= needed
    assert slim.closure(names).isdisjoint(HEAVY)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Federation]:
    data = 'kind = "csv"\ntarget = "label"\nholdout = "keyed"'
    text = CONFIG.format(preset="underdamped-diana", devices=2).replace('name = "wine"', data)
    made = Federation(tmp_path, text.replace("rounds = 400", "rounds = 60"), 2)
    yield made
    made.stop()


def start(fleet: Federation, index: int, *data: str) -> subprocess.Popen[str]:
    """A device that has the slim installation."""
    line = [sys.executable, slim.__file__, "client", f"127.0.0.1:{fleet.port}", "--insecure", "--client", str(index)]
    return subprocess.Popen(
        [*line, *data, "--state", f"state-{index}"], cwd=fleet.folder, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.slow
def test_two_slim_devices_with_files_take_part(fleet: Federation) -> None:
    head, pooled = "x,z,kind,label", []
    for index in range(2):
        kinds, labels = ("abc", "uvw") if index == 0 else ("ab", "uv")  # one has seen fewer categories and labels
        rows = [f"{i % 7},{i * i % 5},{kinds[i % len(kinds)]},{labels[i // 2 % len(labels)]}" for i in range(40)]
        (fleet.folder / f"rows{index}.csv").write_text("\n".join([head, *rows]) + "\n")
        pooled += [f"{row},{index}" for row in rows]
    (fleet.folder / "all.csv").write_text("\n".join([f"{head},owner", *pooled]) + "\n")
    server = fleet.start("server", "experiment.toml")
    devices = [start(fleet, index, "--data", f"rows{index}.csv") for index in range(2)]
    try:
        for device in devices:
            said, _ = device.communicate(timeout=90)
            assert device.returncode == 0, said
            assert said.splitlines()[-1] == "the run has ended"
        assert server.wait(30) == 0, (fleet.folder / "server.log").read_text()
    finally:
        for device in devices:
            device.kill()
            device.communicate()
    file = fleet.folder / "all.csv"
    twin = [f"data.file={file}", "data.client_column=owner", "fleet.engine=by-client"]
    run = fedsample.run(
        fleet.folder / "experiment.toml", overrides=twin, out=fleet.folder / "simulated", progress="quiet"
    )
    assert torch.equal(load_draws(fleet.folder / "run"), run.draws)


@pytest.mark.slow
def test_a_built_in_set_needs_scikit_learn_and_says_so(fleet: Federation) -> None:
    fleet.start("server", "experiment.toml")
    device = start(fleet, 0, "--data", "wine")
    try:
        said, _ = device.communicate(timeout=60)
    finally:
        device.kill()
        device.communicate()
    assert device.returncode == 1
    assert "pip install scikit-learn" in said
