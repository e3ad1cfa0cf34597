"""Stationary laws of production code against exact second moments, with the mutants that must miss them.

What proves what, of every case of `CASES`:

| what | proof |
|---|---|
| one round leaves the law as it is, to rounding | `test_law`: production code over all outcomes (`one_round`) |
| a round's map, from any point: first rounds, pending packets | `test_enumeration`, over all outcomes |
| the law is the published one | `test_the_simulated_law_is_the_published_one`, `test_moments` |
| one client at a time has the same law | `test_the_verdict_does_not_depend_on_the_fleet`, over all outcomes |
| keys draw noise, masks, coins, cohorts, losses as assumed | `test_random`, `test_compressors`, and |
| anew for each client and round, so that chains get there | `test_the_law_is_reached`: `SAMPLED` cases, end to end |
| and anew for each chain | `test_independence` |

Each sampler is sampled with each link family, and each source of randomness is sampled. A sampled case is decisive by
construction: the Monte-Carlo error is less than a fifth of the distance from the method's exact variance to the
target's, and to that of the same sampler with exact gradients. Every mutant breaks one line of production code. It must
fail the exact check; those that spoil what a script replaces, `UNSEEN_BY_A_SCRIPT`, must land at least eight errors
from the exact variance, where the sampled check allows four.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from moment_maps import Chain, doubt
from one_round import after_a_round, check, variance
from simulation import Setup, simulate

from fedsample.compression import LinkKeys, Packet, PacketKeys, RandK, Scaled
from fedsample.estimators import Dense, Diana, Direct, Ef21, Ef21P, Marina, Memory, Oracle, Turn, Upload
from fedsample.protocol.exchange import Aggregate, Request
from fedsample.strategies import Driver, State
from fedsample.strategies.baoab import baoab_step
from fedsample.strategies.langevin import langevin_step
from fedsample.strategies.noise import Noise
from fedsample.strategies.sghmc import sghmc_step
from fedsample.targets import Quadratic

pytestmark = pytest.mark.law

ALLOWED, DECISIVE, CAUGHT = 4.0, 5.0, 8.0
lawful = lru_cache(simulate)
round_of = lru_cache(after_a_round)


def crossed(seed: int = 2) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Hessians (3, 3, 3) of three clients that do not commute."""
    root = np.random.default_rng(seed).normal(size=(3, 3, 3))
    hessians = root @ root.transpose(0, 2, 1) + 0.6 * np.eye(3)
    return tuple(tuple(tuple(row) for row in matrix) for matrix in hessians.tolist())


