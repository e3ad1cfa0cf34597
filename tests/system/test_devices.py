"""Real devices over gRPC: the draws of one process, whatever dies."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import CONFIG, Federation, free_port

import fedsample
from fedsample.config import load
from fedsample.errors import ConfigError, UnsoundError
from fedsample.experiment import check
from fedsample.fleets.grpc.address import Address
from fedsample.fleets.grpc.host import Host, serve
from fedsample.monitor import load_draws
from fedsample.presets import PRESETS

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
POOL = Path(__file__).with_name("device_pool.py")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], int]]:
    """Starts so many devices, once for the module -> the port at which they look for a server."""
    started: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}

    def start(devices: int) -> int:
        if devices not in started:
            port, state = free_port(), tmp_path_factory.mktemp(f"pool{devices}")
            command = [sys.executable, str(POOL), f"127.0.0.1:{port}", str(devices), str(state), "wine"]
            started[devices] = port, subprocess.Popen(command, env=ENVIRONMENT)
        return started[devices][0]

    yield start
    for _, process in started.values():
        process.kill()
        process.wait()


def settings(preset: str, devices: int, **more: Any) -> dict[str, Any]:
    return {
        "preset": preset,
        "rounds": 24,
        "warmup": 4,
        "thin": 2,
        "chains": 2,
        "step_size": 1e-3,
        "data": {"name": "wine", "clients": devices},
        "monitor": {"every": 10, "tensorboard": False},
        "fleet": {"snapshot_rounds": 10},
        **more,
    }


def served(values: dict[str, Any], port: int, out: Path) -> torch.Tensor:
    experiment = load(values, ["fleet.name=grpc"], {})
    serve(experiment, out, Host(Address("127.0.0.1", port), None), "quiet")
    return load_draws(out)


def simulated(values: dict[str, Any], out: Path) -> fedsample.Run:
    return fedsample.run(values, overrides=["fleet.engine=by-client"], out=out, progress="quiet")


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_two_devices_draw_as_one_process_does(preset: str, pool: Callable[[int], int], tmp_path: Path) -> None:
    values = settings(preset, 2)
    draws = served(values, pool(2), tmp_path / "devices")
    run = simulated(values, tmp_path / "simulated")
    assert torch.equal(draws, run.draws)
    summary = json.loads((tmp_path / "devices" / "summary.json").read_bytes())
    for name in ("uplink_bytes_per_client", "downlink_bytes_per_client"):
        assert summary[name] == run.summary[name]
    assert 0 <= summary["accuracy"] <= 1


@pytest.mark.slow
def test_so_do_sixteen(pool: Callable[[int], int], tmp_path: Path) -> None:
    values = settings("underdamped-diana", 16)
    assert torch.equal(served(values, pool(16), tmp_path / "devices"), simulated(values, tmp_path / "here").draws)


# --- processes that die -----------------------------------------------------------------------------------------------


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    made: list[Federation] = []

    def make(preset: str, devices: int, **options: Any) -> Federation:
        made.append(Federation(tmp_path, CONFIG.format(preset=preset, devices=devices), devices, **options))
        return made[-1]

    yield make
    for each in made:
        each.stop()


def undisturbed(folder: Path) -> torch.Tensor:
    return simulated_from(folder / "experiment.toml", folder / "undisturbed").draws


def simulated_from(file: Path, out: Path) -> fedsample.Run:
    return fedsample.run(file, overrides=["fleet.engine=by-client"], out=out, progress="quiet")


@pytest.mark.slow
def test_five_kills_and_the_draws_are_the_same(federation: Callable[..., Federation], tmp_path: Path) -> None:
    chance = random.Random(7)
    fleet = federation("underdamped-diana", 2, secure=True)
    fleet.begin()
    rounds = sorted(chance.sample(range(0, 340, 20), 5))
    for round, who in zip(rounds, ("client-0", "server", "client-1", "client-0", "server"), strict=True):
        fleet.logged(round)
        time.sleep(chance.random() * 0.05)  # a random moment: nothing waits for it
        assert fleet.kill(who)
        fleet.start(who, *(["--resume"] if who == "server" else []))
    fleet.end()
    assert torch.equal(load_draws(tmp_path / "run"), undisturbed(tmp_path))
    assert not (tmp_path / "run" / "forks.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["langevin-diana", "langevin-marina", "d-elf"])
def test_a_lost_disk_forks_the_chain_and_the_fork_can_be_replayed(
    preset: str, federation: Callable[..., Federation], tmp_path: Path
) -> None:
    fleet = federation(preset, 2)
    fleet.begin()
    fleet.logged(60)
    fleet.kill("client-1")
    shutil.rmtree(tmp_path / "state-1")
    fleet.start("client-1")
    fleet.end()
    forks = [json.loads(line) for line in (tmp_path / "run" / "forks.jsonl").read_text().splitlines()]
    assert [fork["clients"] for fork in forks] == [[1]]
    draws = load_draws(tmp_path / "run")
    again = fedsample.run(replay=tmp_path / "run", out=tmp_path / "replayed", progress="quiet")
    assert torch.equal(draws, again.draws)
    assert not torch.equal(draws, undisturbed(tmp_path))


@pytest.mark.slow
def test_sigterm_checkpoints_and_the_run_goes_on(federation: Callable[..., Federation], tmp_path: Path) -> None:
    fleet = federation("whitened-diana", 2)
    server = fleet.begin()
    fleet.logged(40)
    server.send(signal.SIGTERM)
    done = server.wait(30)
    assert done.code == 130
    assert f"Go on with: fedsample server --listen 127.0.0.1:{fleet.port} --insecure --resume --out run" in done.error
    fleet.start("server", "--resume")
    fleet.end()
    assert torch.equal(load_draws(tmp_path / "run"), undisturbed(tmp_path))


@pytest.mark.slow
def test_a_round_without_the_slowest_can_be_replayed(federation: Callable[..., Federation], tmp_path: Path) -> None:
    config = CONFIG.format(preset="langevin-diana", devices=3) + "quorum = 2\ndeadline = 0.2\n"
    fleet = Federation(tmp_path, config, 3)
    try:
        fleet.begin()
        fleet.logged(20)
        fleet.running["client-2"].send(signal.SIGSTOP)  # the snapshot of everyone will wait for it
        rows = tmp_path / "run" / "participation.jsonl"
        until = time.monotonic() + 60
        while time.monotonic() < until and not late(fleet):
            time.sleep(0.05)
        fleet.running["client-2"].send(signal.SIGCONT)
        fleet.end()
    finally:
        fleet.stop()
    absent = [json.loads(line) for line in rows.read_text().splitlines()]
    assert absent
    assert all(row["clients"] == [0, 1] for row in absent)
    again = fedsample.run(replay=tmp_path / "run", out=tmp_path / "replayed", progress="quiet")
    assert torch.equal(load_draws(tmp_path / "run"), again.draws)


def late(fleet: Federation) -> bool:
    """Whether the logs show rounds that went on without everyone."""
    metrics = fleet.folder / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return any(row.get("fleet/late", 0) > 0 for row in rows)


@pytest.mark.parametrize(
    ("changes", "words", "error"),
    [
        (["uplink.name=marina", "fleet.quorum=0.5"], "nothing stands in", UnsoundError),
        (["fleet.loss=0.1"], "simulate faults", ConfigError),
        (["fleet.dropout=0.1"], "simulate faults", ConfigError),
    ],
)
def test_what_devices_cannot_do_is_refused(changes: list[str], words: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=words):
        check(load({}, ["fleet.name=grpc", *changes], {}))
