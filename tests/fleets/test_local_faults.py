"""The local fleet: faults with their laws."""

from __future__ import annotations

import math

import pytest
import torch
from local_fleets import SEED, Rig, quadratic
from rounding import near
from torch import Tensor

from fedsample.fleets.faults import Faults


def binomial_z(successes: int, trials: int, p: float) -> float:
    return abs(successes - trials * p) / math.sqrt(trials * p * (1 - p))


def presence(faults: Faults, rounds: int) -> Tensor:
    """(rounds, n) bool."""
    history: list[Tensor] = []
    for round in range(1, rounds + 1):
        history.append(faults.present(round, history[-1] if history else None))
    return torch.stack(history)


@pytest.mark.parametrize(("dropout", "away"), [(0.1, 10.0), (0.02, 4.0), (0.5, 1.0), (0.9, 3.0)])
def test_presence_is_stationary_with_the_stated_rates(dropout: float, away: float) -> None:
    n, rounds = 4000, 40
    faults = Faults(n, SEED, dropout=dropout, dropout_rounds=away)
    assert faults.any
    there = presence(faults, rounds)
    want = (1 / away) / (1 / away + dropout)
    assert faults.presence == near(want, 4)
    for round in (0, 1, 5, rounds - 1):  # from the first round on: clients are independent, so a binomial each
        assert binomial_z(int(there[round].sum()), n, want) < 5
    left = there[:-1] & ~there[1:]
    assert binomial_z(int(left.sum()), int(there[:-1].sum()), dropout) < 5
    back = ~there[:-1] & there[1:]
    if away == 1:
        assert int(back.sum()) == int((~there[:-1]).sum())  # away for exactly one round
    else:
        assert binomial_z(int(back.sum()), int((~there[:-1]).sum()), 1 / away) < 5
    pair = (there[:, :-1].double() - want) * (there[:, 1:].double() - want)  # neighbours leave independently
    blocks = pair.mean(0)
    assert abs(float(blocks.mean())) < 5 * float(blocks.std()) / math.sqrt(len(blocks))


@pytest.mark.parametrize("loss", [0.01, 0.2, 0.9])
def test_replies_are_lost_at_the_stated_rate_independently(loss: float) -> None:
    n, rounds = 500, 200
    faults = Faults(n, SEED, loss=loss)
    lost = torch.stack([~faults.delivered(round) for round in range(1, rounds + 1)])
    assert binomial_z(int(lost.sum()), n * rounds, loss) < 5
    for a, b in ((lost[1:], lost[:-1]), (lost[:, 1:], lost[:, :-1])):
        assert binomial_z(int((a & b).sum()), a.numel(), loss**2) < 6  # pairs overlap, hence the wider bound
    other = Faults(n, SEED + 1, loss=loss)
    assert not torch.equal(other.delivered(1), faults.delivered(1)) or loss < 0.05


@pytest.mark.parametrize("loss", [0.05, 0.2, 0.7])
def test_attempts_are_geometric(loss: float) -> None:
    n, rounds = 2000, 20
    faults = Faults(n, SEED, loss=loss)
    attempts = torch.stack([faults.attempts(round) for round in range(1, rounds + 1)])
    assert int(attempts.min()) == 1
    for k in (1, 2, 3):
        assert binomial_z(int((attempts > k).sum()), n * rounds, loss**k) < 5
    mean, deviation = 1 / (1 - loss), math.sqrt(loss) / (1 - loss)
    assert abs(float(attempts.double().mean()) - mean) < 5 * deviation / math.sqrt(n * rounds)


def test_presence_loss_and_attempts_do_not_share_draws() -> None:
    n, rounds = 400, 100
    faults = Faults(n, SEED, loss=0.3, dropout=0.3, dropout_rounds=2.0)
    there = presence(faults, rounds)
    lost = torch.stack([~faults.delivered(r) for r in range(1, rounds + 1)])
    again = torch.stack([faults.attempts(r) > 1 for r in range(1, rounds + 1)])
    for a, p, b, q in (
        (there, faults.presence, lost, 0.3),
        (there, faults.presence, again, 0.3),
        (lost, 0.3, again, 0.3),
    ):
        assert binomial_z(int((a & b).sum()), n * rounds, p * q) < 6


def test_calm_weather_draws_nothing() -> None:
    faults = Faults(7, SEED)
    assert not faults.any
    assert faults.presence == 1
    assert faults.present(1, None).all()
    assert faults.delivered(1).all()
    assert faults.attempts(1).tolist() == [1] * 7


@pytest.mark.parametrize("uplink", ["dense", "diana"])
def test_replies_arrive_as_often_as_the_server_believes(uplink: str) -> None:
    """The server scales by this probability, so it must be the frequency."""
    rig = Rig(quadratic(200, 1), uplink, participation=0.4, step_size=1e-4, loss=0.25, dropout=0.2, dropout_rounds=3.0)
    rig.run(40)
    presence_probability = (1 / 3) / (1 / 3 + 0.2)
    wanted = arrived = 0
    for request, aggregate in zip(rig.requests, rig.aggregates, strict=True):
        assert aggregate.arrival == near(presence_probability * 0.75, 4)
        assert request.active is not None
        wanted += int(request.active.any(-1).sum())
        arrived += int(aggregate.arrived.sum())
    # DeviceOptions persists for about 2 rounds, so 40 rounds of 200 clients count as some 4,000 independent trials.
    assert abs(arrived / wanted - presence_probability * 0.75) < 5 * math.sqrt(0.25 / 3000)


def test_a_synchronising_round_of_marina_waits_for_everyone() -> None:
    rig = Rig(quadratic(), "marina", participation=2, loss=0.5, dropout=0.3)
    rig.run(40)
    syncs = 0
    for request, aggregate in zip(rig.requests, rig.aggregates, strict=True):
        if request.sync is not None:
            syncs += 1
            assert aggregate.arrived.all()
            assert aggregate.arrival == 1
        else:
            assert aggregate.arrival == near(rig.faults.presence * 0.5, 4)
    assert syncs > 5
    assert any(not aggregate.arrived.all() for aggregate in rig.aggregates)
