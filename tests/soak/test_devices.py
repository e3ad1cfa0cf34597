"""Devices under a hundred kills and over ten thousand rounds.

pytest -q tests/soak/test_devices.py      about five minutes; SOAK=0.1 makes it a tenth as long
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fedsample
from fedsample.monitor import load_draws

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from commands import Command
from federation import CONFIG, Federation

SHARE = float(os.environ.get("SOAK", "1"))
ROOT = Path(__file__).parents[2]


def simulated(folder: Path) -> torch.Tensor:
    out = folder / "undisturbed"
    file = folder / "experiment.toml"
    return fedsample.run(file, overrides=["fleet.engine=by-client"], out=out, progress="quiet").draws


def config(rounds: int) -> str:
    return CONFIG.format(preset="underdamped-diana", devices=2).replace("rounds = 240", f"rounds = {rounds}", 1)


def test_a_hundred_kills(tmp_path: Path) -> None:
    kills, chance = max(1, int(100 * SHARE)), random.Random(3)
    fleet = Federation(tmp_path, config(rounds=20 * kills + 400), 2, secure=True)
    try:
        fleet.begin()
        done = 0
        for kill in range(kills):
            fleet.logged(20 * kill)
            time.sleep(chance.random() * 0.2)
            who = chance.choice(["client-0", "client-1", "server"])
            if not fleet.kill(who):
                break  # it was quicker than we are
            fleet.start(who, *(["--resume"] if who == "server" else []))
            done += 1
        fleet.end(600)
    finally:
        fleet.stop()
    print(f"{done} kills")
    assert done == kills
    assert torch.equal(load_draws(tmp_path / "run"), simulated(tmp_path))


def resident(process: Command) -> float:
    """Replica size in MB."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident sizes are read from /proc")
def test_memory_is_flat(tmp_path: Path) -> None:
    rounds = max(1000, int(10_000 * SHARE))
    fleet = Federation(tmp_path, config(rounds), 2)
    sizes: dict[str, list[float]] = {}
    try:
        fleet.begin()
        for round in range(rounds // 4, rounds - 20, rounds // 20):
            fleet.logged(round, 600)
            for who, process in fleet.running.items():
                if process.running:
                    sizes.setdefault(who, []).append(resident(process))
        fleet.end(600)
    finally:
        fleet.stop()
    for who, found in sizes.items():
        print(who, " ".join(f"{each:.1f}" for each in found))
        assert max(found) <= 1.05 * found[0]


def test_the_slim_install_takes_part(tmp_path: Path) -> None:
    """A device in a venv with requirements-device.txt and no other dependency."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", str(ROOT)], check=True)
    subprocess.run([*pip, "-r", str(ROOT / "requirements-device.txt")], check=True)
    for index in range(2):
        rows = "\n".join(f"{i % 7},{(i * i) % 5},{'ab'[i % 2]},{(i + index) % 2}" for i in range(40))
        (tmp_path / f"rows{index}.csv").write_text(f"x,z,kind,label\n{rows}\n")
    text = config(60).replace('name = "wine"', 'kind = "csv"\ntarget = "label"').replace("warmup = 40", "warmup = 20")
    fleet = Federation(tmp_path, text + '[model]\nname = "logistic"\n', 2)
    devices = []
    try:
        for index in range(2):
            line = [str(python), "-m", "fedsample", "client", f"127.0.0.1:{fleet.port}", "--insecure", "--client"]
            line += [str(index), "--data", f"rows{index}.csv", "--target", "label", "--state", f"s{index}", "--quiet"]
            devices.append(subprocess.Popen(line, cwd=tmp_path))
        done = fleet.start("server", "experiment.toml").wait(120)
        assert done.code == 0, done.err
        assert [device.wait(30) for device in devices] == [0, 0]
    finally:
        fleet.stop()
        for device in devices:
            device.kill()
            device.wait()
    assert load_draws(tmp_path / "run").shape == (2, 10, 5)
