"""Links in the loop: every preset on both engines, what both ends know of each other, what a return costs, refusals."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chain_rounding import alone, draws_bound
from rounding import agree, assert_within, gamma
from running_error import RunningError
from torch import Tensor

from fedsample import compression
from fedsample.compression import Compressor, Packet
from fedsample.config import Experiment, load
from fedsample.config.presets import PRESETS
from fedsample.errors import ConfigError, RunDirectoryError, UnsoundError
from fedsample.estimators import Direct, Ef21P, build_downlink, build_links, check
from fedsample.estimators.soundness import RULES
from fedsample.monitor.progress import Progress
from fedsample.preparation.prepare import prepare
from fedsample.problem import build_problem
from fedsample.protocol.exchange import Aggregate, Request
from fedsample.runs.build import build_driver, build_fleet
from fedsample.runs.checks import check as check_experiment
from fedsample.runs.plan import plan
from fedsample.strategies import State
from fedsample.targets import GeneralizedLinear

FLOAT64 = torch.float64
CLIENTS, D, CHAINS = 5, 12, 2
ABSENCES: list[dict[str, Any]] = [
    {"participation": 0.5},
    {"participation": 2},
    {"loss": 0.3},
    {"participation": 0.6, "loss": 0.2, "dropout": 0.1, "dropout_rounds": 3.0},
]


@pytest.fixture
def quadratics(tmp_path: Path) -> dict[str, Any]:
    """Five clients that disagree, in 12 dimensions."""
    rng = np.random.default_rng(2)
    file = tmp_path / "q.npz"
    np.savez(file, lam=rng.uniform(0.3, 2.0, (CLIENTS, D)), a=rng.normal(size=(CLIENTS, D)))
    return {"kind": "quadratic", "file": str(file)}


class Rig:
    """A prepared chain on the local fleet, with what was asked and what came back."""

    def __init__(self, settings: Mapping[str, Any], *, like: Rig | None = None, **more: Any) -> None:
        common = {"rounds": 100, "warmup": 0, "chains": CHAINS, "dtype": "float64", "step_size": 0.02}
        self.experiment: Experiment = load({**common, **settings, **more}, environment={})
        self.problem = build_problem(self.experiment)
        self.links = build_links(self.experiment, self.problem.clients)
        self.fleet = build_fleet(self.experiment, self.problem, self.links)
        progress = Progress(self.experiment.rounds, mode="quiet")
        if like is None:
            self.prepared = prepare(self.experiment, self.problem, self.links, self.fleet, progress)
        else:  # one preparation for two engines, as a run and its devices have
            self.prepared = like.prepared
            self.fleet.set_metric(self.prepared.geometry.metric)
        self.sampler = build_driver(self.experiment, self.problem, self.links, self.prepared, self.fleet.n)
        self.state: State = self.sampler.begin(self.prepared.start)

    def step(self, *, observe: bool = False) -> tuple[State, Request, Aggregate]:
        """One round; the state before it, and what was said."""
        before = self.state
        request = self.sampler.request(before, observe=observe)
        aggregate = self.fleet.exchange(request)
        self.state = self.sampler.update(before, request, aggregate)
        return before, request, aggregate

    def draws(self, rounds: int) -> Tensor:
        found = []
        for _ in range(rounds):
            self.step()
            found.append(self.sampler.draw(self.state))
        return torch.stack(found)

    def asked(self, request: Request) -> Tensor:
        everyone = torch.ones(self.fleet.n, dtype=torch.bool)
        return everyone if request.active is None else request.active.any(-1)


def of_preset(name: str, data: Mapping[str, Any], **fleet: Any) -> dict[str, Any]:
    refresh = {"uplink": {"refresh": 7}} if name == "qlsd-plus-plus" else {}
    return {"preset": name, "data": data, "chains": CHAINS, "fleet": fleet, **refresh}


# --- the engines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absence", [{}, ABSENCES[3]], ids=["everyone", "faults"])
@pytest.mark.parametrize("preset", PRESETS)
def test_both_engines_draw_the_same_on_quadratics(
    preset: str, absence: dict[str, Any], quadratics: dict[str, Any]
) -> None:
    runs = [Rig(of_preset(preset, quadratics, engine=each, **absence)) for each in ("batched", "by-client")]
    one, other = (rig.draws(25) for rig in runs)
    assert torch.equal(one, other)
    a, b = (rig.fleet.state() for rig in runs)
    assert all(torch.equal(a[name], b[name]) for name in a if name in b)


WINE: dict[str, Any] = {"name": "wine", "clients": 4}


def on_wine(preset: str, engine: str, like: Rig | None = None) -> Rig:
    return Rig(of_preset(preset, WINE, engine=engine), step_size="auto", like=like)


@pytest.mark.parametrize(
    "preset", ["underdamped-diana", "langevin-marina", "qlsd-star", "qlsd-plus-plus", "b-elf", "dsgld"]
)
def test_both_engines_draw_the_same_bits_on_data_where_each_client_is_computed_alone(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the products inside a client's gradient tells the engines apart: decisions by value included."""
    alone(monkeypatch)
    one = on_wine(preset, "batched")
    other = on_wine(preset, "by-client", like=one)
    assert torch.equal(one.draws(20), other.draws(20))
    a, b = one.fleet.state(), other.fleet.state()
    assert all(torch.equal(a[name], b[name]) for name in a if name in b)