EQUAL = (0.25,) * 4  # four clients in mean form: F_i = 4 U_i has curvature 1
CASES = [
    Setup("langevin", "dense", 0.05),
    Setup("langevin", "dense", 0.2),
    Setup("langevin", "marina", 0.02),
    Setup("langevin", "marina", 0.03),
    Setup("langevin", "diana", 0.02),
    Setup("langevin", "diana", 0.03),
    Setup("baoab", "dense", 0.1),
    Setup("baoab", "dense", 0.3),
    Setup("baoab", "marina", 0.08),
    Setup("baoab", "marina", 0.12),
    Setup("baoab", "diana", 0.08),
    Setup("baoab", "diana", 0.1),
    Setup("sghmc", "dense", 0.1),
    Setup("sghmc", "dense", 0.3),
    Setup("sghmc", "marina", 0.08),
    Setup("sghmc", "diana", 0.1),
    Setup("sghmc", "direct", 0.08, anchored=True, temperature=0.5, prior=0.5),
    Setup("sghmc", "ef21", 0.05),
    Setup("sghmc", "diana", 0.06, hessians=crossed()),
    Setup("sghmc", "diana", 0.08, participation=0.6, loss=0.2),
    Setup("sghmc", "dense", 0.05, downlink=True),
    # blocks have the coordinatewise law of subsets
    Setup("langevin", "diana", 0.04, compressor="randblock", k=2),
    Setup("langevin", "marina", 0.03, compressor="randblock", k=2),
    # client sampling: independent coins, then cohorts of two
    Setup("langevin", "dense", 0.01, participation=0.6),
    Setup("langevin", "dense", 0.02, participation=0.6),
    Setup("langevin", "marina", 0.01, participation=0.6),
    Setup("langevin", "marina", 0.02, participation=0.6),
    Setup("langevin", "diana", 0.01, participation=0.6),
    Setup("langevin", "diana", 0.02, participation=0.6),
    Setup("langevin", "marina", 0.02, participation=0.6, k=4, sync=0.1),
    Setup("langevin", "marina", 0.02, participation=2),
    Setup("langevin", "diana", 0.02, participation=2),
    Setup("baoab", "diana", 0.08, participation=0.6),
    # lost replies
    Setup("langevin", "diana", 0.02, loss=0.01),
    Setup("langevin", "diana", 0.03, loss=0.01),
    Setup("langevin", "diana", 0.02, loss=0.2, participation=0.6),
    # another temperature, and a prior
    Setup("langevin", "diana", 0.02, temperature=2.0, prior=0.5),
    Setup("baoab", "marina", 0.1, temperature=0.5, prior=0.5),
    # Hessians that do not commute
    Setup("langevin", "diana", 0.02, hessians=crossed()),
    Setup("langevin", "marina", 0.02, hessians=crossed()),
    Setup("baoab", "diana", 0.06, hessians=crossed()),
    # no memory: QLSD, and QLSD* about the mode, where the clients' gradients sum to zero, or with a prior do not
    Setup("langevin", "direct", 0.01),
    Setup("langevin", "direct", 0.02),
    Setup("langevin", "direct", 0.02, anchored=True),
    Setup("langevin", "direct", 0.04, anchored=True),
    Setup("langevin", "direct", 0.03, anchored=True, prior=5.0),
    Setup("baoab", "direct", 0.05),
    Setup("baoab", "direct", 0.1),
    Setup("baoab", "direct", 0.08, anchored=True),
    Setup("baoab", "direct", 0.1, anchored=True),
    Setup("langevin", "direct", 0.01, participation=0.6),
    Setup("langevin", "direct", 0.01, participation=2, loss=0.2),
    Setup("langevin", "direct", 0.02, anchored=True, hessians=crossed()),
    # error feedback up (D-ELF), down (P-ELF), both ways (B-ELF)
    Setup("langevin", "ef21", 0.05, curvatures=EQUAL, warmup=200),
    Setup("langevin", "ef21", 0.1, curvatures=EQUAL),
    Setup("langevin", "dense", 0.05, downlink=True, curvatures=EQUAL, warmup=200),
    Setup("langevin", "dense", 0.1, downlink=True, curvatures=EQUAL),
    Setup("langevin", "ef21", 0.025, downlink=True, curvatures=EQUAL, warmup=200),
    Setup("langevin", "ef21", 0.05, downlink=True, curvatures=EQUAL, warmup=200),
    Setup("baoab", "ef21", 0.05),
    Setup("baoab", "ef21", 0.08),
    Setup("baoab", "dense", 0.03, downlink=True),
    Setup("baoab", "dense", 0.05, downlink=True),
    Setup("langevin", "ef21", 0.01, participation=0.6),
    Setup("langevin", "ef21", 0.02, participation=2),
    Setup("langevin", "ef21", 0.01, participation=0.6, loss=0.2),
    Setup("langevin", "ef21", 0.01, downlink=True, hessians=crossed()),
    Setup("langevin", "diana", 0.01, downlink=True),
    Setup("langevin", "marina", 0.01, downlink=True),
    # clients ten times further apart
    Setup("langevin", "direct", 0.02, spread=10.0),
    Setup("langevin", "direct", 0.02, spread=10.0, anchored=True),
    Setup("langevin", "diana", 0.03, spread=10.0),
]

SHOWN = ("compressor", "k", "sync", "participation", "loss", "temperature", "prior", "spread", "anchored", "downlink")


def name_of(setup: Setup) -> str:
    standard = Setup(setup.sampler, setup.uplink, setup.step)
    rest = [f"{key}={getattr(setup, key)}" for key in SHOWN if getattr(setup, key) != getattr(standard, key)]
    rest += ["equal"] * (setup.curvatures == EQUAL) + ["crossed"] * (setup.hessians is not None)
    return "-".join([setup.sampler, setup.uplink, f"{setup.step:g}", *rest])


