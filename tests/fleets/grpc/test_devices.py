"""Real devices over gRPC: the draws of one process, whatever dies."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import device_pool
import pytest
import torch
from commands import fork, last_checkpoint, start
from federation import CONFIG, Federation, free_port

import fedsample
from fedsample.config import load
from fedsample.config.presets import PRESETS
from fedsample.errors import ConfigError, UnsoundError
from fedsample.fleets.grpc.security.address import Address
from fedsample.fleets.grpc.server.host import Host
from fedsample.monitor import load_draws, read_jsonl
from fedsample.runs.checks import check
from fedsample.runs.serve import serve

pytestmark = pytest.mark.slow

WIRE = "comm/wire_up_bytes/payload"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], int]]:
    """Starts so many devices, once for the module -> the port at which they look for a server."""
    started: dict[int, tuple[int, Any]] = {}

    def start(devices: int) -> int:
        if devices not in started:
            port, state = free_port(), tmp_path_factory.mktemp(f"pool{devices}")
            started[devices] = port, fork(device_pool.run, f"127.0.0.1:{port}", devices, state, "wine")
        return started[devices][0]

    yield start
    for _, process in started.values():
        process.kill()
        process.join()


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


def test_so_do_sixteen(pool: Callable[[int], int], tmp_path: Path) -> None:
    values = settings("underdamped-diana", 16, rounds=12)
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


_UNDISTURBED: dict[str, torch.Tensor] = {}  # draws by configuration


def undisturbed(folder: Path) -> torch.Tensor:
    text = (folder / "experiment.toml").read_text()
    if text not in _UNDISTURBED:
        engine, out = ["fleet.engine=by-client"], folder / "undisturbed"
        run = fedsample.run(folder / "experiment.toml", overrides=engine, out=out, progress="quiet")
        _UNDISTURBED[text] = run.draws
    return _UNDISTURBED[text]


def test_five_kills_and_the_draws_are_the_same(federation: Callable[..., Federation], tmp_path: Path) -> None:
    chance = random.Random(7)
    fleet = federation("underdamped-diana", 2, secure=True)
    fleet.begin()
    rounds = sorted(chance.sample(range(0, 180, 20), 5))
    for round, who in zip(rounds, ("client-0", "server", "client-1", "client-0", "server"), strict=True):
        fleet.logged(round)
        time.sleep(chance.random() * 0.05)  # a random moment: nothing waits for it
        assert fleet.kill(who)
        fleet.start(who, *(["--resume"] if who == "server" else []))
    fleet.end()
    assert torch.equal(load_draws(tmp_path / "run"), undisturbed(tmp_path))
    assert not (tmp_path / "run" / "forks.jsonl").exists()
    sent = [row[WIRE] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if WIRE in row]
    assert len(sent) > 8
    assert sent == sorted(sent)  # a server that is resumed counts on


def test_a_lost_disk_forks_the_chain_and_the_fork_can_be_replayed(
    federation: Callable[..., Federation], tmp_path: Path
) -> None:
    fleet = federation("langevin-marina", 2)
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


BAD_MOMENTS = (
    (
        ["fedsample.fleets.grpc.server.dispatcher.Dispatcher.tell"],
        3,
    ),  # the devices have agreed on the schema, not on the scale
    (["fedsample.fleets.grpc.server.fleet.GrpcFleet.exchange"], 2),  # while the mode is looked for
    (["fedsample.monitor.checkpoint.CheckpointStore.save"], 1),  # the devices have a snapshot, the server none
    (["fedsample.monitor.checkpoint.CheckpointStore.save"], 3),  # the devices are one snapshot ahead
    (["fedsample.monitor.checkpoint.CheckpointStore.save"], 1),  # the same once more
    (["fedsample.fleets.grpc.server.fleet.GrpcFleet.rewind"], 1),  # before all go back
    (["fedsample.fleets.grpc.server.fleet.GrpcFleet.keep"], 1),  # after all have gone back
    (["os.rename"], 2),  # in the middle of a checkpoint
)


def test_server_and_devices_die_at_the_worst_moments(federation: Callable[..., Federation], tmp_path: Path) -> None:
    fleet = federation("underdamped-diana", 2)
    fleet.start("client-0", die_at=(["os.rename"], 2))  # in the middle of its snapshot of round 20
    fleet.start("client-1")
    for number, moment in enumerate(BAD_MOMENTS):
        fleet.start("server", "--resume" if number else "experiment.toml", die_at=moment)
        while fleet.running["server"].running:
            if not fleet.running["client-0"].running:
                fleet.start("client-0")
            time.sleep(0.01)
        assert fleet.running["server"].wait().code == -signal.SIGKILL, fleet.running["server"].wait().err
        before = last_checkpoint(fleet.run)
        assert number < 3 or before in fleet.snapshots(1)
    fleet.start("server", "--resume")
    fleet.end()
    assert torch.equal(load_draws(tmp_path / "run"), undisturbed(tmp_path))
    assert not (tmp_path / "run" / "forks.jsonl").exists()


def test_signals_other_data_and_another_run_leave_the_draws_as_they_are(
    federation: Callable[..., Federation], tmp_path: Path
) -> None:
    """One run, with the same devices to its end, through all that can come between."""
    fleet = federation("langevin-diana", 2)
    server = fleet.begin()
    fleet.logged(40)
    # a device ends at a signal, and another one with other data does not take its place
    fleet.running["client-0"].send(signal.SIGTERM)
    done = fleet.running["client-0"].wait(30)
    assert done.code == 130
    assert done.error == "stopped; start it again with the same options, and the run goes on"
    done = fleet.start("client-0", "--partition", "1").wait()
    assert done.code == 1
    assert "the data of client 0 are not those that the run began with: restore them" in done.error
    # the server makes a checkpoint at a signal
    at = last_checkpoint(fleet.run)
    fleet.start("client-0")
    fleet.logged(at + 40)
    server.send(signal.SIGTERM)
    done = server.wait(30)
    assert done.code == 130
    assert f"Go on with: fedsample server --listen 127.0.0.1:{fleet.port} --insecure --resume --out run" in done.error
    # its devices meet another run at the same address, which is stopped, before the first goes on
    other = start(
        tmp_path, "server", "experiment.toml", "--set", "seed=5", "--listen", f"127.0.0.1:{fleet.port}", "--insecure",
        "--out", "other", "--quiet",
    )  # fmt: skip
    assert other.until(lambda: last_checkpoint(tmp_path / "other") >= 20)
    other.send(signal.SIGTERM)
    assert other.wait().code == 130
    fleet.start("server", "--resume")
    fleet.end()
    assert torch.equal(load_draws(tmp_path / "run"), undisturbed(tmp_path))


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
    assert [0, 1] in [row["clients"] for row in absent]
    assert all(len(row["clients"]) >= 2 for row in absent)  # on a busy machine another one may be late at times too
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