def posterior_scale(rig: Rig) -> Tensor:
    """(d,) standard deviations of the Laplace approximation at the mode."""
    mode = rig.prepared.geometry.metric.mean
    precision = rig.problem.clients.hessian_sum(mode) + rig.problem.prior.precision * torch.eye(len(mode)).double()
    return torch.linalg.inv(precision).diagonal().sqrt()


@pytest.mark.rounding
@pytest.mark.parametrize("preset", ["underdamped-diana", "langevin-marina", "dsgld"])
def test_both_engines_draw_the_same_on_data_up_to_the_rounding_of_products(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Presets without decisions by value: each gradient's rounding, as far as the chain itself carries it on."""
    prepared = on_wine(preset, "by-client")
    one, other = (on_wine(preset, engine, prepared).draws(20) for engine in ("batched", "by-client"))
    bound = draws_bound(monkeypatch, lambda: on_wine(preset, "by-client", prepared).draws(20))
    assert_within(one, other, bound)
    scale = posterior_scale(prepared)
    assert float((bound / scale).max()) < 1e-7  # of a standard deviation of the posterior, in every coordinate

    def dropped(self: GeneralizedLinear, residual: Any, targets: Any) -> Tensor:
        return whole(self, residual, targets) * (1 + 1e-7)

    whole = GeneralizedLinear._residual
    monkeypatch.setattr(GeneralizedLinear, "_residual", dropped)  # a mutant that is wrong in the eighth digit
    with pytest.raises(AssertionError, match="differ by more than arithmetic does"):
        assert_within(on_wine(preset, "batched", prepared).draws(20), other, bound)


@pytest.mark.rounding
def test_two_preparations_find_one_mode() -> None:
    """An optimiser stops by its tolerance: a last bit may cost it an iteration, so modes agree to that and no better.

    U is mu-convex by its prior N(0, 1 / mu): mu |m - m'| <= |grad U(m) - grad U(m')| (Nesterov 2004, theorem 2.1.10).
    """
    rigs = [on_wine("langevin-diana", engine) for engine in ("batched", "by-client")]
    modes = [rig.prepared.geometry.metric.mean for rig in rigs]
    clients, prior = rigs[1].problem.clients, rigs[1].problem.prior
    with RunningError() as analysis:
        gradients = [clients.gradient(m.unsqueeze(0)).sum(0)[0] + prior.gradient(m) for m in modes]
        own = [analysis.error(each).norm() for each in gradients]
    bound = sum(float(g.norm() + e) for g, e in zip(gradients, own, strict=True)) / prior.precision
    assert float((modes[0] - modes[1]).norm()) <= bound
    assert bound < 1e-4 * float(posterior_scale(rigs[1]).min())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_restored_chain_goes_on_as_before(preset: str, quadratics: dict[str, Any]) -> None:
    """References, what clients see, memories and who knows what are part of the state."""
    absence = {} if preset == "dsgld" else {"participation": 0.6, "loss": 0.1}
    first = Rig(of_preset(preset, quadratics, **absence))
    first.draws(19)
    state = {name: tensor.clone() for name, tensor in first.state.tensors().items()}
    fleet = {name: tensor.clone() for name, tensor in first.fleet.state().items()}
    again = Rig(of_preset(preset, quadratics, **absence))
    again.fleet.restore(fleet)
    again.state = State.of_tensors(state, torch.device("cpu"))
    for _ in range(15):
        traffic = [rig.step()[2].traffic for rig in (first, again)]
        assert traffic[0] == traffic[1]
    for name, tensor in first.state.tensors().items():
        assert torch.equal(tensor, again.state.tensors()[name]), name


# --- ef21 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absence", ABSENCES, ids=str)
@pytest.mark.parametrize("compressor", ["topk", "scaled-randk", "topk+natural", "sign"])
def test_ef21s_memories_are_the_servers_estimate(
    compressor: str, absence: dict[str, Any], quadratics: dict[str, Any]
) -> None:
    uplink = {"name": "ef21", "compressor": compressor, "k": 3}
    rig = Rig({"data": quadratics, "uplink": uplink, "metric": {"name": "identity"}, "fleet": absence})
    size = torch.zeros(CHAINS, D, dtype=FLOAT64)
    for round in range(1, 31):
        _, request, aggregate = rig.step()
        assert (request.sync is not None) == (round == 1)
        if round == 1:  # dense, and waited for: a lost reply is sent again
            assert request.sync is not None
            assert bool(request.sync.all())
            assert bool(aggregate.arrived.all())
            whole = CLIENTS * CHAINS * 64 * D
            assert aggregate.traffic.up >= whole
            assert aggregate.traffic.up % (CHAINS * 64 * D) == 0
            assert absence.get("loss") or aggregate.traffic.up == whole
        memory = rig.fleet.state()
        committed = memory["memory.shift"].clone()
        applied = (memory["memory.round"] == rig.state.applied)[:, None, None]
        pending = Packet(memory["memory.pending"], memory.get("memory.support"), memory.get("memory.side"), D)
        committed += torch.where(applied, rig.fleet.uplink.compressor.decompress(pending, D), 0.0)
        arrived = aggregate.total
        assert arrived is not None
        size = size + arrived.abs() + committed.abs().sum(0)  # no sum of either end exceeds what was added to it
        agree(committed.sum(0), rig.state.uplink["estimate"], round + CLIENTS + 2, size)


# --- ef21-p -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", ["topk", "scaled-randk", "scaled-qsgd", "topk+bf16"])
def test_clients_follow_what_the_server_thinks_they_see(compressor: str, quadratics: dict[str, Any]) -> None:
    """A client that adds the increments, packet after packet and through bytes, holds the points of every request."""
    rig = Rig({"preset": "p-elf", "data": quadratics, "downlink": {"compressor": compressor, "k": 3}})
    downlink = rig.sampler.downlink
    assert isinstance(downlink, Ef21P)
    held = rig.state.params
    for round in range(1, 25):
        _, request, _ = rig.step()
        assert torch.equal(request.points, held)
        keys = downlink._link.at(round + 1)
        packet = downlink.compressor.compress(rig.state.params - held, keys)
        increment = []
        for chain in range(CHAINS):
            one = Packet(*(None if part is None else part[chain] for part in packet[:3]), packet.length)  # type: ignore[arg-type]
            data = downlink.compressor.to_bytes(one)
            assert 8 * len(data) == downlink.compressor.bits(D, FLOAT64)
            parsed = downlink.compressor.parse(data, D, FLOAT64)
            if parsed.indices is None and packet.indices is not None:
                parsed = parsed._replace(indices=packet.indices[chain])  # from the shared key
            increment.append(downlink.compressor.decompress(parsed, D))
        held = held + torch.stack(increment)
        assert torch.equal(held, rig.state.seen)
    assert not torch.equal(rig.state.seen, rig.state.params)


def test_who_returns_is_billed_the_increments_it_missed_or_the_point(quadratics: dict[str, Any]) -> None:
    settings = {"preset": "p-elf", "data": quadratics, "fleet": {"participation": 0.3}}
    rig = Rig(settings, downlink={"compressor": "topk", "k": 2})
    increment, whole = CHAINS * rig.sampler.downlink.compressor.bits(D, FLOAT64), CHAINS * 64 * D  # type: ignore[attr-defined]
    last = dict.fromkeys(range(CLIENTS), 0)
    kinds = set()
    for round in range(1, 60):
        _, request, aggregate = rig.step()
        want = 0
        for i in rig.asked(request).nonzero().flatten().tolist():
            missed = round - last[i]
            cost = min(missed * increment, whole) if last[i] else whole
            kinds.add("never" if not last[i] else "point" if missed * increment > whole else str(missed))
            want, last[i] = want + cost, round
        assert aggregate.traffic.down == want
    assert kinds >= {"never", "1", "2", "point"}


def test_an_increment_that_is_larger_than_the_point_is_not_sent() -> None:
    downlink = build_downlink("ef21-p", compression.build("topk", 1.0), 0, 1)
    assert downlink.bits(torch.tensor([1, 5, 0]), 1, D, FLOAT64) == 3 * 64 * D


# --- variance reduction -----------------------------------------------------------------------------------------------


def test_references_move_and_who_was_away_is_billed_one() -> None:
    data = {"name": "wine", "clients": 4}
    uplink = {"refresh": 5}
    rig = Rig(
        {"preset": "qlsd-plus-plus", "data": data, "uplink": uplink, "batch_size": 4, "fleet": {"participation": 0.4}}
    )
    d = rig.problem.d
    held = [0] * 4
    point, moved, fetched = rig.state.params, 0, 0
    for round in range(1, 41):
        before, request, aggregate = rig.step(observe=round == 17)
        since = (round - 1) // 5 * 5 + 1
        assert request.reference_round == since
        if since == round:
            point, moved = before.seen, moved + 1
        assert request.reference is not None
        assert torch.equal(request.reference, point)
        asked = rig.asked(request).nonzero().flatten().tolist()
        away = sum(held[i] != since for i in asked) if since < round else 0
        fetched += away
        told = 4 if round == 17 else len(asked)  # the potentials are everyone's
        assert aggregate.traffic.down == (told + away) * CHAINS * 64 * d
        for i in asked:
            held[i] = since
    assert moved == 8
    assert fetched > 3


@pytest.mark.parametrize("mode", ["none", "mode", "svrg"])
def test_direct_is_exact_where_nothing_is_compressed(mode: str) -> None:
    uplink = {"name": "direct", "compressor": "identity", "variance_reduction": mode}
    rig = Rig(
        {"data": {"name": "wine", "clients": 4}, "uplink": uplink, "metric": {"name": "identity"}}, step_size=1e-3
    )
    assert isinstance(rig.sampler.uplink, Direct)
    assert rig.sampler.uplink.anchored == (mode != "none")
    assert bool(rig.state.uplink["anchor"].any()) == (mode != "none")
    for _ in range(5):
        before, request, aggregate = rig.step()
        estimate, _ = rig.sampler.gradient(before, request, aggregate)
        theta = rig.sampler.draw(before)
        with RunningError() as analysis:
            gradients = rig.problem.clients.gradient(theta)
            truth = gradients.sum(0) + rig.problem.prior.gradient(theta)
        bound = 2 * analysis.error(truth)
        if mode != "none":  # what is subtracted at a reference and added again is as large as a gradient there
            with RunningError() as analysis:
                reference = rig.problem.clients.gradient(rig.sampler.draw(before._replace(params=before.reference)))
            bound = bound + 2 * (analysis.error(reference) + gamma(CLIENTS + 4) * reference.abs()).sum(0)
            bound = bound + 2 * gamma(CLIENTS + 4) * gradients.abs().sum(0)
        assert_within(estimate, truth, bound)


def test_a_reference_calms_minibatches() -> None:
    """About the mode, and near it, a minibatch gradient with its reference varies far less than without."""
    spreads = []
    for mode in ("none", "mode"):
        uplink = {"name": "dense", "compressor": "identity", "variance_reduction": mode}
        settings = {"data": {"name": "wine", "clients": 4}, "uplink": uplink, "metric": {"name": "identity"}}
        rig = Rig(settings, batch_size=4, start={"scale": 0.01}, step_size=1e-9)
        errors = []
        for _ in range(20):
            before, request, aggregate = rig.step()
            estimate, _ = rig.sampler.gradient(before, request, aggregate)
            theta = rig.sampler.draw(before)
            truth = rig.problem.clients.gradient(theta).sum(0) + rig.problem.prior.gradient(theta)
            errors.append(estimate - truth)
        spreads.append(float(torch.stack(errors).square().mean().sqrt()))
    assert spreads[1] < 0.05 * spreads[0]


# --- what is sound ----------------------------------------------------------------------------------------------------

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
