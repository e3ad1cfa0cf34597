"""Uplink estimators: what is sound, and what is refused."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import pytest
from uplink_turns import D

from fedsample.compression import Compressor, Identity, RandBlock, RandK
from fedsample.errors import ConfigError, UnsoundError
from fedsample.estimators import Dense, Diana, Marina, build, check, table


class Top(RandK):
    """A stand-in for a contractive compressor."""

    name: ClassVar[str] = "top"
    kind: ClassVar[Literal["unbiased", "contractive"]] = "contractive"


@pytest.mark.parametrize("compressor", [RandK(3), RandBlock(3)])
def test_dense_refuses_to_compress(compressor: Compressor) -> None:
    with pytest.raises(UnsoundError, match=rf"dense around {compressor.name}: .*use uplink diana .*identity"):
        build("dense", compressor)


@pytest.mark.parametrize("name", ["marina", "diana"])
def test_estimators_refuse_a_biased_compressor(name: str) -> None:
    with pytest.raises(UnsoundError, match=rf"{name} around top: .*unbiased.*use randk or randblock"):
        check(name, Top(3))
    with pytest.raises(UnsoundError):
        build(name, Top(3))
    for compressor in (RandK(3), RandBlock(3), Identity()):
        check(name, compressor)


def test_build_makes_what_was_asked_for_or_says_why_not() -> None:
    assert isinstance(build("dense", Identity()), Dense)
    assert isinstance(build("diana", RandK(2)), Diana)
    marina = build("marina", RandK(2), 0.5)
    assert isinstance(marina, Marina)
    assert marina.probability(D) == 0.5
    with pytest.raises(ConfigError, match="'sgd' is not known; choose one of dense, direct, marina, diana, ef21"):
        build("sgd", RandK(2))
    for name, compressor in (("diana", RandK(2)), ("dense", Identity())):
        with pytest.raises(ConfigError, match=rf"uplink.p = 0.5 is marina's .*{name} has none: leave it out"):
            build(name, compressor, 0.5)
    for p in (0.0, -0.1, 1.5, math.nan):
        with pytest.raises(ConfigError, match=rf"uplink.p = {p}: .*must lie in \(0, 1\]"):
            build("marina", RandK(2), p)
    assert isinstance(build("marina", RandK(2), 1.0), Marina)


def test_the_table_lists_every_estimator() -> None:
    rows = table()
    assert [each["name"] for each in rows] == ["dense", "direct", "marina", "diana", "ef21", "ef21-p"]
    assert all(each["reference"] and each["wire"] for each in rows)
    for each in rows:
        if each["link"] == "downlink":
            continue
        built = build(each["name"], Identity())
        assert (built.name, built.summary, built.reference) == (each["name"], each["wire"], each["reference"])
