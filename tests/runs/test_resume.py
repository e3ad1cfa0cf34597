"""Runs that are killed, interrupted, extended or taken up again give what an undisturbed run gives, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import STEPS, Command, Done, call, last_checkpoint, sets, start
from rounding import ELEMENTARY, gamma
from safetensors.torch import load_file

import fedsample
from fedsample.errors import ConfigError, Interrupted, RunDirectoryError
from fedsample.monitor import load_draws, load_rounds, read_jsonl
from fedsample.monitor.directory import RunDirectory

pytestmark = pytest.mark.slow

Undisturbed = Callable[[list[str]], Path]

# Written in threads whenever they come round to it, or measured with a clock.
TIMED = ("time/", "mcmc/rhat/", "mcmc/ess/")
# A float32 prediction in another portion: a product of at most 66 terms, an exponential and a logarithm of it.
SINGLE = 2 * gamma(66 + 2 * ELEMENTARY, torch.float32)
AVERAGED = ("round/",)  # sums over draws, in portions that a kill changes
OFTEN = {"fedsample.runs.loop._CHECKPOINT_SHARE": 0.5}  # a checkpoint every few rounds, whatever that costs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small federations: `quadratic.npz` in 6 dimensions, `classes.npz` with 3 classes and test rows."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    np.savez(folder / "quadratic.npz", lam=draw.uniform(0.5, 2, (4, 6)), a=draw.normal(size=(4, 6)))
    x = draw.normal(size=(80, 5))
    y = np.argmax(x @ draw.normal(size=(5, 3)) + draw.gumbel(size=(80, 3)), axis=1)
    client = np.arange(60) % 5
    np.savez(folder / "classes.npz", X=x[:60], y=y[:60], client=client, X_test=x[60:], y_test=y[60:])
    return folder


def settings(data: Path, kind: str, **more: object) -> list[str]:
    source: dict[str, object] = {
        "data__kind": "quadratic" if kind == "quadratic" else "npz",
        "data__file": data / f"{kind}.npz",
        "rounds": 160,
        "warmup": 40,
        "monitor__every": 10,
        "monitor__checkpoint_seconds": 0,
    }
    return sets(**{**source, **more})


CASES: dict[str, tuple[str, dict[str, object]]] = {
    "underdamped-diana": ("quadratic", {"dtype": "float64"}),
    "langevin-marina": (
        "quadratic",
        {"preset": "langevin-marina", "fleet__participation": 0.6, "fleet__loss": 0.1, "fleet__dropout": 0.05},
    ),
    "langevin-diana": (
        "classes",
        {
            "preset": "langevin-diana",
            "batch_size": 4,
            "fleet__participation": 2,
            "fleet__loss": 0.2,
            "fleet__dropout": 0.1,
            "fleet__dropout_rounds": 3.0,
        },
    ),
    "federated-gd": ("classes", {"preset": "federated-gd", "model__intercept": "false"}),
    "network": (
        "classes",
        {"model__name": "mlp", "model__hidden": "[3]", "metric__name": "kronecker", "batch_size": 8, "rounds": 55},
    ),
    "by-client": (
        "classes",
        {"fleet__engine": "by-client", "metric__name": "diagonal", "fleet__participation": 0.5, "dtype": "float64"},
    ),
}


def rounds_of(arguments: list[str]) -> int:
    return int(next(word for word in reversed(arguments) if word.startswith("rounds=")).removeprefix("rounds="))


def options(data: Path, case: str) -> list[str]:
    kind, more = CASES[case]
    return settings(data, kind, **more)


def simulate(folder: Path, run: str, *arguments: str, **keywords: Any) -> Done:
    return call(folder, "simulate", "--quiet", "--out", run, *arguments, **{"constants": OFTEN, **keywords})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The run with these arguments that nothing disturbed, made once for the module -> its directory, to be read."""
    folder, made = tmp_path_factory.mktemp("undisturbed"), dict[tuple[str, ...], Path]()

    def whole(arguments: list[str]) -> Path:
        if tuple(arguments) not in made:
            name = f"whole{len(made)}"
            done = simulate(folder, name, *arguments)
            assert done.code == 0, done.err
            made[tuple(arguments)] = folder / name
        return made[tuple(arguments)]

    return whole


