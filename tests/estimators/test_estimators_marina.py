"""Uplink estimators: MARINA's differences and full rounds."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from rounding import agree, assert_within, gamma
from running_error import RunningError
from torch import Tensor
from uplink_turns import CPU, FLOAT64, C, D, N, Springs, fresh, points, turn

from fedsample.clients.client_stack import ClientStack
from fedsample.compression import QSGD, Composed, Compressor, Identity, Natural, RandBlock, RandK
from fedsample.estimators import Dense, Diana, Marina
from fedsample.protocol.exchange import ESTIMATE, Request
from fedsample.random import key
from fedsample.targets import GeneralizedLinear


def run_marina(
    uplink: Marina, rounds: int, coins: Callable[[int], list[bool]], *, forget: bool = False
) -> list[tuple[Tensor, Tensor, int]]:
    """(estimate, exact sum, gradient evaluations) of each round; `forget` makes every client recompute."""
    memory, state = fresh(uplink), uplink.start(C, D, CPU)
    history = []
    for round in range(1, rounds + 1):
        sync = coins(round) if round > 1 else [True] * C
        oracle = Springs()
        if forget:
            memory["round"].zero_()
        here = turn(round, sync=sync if any(sync) else None)
        upload, memory = uplink.encode(oracle, memory, here)
        total = uplink.decompress(upload, here.sync, None, D).sum(0)
        estimate, state = uplink.decode(state, total, here.sync, 1.0)
        history.append((estimate, Springs().gradient(points(round)).sum(0), oracle.evaluations))
    return history


def some_coins(round: int) -> list[bool]:
    return key(8, round, chain=torch.arange(C), purpose="coins").bernoulli(0.3).tolist()


@pytest.mark.parametrize("compressor", [RandK(3), RandBlock(2), Identity(), QSGD(3), Composed(RandK(3), Natural())])
def test_marinas_kept_gradient_equals_recomputation_to_the_bit(compressor: Compressor) -> None:
    kept = run_marina(Marina(compressor, None), 12, some_coins)
    recomputed = run_marina(Marina(compressor, None), 12, some_coins, forget=True)
    for (one, _, _), (other, _, _) in zip(kept, recomputed, strict=True):
        assert torch.equal(one, other)
    assert [count for *_, count in kept] == [1] * 12
    assert [count for *_, count in recomputed] == [1] + [2] * 11


def test_marina_is_exact_after_a_synchronisation_for_that_chain_alone() -> None:
    history = run_marina(Marina(RandK(2), 0.3), 40, some_coins)
    synced = [(round, chain) for round in range(2, 41) for chain in range(C) if some_coins(round)[chain]]
    assert any(sum(some_coins(round)) == 1 for round in range(2, 41))  # some rounds synchronise one chain only
    for round, (estimate, exact, _) in enumerate(history, start=1):
        for chain in range(C):
            if round == 1 or (round, chain) in synced:
                assert torch.equal(estimate[chain], exact[chain])
            else:
                assert not torch.equal(estimate[chain], exact[chain])


def test_marina_adds_the_scaled_differences_to_its_last_estimate() -> None:
    uplink = Marina(RandK(2), 0.1)
    state = {"estimate": torch.ones(C, D, dtype=FLOAT64)}
    total = key(0, purpose="total").normal(C * D).view(C, D)
    estimate, after = uplink.decode(state, total, torch.tensor([False, True]), 0.5)
    assert torch.equal(estimate[0], 1 + 2 * total[0])
    assert torch.equal(estimate[1], total[1])  # a dense round has every client: nothing to scale
    assert torch.equal(after["estimate"], estimate)


def test_marina_with_the_identity_follows_the_gradient_without_synchronising() -> None:
    size = torch.zeros(C, D, dtype=FLOAT64)
    history = run_marina(Marina(Identity(), None), 10, lambda _: [False] * C)
    for round, (estimate, exact, _) in enumerate(history, start=1):
        size = size + 2 * Springs().gradient(points(round)).abs().sum(0)  # differences of gradients, added up
        agree(estimate, exact, round * (N + 3), size)


class TwoBatches(Springs):
    """A mutant's oracle: each gradient of a round on a minibatch of its own."""

    def gradient(self, point: Tensor, *, full: bool = False) -> Tensor:
        self.round += 1000
        return super().gradient(point, full=full)


