"""Configuration: precedence, round trip, and every way of getting it wrong."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fedsample
from fedsample.config import Experiment, FleetConfig, dump_toml, keys, load, nearest, template, trace, variable
from fedsample.config.presets import DEFAULT, PRESETS, table
from fedsample.errors import ConfigError


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, type]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value, type(value)


def same(one: Experiment, other: Experiment) -> bool:
    """Equal in value and in type: 1 and 1.0 are different cohorts."""
    return list(leaves(one.model_dump())) == list(leaves(other.model_dump()))


def read(source: Any = None, *overrides: str, **environment: str) -> Experiment:
    return load(source, overrides, environment)


def refusal(source: Any = None, *overrides: str, **environment: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(source, *overrides, **environment)
    assert caught.value.exit_code == 2
    return str(caught.value)


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
    assert by_path["sampler.name"].allowed == 'one of "baoab", "langevin"'


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "want"),
    [
        ("uplink.kk", "uplink.k"),
        ("uplnk.k", "uplink"),
        ("compressor", "uplink.compressor"),
        ("fleet.particpation", "fleet.participation"),
        ("sede", "seed"),
        ("stepsize", "step_size"),
        ("data.test_size", "data.test_fraction"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, want: str) -> None:
    shown = key.split(".")[0] if key == "uplnk.k" else key
    assert refusal(None, f"{key}=3").startswith(f"{shown}: unknown key; the nearest known key is {want} (set by --set")


def test_nearest_always_names_something() -> None:
    assert nearest("zzzz") in {key.path for key in keys()}


def test_an_unknown_variable_names_the_nearest() -> None:
    assert "the nearest known one is FEDSAMPLE_UPLINK__K" in refusal(None, FEDSAMPLE_UPLINK_K="3")
    assert "FEDSAMPLE_SED: unknown" in refusal(None, FEDSAMPLE_SED="3")


def test_an_unknown_preset_names_the_nearest_and_all() -> None:
    text = refusal({"preset": "langevin-marna"})
    assert 'the nearest is "langevin-marina"' in text
    assert all(name in text for name in PRESETS)
    assert 'the nearest is "qlsd"' in refusal({"preset": "QLSD"})
    assert 'the nearest is "qlsd-plus-plus"' in refusal({"preset": "qlsd_plus_plus"})
    assert 'got "zzzzz"; there are underdamped-diana' in refusal({"preset": "zzzzz"})


WRONG = [
    ("batch_size=100000000000000000000", "batch_size: got 100000000000000000000; expected at most 9223372036854775807"),
    ("model.prior_scale=1e300", "model.prior_scale: got 1e+300; expected from 1e-18 to 1e+18, because its square is"),
    ("model.prior_scale=1e-300", "model.prior_scale: got 1e-300; expected from 1e-18 to 1e+18"),
    ("model.noise_scale=1e-200", "model.noise_scale: got 1e-200; expected from 1e-18 to 1e+18"),
    ("rounds=-5", "rounds: got -5; expected a whole number >= 1"),
    ("rounds=100.0", "rounds: got 100.0; expected a whole number >= 1"),
    ("chains=0", "chains: got 0;"),
    ("chains=true", "chains: got true; expected a whole number >= 1"),
    ("thin=0", "thin: got 0;"),
    ("warmup=-1", "warmup: got -1;"),
    ("seed=-1", "seed: got -1;"),
    ("seed=9223372036854775808", "seed: got 9223372036854775808;"),
    ("temperature=-0.1", "temperature: got -0.1; expected a number >= 0"),
    ("temperature=nan", "temperature: got nan;"),
    ("temperature=inf", "temperature: got inf;"),
    ("temperature=true", "temperature: got true; expected a number >= 0"),
    ("step_size=-0.1", 'step_size: got -0.1; expected a number > 0 or "auto"'),
    ("step_size=0", "step_size: got 0;"),
    ("step_size=.5", "write it without quotes and as TOML does: 0.5"),
    ("step_size=fast", 'step_size: got "fast"; expected a number > 0 or "auto"'),
    ("batch_size=0", 'batch_size: got 0; expected a whole number >= 1 or "all"'),
    ("dtype=float16", 'dtype: got "float16"; expected one of "float32", "float64"'),
    ("sampler.name=baoba", 'did you mean "baoab"?'),
    ("sampler.friction=0", "sampler.friction: got 0;"),
    ("metric.name=fisher", "metric.name: got"),
    ("uplink.k=0", "uplink.k: got 0;"),
    ("uplink.k=1.5", "uplink.k: got 1.5;"),
    ("uplink.k=0.0", "uplink.k: got 0.0;"),
    ("uplink.k=true", "uplink.k: got true;"),
    ("uplink.p=0", "uplink.p: got 0;"),
    ("uplink.p=1.1", "uplink.p: got 1.1;"),
    ("uplink.p=0.1", "uplink.p: only marina has full rounds"),
    ("uplink.variance_reduction=mode", 'uplink.variance_reduction: "mode" reduces the variance of minibatches'),
    ("fleet.participation=0", "fleet.participation: got 0;"),
    ("fleet.participation=1.1", "fleet.participation: got 1.1;"),
    ("fleet.participation=11", "fleet.participation: got 11 of 10 clients"),
    ("fleet.loss=1", "fleet.loss: got 1; expected a number >= 0 and < 1"),
    ("fleet.loss=-0.1", "fleet.loss: got -0.1;"),
    ("fleet.dropout=1.0", "fleet.dropout: got 1.0;"),
    ("fleet.dropout_rounds=0.5", "fleet.dropout_rounds: got 0.5;"),
    ("fleet.threads=0", "fleet.threads: got 0;"),
    ("fleet.device=cuda:x", "fleet.device: got"),
    ("fleet.device=gpu", "fleet.device: got"),
    ("fleet.name=ray", '"ray" is not part of this version, "local" runs the same chain'),
    ("data.clients=0", "data.clients: got 0;"),
    ("data.alpha=0", "data.alpha: got 0;"),
    ("data.test_fraction=1", "data.test_fraction: got 1;"),
    ("data.file=a.parquet", 'set data.kind = "parquet"'),
    ("data.kind=npz", 'data.file: missing; data.kind = "npz" needs'),
    ("data.target=y", "data.target: only csv and parquet have it"),
    ("data.name=", "data.name: missing"),
    ("model.hidden=[8, 0]", "model.hidden: got 0; expected a list, each a whole number >= 1"),
    ("model.hidden=8", "model.hidden: got 8;"),
    ("model.prior_scale=0", 'model.prior_scale: got 0; expected a number > 0 or "flat"'),
    ("model.intercept=1", "model.intercept: got 1; expected true or false"),
    ("model.intercept=True", "as TOML does: true"),
    ("data=3", "data: got 3; expected a table of settings"),
    ("seed.x=3", "seed: got {x = 3};"),
    ("warmup=8000", "warmup: 8000 rounds of warm-up leave none of 8000"),
    ("thin=7001", "thin: no draw in 7000 rounds with one every 7001"),
    ("start.scale=-1", "start.scale: got -1;"),
    ("monitor.every=0", "monitor.every: got 0;"),
    ("rounds", "expected section.key=value"),
    ("=3", "expected section.key=value"),
]


@pytest.mark.parametrize(("override", "want"), WRONG)
def test_a_wrong_value_is_named_with_what_is_allowed(override: str, want: str) -> None:
    text = refusal(None, override)
    assert want in text
    assert "pydantic" not in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "override",
    [
        "warmup=7995",
        "thin=7000",
        "fleet.participation=10",
        "temperature=0",
        "fleet.loss=0",
        "uplink.k=1.0",
        "start.scale=0",
    ],
)
def test_the_edge_of_a_range_is_allowed(override: str) -> None:
    assert read(None, override)


def test_a_flat_prior_cannot_be_drawn_from() -> None:
    assert "start.at: a flat prior" in refusal(None, "start.at=prior", "model.prior_scale=flat")


def test_a_cohort_is_not_checked_against_clients_that_only_the_file_knows() -> None:
    data = {"kind": "csv", "file": "/a.csv", "target": "y", "client_column": "c"}
    assert read({"data": data, "fleet": {"participation": 50}}).fleet.participation == 50


def test_all_that_is_wrong_is_said_at_once_and_by_whom(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('rounds = -5\nsampel = 3\n[uplink]\nname = "marna"\n')
    text = refusal(file, "seed=x", FEDSAMPLE_FLEET__LOSS="2")
    assert text.startswith("5 settings cannot be used:\n")
    assert f"rounds: got -5; expected a whole number >= 1 (set by {file})" in text
    assert f"sampel: unknown key; the nearest known key is sampler (set by {file})" in text or "sampel: unknown" in text
    assert f'did you mean "marina"? (set by {file})' in text
    assert "(set by --set seed=x)" in text
    assert "(set by FEDSAMPLE_FLEET__LOSS)" in text
    both = refusal({"rounds": 500, "data": {"kind": "csv"}})
    assert both.startswith("3 settings cannot be used:\n")


def test_a_class_called_directly_raises_our_error() -> None:
    with pytest.raises(ConfigError, match=r"uplink\.k: got -1"):
        Experiment(uplink={"k": -1})
    with pytest.raises(ConfigError, match="warm-up"):
        Experiment(rounds=10)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    assert "no such configuration file" in refusal(tmp_path / "none.toml")
    assert "--preset langevin-marina" in refusal("langevin-marina")
    assert "is a directory" in refusal(tmp_path)
    (tmp_path / "bad.toml").write_text("rounds = \n")
    assert "is not TOML" in refusal(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert "is not TOML" in refusal(tmp_path / "binary.toml")
    assert "save it as UTF-8" in refusal(tmp_path / "binary.toml")
    assert "expected a dict" in refusal(3)
    assert "data: got 3" in refusal({"data": 3})
    assert "1: unknown key" in refusal({1: 2})


def test_a_file_that_begins_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "windows.toml").write_bytes(b"\xef\xbb\xbfseed = 3\r\n")
    assert load(tmp_path / "windows.toml").seed == 3


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