SAMPLED = [
    # each sampler with each link family
    "langevin-dense-0.05",
    "langevin-marina-0.02",
    "langevin-diana-0.02",
    "langevin-direct-0.02",
    "langevin-direct-0.04-anchored=True",
    "langevin-ef21-0.1-equal",
    "langevin-dense-0.1-downlink=True-equal",
    "langevin-ef21-0.05-downlink=True-equal",
    "baoab-dense-0.1",
    "baoab-marina-0.12",
    "baoab-diana-0.1",
    "sghmc-dense-0.3",
    "sghmc-diana-0.1",
    "baoab-direct-0.1",
    "baoab-direct-0.1-anchored=True",
    "baoab-ef21-0.08",
    "baoab-dense-0.05-downlink=True",
    # each source of randomness: blocks, masks under Hessians that mix them, clients' coins, cohorts, losses
    "langevin-diana-0.04-compressor=randblock-k=2",
    "langevin-diana-0.02-crossed",
    "langevin-dense-0.02-participation=0.6",
    "langevin-marina-0.02-participation=2",
    "langevin-diana-0.02-participation=0.6-loss=0.2",
    "langevin-ef21-0.01-participation=0.6-loss=0.2",
]
FINE = Setup("baoab", "dense", 0.1)  # whole momenta are nearer to 1 than half the chains could tell
NAMED = {
    name_of(case): replace(case, seed=100 + number, chains=2048 if case == FINE else 1024)
    for number, case in enumerate(CASES)
}


def solves(law: Chain) -> float:
    """How far off a variance is that was solved from a law: a second moment less the square of a mean, both solved."""
    return 3 * doubt(law)


@pytest.mark.parametrize("name", NAMED)
def test_law(name: str) -> None:
    """A round that begins at the law ends there; and the law is that of one coordinate, which is what is published."""
    setup = NAMED[name]
    assert setup.exact.radius < 1
    check(round_of(setup))
    after = round_of(setup)
    assert variance(after) == pytest.approx(setup.variance, abs=solves(after.law) + doubt(setup.exact))


@pytest.mark.parametrize("name", SAMPLED)
def test_the_law_is_reached(name: str) -> None:
    """By chains that begin at the target, with the noise, masks, coins, cohorts and losses that keys draw."""
    setup = NAMED[name]
    result = lawful(setup)
    variance, want = result["variance"], setup.variance
    assert result["mean"].errors_from(0.0) < ALLOWED
    assert variance.errors_from(want) < ALLOWED
    exact_gradients = float(setup.uncompressed.spread().mean())
    if setup.sampler == "langevin" or setup.compressed:
        assert abs(want - setup.truth) > DECISIVE * variance.error
    if setup.compressed:
        assert abs(want - exact_gradients) > DECISIVE * variance.error
    if setup.sampler == "baoab":
        assert result["momenta"].errors_from(float(setup.exact.spread("v").mean())) < ALLOWED
    if setup.sampler == "baoab" and not setup.compressed:
        momenta = float(setup.exact.whole_momenta().mean())
        assert result["whole"].errors_from(momenta) < ALLOWED
        assert 1 - momenta > DECISIVE * result["whole"].error


@pytest.mark.parametrize("name", NAMED)
def test_the_verdict_does_not_depend_on_the_fleet(name: str) -> None:
    """All clients at once and one by one: equal bits of every state, over all outcomes of the round above."""
    setup = NAMED[name]
    together, apart = round_of(setup).states, after_a_round(replace(setup, engine="by-client")).states
    for one, other in zip(together, apart, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[part], other[part]) for part in one)


@pytest.mark.parametrize(
    "setup", [case for case in CASES if case.sampler == "baoab" and not case.compressed], ids=name_of
)
def test_baoab_with_exact_gradients(setup: Setup) -> None:
    """Positions have the target's variance at any stable step; whole momenta have 1 - h^2 lam / 4."""
    momenta = 1 - setup.step**2 * 5 / 4
    unsure = 25 * doubt(setup.exact)
    assert setup.variance == pytest.approx(0.2, abs=doubt(setup.exact))
    assert float(setup.exact.whole_momenta().mean()) == pytest.approx(momenta, abs=unsure)
    after = round_of(NAMED[name_of(setup)])
    assert float(after.law.whole_momenta(after.moments).mean()) == pytest.approx(momenta, abs=2 * unsure)


PRINTED = {
    "langevin-direct-0.02": 0.283978,
    "langevin-direct-0.02-anchored=True": 0.220994,
    "langevin-diana-0.02": 0.218053,
    "langevin-ef21-0.05-equal": 1.183521,
    "langevin-ef21-0.1-equal": 1.385827,
    "langevin-dense-0.05-downlink=True-equal": 1.212121,
    "langevin-dense-0.1-downlink=True-equal": 1.538462,
    "langevin-ef21-0.025-downlink=True-equal": 1.179210,
    "langevin-ef21-0.05-downlink=True-equal": 1.399479,
}


