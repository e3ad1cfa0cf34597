"""Links: which of them are sound together, and what is refused."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from link_rigs import CLIENTS, D, Rig

from fedsample import compression
from fedsample.compression import Compressor
from fedsample.config import load
from fedsample.errors import ConfigError, RunDirectoryError, UnsoundError
from fedsample.estimators import build_downlink, check
from fedsample.estimators.soundness import RULES
from fedsample.runs.checks import check as check_experiment
from fedsample.runs.plan import plan

NAMES = ["identity", "randk", "randblock", "topk", "qsgd", "natural", "sign", "permk", "lowrank", "bf16"]
NAMES += ["randk+natural", "topk+bf16", "permk+natural", "scaled-randk", "scaled-permk", "scaled-qsgd"]
BLOCKS = [torch.arange(D).view(3, 4)]


def compressor_of(name: str) -> Compressor:
    return compression.build(name, 3, clients=CLIENTS, blocks=BLOCKS)


def choices(text: str, link: str, name: str) -> list[tuple[str, str, bool]]:
    """(link, compressor, everyone present) that a refusal recommends."""
    advice = text.split("; use ")[-1]
    found = [(other, name, False) for other in re.findall(r"(?:up|down)link (\S+) with this compressor", advice)]
    found += [("ef21-p", "scaled-" + name, False)] if f"ef21-p with scaled-{name}" in advice else []
    found += [(link, name, True)] if "fleet.participation = 1.0" in advice else []
    own = advice.split(" with ")[0] if "ef21-p" in advice else advice
    words = re.findall(r"\b(?:scaled-)?(?:randk|randblock|topk|qsgd|identity)\b(?![+-])", own)
    words += re.findall(r"this one: (\S+)", advice)
    return found + [(link, word, False) for word in words]


@pytest.mark.parametrize(("link", "name", "everyone"), list(itertools.product(RULES, NAMES, (True, False))))
def test_what_stands_outside_the_table_is_refused_with_a_choice_that_is_accepted(
    link: str, name: str, everyone: bool
) -> None:
    compressor, rule = compressor_of(name), RULES[link]
    sound = name == "identity" or compressor.kind == rule.needs
    if compressor.everyone:
        sound = sound and everyone and link != "ef21-p"
    if sound:
        check(link, compressor, everyone=everyone)
        return
    with pytest.raises(UnsoundError) as caught:
        check(link, compressor, everyone=everyone)
    text = str(caught.value)
    assert f"link {link} around {name}: " in text
    found = choices(text, link, name)
    assert found, text
    for other, inner, present in found:
        check(other, compressor_of(inner), everyone=everyone or present)


@pytest.mark.parametrize("name", ["topk", "randk", "sign"])
def test_a_dense_downlink_compresses_nothing(name: str) -> None:
    with pytest.raises(UnsoundError, match=f"downlink dense around {name}: .*use downlink ef21-p"):
        build_downlink("dense", compressor_of(name), 0, 1)
    experiment = load({"preset": "p-elf", "downlink": {"name": "dense"}}, environment={})
    assert experiment.downlink.compressor == "identity"  # a preset's does not go with it
    assert load(experiment) == experiment


BAD = {
    "fraction 0": ({"uplink": {"k": 0.0}}, r"uplink\.k: got 0\.0; expected .*> 0 and <= 1"),
    "fraction above 1": ({"uplink": {"k": 1.5}}, r"uplink\.k: got 1\.5; expected .*> 0 and <= 1"),
    "no coordinates": ({"downlink": {"k": 0}}, r"downlink\.k: got 0; expected a whole number >= 1"),
    "K > d": ({"uplink": {"k": 651}}, r"k = 651 coordinates of 650 parameters; choose 1 <= k <= 650"),
    "K > d down": (
        {"downlink": {"name": "ef21-p", "compressor": "topk", "k": 700}},
        r"topk: k = 700 coordinates of 650 parameters; choose 1 <= k <= 650",
    ),
    "no levels": ({"uplink": {"levels": 0}}, r"uplink\.levels: got 0; expected a whole number >= 1"),
    "too many levels": (
        {"uplink": {"compressor": "qsgd", "levels": 40000}},
        r"levels = 40000; choose .* in 1\.\.32767",
    ),
    "levels that need not contract": (
        {"uplink": {"name": "ef21", "compressor": "topk+qsgd", "levels": 1}},
        r"topk\+qsgd: omega = .* must be below 1.*use more levels, or topk\+scaled-qsgd",
    ),
    "rank above the matrix": (
        {"uplink": {"name": "ef21", "compressor": "lowrank", "rank": 11}},
        r"lowrank: rank = 11 of matrices \(10, 65\).*choose an integer in 1\.\.10",
    ),
    "no rank": ({"uplink": {"rank": 0}}, r"uplink\.rank: got 0; expected a whole number >= 1"),
    "unbiased downlink": (
        {"downlink": {"name": "ef21-p", "compressor": "randk"}},
        r"downlink ef21-p around randk: .*use topk, or .*scaled-randk",
    ),
    "shares of absent clients": (
        {"uplink": {"compressor": "permk"}, "fleet": {"participation": 0.5}},
        r"diana around permk: .*every client must be heard.*fleet\.participation = 1\.0 .*or compressor randk",
    ),
    "shares of lost replies": (
        {"uplink": {"compressor": "permk"}, "fleet": {"loss": 0.1}},
        r"diana around permk: .*without loss and drop-outs",
    ),
    "unknown compressor": ({"uplink": {"compressor": "topq"}}, r"'topq' is not known; choose one of identity, randk"),
}


@pytest.mark.parametrize(("settings", "says"), BAD.values(), ids=BAD)
def test_bad_settings_are_named_with_range_and_remedy(settings: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, UnsoundError), match=says):
        plan({**settings})


def test_what_depends_on_the_data_waits_for_them() -> None:
    """Before the data are read neither the matrices nor the number of clients are known."""
    for settings in (
        {"uplink": {"name": "ef21", "compressor": "lowrank", "rank": 4}},
        {"uplink": {"compressor": "permk"}, "fleet": {"participation": 10}},
    ):
        check_experiment(load(settings, environment={}))
        plan(settings)
    with pytest.raises(UnsoundError, match="permk"):
        plan({"uplink": {"compressor": "permk"}, "fleet": {"participation": 9}})


@pytest.mark.parametrize(
    "other",
    [
        {"name": "ef21", "compressor": "topk", "k": 4},
        {"name": "diana", "compressor": "qsgd"},
        {"name": "marina", "compressor": "randk", "k": 3},
    ],
    ids=str,
)
def test_a_memory_of_another_shape_is_refused(other: dict[str, Any], quadratics: dict[str, Any]) -> None:
    rigs = [
        Rig({"data": quadratics, "metric": {"name": "identity"}, "uplink": uplink})
        for uplink in ({"name": "ef21", "compressor": "topk", "k": 3}, other)
    ]
    rigs[0].draws(2)
    with pytest.raises(
        RunDirectoryError, match=r"memory '\w+' in the checkpoint is .*, expected .*restore config\.toml"
    ):
        rigs[1].fleet.restore(rigs[0].fleet.state())
