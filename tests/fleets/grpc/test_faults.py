"""Devices, connections and messages that fail in one process: the draws are those of an undisturbed run."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import free_port
from laboratory import TROUBLES, Cut, Laboratory, Meddling, Passing, nothing, quick, troubles

import fedsample
from fedsample.config import load
from fedsample.errors import DataError, FedSampleError, Interrupted, RunDirectoryError
from fedsample.fleets.grpc.device.connection import Refused
from fedsample.fleets.grpc.framing import frames
from fedsample.fleets.grpc.security.address import Address
from fedsample.fleets.grpc.server import hub, streams
from fedsample.fleets.grpc.server.host import Host
from fedsample.fleets.grpc.server.hub import Hub
from fedsample.monitor import load_draws, read_jsonl
from fedsample.protocol import METRIC, TRAIN
from fedsample.protocol.names import REWIND, SCALE, SNAPSHOT, SPREAD
from fedsample.runs import session
from fedsample.runs.serve import serve

pytestmark = pytest.mark.slow

_UNDISTURBED: dict[str, torch.Tensor] = {}  # draws by settings
FORGETFUL = ("langevin-diana", "langevin-marina", "d-elf")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file with two clients, and one of each alone."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 4))
    y = (x @ rng.normal(size=(4, 3)) + rng.gumbel(size=(60, 3))).argmax(1)
    client = np.arange(60) % 2
    np.savez(tmp_path / "all.npz", X=x, y=y, client=client, X_test=x[:2], y_test=y[:2])
    for index in range(2):
        mine = client == index
        np.savez(
            tmp_path / f"own{index}.npz", X=x[mine], y=y[mine], X_test=x[index : index + 1], y_test=y[index : index + 1]
        )
    return tmp_path


def settings(preset: str = "underdamped-diana", **more: Any) -> dict[str, Any]:
    return {
        "preset": preset,
        "rounds": 40,
        "warmup": 4,
        "thin": 2,
        "chains": 2,
        "step_size": 1e-3,
        "data": {"name": "wine", "clients": 2},
        "monitor": {"every": 5, "tensorboard": False},
        "fleet": {"snapshot_rounds": 8},
        **more,
    }


def brief(preset: str = "underdamped-diana", **more: Any) -> dict[str, Any]:
    """Without a search for the mode: for what happens in the rounds, or to the messages before all preparation."""
    return settings(preset, rounds=32, start={"at": "zeros"}, metric={"name": "identity"}, **more)


class Trial:
    """A run with devices in a laboratory."""

    def __init__(self, folder: Path, values: dict[str, Any], meddling: Meddling = nothing, data: str = "wine") -> None:
        self.folder, self.values, self.port = folder, values, free_port()
        self.laboratory = Laboratory(folder / "disks", values["data"]["clients"], self.port, data, meddling)

    def serve(self, resume: bool = False) -> None:
        experiment = None if resume else load(self.values, ["fleet.name=grpc"], {})
        serve(experiment, self.folder / "run", Host(Address("127.0.0.1", self.port), None), "quiet")

    def run(self) -> Trial:
        with self.laboratory as laboratory:
            self.serve()
            laboratory.over()
            assert not laboratory.errors
        return self

    @property
    def draws(self) -> torch.Tensor:
        return load_draws(self.folder / "run")

    @property
    def forks(self) -> list[dict[str, Any]]:
        file = self.folder / "run" / "forks.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def undisturbed(self) -> torch.Tensor:
        key = json.dumps(self.values)
        if key not in _UNDISTURBED:
            out = self.folder / "undisturbed"
            run = fedsample.run(self.values, overrides=["fleet.engine=by-client"], out=out, progress="quiet")
            _UNDISTURBED[key] = run.draws
        return _UNDISTURBED[key]

    def same(self) -> bool:
        return not self.forks and torch.equal(self.draws, self.undisturbed())


def once(up: bool, client: int, kind: str, round: int, act: Callable[[Laboratory], None]) -> Meddling:
    """Do something when a message passes for the first time."""
    done: list[int] = []

    def meddle(passing: Passing, laboratory: Laboratory) -> Sequence[bytes | float]:
        name = passing.head.name
        if not done and (passing.up, name.client, passing.head.kind) == (up, client, kind) and name.round >= round:
            done.append(1)
            act(laboratory)
        return passing.frames

    return meddle


def cut(laboratory: Laboratory) -> None:
    raise Cut


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["underdamped-diana", "langevin-marina", "b-elf", "qlsd-plus-plus"])
def test_messages_come_twice_late_swapped_short_or_not_at_all(preset: str, tmp_path: Path) -> None:
    done: Counter[str] = Counter()
    assert Trial(tmp_path, settings(preset), troubles(random.Random(4), 0.15, done)).run().same()
    assert set(done) == set(TROUBLES[:-2])


def test_so_do_messages_in_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in frames, hub, streams:
        monkeypatch.setattr(module, "PIECE", 1 << 16)
    d = 12_000  # 96 kB a message
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "wide.npz", lam=rng.uniform(0.5, 2, (2, d)), a=rng.normal(size=(2, d)))
    values = settings(
        "p-elf",
        rounds=8,
        step_size=0.1,
        data={"kind": "quadratic", "file": str(tmp_path / "wide.npz"), "clients": 2},
        model={"name": "quadratic"},
        start={"at": "zeros"},
        downlink={"name": "dense"},
        fleet={"snapshot_rounds": 4},
    )
    done: Counter[str] = Counter()
    trial = Trial(tmp_path, values, troubles(random.Random(11), 0.3, done), str(tmp_path / "wide.npz"))
    assert trial.run().same()
    assert {"swapped", "short", "truncated", "again"} <= set(done)


# --- deaths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["underdamped-diana", "langevin-marina", "b-elf", "qlsd-star", "dsgld"])
def test_devices_die_at_random_moments(preset: str, tmp_path: Path) -> None:
    chance = random.Random(preset)
    left = [chance.randrange(1, 80)]

    def meddle(passing: Passing, laboratory: Laboratory) -> Sequence[bytes | float]:
        left[0] -= 1
        if left[0] <= 0:
            left[0] = chance.randrange(1, 200)
            laboratory.kill(passing.client)
            if chance.random() < 0.3:
                laboratory.kill(1 - passing.client)
            if chance.random() < 0.5:
                raise Cut
        return passing.frames

    trial = Trial(tmp_path, settings(preset), meddle).run()
    assert trial.laboratory.kills >= 2
    assert trial.same()


@pytest.mark.parametrize(
    ("up", "kind", "round"),
    [
        (True, SPREAD, 0),
        (False, SCALE, 0),
        (True, METRIC, 0),
        (True, SNAPSHOT, 0),
        (False, SNAPSHOT, 16),
        (True, TRAIN, 19),
    ],
)
@pytest.mark.parametrize("act", [cut, lambda laboratory: laboratory.kill(0)], ids=["cut", "dies"])
def test_a_death_at_a_bad_moment(up: bool, kind: str, round: int, act: Callable[..., None], tmp_path: Path) -> None:
    assert Trial(tmp_path, brief(), once(up, 0, kind, round, act)).run().same()


def test_a_device_that_dies_after_it_went_back_goes_back_again(tmp_path: Path) -> None:
    """Device 1 dies in round 19; when all go back, device 0 answers, dies and is here again before 1 has answered."""
    story: list[str] = []

    def meddle(passing: Passing, laboratory: Laboratory) -> Sequence[bytes | float]:
        name, kind = passing.head.name, passing.head.kind
        if not story and name.client == 1 and kind == TRAIN and name.round == 19:
            story.append("dead")
            laboratory.kill(1)
            raise Cut
        if kind == REWIND and story:
            if passing.up and name.client == 0 and story == ["dead"]:
                story.append("dead again")
                laboratory.kill(0)
            elif not passing.up and name.client == 1 and len(story) < 3:
                raise Cut
        if kind == METRIC and name.client == 0 and story == ["dead", "dead again"]:
            story.append("told again")
        return passing.frames

    assert Trial(tmp_path, brief("langevin-diana"), meddle).run().same()
    assert story == ["dead", "dead again", "told again"]


@pytest.mark.parametrize("preset", FORGETFUL)
def test_a_lost_disk_forks_the_chain_and_the_fork_can_be_replayed(preset: str, tmp_path: Path) -> None:
    lose = once(False, 1, TRAIN, 19, lambda laboratory: laboratory.kill(1, disk=True))
    trial = Trial(tmp_path, brief(preset), lose).run()
    assert [fork["clients"] for fork in trial.forks] == [[1]]
    again = fedsample.run(replay=tmp_path / "run", out=tmp_path / "replayed", progress="quiet")
    assert torch.equal(trial.draws, again.draws)
    assert not torch.equal(trial.draws, trial.undisturbed())


def test_who_remembers_nothing_can_lose_its_disk(tmp_path: Path) -> None:
    lose = once(False, 1, TRAIN, 19, lambda laboratory: laboratory.kill(1, disk=True))
    assert Trial(tmp_path, brief("qlsd"), lose).run().same()


def test_another_may_die_after_a_fork(tmp_path: Path) -> None:
    """The run goes back before the fork: who has lost its disk has nothing there, and the chain forks anew."""
    done: list[str] = []

    def meddle(passing: Passing, laboratory: Laboratory) -> Sequence[bytes | float]:
        name = passing.head.name
        if passing.head.kind == TRAIN and name.round == 19 and not done:
            done.append("lost")
            laboratory.kill(1, disk=True)
        if passing.head.kind == TRAIN and name.round == 21 and done == ["lost"]:
            done.append("dead")
            laboratory.kill(0)
        return passing.frames

    trial = Trial(tmp_path, brief("langevin-marina"), meddle).run()
    assert trial.forks == [{"round": 17, "clients": [1]}]
    again = fedsample.run(replay=tmp_path / "run", out=tmp_path / "replayed", progress="quiet")
    assert torch.equal(trial.draws, again.draws)


# --- the server stops and goes on -------------------------------------------------------------------------------------


def stop(laboratory: Laboratory) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_server_goes_on_from_the_last_snapshot_that_all_have(tmp_path: Path) -> None:
    trial = Trial(tmp_path, brief(), once(True, 1, TRAIN, 19, stop))
    with trial.laboratory as laboratory:
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM after round (19|20) .*--resume --out"):
            trial.serve()
        laboratory.call(laboratory.again(1))
        last = max((tmp_path / "disks").glob("*-1/round-*"))
        shutil.rmtree(last)
        laboratory.call(laboratory.again(1))
        trial.serve(resume=True)
        laboratory.over()
    assert last.name != "round-00000016"
    assert trial.same()


def test_a_server_is_stopped_while_a_device_is_away(tmp_path: Path) -> None:
    def act(laboratory: Laboratory) -> None:
        laboratory.server = 1  # nothing listens there: whoever comes back does not reach the server
        stop(laboratory)
        raise Cut

    trial = Trial(tmp_path, brief(), once(True, 1, TRAIN, 19, act))
    with trial.laboratory as laboratory:
        with pytest.raises(
            Interrupted, match=r"stopped by SIGTERM: the round was given up while waiting for .*--resume"
        ):
            trial.serve()
        laboratory.server = trial.port
        trial.serve(resume=True)
        laboratory.over()
    assert trial.same()


def test_a_server_that_dies_after_the_last_round_still_knows_the_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    trial = Trial(tmp_path, brief())
    with trial.laboratory as laboratory:
        with monkeypatch.context() as patch:
            patch.setattr(session, "summarise", killed)
            with pytest.raises(Interrupted):
                trial.serve()
        trial.serve(resume=True)
        laboratory.over()
    assert trial.same()
    logged = [row for row in read_jsonl(trial.folder / "run" / "metrics.jsonl") if row["round"] == 32]
    summary = json.loads((trial.folder / "run" / "summary.json").read_text())
    assert summary["accuracy"] == logged[0]["round/accuracy"]
    assert {summary["nll"], summary["brier"], summary["ece"]}.isdisjoint({None})
    assert summary["adaptive_ece"] is None  # its bins cannot be had from sums


def test_a_configuration_that_was_changed_before_the_first_snapshot_is_refused(tmp_path: Path) -> None:
    """Devices go by the one that the run began with."""

    def killed(hub: Hub) -> None:
        raise KeyboardInterrupt

    experiment = load(brief(), ["fleet.name=grpc"], {})
    run, host = tmp_path / "run", Host(Address("127.0.0.1", free_port()), None, killed)
    with pytest.raises(Interrupted):
        serve(experiment, run, host, "quiet")
    began = (run / "config.toml").read_text()
    (run / "config.toml").write_text(began.replace("seed = 0", "seed = 1"))
    with pytest.raises(RunDirectoryError, match="was changed after the run began, and its devices go by"):
        serve(None, run, host, "quiet")
    (run / "config.toml").write_text(began.replace("rounds = 32", "rounds = 60"))
    with pytest.raises(Interrupted):
        serve(None, run, host, "quiet")


# --- who may take part ------------------------------------------------------------------------------------------------


def sent_away_and_mended(trial: Trial, rows: Path) -> BaseException:
    """Serve; once device 1 has been sent away it gets its right file, and comes again -> why it was sent away."""
    with trial.laboratory as laboratory:

        async def mend() -> None:
            while 1 not in laboratory.errors:
                await asyncio.sleep(0.01)
            shutil.copy(rows / "right.npz", rows / "own1.npz")
            await laboratory.again(1)

        mending = asyncio.run_coroutine_threadsafe(mend(), laboratory._loop)
        trial.serve()
        mending.result(10)
        laboratory.over()
    return laboratory.errors[1]


def test_a_device_with_other_data_does_not_come_back_and_the_run_waits_for_the_right_ones(rows: Path) -> None:
    values = brief("langevin-diana", data={"kind": "npz", "file": str(rows / "all.npz"), "clients": 2})
    shutil.copy(rows / "own1.npz", rows / "right.npz")

    def change(laboratory: Laboratory) -> None:
        with np.load(rows / "own1.npz") as arrays:
            np.savez(rows / "own1.npz", **{**arrays, "X": arrays["X"] + 1})
        laboratory.kill(1)

    trial = Trial(rows, values, once(True, 1, TRAIN, 19, change), str(rows / "own{}.npz"))
    error = sent_away_and_mended(trial, rows)
    assert isinstance(error, DataError)
    assert "not those that the run began with" in str(error)
    assert trial.same()


def test_a_newcomer_whose_data_do_not_fit_is_refused_and_the_run_waits(rows: Path) -> None:
    values = brief("langevin-diana", data={"kind": "npz", "file": str(rows / "all.npz"), "clients": 2})
    shutil.copy(rows / "own1.npz", rows / "right.npz")

    def change(laboratory: Laboratory) -> None:
        with np.load(rows / "own1.npz") as arrays:
            np.savez(rows / "own1.npz", **{**arrays, "X": arrays["X"][:, :2], "X_test": arrays["X_test"][:, :2]})
        laboratory.kill(1, disk=True)

    trial = Trial(rows, values, once(True, 1, TRAIN, 19, change), str(rows / "own{}.npz"))
    assert isinstance(sent_away_and_mended(trial, rows), Refused)
    assert [fork["clients"] for fork in trial.forks] == [[1]]


def test_a_rival_waits_its_turn(tmp_path: Path) -> None:
    """A second process for a client is refused for as long as the first answers."""
    trial = Trial(tmp_path, brief())
    with trial.laboratory as laboratory:

        async def rival() -> BaseException | str:
            while laboratory._running[0][0].watching.answers < 3:
                await asyncio.sleep(0.005)
            other = laboratory.device(0, "elsewhere")
            other.attempts = 2
            try:
                return await other.attend()
            except FedSampleError as error:
                return error

        result = asyncio.run_coroutine_threadsafe(rival(), laboratory._loop)
        trial.serve()
        assert "client 0 is connected already, from another process that answers" in str(result.result(20))
        laboratory.over()
    assert trial.same()