@pytest.mark.parametrize("name", PRINTED)
def test_the_simulated_law_is_the_published_one(name: str) -> None:
    assert NAMED[name].variance == pytest.approx(PRINTED[name], abs=5.1e-7)


@pytest.mark.parametrize(("uplink", "step", "anchored"), [("direct", 0.02, True), ("diana", 0.03, False)])
def test_disagreement_leaves_the_law_alone(uplink: str, step: float, anchored: bool) -> None:
    """Clients ten times further apart have the law of near ones; without reference or memory they do not."""
    near = Setup("langevin", uplink, step, anchored=anchored)
    far = NAMED[name_of(replace(near, spread=10.0))]
    after = round_of(far)
    assert variance(after) == pytest.approx(near.variance, abs=solves(after.law) + doubt(near.exact))
    bare = NAMED["langevin-direct-0.02-spread=10.0"]
    assert variance(round_of(bare)) > 20 * NAMED["langevin-direct-0.02"].variance


# --- mutants ------------------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def half_the_noise(patch: Patch) -> None:
    draw = Noise.at
    patch.setattr(Noise, "at", lambda self, round, like: 0.5 * draw(self, round, like))


def no_square_root_of_two(patch: Patch) -> None:
    patch.setattr(
        "fedsample.strategies.langevin.langevin_step", lambda x, g, xi, h, t: langevin_step(x, g, xi, h, t / 2)
    )


def temperature_ignored(patch: Patch) -> None:
    for name, step in (("langevin", langevin_step), ("baoab", baoab_step), ("sghmc", sghmc_step)):
        patch.setattr(
            f"fedsample.strategies.{name}.{name}_step",
            lambda *given, step=step, **named: step(*given[:-1], 1.0, **named),
        )


def uphill(patch: Patch) -> None:
    patch.setattr("fedsample.strategies.langevin.langevin_step", lambda x, g, *rest: langevin_step(x, -g, *rest))


def half_kicks(patch: Patch) -> None:
    """The closing half kick of the step before is forgotten."""
    patch.setattr("fedsample.strategies.baoab.baoab_step", lambda *given, first: baoab_step(*given, first=True))


def friction_dropped(patch: Patch) -> None:
    patch.setattr(
        "fedsample.strategies.sghmc.sghmc_step", lambda x, v, g, xi, h, c, t: sghmc_step(x, v, g, xi, h, 0.5 * c, t)
    )


