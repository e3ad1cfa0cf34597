"""Configuration: the round trip, and what the package shows of it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from config_reading import leaves, read, same
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fedsample
from fedsample.config import Experiment, dump_toml, keys, load, template, trace
from fedsample.config.presets import DEFAULT, PRESETS

# --- round trip -------------------------------------------------------------------------------------------------------


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "preset": st.sampled_from(list(PRESETS)),
    "seed": st.integers(0, 2**63 - 1),
    "thin": st.integers(1, 50),
    "temperature": st.floats(0, 1e6),
    "step_size": st.floats(1e-300, 1e3) | st.integers(1, 9) | st.just("auto"),
    "batch_size": st.none() | st.integers(1, 99),
    "data.name": st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
    "data.test_fraction": st.none() | st.floats(0, 0.99),
    "data.standardize": st.none() | st.booleans(),
    "model.prior_scale": st.none() | st.floats(1e-3, 1e3),
    "model.hidden": st.lists(st.integers(1, 64), max_size=3),
    "uplink.k": st.integers(1, 99) | st.floats(1e-6, 1) | st.just(1.0),
    "fleet.participation": st.integers(1, 10) | st.floats(1e-6, 1) | st.just(1.0),
    "fleet.threads": st.none() | st.integers(1, 64),
    "fleet.device": st.sampled_from(["cpu", "cuda", "cuda:3"]),
}


@given(st.fixed_dictionaries({}, optional=VALUES))
@settings(deadline=None, max_examples=200, derandomize=True, database=None)
def test_what_is_dumped_loads_as_it_was(flat: dict[str, Any]) -> None:
    assume(flat.get("preset") != "qlsd-plus-plus" or flat.get("batch_size", 1) is not None)  # svrg of no minibatches
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        section, _, key = path.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = value
    e = read(nested)
    text = dump_toml(e)
    assert same(read(tomllib.loads(text)), e)
    assert same(load(e), e)
    for path, value in flat.items():
        got = e
        for part in path.split("."):
            got = getattr(got, part)
        assert got == value


@pytest.mark.parametrize("kind", ["npz", "csv", "quadratic"])
def test_files_round_trip(kind: str) -> None:
    data: dict[str, Any] = {"kind": kind, "file": "some 'odd\" name"}
    e = read({"data": data | ({"target": "y", "client_column": "c"} if kind == "csv" else {})})
    assert same(read(tomllib.loads(dump_toml(e))), e)
    assert Path(e.data.file or "").is_absolute()


def test_the_dump_says_every_value_that_has_one() -> None:
    flat = {path for path, *_ in leaves(tomllib.loads(dump_toml(read())))}
    assert {key.path for key in keys()} - flat == {"data.file", "data.target", "data.client_column"}
    assert "k = 3  # --set uplink.k=3\n" in dump_toml(*trace(None, ["uplink.k=3"], {}))


def test_the_template_is_the_default_job_with_and_without_its_comments() -> None:
    text = template()
    assert tomllib.loads(text)["preset"] == DEFAULT
    assert same(read(tomllib.loads(text)), read())
    names = {key.path.split(".")[-1] for key in keys()}
    lines = text.splitlines()
    uncommented = [x[2:] if x.startswith("# ") and x[2:].split(" = ")[0] in names else x for x in lines]
    assert len(list(leaves(tomllib.loads("\n".join(uncommented))))) == len(keys()) - 3
    assert same(read(tomllib.loads("\n".join(uncommented))), read())
    # A preset changed in the template takes effect: nothing else in it is set.
    assert read(tomllib.loads(text.replace(DEFAULT, "federated-gd"))).rounds == 500


def test_every_key_is_described() -> None:
    known = keys()
    assert len(known) == len(list(leaves(Experiment().model_dump())))
    for key in known:
        assert key.meaning, key.path
        assert key.allowed, key.path
    by_path = {key.path: key for key in known}
    assert by_path["uplink.k"].variable == "FEDSAMPLE_UPLINK__K"
    assert by_path["uplink.k"].allowed == "a whole number >= 1 or a number > 0 and <= 1"
    assert by_path["model.prior_scale"].allowed == 'a number > 0 or "flat"'
    assert by_path["model.hidden"].allowed == "a list, each a whole number >= 1"
    assert by_path["sampler.name"].allowed == 'one of "baoab", "langevin", "sghmc"'


# --- the package ------------------------------------------------------------------------------------------------------


def test_public_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fedsample.__all__ == [
        *["ClientError", "CompileError", "ConfigError", "DataError", "DivergenceError", "Experiment"],
        *[
            "FedSampleError",
            "FlowerRun",
            "Interrupted",
            "QuorumError",
            "Run",
            "RunDirectoryError",
            "UnsoundError",
            "__version__",
            "build_target",
            "run",
            "run_flower",
        ],
    ]
    engine = types.ModuleType("fedsample.runs.api")
    for name in ("Run", "build_target", "run"):
        setattr(engine, name, name)
        monkeypatch.delitem(vars(fedsample), name, raising=False)
    monkeypatch.setitem(sys.modules, "fedsample.runs.api", engine)
    for name in fedsample.__all__:
        assert getattr(fedsample, name) is not None
        assert name in dir(fedsample)
    assert fedsample.Experiment is Experiment
    for name in ("Run", "build_target", "run"):  # not the stand-ins, for the tests that follow
        del vars(fedsample)[name]
    with pytest.raises(AttributeError, match="nothing"):
        _ = fedsample.nothing


def test_the_version_is_the_installed_one() -> None:
    assert fedsample.__version__ == importlib.metadata.version("fedsample")


def test_importing_the_package_loads_the_standard_library_only() -> None:
    code = (
        "import sys, fedsample; heavy = {'torch', 'flwr', 'ray', 'opacus', 'transformers', 'tensorboard', 'sklearn', "
        "'datasets', 'pydantic', 'numpy', 'typer', 'rich'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_choices_and_presets_agree_on_names() -> None:
    for name, row in PRESETS.items():
        for section, values in row.overrides.items():
            if isinstance(values, Mapping) and "name" in values:
                kind = Experiment.model_fields[section].annotation
                assert kind is not None
                assert values["name"] in get_args(kind.model_fields["name"].annotation), name
