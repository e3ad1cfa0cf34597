"""The local fleet: traffic, exact to the byte."""

from __future__ import annotations

import pytest
import torch
from local_fleets import (
    AWAY,
    CHAINS,
    ENGINES,
    FAULTS,
    FLOAT64,
    PARTICIPATION,
    ROUNDS,
    UPLINKS,
    Rig,
    asked_clients,
    make_uplink,
    quadratic,
)

from fedsample.compression import RandK
from fedsample.fleets.local import Engine
from fedsample.protocol.exchange import Traffic


@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("participation", PARTICIPATION)
@pytest.mark.parametrize("faults", FAULTS, ids=["calm", "loss", "away", "both"])
@pytest.mark.parametrize(("dtype", "engine"), [(FLOAT64, "by-client"), (torch.float32, "batched")])
def test_traffic_is_the_bytes_of_the_uploads(
    uplink: str, participation: float, faults: dict[str, float], dtype: torch.dtype, engine: Engine
) -> None:
    rig = Rig(quadratic(dtype=dtype), uplink, engine=engine, participation=participation, **faults)
    rig.run(ROUNDS)
    d, width = rig.fleet.d, torch.finfo(dtype).bits
    for at, (request, aggregate) in enumerate(zip(rig.requests, rig.aggregates, strict=True)):
        asked, uploads = asked_clients(rig, at), rig.uploads(at)
        waits = rig.uplink.needs_everyone_to_sync and request.sync is not None
        sends = rig.faults.attempts(request.round) if waits else torch.ones(5, dtype=torch.int64)
        up = dense = 0
        for i, upload in zip(asked, uploads, strict=True):
            active = None if request.active is None else request.active[i]
            times = int(sends[i])  # where the round waits, a lost reply is sent again
            up += times * 8 * len(rig.uplink.to_bytes(upload, request.sync, active))
            dense += times * width * d * (CHAINS if active is None else int(active.sum()))
        assert aggregate.traffic.up == up
        assert aggregate.traffic.up_dense == dense
        if uplink == "marina" and request.active is None and "dropout" in faults:
            continue  # see the next test
        points = CHAINS * d * width * (2 if uplink == "marina" and request.active is not None and at > 0 else 1)
        coins = CHAINS if uplink == "marina" else 0
        assert aggregate.traffic.down == len(asked) * (points + coins)


def test_a_client_that_comes_back_to_marina_is_sent_both_points() -> None:
    """It missed the round before, so it does not hold the point that its difference starts from."""
    rig = Rig(quadratic(), "marina", **AWAY)
    rig.run(30)
    before = list(range(5))
    for at, aggregate in enumerate(rig.aggregates):
        asked = asked_clients(rig, at)
        points = len(asked) + len(set(asked) - set(before))
        assert aggregate.traffic.down == points * CHAINS * rig.fleet.d * 64 + len(asked) * CHAINS
        before = asked


@pytest.mark.parametrize("engine", ENGINES)
def test_observing_costs_one_value_a_client_and_points_for_those_not_asked(engine: Engine) -> None:
    watched, plain = (Rig(quadratic(), "diana", engine=engine, participation=2, observe=o) for o in (True, False))
    assert torch.equal(watched.run(8).params, plain.run(8).params)
    for at, (one, other) in enumerate(zip(watched.aggregates, plain.aggregates, strict=True)):
        assert one.traffic.up - other.traffic.up == one.traffic.up_dense - other.traffic.up_dense == 5 * CHAINS * 64
        others = 5 - len(asked_clients(plain, at))
        assert one.traffic.down - other.traffic.down == others * CHAINS * plain.fleet.d * 64
        assert one.norms is not None
        assert other.norms is None
        assert torch.equal(
            one.norms.isnan().logical_not().nonzero().squeeze(-1), torch.tensor(asked_clients(plain, at))
        )


def test_compression_pays() -> None:
    dense, marina, diana = (Rig(quadratic(d=50), make_uplink(name, RandK(0.1), 0.1)) for name in UPLINKS)
    for rig in (dense, marina, diana):
        rig.run(200)
    totals = [sum(a.traffic.up for a in rig.aggregates) for rig in (dense, marina, diana)]
    assert totals[0] == sum(a.traffic.up_dense for a in diana.aggregates) == 200 * 5 * CHAINS * 50 * 64
    assert totals[2] * 10 == totals[0]
    assert totals[0] / totals[1] == pytest.approx(1 / (0.1 + 0.9 * 0.1), rel=0.2)


def test_traffic_adds_up() -> None:
    assert Traffic(1, 2, 3).plus(Traffic(10, 20, 30)) == Traffic(11, 22, 33)
