"""Links in the loop: what both ends know of each other, and what a return costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from link_rigs import ABSENCES, CHAINS, CLIENTS, D, Rig
from rounding import agree, assert_within, gamma
from running_error import RunningError

from fedsample import compression
from fedsample.compression import Packet
from fedsample.estimators import Direct, Ef21P, build_downlink

FLOAT64 = torch.float64


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