def difference_error(oracle: Springs) -> float:
    """How far a compressed round's difference lies from H (x - x'), for a batch noise that does not depend on x.

    In units of what the four roundings of each of two gradients may come to.
    """
    uplink = Marina(Identity(), None)
    memory = fresh(uplink)
    upload, _ = uplink.encode(oracle, memory, turn(2))
    assert upload.packet is not None
    springs = Springs()
    noise = 10 * 6.0  # no normal of this test is beyond six
    size = springs.curvature * (points(2).abs() + points(1).abs() + 2 * springs.center.abs()) + 2 * noise
    apart = (upload.packet.values - springs.curvature * (points(2) - points(1))).abs()
    return float((apart / (2 * gamma(4) * size)).max())


def test_both_gradients_of_a_difference_use_one_minibatch() -> None:
    assert difference_error(Springs(full=False, round=2)) <= 1
    assert difference_error(TwoBatches(full=False, round=2)) > 1e9


def test_a_minibatch_client_recomputes_and_synchronises_with_all_its_rows() -> None:
    uplink = Marina(RandK(3), None)
    oracle = Springs(full=False, round=1)
    upload, memory = uplink.encode(oracle, fresh(uplink), turn(1, sync=[True, True]))
    assert upload.packet is None
    assert upload.dense is not None
    assert torch.equal(upload.dense, Springs().gradient(points(1)))
    oracle = Springs(full=False, round=2)
    upload, _ = uplink.encode(oracle, memory, turn(2, sync=[False, True]))
    assert oracle.evaluations == 3  # here and before on one batch, and here on all rows: last round's batch was another
    assert upload.dense is not None
    assert torch.equal(upload.dense[:, 1], Springs().gradient(points(2))[:, 1])


def test_a_real_minibatch_worker_draws_one_batch_a_round_for_both_points() -> None:
    keys = key(4, purpose="rows")
    x, y = keys.normal(60 * 3).view(60, 3), keys.integers(3, 60)
    clients = GeneralizedLinear(x, y, torch.tensor([0, 25, 60]), "categorical", 3)
    worker = ClientStack(clients, Marina(Identity(), None), 9, C, torch.arange(2), batch_size=4)
    here, before = (key(5, r, chain=torch.arange(C)).normal(clients.d) for r in (2, 1))

    def difference(round: int) -> Tensor:
        answer = worker.answer(Request(round, here, frozenset({ESTIMATE}), previous=before))
        assert answer.upload is not None
        assert answer.upload.packet is not None
        return answer.upload.packet.values

    batch = key(9, client=torch.arange(2).unsqueeze(-1), chain=torch.arange(C), purpose="batch").fold("round").fold(3)
    with RunningError() as analysis:
        one, other = (clients.gradient(at, keys=batch, batch_size=4) for at in (here, before))
        want = one - other
    bound = 2 * analysis.error(want)
    assert_within(difference(3), want, bound)
    with pytest.raises(AssertionError, match="differ by more"):
        assert_within(difference(4), want, 1e9 * bound, sees=math.inf)  # the next round draws anew


def test_marina_keeps_the_difference_right_for_a_client_that_was_away() -> None:
    """Its kept gradient is of an older point, so it recomputes at both points of the request."""
    uplink = Marina(Identity(), None)
    _, memory = uplink.encode(Springs(), fresh(uplink), turn(1, sync=[True] * C))
    oracle = Springs()
    upload, _ = uplink.encode(oracle, memory, turn(5))
    assert oracle.evaluations == 2
    assert upload.packet is not None
    assert torch.equal(upload.packet.values, Springs().gradient(points(5)) - Springs().gradient(points(4)))


@pytest.mark.parametrize("sync", [None, [False, False], [True, False]])
def test_marina_without_a_previous_point_must_synchronise_every_chain(sync: list[bool] | None) -> None:
    uplink = Marina(RandK(3), None)
    with pytest.raises(ValueError, match="round 1: no previous point"):
        uplink.encode(Springs(), fresh(uplink), turn(1, sync=sync))


def test_marinas_coin() -> None:
    assert Marina(RandK(2), None).probability(D) == 2 / D  # K / d: both kinds of round cost the same on average
    assert Marina(RandK(2), 0.25).probability(D) == 0.25
    assert Marina(RandK(2), 0.25).sync_probability(1, D) == 1
    assert Marina(RandK(2), 0.25).sync_probability(2, D) == 0.25
    assert Dense().sync_probability(1, D) == Diana(RandK(2)).sync_probability(1, D) == 0
    assert Marina.needs_everyone_to_sync
    assert Marina.needs_previous
    assert not Diana.needs_previous
