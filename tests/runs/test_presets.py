"""Every preset from one line: it runs, goes on where it stopped, and sends what its row says."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fedsample
from fedsample.config import load
from fedsample.config.presets import PRESETS, table
from fedsample.estimators import Marina, links

pytestmark = pytest.mark.slow

D = 650
SHORT: dict[str, Any] = {"rounds": 40, "warmup": 0, "thin": 1, "chains": 2, "monitor": {"tensorboard": False}}


def evaluate(formula: str, **letters: float) -> float:
    """A formula as printed: "32 K + min(K ceil(log2(d)), d)"; a space between two factors multiplies."""
    python = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula)
    names = {"min": min, "ceil": math.ceil, "log2": math.log2, **letters}
    return float(eval(python, {"__builtins__": {}}, names))


RESUMED = ("langevin-marina", "qlsd-star", "qlsd-plus-plus", "b-elf")  # each link and reference once


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_runs_and_goes_on_where_it_stopped(preset: str, tmp_path: Path) -> None:
    settings = {**SHORT, "preset": preset, "data": {"name": "wine"}}  # digits are of the main job
    if preset == "qlsd-plus-plus":
        settings["uplink"] = {"refresh": 15}
    whole = fedsample.run(settings, out=tmp_path / "whole", progress="quiet")
    draws = torch.as_tensor(whole.draws)
    assert draws.shape == (2, 40, 42)
    assert bool(torch.isfinite(draws).all())
    if preset not in RESUMED:
        return
    half = fedsample.run({**settings, "rounds": 23}, out=tmp_path / "half", progress="quiet")
    config = half.path / "config.toml"
    config.write_text(config.read_text().replace("rounds = 23", "rounds = 40"))
    resumed = fedsample.run(out=half.path, resume=True, progress="quiet")
    assert torch.equal(torch.as_tensor(resumed.draws), draws)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_printed_formulas_are_the_bits_of_the_links(preset: str) -> None:
    experiment, row = load({"preset": preset}, environment={}), PRESETS[preset]
    uplink, downlink = links.build_uplink(experiment), links.build_downlink(experiment)
    p = uplink.sync_probability(2, D) if isinstance(uplink, Marina) else 0.0
    packet, dense = uplink.bits(1, 0, D, torch.float32), uplink.bits(1, 1, D, torch.float32)
    back = downlink.bits(torch.ones(1, dtype=torch.int64), 1, D, torch.float32)
    section = experiment.uplink
    for formula, count, k, levels in (
        (row.bits_up, p * dense + (1 - p) * packet, section.k, section.levels),
        (row.bits_down, back, experiment.downlink.k, experiment.downlink.levels),
    ):
        kept = max(1, round(k * D)) if isinstance(k, float) else k
        want = evaluate(formula, d=D, K=kept, s=levels, p=p)
        assert want <= count < want + 8, formula  # padded to bytes


def test_the_table_says_what_is_asked_of_it() -> None:
    for row in table():
        assert all(row.values()), row["name"]
        assert "order" in row["guarantee"] or row["name"] == "federated-gd"
        assert row["bits per chain and round"].endswith("down")


def test_a_run_bills_what_the_formulas_say(tmp_path: Path) -> None:
    run = fedsample.run({**SHORT, "preset": "b-elf", "rounds": 10}, out=tmp_path / "run", progress="quiet")
    increment = 32 * 32 + min(32 * 10, D)
    dense = 32 * D
    observed = 2 * 64  # the potentials of the last round
    setup = run.summary["preparation_uplink_bytes_per_client"]
    assert 8 * (run.summary["uplink_bytes_per_client"] - setup) == 2 * (dense + 9 * increment) + observed
