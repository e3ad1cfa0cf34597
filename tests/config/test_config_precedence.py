"""Configuration: defaults and presets, precedence, and what data imply."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
from config_reading import leaves, read, refusal, same

from fedsample.config import Experiment, FleetConfig, dump_toml, load, trace, variable
from fedsample.config.presets import DEFAULT, PRESETS, table

# --- defaults and presets ---------------------------------------------------------------------------------------------


def test_nothing_given_is_the_default_preset() -> None:
    assert same(read(), Experiment())
    assert same(read(), read({"preset": DEFAULT}))
    # The class defaults are the default row, written twice: they must not drift apart.
    defaults = {path: (value, kind) for path, value, kind in leaves(Experiment().model_dump())}
    for path, value, kind in leaves(PRESETS[DEFAULT].overrides):
        assert defaults[path] == (value, kind)


def test_default_job_is_the_documented_one() -> None:
    e = read()
    assert (e.preset, e.seed, e.rounds, e.warmup, e.thin, e.chains) == ("underdamped-diana", 0, 8000, 1000, 5, 4)
    assert (e.temperature, e.dtype, e.step_size, e.batch_size, e.draws) == (1.0, "float32", "auto", None, 1400)
    assert (e.data.name, e.data.clients, e.data.partition, e.data.alpha) == ("digits", 10, "dirichlet", 0.3)
    assert (e.sampler.name, e.metric.name, e.fleet.name, e.fleet.device) == ("baoab", "hessian", "local", "cpu")
    assert (e.uplink.name, e.uplink.compressor, e.uplink.k, e.uplink.p) == ("diana", "randblock", 0.05, None)


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_a_valid_experiment_that_holds_its_row(name: str) -> None:
    found = {path: value for path, value, _ in leaves(read({"preset": name}).model_dump())}
    for path, value, _ in leaves(PRESETS[name].overrides):
        assert found[path] == value
    assert PRESETS[name].name == name
    assert all(row["summary"] and row["guarantee"] and row["reference"] for row in table())


def test_federated_gd_is_gradient_descent_from_zero() -> None:
    e = read({"preset": "federated-gd"})
    assert (e.rounds, e.warmup, e.thin, e.chains, e.temperature, e.start.at) == (500, 0, 1, 1, 0.0, "zeros")
    assert (e.uplink.name, e.uplink.compressor, e.metric.name) == ("dense", "identity", "identity")


def test_a_class_called_directly_takes_its_preset_and_instances() -> None:
    e = Experiment(preset="langevin-marina", fleet=FleetConfig(loss=0.1), uplink={"k": 3})
    assert (e.sampler.name, e.uplink.name, e.uplink.k, e.fleet.loss) == ("langevin", "marina", 3, 0.1)
    assert same(e, read({"preset": "langevin-marina", "fleet": {"loss": 0.1}, "uplink": {"k": 3}}))


# --- precedence -------------------------------------------------------------------------------------------------------


def test_each_layer_lies_over_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('preset = "langevin-marina"\nseed = 1\nchains = 2\nrounds = 9000\n[uplink]\nk = 4\n')
    env = {"FEDSAMPLE_SEED": "2", "FEDSAMPLE_CHAINS": "3", "FEDSAMPLE_UPLINK__COMPRESSOR": "identity", "HOME": "/x"}
    experiment, origins = trace(file, ["seed=3"], env)
    assert experiment.sampler.name == "langevin"  # preset
    assert (experiment.rounds, experiment.uplink.k) == (9000, 4)  # file
    assert (experiment.chains, experiment.uplink.compressor) == (3, "identity")  # environment
    assert experiment.seed == 3  # --set
    assert origins == {
        "preset": str(file),
        "seed": "--set seed=3",
        "rounds": str(file),
        "chains": "FEDSAMPLE_CHAINS",
        "sampler.name": "preset langevin-marina",
        "metric.name": "preset langevin-marina",
        "uplink.name": "preset langevin-marina",
        "uplink.compressor": "FEDSAMPLE_UPLINK__COMPRESSOR",
        "uplink.k": str(file),
    }


@pytest.mark.parametrize("how", ["dict", "environment", "override"])
def test_the_preset_last_named_is_the_base(how: str) -> None:
    source = {"preset": "langevin-marina", "uplink": {"k": 7}}
    if how == "dict":
        e = read(source | {"preset": "federated-gd"})
    elif how == "environment":
        e = read(source, FEDSAMPLE_PRESET="federated-gd")
    else:
        e = read(source, "preset=federated-gd")
    assert (e.preset, e.temperature, e.uplink.name, e.uplink.k) == ("federated-gd", 0.0, "dense", 7)


def test_an_experiment_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    e = read({"preset": "langevin-marina", "seed": 5, "fleet": {"participation": 1}})
    monkeypatch.setenv("FEDSAMPLE_SEED", "9")
    assert load(e).seed == 5
    assert load({}).seed == 9
    assert load({}, environment={}).seed == 0
    moved = load(e, ["preset=federated-gd"])
    assert (moved.seed, moved.sampler.name, moved.temperature, moved.start.at) == (5, "langevin", 0.0, "zeros")
    assert moved.fleet.participation == 1
    assert type(moved.fleet.participation) is int


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("uplink.k=32", 32),
        ("uplink.k=0.05", 0.05),
        ("uplink.k=1", 1),
        ("uplink.k=1.0", 1.0),
        ("uplink.compressor=randk", "randk"),
        ('uplink.compressor="randk"', "randk"),
        ("model.intercept=false", False),
        ("model.hidden=[8, 4]", [8, 4]),
        ("model.prior_scale=flat", None),
        ("model.prior_scale=2", 2.0),
        ("batch_size=all", None),
        ("data.name=2020-01-01", "2020-01-01"),
        ("data.name=a = b", "a = b"),
        ("data.name=1\nseed = 3", "1\nseed = 3"),
        (" fleet.device = cuda:1 ", "cuda:1"),
        ("uplink={k = 3}", 3),
    ],
)
def test_a_value_is_a_toml_literal_or_a_bare_word(text: str, value: object) -> None:
    path = "uplink.k" if text.startswith("uplink={") else text.split("=")[0].strip()
    found = {key: (v, kind) for key, v, kind in leaves(read(None, text).model_dump())}
    assert found[path] == (value, type(value))
    if not text.startswith("uplink={"):
        name = variable(path)
        assert same(read(None, **{name: text.partition("=")[2].strip()}), read(None, text))


def test_python_values_arrive_as_toml_has_them() -> None:
    e = read({"seed": np.int64(3), "temperature": np.float32(0.5), "model": {"name": "mlp", "hidden": (8, 8)}})
    assert (e.seed, e.temperature, e.model.hidden) == (3, 0.5, [8, 8])
    assert type(e.seed) is int


def test_a_relative_data_file_is_looked_for_beside_the_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, elsewhere = tmp_path / "study", tmp_path / "elsewhere"
    study.mkdir()
    elsewhere.mkdir()
    (study / "run.toml").write_text('[data]\nkind = "npz"\nfile = "rows.npz"\n')
    monkeypatch.chdir(elsewhere)
    assert read(study / "run.toml").data.file == str(elsewhere / "rows.npz")
    (study / "rows.npz").touch()
    e = read(study / "run.toml")
    assert e.data.file == str(study / "rows.npz")
    assert same(read(tomllib.loads(dump_toml(e))), e)


# --- what data imply --------------------------------------------------------------------------------------------------


def test_quadratic_data_bring_their_model_and_a_flat_prior() -> None:
    e = read({"data": {"kind": "quadratic", "file": "/q.npz"}})
    assert (e.data.name, e.model.name, e.model.prior_scale) == (None, "quadratic", None)
    e = read({"data": {"kind": "quadratic", "file": "/q.npz"}, "model": {"prior_scale": 2.0}})
    assert e.model.prior_scale == 2.0
    text = refusal({"data": {"kind": "quadratic", "file": "/q.npz"}, "model": {"name": "softmax"}})
    assert 'model.name: got "softmax" with data.kind = "quadratic"' in text
    assert 'needs data.kind = "quadratic"' in refusal({"model": {"name": "quadratic"}})


def test_a_client_column_implies_the_natural_partition() -> None:
    csv = {"kind": "csv", "file": "/a.csv", "target": "y"}
    assert read({"data": {**csv, "client_column": "c"}}).data.partition == "natural"
    assert "data.client_column" in refusal({"data": {**csv, "client_column": "c", "partition": "iid"}})
    assert "data.client_column" in refusal({"data": {**csv, "partition": "natural"}})
