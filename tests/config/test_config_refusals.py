"""Configuration: every way of getting it wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_reading import read, refusal

from fedsample.config import Experiment, keys, load, nearest
from fedsample.config.presets import PRESETS
from fedsample.errors import ConfigError


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
