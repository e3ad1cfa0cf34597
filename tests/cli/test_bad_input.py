"""What cannot be meant, read, written or sampled: one clear message, the documented exit code, and nothing lost."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from commands import TRACEBACK, Done, call, last_checkpoint, sets

import fedsample
from fedsample.cli.main import main
from fedsample.errors import (
    ConfigError,
    DataError,
    DivergenceError,
    FedSampleError,
    RunDirectoryError,
    UnsoundError,
)
from fedsample.monitor import load_draws
from fedsample.runs.session import SHARD_ROUNDS

pytestmark = pytest.mark.slow

SHORT: dict[str, object] = {"rounds": 60, "warmup": 10, "monitor__every": 10}
OFTEN = {"fedsample.runs.loop._CHECKPOINT_SHARE": 0.5}  # with checkpoint_seconds = 0: every few rounds


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are sound, and files that are not, each for one reason."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    x, client = draw.normal(size=(30, 3)), np.arange(30) % 4
    y, label = x @ np.array([1.0, -2.0, 0.5]) + draw.normal(size=30), (x[:, 0] + draw.normal(size=30) > 0).astype(int)

    def save(name: str, **arrays: Any) -> None:
        np.savez(folder / name, **arrays)

    def spoiled(value: float) -> np.ndarray[Any, Any]:
        bad = x.copy()
        bad[7, 1] = value
        return bad

    save("labels.npz", X=x, y=label, client=client)
    save("twice.npz", X=np.concatenate([x, x[:, :1]], axis=1), y=x[:, 0], client=client)
    save("numbers.npz", X=x, y=y, client=client)
    save("three.npz", X=x, y=np.arange(30) % 3, client=client)
    save("one-class.npz", X=x, y=np.ones(30, dtype=int), client=client)
    save("nan.npz", X=spoiled(np.nan), y=label, client=client)
    save("infinite.npz", X=spoiled(np.inf), y=label, client=client)
    save("nan-target.npz", X=x, y=np.where(np.arange(30) == 4, np.nan, y), client=client)
    save("short.npz", X=x, y=label[:29], client=client)
    save("lower.npz", x=x, y=label)
    save("no-y.npz", X=x)
    save("empty.npz", X=x[:0], y=y[:0])
    save("row.npz", X=x[:1], y=y[:1])
    save("unassigned.npz", X=x, y=label)
    save("objects.npz", X=x, y=np.array([object()] * 30))
    (folder / "text.npz").write_text("X,y\n1,2\n")
    save("quadratic.npz", lam=draw.uniform(0.5, 2, (4, 6)), a=draw.normal(size=(4, 6)))
    save("negative.npz", lam=np.array([[1.0, 1.0], [1.0, -0.5]]), a=np.zeros((2, 2)))
    save("improper.npz", lam=np.array([[1.0, 0.0], [1.0, 0.0]]), a=np.zeros((2, 2)))
    save("unequal.npz", lam=np.ones((2, 3)), a=np.zeros((2, 2)))
    lines = [f"{a:.4f},{b:.4f},{c},{k}" for (a, b, _), c, k in zip(x, label, client, strict=True)]
    (folder / "sound.csv").write_text("\n".join(["left,right,label,site", *lines]) + "\n")
    gap = [*lines[:5], lines[5].replace(lines[5].split(",")[1], ""), *lines[6:]]
    (folder / "gap.csv").write_text("\n".join(["left,right,label,site", *gap]) + "\n")
    (folder / "word.csv").write_text("\n".join(["left,right,label,site", *lines[:3], "1,2,3"]) + "\n")
    (folder / "header.csv").write_text("left,right,label,site\n")
    return folder


class Case(NamedTuple):
    """Settings, and how they are refused: exit code, kind of error, and what the message must say."""

    settings: dict[str, object]
    code: int
    kind: type[FedSampleError]
    says: tuple[str, ...]


def config(*says: str, kind: type[FedSampleError] = ConfigError, **settings: object) -> Case:
    return Case(settings, 2, kind, says)


def npz(file: str, *says: str, model: str = "logistic", **settings: object) -> Case:
    return Case(
        {"data__kind": "npz", "data__file": file, "model__name": model, **settings}, 1, DataError, (*says, file[:-4])
    )


def csv(file: str, *says: str, **settings: object) -> Case:
    source = {"data__kind": "csv", "data__file": file, "data__target": "label", "model__name": "logistic"}
    return Case({**source, **settings}, 1, DataError, says)


def quadratic(file: str, *says: str, **settings: object) -> Case:
    return Case({"data__kind": "quadratic", "data__file": file, **settings}, 1, DataError, says)


CONFIGURATIONS = {
    # keys
    "unknown key": config("uplink.kk: unknown key; the nearest known key is uplink.k", uplink__kk=3),
    "unknown section": config("uplnk: unknown key; the nearest known key is uplink", uplnk__k=3),
    "key in the wrong section": config("nearest known key is sampler.friction", metric__friction=2.0),
    "section as value": config("uplink: got 3; expected a table of settings", uplink=3),
    "unknown preset": config(
        'got "underdamped-dianna"; the nearest is "underdamped-diana"', preset="underdamped-dianna"
    ),
    # types
    "text for a number": config('rounds: got "many"; expected a whole number >= 1', rounds="many"),
    "number in quotes": config("write it without quotes and as TOML does: 0.2", fleet__loss=".2"),
    "fraction for a count": config("chains: got 2.5; expected a whole number >= 1", chains=2.5),
    "truth for a number": config("seed: got true; expected a whole number >= 0", seed="true"),
    "number for truth": config("monitor.tensorboard: got 1; expected true or false", monitor__tensorboard=1),
    "unknown word": config('metric.name: got "hesian"', 'did you mean "hessian"?', metric__name="hesian"),
    "later engine": config('"ray" is not part of this version', fleet__name="ray"),
    "half precision": config('dtype: got "float16"; expected one of "float32", "float64"', dtype="float16"),
    "several at once": config("2 settings cannot be used:", "chains: got 0", "thin: got -1", chains=0, thin=-1),
    # ranges
    "negative step": config('step_size: got -0.1; expected a number > 0 or "auto"', step_size=-0.1),
    "no step": config("step_size: got 0", step_size=0),
    "infinite step": config("step_size: got inf", step_size="inf"),
    "step that is no number": config("step_size: got nan", step_size="nan"),
    "negative temperature": config("temperature: got -1; expected a number >= 0", temperature=-1),
    "no friction": config("sampler.friction: got 0.0; expected a number > 0", sampler__friction=0.0),
    "no noise": config("model.noise_scale: got 0.0", model__noise_scale=0.0),
    "negative prior": config('model.prior_scale: got -1.0; expected a number > 0 or "flat"', model__prior_scale=-1.0),
    "no coordinates": config("uplink.k: got 0", uplink__k=0),
    "more than all coordinates": config("uplink.k: got 1.5", uplink__k=1.5),
    "certain loss": config("fleet.loss: got 1.0; expected a number >= 0 and < 1", fleet__loss=1.0),
    "empty batch": config('batch_size: got 0; expected a whole number >= 1 or "all"', batch_size=0),
    "no clients": config("data.clients: got 0", data__clients=0),
    "nobody takes part": config("fleet.participation: got 0", fleet__participation=0),
    "negative seed": config("seed: got -1", seed=-1),
    "unknown device": config('fleet.device: got "gpu"; expected text such as "cpu", "cuda"', fleet__device="gpu"),
    # contradictions
    "all warm-up": config("60 rounds of warm-up leave none of 60; lower it, to 12 say", warmup=60),
    "no draw": config("no draw in 50 rounds with one every 100; lower thin", thin=100),
    "cohort of too many": config("got 20 of 10 clients; ask for fewer", fleet__participation=20),
    "p without coins": config('only marina has full rounds; set uplink.p = "auto"', uplink__p=0.5),
    "flat prior draws": config("cannot be drawn from", start__at="prior", model__prior_scale="flat"),
    "no file": config('data.kind = "npz" needs the path of its file', data__kind="npz"),
    "file of a built-in": config('set data.kind = "csv", or drop data.file', data__file="sound.csv"),
    "quadratic model": config('it needs data.kind = "quadratic"', model__name="quadratic"),
    "no label column": config("needs the name of the label column", data__kind="csv", data__file="sound.csv"),
    # soundness
    "dense with a compressor": config(
        "heats the chain",
        "use uplink diana with this compressor (direct, if that heating is wanted), or compressor identity",
        kind=UnsoundError,
        uplink__name="dense",
        uplink__compressor="randk",
    ),
    "simulated faults on Flower": config("set both to 0", fleet__name="flower", fleet__loss=0.1),
    # what only the data tell
    "k above d": config(
        "k = 7 coordinates of 6 parameters; choose 1 <= k <= 6, or a fraction",
        data__kind="quadratic",
        data__file="quadratic.npz",
        uplink__k=7,
    ),
    "cohort of more than the file names": config(
        "fleet.participation = 5: choose a probability in (0, 1] or a cohort of 1..4 clients",
        data__kind="npz",
        data__file="labels.npz",
        fleet__participation=5,
    ),
    "matrix too large": config(
        "metric.name = 'hessian' needs a matrix of",
        "choose kronecker or diagonal",
        data__kind="npz",
        data__file="labels.npz",
        model__name="mlp",
        model__hidden="[2000]",
    ),
    "three classes for a logit": config(
        'takes two classes, but three has 3: choose "softmax"',
        data__kind="npz",
        data__file="three.npz",
        model__name="logistic",
    ),
    "classes without a prior": config(
        'model.prior_scale = "flat"',
        "the posterior has no finite mass; set model.prior_scale to a number",
        data__kind="npz",
        data__file="three.npz",
        model__prior_scale="flat",
    ),
    "columns that others determine": config(
        "1 of ",
        "directions of the parameters are flat as far as float32 tells, and so is the prior",
        "drop columns that others determine, or try dtype = 'float64'",
        data__kind="npz",
        data__file="twice.npz",
        model__name="linear",
        model__prior_scale="flat",
    ),
    "images wanted": config(
        "lenet5",
        "takes images",
        data__kind="npz",
        data__file="labels.npz",
        model__name="lenet5",
    ),
    "no client names": config(
        'does not name clients: give an npz file an array "client"',
        data__kind="npz",
        data__file="unassigned.npz",
        data__partition="natural",
    ),
}

DATA = {
    "missing file": npz("none.npz", "does not exist: expected a npz file; check the path"),
    "not an archive": npz("text.npz", "cannot read text.npz as a numpy archive"),
    "pickled objects": npz("objects.npz", "pickled objects are refused because loading them can run code"),
    "misspelled array": npz("lower.npz", "holds an array 'x', which has no meaning here. Did you mean 'X'?"),
    "missing array": npz("no-y.npz", "has no array 'y': it holds 'X'"),
    "lengths differ": npz("short.npz", "y has shape (29,)", "expected (30,)"),
    "NaN": npz("nan.npz", "column 'x1' holds nan in row 7 of X", "drop such rows or fill them in"),
    "infinity": npz("infinite.npz", "column 'x1' holds inf in row 7 of X"),
    "NaN in the target": npz("nan-target.npz", "column 'y' holds nan in row 4", model="linear"),
    "numbers for classes": npz("numbers.npz", "but the model predicts a class", "model.name = linear"),
    "one class": npz("one-class.npz", "every row of one-class has the label 1: expected at least two classes"),
    "no rows": npz("empty.npz", "has no rows: expected at least one", model="linear"),
    "more clients than rows": npz("unassigned.npz"[:-4] + ".npz", "only 30 training rows", data__clients=31)._replace(
        says=("data.clients = 31, but there are only 30 training rows: lower data.clients",)
    ),
    "unknown built-in": Case({"data__name": "digit"}, 1, DataError, ("no built-in dataset 'digit'", "'digits'?")),
    "regression set": Case({"data__name": "diabetes"}, 1, DataError, ("choose model.name = linear",)),
    "empty field": csv("gap.csv", "column 'right' of gap.csv has no value in row 5 (the first row is 0; 1 of 30"),
    "missing column": csv(
        "sound.csv", "has no column 'lable' (data.target). Did you mean 'label'?", data__target="lable"
    ),
    "missing client column": csv("sound.csv", "no column 'sight' (data.client_column)", data__client_column="sight"),
    "ragged lines": csv("word.csv", "cannot read word.csv as csv", "Expected 4 columns, got 3"),
    "header only": csv("header.csv", "has a header but no rows"),
    "wrong kind": csv("labels.npz", "cannot read labels.npz as csv"),
    "negative curvature": quadratic("negative.npz", "client 1 has curvature -0.5 in some direction, expected >= 0"),
    "improper": quadratic("improper.npz", "the posterior is improper there", "set model.prior_scale"),
    "shapes differ": quadratic("unequal.npz", "(2, 3)", "to fit the centres"),
}


def named(folder: Path, settings: dict[str, object]) -> dict[str, object]:
    """The settings with the data file's full path, in a short run."""
    file = settings.get("data__file")
    return {**SHORT, **settings, **({"data__file": folder / str(file)} if file else {})}