def resume(folder: Path, run: str, **keywords: Any) -> Done:
    return call(folder, "simulate", "--quiet", "--resume", "--out", run, **{"constants": OFTEN, **keywords})


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def rows(run: Path) -> dict[int, dict[str, Any]]:
    """The log by round; values that came late lie in a second object of their round."""
    found: dict[int, dict[str, Any]] = {}
    for row in read_jsonl(run / "metrics.jsonl"):
        found.setdefault(row["round"], {}).update(row)
    return found


def assert_same(one: Path, other: Path) -> None:
    """Whatever a run leaves that no clock had a hand in."""
    assert torch.equal(load_draws(one), load_draws(other))
    assert torch.equal(load_rounds(one), load_rounds(other))
    for name in ("config.toml", "params.json", "participation.jsonl"):
        here, there = one / name, other / name
        assert here.exists() == there.exists(), name
        assert not here.exists() or here.read_bytes() == there.read_bytes(), name
    wanted, got = (json.loads((run / "summary.json").read_text()) for run in (one, other))
    assert wanted.keys() == got.keys()
    for key in wanted:
        assert key.startswith("seconds") or wanted[key] == got[key], key
    assert last_checkpoint(one) == last_checkpoint(other) == wanted["rounds"]
    final = f"checkpoint/round-{wanted['rounds']:08d}/tensors.safetensors"
    state, again = load_file(one / final), load_file(other / final)
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert_same_curves(one, other)


def assert_same_curves(one: Path, other: Path) -> None:
    """Each logged round once and in order, with the same values, in the log and in TensorBoard."""
    logged = [row["round"] for row in read_jsonl(other / "metrics.jsonl") if "mcmc/step_size" in row]
    assert logged == sorted(set(logged))
    wanted, got = rows(one), rows(other)
    assert list(wanted) == logged
    for round, row in wanted.items():
        for tag, value in row.items():
            if tag.startswith(AVERAGED):
                assert got[round].get(tag, value) == pytest.approx(value, rel=SINGLE, abs=SINGLE), (round, tag)
            elif not tag.startswith(TIMED):
                assert got[round][tag] == value, (round, tag)
    for folder, abscissa, tree in (other, "round", ""), (other / "bytes", "bytes", "uplink_bytes/"):
        steps = [row[abscissa] for row in got.values()]
        for tag, points in events(folder).items():
            assert [step for step, _ in points] == sorted({step for step, _ in points}), tag
            if tag == tree + "mcmc/step_size":
                assert [step for step, _ in points] == sorted(set(steps))
            for step, value in points:
                row = next(row for row in got.values() if row[abscissa] == step)
                assert row[tag.removeprefix(tree)] == pytest.approx(value, rel=gamma(1, torch.float32)), (tag, step)


def killed_and_resumed(folder: Path, name: str, arguments: list[str], chance: random.Random, kills: int) -> list[int]:
    """Start, kill at a random round, resume, kill again, ...; the rounds from which it went on."""
    rounds = rounds_of(arguments)
    began: list[int] = []
    process = start(folder, "simulate", "--quiet", "--out", name, *arguments, constants=OFTEN)
    while len(began) < kills and (at := last_checkpoint(folder / name)) < rounds:
        goal = chance.randint(at + 1, rounds)
        process.until(lambda goal=goal: last_checkpoint(folder / name) >= goal)
        if not process.kill():
            break
        began.append(last_checkpoint(folder / name))
        process = start(folder, "simulate", "--quiet", "--resume", "--out", name, constants=OFTEN)
    done = process.wait()
    assert done.code == 0, done.err
    return began


# --- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_rounds_the_run_is_the_same(
    case: str, data: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    arguments = options(data, case)
    whole = undisturbed(arguments)
    chance = random.Random(case)
    for attempt in range(3):  # a run may be over before it can be killed in the middle
        began = killed_and_resumed(tmp_path, f"killed{attempt}", arguments, chance, 2)
        assert_same(whole, tmp_path / f"killed{attempt}")
        if any(0 < at < rounds_of(arguments) for at in began):
            return
    pytest.fail("never killed in the middle")


