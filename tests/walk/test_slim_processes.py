"""Devices that have what requirements-device.txt names, and no more, each a Python of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import commands
import pytest
import slim
import torch
from commands import Command
from federation import CONFIG, ENVIRONMENT, free_port

import fedsample
from fedsample.monitor import load_draws

pytestmark = pytest.mark.timeout(600)


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def server(port: int, tmp_path: Path) -> Iterator[Command]:
    """A server as it is installed, in the folder of the test."""
    data = 'kind = "csv"\ntarget = "label"\nholdout = "keyed"'
    text = CONFIG.format(preset="underdamped-diana", devices=2).replace('name = "wine"', data)
    (tmp_path / "experiment.toml").write_text(text.replace("rounds = 240", "rounds = 60"))
    process = commands.start(
        tmp_path, "server", "experiment.toml", "--listen", f"127.0.0.1:{port}", "--out", "run", "--insecure"
    )
    yield process
    process.kill()


@pytest.fixture
def start(port: int, tmp_path: Path) -> Iterator[Start]:
    """Starts devices with slim.py, each a Python of its own."""
    started = []

    def begin(who: str, *options: str) -> subprocess.Popen[str]:
        line = [slim.__file__, "client", f"127.0.0.1:{port}", "--insecure", "--client", who, "--state", f"state-{who}"]
        started.append(
            subprocess.Popen(
                [sys.executable, *line, *options], cwd=tmp_path, env=ENVIRONMENT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_two_slim_devices_with_files_take_part(server: Command, start: Start, tmp_path: Path) -> None:
    head, pooled = "x,z,kind,label", []
    for index in range(2):
        kinds, labels = ("abc", "uvw") if index == 0 else ("ab", "uv")  # one has seen fewer categories and labels
        rows = [f"{i % 7},{i * i % 5},{kinds[i % len(kinds)]},{labels[i // 2 % len(labels)]}" for i in range(40)]
        (tmp_path / f"rows{index}.csv").write_text("\n".join([head, *rows]) + "\n")
        pooled += [f"{row},{index}" for row in rows]
    (tmp_path / "all.csv").write_text("\n".join([f"{head},owner", *pooled]) + "\n")
    devices = [start(str(index), "--data", f"rows{index}.csv") for index in range(2)]
    for device in devices:
        said, _ = device.communicate(timeout=90)
        assert device.returncode == 0, said
        assert said.splitlines()[-1] == "the run has ended"
    done = server.wait(30)
    assert done.code == 0, done.err
    twin = [f"data.file={tmp_path / 'all.csv'}", "data.client_column=owner", "fleet.engine=by-client"]
    run = fedsample.run(tmp_path / "experiment.toml", overrides=twin, out=tmp_path / "simulated", progress="quiet")
    assert torch.equal(load_draws(tmp_path / "run"), run.draws)


def test_a_built_in_set_needs_scikit_learn_and_says_so(server: Command, start: Start) -> None:
    device = start("0", "--data", "wine")
    said, _ = device.communicate(timeout=60)
    assert device.returncode == 1
    assert "pip install scikit-learn" in said