def refuses(run: Callable[[], object], kind: type[FedSampleError]) -> str:
    """The message of the error, which is of exactly this kind or of its more specific ones."""
    with pytest.raises(kind) as caught:
        run()
    return str(caught.value)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FEDSAMPLE_")]:
        monkeypatch.delenv(name)


# --- configurations and data ------------------------------------------------------------------------------------------


PROCESSES = ("unknown key", "dense with a compressor", "NaN")  # of each kind of error one, by a process of its own


def called_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str
) -> Done:
    """The same command in this process, for the dozens that end before a chain begins."""
    monkeypatch.setattr(sys, "argv", ["fedsample", *arguments])
    for name, value in (("COLUMNS", "120"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    return Done(int(ended.value.code or 0), *capfd.readouterr())


@pytest.mark.parametrize("name", [*CONFIGURATIONS, *DATA])
def test_what_cannot_be_meant_is_refused(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    case = (CONFIGURATIONS | DATA)[name]
    settings = named(data, case.settings)
    words = ["simulate", "--out", "run", *sets(**settings)]
    done = call(tmp_path, *words) if name in PROCESSES else called_here(tmp_path, monkeypatch, capfd, *words)
    assert done.code == case.code, done.err
    assert done.out == ""
    for text in case.says:
        assert text in done.error
    assert not (tmp_path / "run").exists()
    overrides = sets(**settings)[1::2]
    message = refuses(lambda: fedsample.run(overrides=overrides, out=tmp_path / "run", progress="quiet"), case.kind)
    assert message == done.error
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(device: str, data: Path, tmp_path: Path) -> None:
    settings = named(data, {"data__kind": "quadratic", "data__file": "quadratic.npz"})
    done = call(tmp_path, "simulate", "--out", "run", "--device", device, *sets(**settings))
    assert done.code == 2
    assert done.error == (
        f'fleet.device = "{device}", but this machine has no GPU that PyTorch can use; choose another, such as "cpu"'
    )
    assert not (tmp_path / "run").exists()
    message = refuses(
        lambda: fedsample.build_target({"data": {"name": "iris"}, "fleet": {"device": device}}), ConfigError
    )
    assert message == done.error


@pytest.mark.parametrize(
    "settings",
    [
        {"data__kind": "npz", "data__file": "row.npz", "model__name": "linear", "data__clients": 1},
        {"data__kind": "npz", "data__file": "unassigned.npz", "data__clients": 1, "chains": 1},
        {"data__kind": "npz", "data__file": "labels.npz", "batch_size": 1000},
        {"data__kind": "npz", "data__file": "labels.npz", "fleet__participation": 1, "batch_size": 2, "thin": 50},
        {"data__kind": "quadratic", "data__file": "quadratic.npz", "uplink__k": 6, "chains": 1},
        {
            "data__kind": "quadratic",
            "data__file": "quadratic.npz",
            "fleet__dropout": 0.9,
            "fleet__dropout_rounds": 30.0,
        },
        {"data__kind": "csv", "data__file": "sound.csv", "data__target": "label", "data__client_column": "site"},
    ],
    ids=["one row", "one client", "batch above all", "cohort of one", "k = d", "nobody there", "csv"],
)
def test_the_smallest_that_can_be_meant_runs(settings: dict[str, object], data: Path, tmp_path: Path) -> None:
    done = call(tmp_path, "simulate", "--json", "--out", "run", *sets(**named(data, settings)))
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    draws = load_draws(tmp_path / "run")
    assert draws.shape == (summary["chains"], summary["draws"], summary["params"])
    assert bool(torch.isfinite(draws).all())
    assert (summary["rhat_max"] is None) == (summary["chains"] == 1 or summary["draws"] < 4)


def test_files_and_variables_of_the_configuration(data: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.toml").write_text("[uplink\nk = 3\n")
    (tmp_path / "typo.toml").write_text("[uplink]\nkk = 3\n")
    (tmp_path / "latin.toml").write_bytes(b'preset = "\xe9"\n')
    for name, text in (
        ("none.toml", "none.toml: there is no such configuration file; `fedsample config init` writes one"),
        ("federated-gd", "to use the preset of that name: --preset federated-gd"),
        (".", ".: is a directory; name the TOML file in it, such as config.toml"),
        ("torn.toml", "torn.toml: is not TOML: "),
        ("latin.toml", "latin.toml: is not TOML: "),
        ("typo.toml", "uplink.kk: unknown key; the nearest known key is uplink.k (set by typo.toml)"),
    ):
        done = call(tmp_path, "simulate", name, "--out", "run")
        assert (done.code, done.out) == (2, "")
        assert text in done.error
    done = call(tmp_path, "simulate", "--out", "run", environment={"FEDSAMPLE_UPLNK__K": "3"})
    assert done.code == 2
    assert (
        "FEDSAMPLE_UPLNK__K: unknown environment variable; the nearest known one is FEDSAMPLE_UPLINK__K" in done.error
    )
    done = call(tmp_path, "simulate", "--set", "uplink.k", "--out", "run")
    assert done.code == 2
    assert "expected section.key=value, such as uplink.k=32" in done.error
    assert not (tmp_path / "run").exists()
    message = refuses(lambda: fedsample.run(17, out=tmp_path / "run"), ConfigError)  # type: ignore[arg-type]
    assert message == "got a int; expected a dict, the path of a TOML file, or an Experiment"


@pytest.mark.parametrize(
    ("settings", "code", "kind"),
    [
        ({"uplink__kk": 3}, 2, "SettingsError"),
        ({"data__kind": "npz", "data__file": "nan.npz"}, 1, "DataError"),
        ({"data__kind": "quadratic", "data__file": "quadratic.npz", "uplink__k": 7}, 2, "ConfigError"),
        ({"data__kind": "quadratic", "data__file": "quadratic.npz", "step_size": 50.0}, 1, "DivergenceError"),
    ],
)
def test_debug_shows_the_traceback_and_the_message(
    settings: dict[str, object], code: int, kind: str, data: Path, tmp_path: Path
) -> None:
    done = call(tmp_path, "simulate", "--quiet", "--debug", "--out", "run", *sets(**named(data, settings)))
    assert done.code == code
    assert TRACEBACK in done.err
    assert f"{kind}: " in done.err
    assert done.err.splitlines()[-1].startswith("error: ")


def test_a_defect_is_named_as_one(data: Path, tmp_path: Path) -> None:
    settings = sets(**named(data, {"data__kind": "quadratic", "data__file": "quadratic.npz"}))
    broken = {"fedsample.runs.session.build_fleet": None}
    done = call(tmp_path, "simulate", "--out", "run", *settings, constants=broken)
    assert done.code == 1
    assert "unexpected TypeError: 'NoneType' object is not callable (a defect of fedsample; --debug" in done.error
    assert not (tmp_path / "run").exists()


# --- a chain that diverges --------------------------------------------------------------------------------------------


def test_a_step_too_large_says_which_would_do(data: Path, tmp_path: Path) -> None:
    settings = {"data__kind": "quadratic", "data__file": "quadratic.npz", "step_size": 50.0}
    done = call(tmp_path, "simulate", "--quiet", "--out", "run", *sets(**named(data, settings)))
    assert done.code == 1
    assert "the step 50 is too large for the curvature " in done.error
    limit = float(done.error.partition("largest stable step is ")[2].partition(". Set step_size")[0])
    assert 0.01 < limit < 4
    settings = {**settings, "step_size": 0.9 * limit}
    assert call(tmp_path, "simulate", "--quiet", "--out", "calm", *sets(**named(data, settings))).code == 0
    overrides = sets(**named(data, {**settings, "step_size": 50.0}))[1::2]
    run = tmp_path / "again"
    message = refuses(lambda: fedsample.run(overrides=overrides, out=run, progress="quiet"), DivergenceError)
    assert message == done.error


def test_draws_from_before_a_divergence_are_kept(data: Path, tmp_path: Path) -> None:
    """A step a little beyond the limit needs a while to show."""
    settings = {
        "data__kind": "quadratic",
        "data__file": "quadratic.npz",
        "preset": "federated-gd",
        "start__at": "prior",
        "model__prior_scale": 1.0,
        "temperature": 0.01,
        "rounds": 4000,
        "monitor__checkpoint_seconds": 0,
    }
    trial = call(tmp_path, "simulate", "--json", "--out", "trial", *sets(**named(data, settings | {"rounds": 20})))
    assert trial.code == 0, trial.err
    step = 1.005 * json.loads(trial.out)["largest_stable_step"]
    arguments = sets(**named(data, settings | {"step_size": step}))
    done = call(tmp_path, "simulate", "--quiet", "--out", "run", *arguments, constants=OFTEN)
    assert done.code == 1
    assert "chain 0 diverged in round" in done.error
    at = last_checkpoint(tmp_path / "run")
    assert at > 0
    draws = load_draws(tmp_path / "run")
    kept = draws.shape[1]  # up to the checkpoint, or a shard more: one that is full is written at once
    assert kept == at - 10 or (kept > at - 10 and kept % SHARD_ROUNDS == 0)
    assert bool(torch.isfinite(draws).all())
    again = call(tmp_path, "simulate", "--quiet", "--resume", "--out", "run", constants=OFTEN)
    assert (again.code, again.error) == (1, done.error)
    assert torch.equal(load_draws(tmp_path / "run")[:, : draws.shape[1]], draws)


# --- directories ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, to be copied and spoiled."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = arguments_of(data)
    assert call(folder, "simulate", "--quiet", "--out", "run", *arguments, constants=OFTEN).code == 0
    assert len(list((folder / "run" / "checkpoint").iterdir())) == 2
    return folder / "run"


def arguments_of(data: Path, **more: object) -> list[str]:
    settings = {"data__kind": "quadratic", "data__file": "quadratic.npz", "monitor__checkpoint_seconds": 0}
    return sets(**named(data, {**settings, **more}))


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def resume(run: Path) -> Done:
    return call(run.parent, "simulate", "--quiet", "--resume", "--out", run.name)


def test_a_directory_with_files_is_left_alone(data: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    done = call(tmp_path, "simulate", "--out", "mine", *arguments_of(data))
    assert done.code == 1
    assert done.error == (
        "mine is not empty (it holds notes.txt): a new run needs an empty directory; go on with the run that lies "
        "there with --resume, or choose another directory with --out"
    )
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    done = resume(tmp_path / "mine")
    assert done.code == 1
    assert "nothing to resume in mine: it has no config.toml and no checkpoint" in done.error
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert call(finished.parent, "simulate", "--out", "run", *arguments_of(data)).code == 1
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    message = refuses(lambda: fedsample.run(out=finished, progress="quiet"), RunDirectoryError)
    assert "is not empty (it holds bytes, checkpoint, config.toml, ...)" in message


def test_no_directory_and_a_file_in_its_place(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    for place in "file", "file/below":
        done = call(tmp_path, "simulate", "--out", place, *arguments_of(data))
        assert done.code == 1
        assert done.error == f"{place} is a file or lies below one: expected a directory; choose another with --out"
    assert (tmp_path / "file").read_text() == "keep"
    assert "nothing to resume: none does not exist" in resume(tmp_path / "none").error
    assert "nothing to resume: file is not a directory" in resume(tmp_path / "file").error
    assert not (tmp_path / "none").exists()
    done = call(tmp_path, "simulate", "--resume")
    assert done.code == 2
    assert "--resume needs --out DIR, the directory of the run to go on with" in done.err
    assert TRACEBACK not in done.err


def test_an_attempt_that_cannot_begin_leaves_an_empty_directory_for_the_next(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert call(tmp_path, "simulate", "--out", "run", *arguments_of(data, uplink__k=7)).code == 2
    assert call(tmp_path, "simulate", "--out", "run", *arguments_of(data, fleet__participation=9)).code == 2
    assert (tmp_path / "run").is_dir()
    assert call(tmp_path, "simulate", "--quiet", "--out", "run", *arguments_of(data)).code == 0


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def act(run: Path) -> None:
        file = run / "config.toml"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return act


def flipped(name: str, at: int = -9) -> Callable[[Path], None]:
    """One byte is wrong, near the end of each of the files."""

    def act(run: Path) -> None:
        files = sorted(run.glob(name))
        assert files
        for file in files:
            content = bytearray(file.read_bytes())
            content[at] ^= 1
            file.write_bytes(bytes(content))

    return act


def removed(name: str) -> Callable[[Path], None]:
    def act(run: Path) -> None:
        for path in list(run.glob(name)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def act(run: Path) -> None:
        for file in list(run.glob(name)):
            file.write_bytes(content)

    return act


OTHER = "is a checkpoint of another configuration"
GEOMETRY = "the run's geometry (geometry.safetensors, geometry.json) is missing or damaged"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (replaced("seed = 0", "seed = 1"), OTHER),
        (replaced("warmup = 10", "warmup = 20"), OTHER),
        (replaced("chains = 4", "chains = 2"), OTHER),
        (written("config.toml", b""), OTHER),
        (replaced("rounds = 60", "rounds = 50"), "the run has done 60 rounds, but its config.toml says rounds = 50"),
        (replaced("[data]", "[data"), "config.toml of the run cannot be used: Expected ']'"),
        (replaced("thin = 5", "thinn = 5"), "thinn: unknown key; the nearest known key is thin"),
        (written("config.toml", b"\xff"), "expected the configuration of the run as TOML"),
        (removed("config.toml"), "it has no config.toml"),
        (removed("checkpoint/*"), "holds no checkpoint, but there are draws"),
        (removed("checkpoint"), "it has no checkpoint"),
        (flipped("checkpoint/*/tensors.safetensors"), "the checksum of tensors.safetensors does not match"),
        (flipped("checkpoint/*/meta.json", 200), "the checksum of meta.json does not match"),
        (written("checkpoint/*/meta.json", b"{}"), "the checksum of meta.json does not match"),
        (removed("geometry.safetensors"), GEOMETRY),
        (flipped("geometry.safetensors"), GEOMETRY),
        (written("geometry.safetensors", b"torn"), GEOMETRY),
        (flipped("geometry.json", 40), GEOMETRY),
        (written("geometry.json", b"[]"), GEOMETRY),
        (flipped("draws/000000.safetensors"), "draws/000000.safetensors is damaged (the checksum does not match)"),
        (written("draws/000000.safetensors", b"torn"), "draws/000000.safetensors is damaged"),
        (removed("draws/*"), "holds 0 draws up to round 60, but the checkpoint counts 10"),
    ],
)
def test_a_run_that_was_tampered_with_is_not_resumed(spoil: Callable[[Path], None], says: str, copy: Path) -> None:
    spoil(copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != "lock"}
    done = resume(copy)
    assert done.code == 1
    assert says in done.error
    message = refuses(lambda: fedsample.run(out=copy, resume=True, progress="quiet"), RunDirectoryError)
    assert says in message
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != "lock"} == before


def test_one_damaged_checkpoint_costs_the_rounds_since_the_one_before(finished: Path, copy: Path) -> None:
    newest = sorted((copy / "checkpoint").iterdir())[-1]
    flipped(f"checkpoint/{newest.name}/tensors.safetensors")(copy)
    done = resume(copy)
    assert done.code == 0, done.err
    assert "is damaged (the checksum of tensors.safetensors does not match) and is skipped" in done.err
    assert torch.equal(load_draws(copy), load_draws(finished))


def test_other_data_under_the_same_name_are_found_out(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.npz"
    shutil.copy(data / "quadratic.npz", file)
    arguments = sets(**SHORT, data__kind="quadratic", data__file=file)
    killed = call(tmp_path, "simulate", "--out", "run", *arguments, die_at=(["fedsample.runs.session.summarise"], 1))
    assert killed.code == -signal.SIGKILL
    with np.load(file) as arrays:
        changed = dict(arrays)
    changed["a"][2, 3] += 1e-3
    np.savez(file, **changed)
    before = load_draws(tmp_path / "run")
    done = resume(tmp_path / "run")
    assert done.code == 1
    assert "the data are not those that the run in run began with: restore them, or start a new run" in done.error
    assert torch.equal(load_draws(tmp_path / "run"), before)
    shutil.copy(data / "quadratic.npz", file)
    assert resume(tmp_path / "run").code == 0


# --- disks ------------------------------------------------------------------------------------------------------------


def mount(*words: str | Path) -> bool:
    tool = shutil.which("mount")
    return tool is not None and subprocess.run([tool, *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 80 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=80k", "none", folder):
        pytest.skip("needs the right to mount a small tmpfs, which this user does not have")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_and_then_a_larger_one(data: Path, disk: Path, tmp_path: Path) -> None:
    arguments = arguments_of(data, rounds=600, thin=1)
    assert call(tmp_path, "simulate", "--quiet", "--out", "whole", *arguments).code == 0
    done = call(tmp_path, "simulate", "--quiet", "--out", "disk/run", *arguments, constants=OFTEN)
    assert done.code == 1
    assert "no room on the disk or in the quota for disk/run/" in done.error
    assert "What was written before is whole: free some space and go on with --resume" in done.error
    at, draws = last_checkpoint(disk / "run"), load_draws(disk / "run")
    assert 10 < at < 600
    assert draws.shape[1] >= at - 10
    assert torch.equal(draws, load_draws(tmp_path / "whole")[:, : draws.shape[1]])
    assert call(tmp_path, "simulate", "--quiet", "--resume", "--out", "disk/run").code == 1
    assert last_checkpoint(disk / "run") >= at
    assert mount("-o", "remount,size=9m", disk)
    assert call(tmp_path, "simulate", "--quiet", "--resume", "--out", "disk/run").code == 0
    assert torch.equal(load_draws(disk / "run"), load_draws(tmp_path / "whole"))


def test_a_read_only_disk(data: Path, disk: Path, tmp_path: Path) -> None:
    (disk / "empty").mkdir()
    assert call(tmp_path, "simulate", "--quiet", "--out", "disk/run", *arguments_of(data)).code == 0
    assert mount("-o", "remount,ro", disk)
    for place, words in ("run", ["--resume"]), ("empty", arguments_of(data)), ("new", arguments_of(data)):
        done = call(tmp_path, "simulate", "--quiet", "--out", f"disk/{place}", *words)
        assert done.code == 1
        assert done.error == (
            f"disk/{place} cannot be written (Read-only file system): expected a writable directory; "
            "choose another with --out"
        )


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stood in the way of."""
    folder = tmp_path_factory.mktemp("whole")
    assert call(folder, "simulate", "--quiet", "--out", "run", *arguments_of(data, rounds=400, thin=1)).code == 0
    return folder / "run"


@pytest.mark.parametrize("limit", [100, 3000, 8000])
def test_a_file_that_may_not_grow(limit: int, data: Path, whole: Path, tmp_path: Path) -> None:
    """Where no disk can be mounted: the configuration, the curves and the draws hit a limit in turn."""
    arguments = arguments_of(data, rounds=400, thin=1)
    done = call(tmp_path, "simulate", "--quiet", "--out", "run", *arguments, file_limit=limit, constants=OFTEN)
    assert done.code == 1
    assert "no room on the disk or in the quota for run/" in done.err
    if limit == 100:
        assert last_checkpoint(tmp_path / "run") == -1
        assert "run/config.toml" in done.err
        assert call(tmp_path, "simulate", "--quiet", "--out", "run", *arguments).code == 0
    else:
        assert last_checkpoint(tmp_path / "run") > 0
        assert call(tmp_path, "simulate", "--quiet", "--resume", "--out", "run").code == 0
    assert torch.equal(load_draws(tmp_path / "run"), load_draws(whole))


def test_the_checks_above_name_every_kind_of_error() -> None:
    kinds = {case.kind for case in itertools.chain(CONFIGURATIONS.values(), DATA.values())}
    assert kinds == {ConfigError, UnsoundError, DataError}