def test_killed_at_every_write_the_run_is_the_same(data: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    """Before each fsync, rename and deletion of the preparation, and some of those of the rounds."""
    arguments = options(data, "langevin-marina")
    whole = undisturbed(arguments)
    seen = set()
    for k in (1, 8, 19, 27, 45):
        name = f"killed{k}"
        done = simulate(tmp_path, name, *arguments, die_at=(STEPS, k))
        if done.code == 0:
            break
        assert done.code == -signal.SIGKILL, done.err
        run = tmp_path / name
        seen.add("preparation" if last_checkpoint(run) < 0 else "rounds")
        if not (run / "config.toml").exists():
            assert "start a new run without --resume" in resume(tmp_path, name).error
            assert simulate(tmp_path, name, *arguments).code == 0
        else:
            again = resume(tmp_path, name, die_at=(STEPS, k))  # and once more at the same place
            assert again.code in (0, -signal.SIGKILL), again.err
            assert resume(tmp_path, name).code == 0
        assert_same(whole, run)
    assert seen == {"preparation", "rounds"}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("reading the data", "fedsample.data.quadratic.read_archive"),
        ("finding the mode", "fedsample.preparation.prepare.find_mode"),
        ("measuring the curvature", "fedsample.preparation.prepare.survey_geometry"),
        ("summing up", "fedsample.runs.session.summarise"),
        ("writing the summary", "fedsample.monitor.directory.RunDirectory.write_json"),
    ],
)
def test_killed_outside_the_rounds(name: str, where: str, data: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    arguments = settings(data, "quadratic")
    whole = undisturbed(arguments)
    # env.json, params.json, then summary.json
    k = 3 if name == "writing the summary" else 1
    assert simulate(tmp_path, "killed", *arguments, die_at=([where], k)).code == -signal.SIGKILL
    assert last_checkpoint(tmp_path / "killed") == (160 if name[0] == "s" or k == 3 else -1)
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert resume(tmp_path, "killed").code == 0
    assert_same(whole, tmp_path / "killed")


def test_rows_that_wait_to_be_written_are_in_the_checkpoint(
    data: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """The log is written in threads, which may be behind when the process dies."""
    arguments = options(data, "by-client")
    whole = undisturbed(arguments)
    behind = {"wait_at": "fedsample.monitor.tensorboard.Recorder._append:4"}
    killed = simulate(
        tmp_path, "killed", *arguments, die_at=(["fedsample.monitor.tensorboard.Recorder.close"], 1), **behind
    )
    assert killed.code == -signal.SIGKILL
    assert last_checkpoint(tmp_path / "killed") == 160
    assert list(rows(tmp_path / "killed")) == [10, 20, 30]
    assert resume(tmp_path, "killed").code == 0
    assert_same(whole, tmp_path / "killed")
    assert "mcmc/rhat/max" in rows(tmp_path / "killed")[160]


# --- a finished run ---------------------------------------------------------------------------------------------------


def test_a_finished_run_reports_again_and_changes_nothing(data: Path, tmp_path: Path) -> None:
    first = call(tmp_path, "simulate", "--json", "--out", "run", *options(data, "langevin-diana"))
    assert first.code == 0, first.err
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.suffix != ".json"}
    again = call(tmp_path, "simulate", "--json", "--resume", "--out", "run")
    assert again.code == 0, again.err
    old, new = json.loads(first.out), json.loads(again.out)
    assert {k: v for k, v in new.items() if "seconds" not in k} == {k: v for k, v in old.items() if "seconds" not in k}
    for path, content in before.items():
        assert path.name == "lock" or path.read_bytes() == content, path
    assert_same_curves(run, run)


def test_a_finished_run_goes_on_where_its_rounds_are_raised(data: Path, tmp_path: Path) -> None:
    """Past the end of a shard of draws."""
    arguments = options(data, "underdamped-diana")
    assert simulate(tmp_path, "long", *arguments, "--rounds", "1300", constants=None).code == 0
    assert simulate(tmp_path, "short", *arguments, "--rounds", "420", constants=None).code == 0
    config = tmp_path / "short" / "config.toml"
    few = load_draws(tmp_path / "short")
    config.write_text(config.read_text().replace("rounds = 420", "rounds = 1300"))
    assert resume(tmp_path, "short", constants=None).code == 0
    many = load_draws(tmp_path / "short")
    assert few.shape[1] == 76
    assert many.shape[1] == 252
    assert torch.equal(many[:, :76], few)
    assert_same(tmp_path / "long", tmp_path / "short")
    config.write_text(config.read_text().replace("rounds = 1300", "rounds = 500"))
    refused = resume(tmp_path, "short")
    assert refused.code == 1
    assert refused.error.startswith("the run has done 1300 rounds, but its config.toml says rounds = 500")
    assert torch.equal(load_draws(tmp_path / "short"), many)


# --- signals ----------------------------------------------------------------------------------------------------------


def interrupted(process: Command, number: int) -> Done:
    process.send(number)
    done = process.wait()
    assert done.code == 130, (done.code, done.err)
    return done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on_and_does(
    number: signal.Signals, data: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    more: dict[str, object] = {"rounds": 1500, "monitor__every": 100, "monitor__checkpoint_seconds": 3600}
    arguments = settings(data, "quadratic", **more)
    whole = undisturbed(arguments)
    run = tmp_path / "it's a run"
    process = start(tmp_path, "simulate", "--out", run.name, *arguments)
    assert process.until(lambda: len(rows(run)) > 1)
    done = interrupted(process, number)
    at = last_checkpoint(run)
    assert 200 <= at < 1500
    command = "fedsample simulate --resume --out 'it'\"'\"'s a run'"
    assert done.error == f"stopped by {number.name} after round {at} of 1500; everything is kept. Go on with: {command}"
    assert load_rounds(run).tolist() == list(range(45, at + 1, 5))
    assert resume(tmp_path, run.name).code == 0
    assert_same(whole, run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("stage", "where", "when"),
    [
        ("reading the data", "fedsample.runs.session.build_problem", "while it was being prepared"),
        ("finding the mode", "fedsample.preparation.prepare.find_mode", "while it was being prepared"),
        ("summing up", "fedsample.runs.session.summarise", "after the last round"),
    ],
)
def test_an_interrupt_outside_the_rounds_ends_it_at_once(
    stage: str, where: str, when: str, number: signal.Signals, data: Path, tmp_path: Path
) -> None:
    arguments = settings(data, "quadratic", rounds=140)
    process = start(tmp_path, "simulate", "--out", "run", *arguments, wait_at=where)
    assert process.until(lambda: process.says(f"{stage} ... "))
    done = interrupted(process, number)
    message = f"stopped by {number.name} {when}; everything is kept. Go on with: fedsample simulate --resume --out run"
    assert done.error == message
    assert f"{stage} ... stopped\n" in done.err
    assert resume(tmp_path, "run").code == 0
    assert load_draws(tmp_path / "run").shape == (4, 20, 6)


def test_a_second_interrupt_ends_a_round_that_does_not_end(data: Path, tmp_path: Path) -> None:
    arguments = settings(data, "quadratic", rounds=140)
    where = "fedsample.fleets.local.LocalFleet.exchange:99"
    process = start(tmp_path, "simulate", "--out", "run", *arguments, wait_at=where, constants=OFTEN)
    assert process.until(lambda: last_checkpoint(tmp_path / "run") > 0)
    process.send(signal.SIGINT)
    process.send(signal.SIGTERM)
    done = process.wait()
    assert done.code == 130
    command = "fedsample simulate --resume --out run"
    assert done.error == f"stopped at once; the last checkpoint is kept. Go on with: {command}"
    assert resume(tmp_path, "run").code == 0
    assert load_draws(tmp_path / "run").shape == (4, 20, 6)


# --- one process, in process, other directories -----------------------------------------------------------------------


def test_a_directory_has_one_writer(data: Path, tmp_path: Path) -> None:
    arguments = settings(data, "quadratic", rounds=200)
    first = start(tmp_path, "simulate", "--out", "run", *arguments, wait_at="fedsample.runs.session.summarise")
    assert first.until(lambda: last_checkpoint(tmp_path / "run") == 200)
    before = load_draws(tmp_path / "run")
    refused = resume(tmp_path, "run")
    assert refused.code == 1
    assert "is in use by another process (process " in refused.error
    again = simulate(tmp_path, "run", *arguments)
    assert again.code == 1
    assert "is not empty" in again.error
    interrupted(first, signal.SIGINT)
    assert torch.equal(load_draws(tmp_path / "run"), before)
    assert resume(tmp_path, "run").code == 0


def test_resume_in_process(data: Path, tmp_path: Path) -> None:
    configuration = {
        "rounds": 300,
        "warmup": 100,
        "data": {"kind": "quadratic", "file": str(data / "quadratic.npz")},
        "monitor": {"every": 20, "tensorboard": False},
    }
    whole = fedsample.run(configuration, out=tmp_path / "whole", progress="quiet")
    cut = fedsample.run({**configuration, "rounds": 150}, out=tmp_path / "cut", progress="quiet")
    config = cut.path / "config.toml"
    config.write_text(config.read_text().replace("rounds = 150", "rounds = 300"))
    run = fedsample.run(out=cut.path, resume=True, progress="quiet")
    assert run.experiment == whole.experiment
    assert torch.equal(run.draws, whole.draws)
    assert not torch.equal(run.draws[:, :10], run.draws[:, 10:20])
    for mixed in ({"source": configuration}, {"overrides": ["seed=1"]}):
        with pytest.raises(ConfigError, match="resume takes everything from the run directory"):
            fedsample.run(**mixed, out=cut.path, resume=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give `out`"):
        fedsample.run(resume=True)
    with pytest.raises(RunDirectoryError, match="nothing to resume"):
        fedsample.run(out=tmp_path / "none", resume=True)


@pytest.mark.parametrize("moment", ["write_config", "write_env"])
def test_killed_once_the_step_is_chosen_it_is_prepared_as_before(
    moment: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A given step needs no mode where chains start elsewhere; one that was chosen there is of another survey."""
    configuration = {
        "preset": "langevin-diana",
        "rounds": 20,
        "warmup": 0,
        "data": {"kind": "npz", "file": str(data / "classes.npz")},
        "start": {"at": "zeros"},
        "monitor": {"every": 20, "tensorboard": False},
    }
    whole = fedsample.run(configuration, out=tmp_path / "whole", progress="quiet")
    calls = iter([False, True] if moment == "write_config" else [True])  # the configuration is written before, too
    written = getattr(RunDirectory, moment)

    def killed(*arguments: Any) -> None:
        if next(calls):
            raise KeyboardInterrupt
        written(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, moment, killed)
        with pytest.raises(Interrupted):
            fedsample.run(configuration, out=tmp_path / "cut", progress="quiet")
    run = fedsample.run(out=tmp_path / "cut", resume=True, progress="quiet")
    assert torch.equal(run.draws, whole.draws)
    assert run.experiment == whole.experiment
    for name in ("largest_stable_step", "predicted_variance_bias", "preparation_uplink_bytes_per_client"):
        assert run.summary[name] == whole.summary[name]


@pytest.mark.timeout(method="thread")  # SIGALRM is the test's own
def test_an_interrupt_in_process_is_an_exception_and_handlers_are_as_before(data: Path, tmp_path: Path) -> None:
    configuration = {
        "rounds": 100_000,
        "data": {"kind": "quadratic", "file": str(data / "quadratic.npz")},
        "monitor": {"tensorboard": False},
    }

    def alarm(number: int, frame: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    old = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM .* everything is kept"):
            fedsample.run(configuration, out=tmp_path / "run", progress="quiet")
    finally:
        signal.signal(signal.SIGALRM, old)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["rounds"] == 100_000


def test_a_run_can_move_and_be_resumed_under_another_environment(
    data: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    arguments = settings(data, "quadratic")
    whole = undisturbed(arguments)
    assert simulate(tmp_path, "here", *arguments, die_at=(["fedsample.runs.session.Session.save"], 3)).code == -9
    (tmp_path / "there").mkdir()
    (tmp_path / "here").rename(tmp_path / "there" / "moved")
    environment = {"FEDSAMPLE_SEED": "9", "FEDSAMPLE_ROUNDS": "7", "OMP_NUM_THREADS": "2"}
    assert resume(tmp_path / "there", "moved", environment=environment).code == 0
    assert_same(whole, tmp_path / "there" / "moved")


def test_a_run_that_goes_on_with_another_torch_says_so(data: Path, tmp_path: Path) -> None:
    arguments = settings(data, "quadratic")
    assert simulate(tmp_path, "run", *arguments, die_at=(["fedsample.runs.session.Session.save"], 3)).code == -9
    kept = json.loads((tmp_path / "run" / "env.json").read_text())
    kept["versions"]["torch"] = "2.0.1"
    (tmp_path / "run" / "env.json").write_text(json.dumps(kept))
    done = call(tmp_path, "simulate", "--resume", "--out", "run", constants=OFTEN)
    assert done.code == 0
    assert f"resumed elsewhere (torch 2.0.1 -> {torch.__version__}): the last bits of draws may differ" in done.err


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FEDSAMPLE_")]:
        monkeypatch.delenv(name)