def moved_by_the_old_momenta(patch: Patch) -> None:
    """Forward Euler, which heats, in place of the symplectic step."""

    def step(x: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return x + rest[2] * v, sghmc_step(x, v, *rest)[1]

    patch.setattr("fedsample.strategies.sghmc.sghmc_step", step)


def memory_dropped(patch: Patch) -> None:
    patch.setattr(Diana, "rate", lambda self, d: 0.0)


def memory_committed_at_once(patch: Patch) -> None:
    encode = Diana.encode

    def hasty(self: Diana, oracle: Oracle, memory: Memory, turn: Turn) -> tuple[Upload, Memory]:
        upload, memory = encode(self, oracle, memory, turn)
        assert upload.packet is not None
        self.compressor.add_to(memory["shift"], upload.packet, self.rate(memory["shift"].shape[-1]))
        return upload, {**memory, "pending": 0 * memory["pending"]}

    patch.setattr(Diana, "encode", hasty)


def stale_marina(patch: Patch) -> None:
    """A client takes the difference to the gradient of the round in which it was last asked for this chain."""
    encode = Marina.encode

    def stale(self: Marina, oracle: Oracle, memory: Memory, turn: Turn) -> tuple[Upload, Memory]:
        pretended = {**memory, "round": torch.full_like(memory["round"], turn.round - 1)}
        upload, fresh = encode(self, oracle, pretended, turn)
        if turn.active is not None:
            fresh["gradient"] = torch.where(turn.active.unsqueeze(-1), fresh["gradient"], memory["gradient"])
        return upload, fresh

    patch.setattr(Marina, "encode", stale)


def one_mask_for_all_clients(patch: Patch) -> None:
    patch.setattr(
        "fedsample.clients.client_stack.LinkKeys", lambda seed, clients, *rest: LinkKeys(seed, 0 * clients, *rest)
    )


def compression_off(patch: Patch) -> None:
    """Every coordinate travels, unscaled, whatever the configuration says; bits are counted as if K did."""

    def everything(self: RandK, vector: torch.Tensor, keys: PacketKeys) -> Packet:
        return Packet(vector, torch.arange(vector.shape[-1]).expand(vector.shape))

    patch.setattr(RandK, "compress", everything)
    patch.setattr(Diana, "rate", lambda self, d: 1.0)


def masks_unscaled(patch: Patch) -> None:
    compress = RandK.compress

    def bare(self: RandK, vector: torch.Tensor, keys: PacketKeys) -> Packet:
        packet = compress(self, vector, keys)
        return packet._replace(values=packet.values * (self.count(vector.shape[-1]) / vector.shape[-1]))

    patch.setattr(RandK, "compress", bare)


def averaged(patch: Patch) -> None:
    """The mean of the clients' gradients in place of their sum."""
    for uplink in (Dense, Diana, Marina, Direct, Ef21):
        decode = uplink.decode

        def mean(self, state, total, sync, pi, decode=decode):  # type: ignore[no-untyped-def]
            estimate, state = decode(self, state, total, sync, pi)
            return estimate / 4, state

        patch.setattr(uplink, "decode", mean)


def absence_unscaled(patch: Patch) -> None:
    for uplink in (Dense, Diana, Marina, Direct):
        decode = uplink.decode
        patch.setattr(
            uplink, "decode", lambda self, state, total, sync, pi, decode=decode: decode(self, state, total, sync, 1.0)
        )


def feedback_scaled_for_absence(patch: Patch) -> None:
    decode = Ef21.decode
    patch.setattr(Ef21, "decode", lambda self, state, total, sync, pi: decode(self, state, total / pi, sync, pi))


def feedback_dropped(patch: Patch) -> None:
    """What a client sends never enters its own memory."""
    patch.setattr("fedsample.estimators.ef21.settle", lambda compressor, memory, turn, rate: memory["shift"])


def feedback_committed_at_once(patch: Patch) -> None:
    encode = Ef21.encode

    def hasty(self: Ef21, oracle: Oracle, memory: Memory, turn: Turn) -> tuple[Upload, Memory]:
        upload, memory = encode(self, oracle, memory, turn)
        if upload.packet is not None:
            self.compressor.add_to(memory["shift"], upload.packet, 1.0)
        return upload, {**memory, "pending": 0 * memory["pending"]}

    patch.setattr(Ef21, "encode", hasty)


def contraction_unscaled(patch: Patch) -> None:
    """Error feedback around masks scaled by d / K."""
    patch.setattr(Scaled, "alpha", lambda self, d: 1.0)


def increments_forgotten(patch: Patch) -> None:
    """Clients see the last increment alone."""
    see = Ef21P.see
    patch.setattr(Ef21P, "see", lambda self, seen, params, round: (see(self, seen, params, round)[0] - seen, None))


def increments_of_the_iterate(patch: Patch) -> None:
    """The compressed increment of the iterate: what a mask drops is lost for good."""
    update, see = Driver.update, Ef21P.see

    def blind(self: Driver, state: State, request: Request, aggregate: Aggregate) -> State:
        before = state.params
        patch.setattr(Ef21P, "see", lambda link, seen, params, round: see(link, seen, seen + params - before, round))
        return update(self, state, request, aggregate)

    patch.setattr(Driver, "update", blind)


def everything_goes_down(patch: Patch) -> None:
    """Increments are sent whole; bits are counted as if K values were."""
    patch.setattr(Ef21P, "see", lambda self, seen, params, round: (params, None))


def anchor_omitted(patch: Patch) -> None:
    """The clients subtract what the server does not add."""
    patch.setattr(Direct, "anchor", lambda self, state, total: state)


def anchor_added_twice(patch: Patch) -> None:
    anchor = Direct.anchor
    patch.setattr(Direct, "anchor", lambda self, state, total: anchor(self, state, 2 * total))


def anchor_not_subtracted(patch: Patch) -> None:
    patch.setattr("fedsample.clients.client_stack._TurnOracle.anchor", lambda self: 0.0)


def prior_from_every_client(patch: Patch) -> None:
    gradient = Quadratic.gradient
    patch.setattr(
        Quadratic, "gradient", lambda self, theta, **rest: gradient(self, theta, **rest) + 0.5 * theta / self.n
    )


MUTANTS: list[tuple[Callable[[Patch], None], str]] = [
    (half_the_noise, "langevin-dense-0.05"),
    (half_the_noise, "baoab-dense-0.1"),
    (no_square_root_of_two, "langevin-diana-0.02"),
    (temperature_ignored, "langevin-diana-0.02-temperature=2.0-prior=0.5"),
    (temperature_ignored, "baoab-marina-0.1-temperature=0.5-prior=0.5"),
    (uphill, "langevin-dense-0.05"),
    (half_kicks, "baoab-dense-0.3"),
    (half_the_noise, "sghmc-dense-0.3"),
    (friction_dropped, "sghmc-diana-0.1"),
    (temperature_ignored, "sghmc-direct-0.08-temperature=0.5-prior=0.5-anchored=True"),
    (everything_goes_down, "sghmc-dense-0.05-downlink=True"),
    (moved_by_the_old_momenta, "sghmc-dense-0.3"),
    (compression_off, "sghmc-diana-0.1"),
    (memory_dropped, "sghmc-diana-0.06-crossed"),
    (memory_dropped, "langevin-diana-0.02"),
    (memory_dropped, "baoab-diana-0.1"),
    (memory_committed_at_once, "langevin-diana-0.02-participation=0.6-loss=0.2"),
    (memory_committed_at_once, "langevin-diana-0.03-loss=0.01"),
    (stale_marina, "langevin-marina-0.02-k=4-sync=0.1-participation=0.6"),
    (one_mask_for_all_clients, "langevin-diana-0.02"),
    (one_mask_for_all_clients, "langevin-marina-0.02"),
    (one_mask_for_all_clients, "baoab-marina-0.12"),
    (compression_off, "langevin-diana-0.03"),
    (compression_off, "langevin-marina-0.03"),
    (compression_off, "baoab-diana-0.1"),
    (compression_off, "baoab-marina-0.12"),
    (masks_unscaled, "langevin-marina-0.03"),
    (averaged, "langevin-dense-0.05"),
    (averaged, "langevin-diana-0.02"),
    (averaged, "langevin-marina-0.02"),
    (absence_unscaled, "langevin-dense-0.02-participation=0.6"),
    (absence_unscaled, "langevin-marina-0.02-k=4-sync=0.1-participation=0.6"),
    (absence_unscaled, "langevin-diana-0.02-participation=0.6"),
    (prior_from_every_client, "langevin-diana-0.02-temperature=2.0-prior=0.5"),
    *((mutate, "langevin-direct-0.02") for mutate in (masks_unscaled, one_mask_for_all_clients, compression_off)),
    (averaged, "langevin-direct-0.02"),
    (absence_unscaled, "langevin-direct-0.01-participation=0.6"),
    (anchor_omitted, "langevin-direct-0.03-prior=5.0-anchored=True"),
    (anchor_added_twice, "langevin-direct-0.03-prior=5.0-anchored=True"),
    (anchor_not_subtracted, "langevin-direct-0.02-anchored=True"),
    (anchor_not_subtracted, "baoab-direct-0.1-anchored=True"),
    (feedback_dropped, "langevin-ef21-0.1-equal"),
    (contraction_unscaled, "langevin-ef21-0.1-equal"),
    (contraction_unscaled, "langevin-dense-0.1-downlink=True-equal"),
    (averaged, "langevin-ef21-0.1-equal"),
    (one_mask_for_all_clients, "baoab-ef21-0.08"),
    (feedback_scaled_for_absence, "langevin-ef21-0.01-participation=0.6"),
    (feedback_scaled_for_absence, "langevin-ef21-0.02-participation=2"),
    (feedback_committed_at_once, "langevin-ef21-0.01-participation=0.6-loss=0.2"),
    *(
        (mutate, "langevin-dense-0.1-downlink=True-equal")
        for mutate in (increments_forgotten, increments_of_the_iterate, everything_goes_down)
    ),
    (everything_goes_down, "langevin-ef21-0.05-downlink=True-equal"),
]


UNSEEN_BY_A_SCRIPT = (half_the_noise, one_mask_for_all_clients)  # they spoil the draws that it replaces


@pytest.mark.parametrize(("mutate", "name"), MUTANTS)
def test_a_mutant_misses_the_law(monkeypatch: Patch, mutate: Callable[[Patch], None], name: str) -> None:
    setup = NAMED[name]
    if mutate not in UNSEEN_BY_A_SCRIPT:
        mutate(monkeypatch)
        with pytest.raises(AssertionError):
            check(after_a_round(setup))
        return
    assert name in SAMPLED
    error = lawful(setup)["variance"].error
    mutate(monkeypatch)
    missed = simulate(setup)["variance"]
    assert missed.errors_from(setup.variance) > CAUGHT
    assert missed._replace(error=error).errors_from(setup.variance) > CAUGHT
