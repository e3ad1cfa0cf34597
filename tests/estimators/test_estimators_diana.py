"""Uplink estimators: what they promise to the bit, memories that commit in two steps, bytes, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import agree, assert_within, gamma, near
from running_error import RunningError
from torch import Tensor

from fedsample.clients.client_stack import ClientStack
from fedsample.compression import QSGD, Composed, Compressor, Identity, LinkKeys, Natural, RandBlock, RandK
from fedsample.errors import ConfigError, DataError, UnsoundError
from fedsample.estimators import Dense, Diana, Marina, Memory, Oracle, Turn, Uplink, Upload, build, check, table
from fedsample.protocol.exchange import ESTIMATE, Request
from fedsample.random import key
from fedsample.targets import GeneralizedLinear

CPU, FLOAT64 = torch.device("cpu"), torch.float64
N, C, D = 5, 2, 7


class Springs:
    """Gradients lam_i (x - a_i) of N quadratic clients; counts its evaluations, and adds keyed noise if not full."""

    def __init__(self, n: int = N, *, full: bool = True, round: int = 0, dtype: torch.dtype = FLOAT64) -> None:
        draws = key(1, purpose="springs").normal(2 * n * D, dtype).view(2, n, 1, D)
        self.curvature, self.center = draws[0].abs() + 0.5, 2 * draws[1]
        self.full, self.round, self.evaluations = full, round, 0
        self.rows = slice(None)

    def gradient(self, point: Tensor, *, full: bool = False) -> Tensor:
        self.evaluations += 1
        exact = self.curvature * (point.unsqueeze(0) - self.center)  # (n, C, d)
        if self.full or full:
            return exact
        clients, chains = torch.arange(len(exact)).unsqueeze(-1), torch.arange(point.shape[0])
        return exact + 10 * key(2, self.round, clients, chains, "minibatch").normal(D, point.dtype)


def points(round: int, chains: int = C, dtype: torch.dtype = FLOAT64) -> Tensor:
    """(C, d) a path that moves a little each round."""
    return 2 + 0.05 * key(3, round, chain=torch.arange(chains), purpose="points").normal(D, dtype)


def turn(
    round: int,
    *,
    n: int = N,
    sync: list[bool] | None = None,
    active: Tensor | None = None,
    applied: Tensor | int = 0,
    epoch: int = 0,
    previous: bool = True,
    dtype: torch.dtype = FLOAT64,
) -> Turn:
    return Turn(
        round=round,
        point=points(round, dtype=dtype),
        previous=points(round - 1, dtype=dtype) if previous and round > 1 else None,
        sync=None if sync is None else torch.tensor(sync),
        active=active,
        applied=applied,
        epoch=epoch,
        keys=LinkKeys(0, torch.arange(n), C, "uplink").at(round),
    )


def fresh(uplink: Uplink, n: int = N, dtype: torch.dtype = FLOAT64) -> Memory:
    return uplink.memory((n, C, D), dtype, CPU)


def copy(memory: Memory) -> Memory:
    """Encoding consumes a memory, so what is compared afterwards is copied."""
    return {name: tensor.clone() for name, tensor in memory.items()}


def never(n: int = N) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


# --- dense ----------------------------------------------------------------------------------------------------------


def test_dense_sends_gradients_and_the_server_sums_them() -> None:
    uplink, oracle = build("dense", Identity()), Springs()
    upload, memory = uplink.encode(oracle, fresh(uplink), turn(1))
    assert memory == {}
    assert upload.dense is None
    gradients = Springs().gradient(points(1))
    decoded = uplink.decompress(upload, None, None, D)
    assert torch.equal(decoded, gradients)
    total = decoded.sum(0)
    estimate, state = uplink.decode(uplink.start(C, D, CPU), total, None, 1.0)
    assert torch.equal(estimate, gradients.sum(0))
    assert state == {}
    assert torch.equal(uplink.decode({}, total, None, 0.25)[0], 4 * total)


def test_dense_under_sampling_scales_what_arrives() -> None:
    """Averaged over all subsets of clients, with their probabilities, the estimate is the exact sum."""
    uplink, q = Dense(), 0.3
    gradients = Springs().gradient(points(1))
    mean = torch.zeros(C, D, dtype=FLOAT64)
    for chosen in itertools.product((False, True), repeat=N):
        active = torch.tensor(chosen).unsqueeze(-1).expand(N, C)
        upload, _ = uplink.encode(Springs(), {}, turn(1, active=active))
        estimate, _ = uplink.decode({}, uplink.decompress(upload, None, active, D).sum(0), None, q)
        mean += q ** sum(chosen) * (1 - q) ** (N - sum(chosen)) * estimate
    # 2^N terms, each of N gradients, a weight of N factors and two scalings
    agree(mean, gradients.sum(0), 2**N + 2 * N + 4, gradients.abs().sum(0))


# --- diana: the commit in two steps ---------------------------------------------------------------------------------


def test_diana_starts_from_the_gradient_and_learns_at_its_rate() -> None:
    uplink = Diana(RandK(2))
    assert uplink.rate(D) == near(2 / D, 1)
    assert Diana(Identity()).rate(D) == 1
    upload, memory = uplink.encode(Springs(), fresh(uplink), turn(1, applied=never()))
    assert upload.packet is not None
    assert not memory["shift"].any()  # nothing is committed before it was acknowledged
    assert memory["round"].tolist() == [1] * N
    assert torch.equal(memory["pending"], upload.packet.values)
    gradients = Springs().gradient(points(1))
    want = RandK(2).compress(gradients, turn(1).keys)
    assert torch.equal(upload.packet.values, want.values)
    _, memory = uplink.encode(Springs(), memory, turn(2, applied=torch.full((N,), 1)))
    committed = RandK(2).decompress(want, D) * (2 / D)  # alpha C(g) is the gradient itself on the support
    agree(memory["shift"], committed, 3)


def test_diana_keeps_what_was_applied_and_drops_what_was_lost() -> None:
    uplink = Diana(RandK(3))
    _, first = uplink.encode(Springs(), fresh(uplink), turn(1, applied=never()))
    after_first = fresh(uplink)["shift"]
    RandK(3).add_to(after_first, RandK(3).compress(Springs().gradient(points(1)), turn(1).keys), uplink.rate(D))
    applied = torch.full((N,), 1)
    _, second = uplink.encode(Springs(), copy(first), turn(2, applied=applied))
    assert torch.equal(second["shift"], after_first)

    applied[[1, 3]] = 2  # the uploads of clients 1 and 3 arrive in round 2, the others are lost
    upload, third = uplink.encode(Springs(), copy(second), turn(3, applied=applied))
    lost, got = [0, 2, 4], [1, 3]
    assert torch.equal(third["shift"][lost], after_first[lost])
    assert (third["shift"][got] != after_first[got]).any(-1).all()
    # What is sent next is a difference to the memory that both ends agree on.
    assert upload.packet is not None
    want = RandK(3).compress(Springs().gradient(points(3)) - third["shift"], turn(3).keys)
    assert torch.equal(upload.packet.values, want.values)


@pytest.mark.parametrize("applied", [0, 1, 2, 4, 5])
def test_diana_commits_only_the_round_that_is_pending(applied: int) -> None:
    """Round 3 is pending; an acknowledgement of any other round is none, be it older or from a later run."""
    uplink = Diana(RandK(3))
    memory = fresh(uplink)
    for round in (1, 2, 3):
        _, memory = uplink.encode(Springs(), memory, turn(round, applied=torch.full((N,), round - 1)))
    before = copy(memory)
    _, dropped = uplink.encode(Springs(), copy(memory), turn(6, applied=torch.full((N,), applied)))
    assert torch.equal(dropped["shift"], before["shift"])
    _, kept = uplink.encode(Springs(), memory, turn(6, applied=torch.full((N,), 3)))
    assert not torch.equal(kept["shift"], before["shift"])


def test_diana_on_a_device_takes_an_integer_acknowledgement() -> None:
    """One client, arrays (C, d): the same numbers as its row of the stack."""
    stacked, alone = Diana(RandK(3)), Diana(RandK(3))
    everyone, single = fresh(stacked), alone.memory((C, D), FLOAT64, CPU)
    client = 2

    class Device(Springs):
        def gradient(self, point: Tensor, *, full: bool = False) -> Tensor:
            return super().gradient(point)[client]

    for round, applied in ((1, 0), (2, 1), (3, 1), (4, 3)):
        whole, everyone = stacked.encode(Springs(), everyone, turn(round, applied=torch.full((N,), applied)))
        mine = turn(round, applied=applied)
        link = LinkKeys(0, client, C, "uplink").at(round)
        upload, single = alone.encode(Device(), single, Turn(**{**vars(mine), "keys": link}))
        assert whole.packet is not None
        assert upload.packet is not None
        assert torch.equal(upload.packet.values, whole.packet.values[client])
        assert torch.equal(single["shift"], everyone["shift"][client])


class Hasty(Diana):
    """A mutant without the commit rule: the memory moves as soon as the packet is made."""

    def encode(self, oracle: Oracle, memory: Memory, turn: Turn) -> tuple[Upload, Memory]:
        pending = Turn(**{**vars(turn), "applied": memory["round"]})  # every packet counts as applied
        return super().encode(oracle, memory, pending)


def drift(uplink: Diana, loss: float, rounds: int = 50, epochs: tuple[int, ...] = ()) -> list[float]:
    """The largest difference, round by round, between the server's sum of memories and the sum of the clients'.

    In units of what roundings may come to: each end adds a scaled packet per round, the server after summing clients.
    """
    memory, state = fresh(uplink), uplink.start(C, D, CPU)
    applied, epoch, differences, size = never(), 0, [], torch.zeros(C, D, dtype=FLOAT64)
    for round in range(1, rounds + 1):
        if round in epochs:
            epoch, state = epoch + 1, uplink.start(C, D, CPU)
        here = turn(round, applied=applied.clone(), epoch=epoch)
        chosen = key(7, round, torch.arange(N).unsqueeze(-1), torch.arange(C), "cohort").bernoulli(0.6)
        who = chosen.any(-1).nonzero().squeeze(-1)
        part = {name: tensor[who] for name, tensor in memory.items()}
        oracle = Springs()
        oracle.curvature, oracle.center = oracle.curvature[who], oracle.center[who]
        asked = Turn(
            **{
                **vars(here),
                "active": chosen[who],
                "applied": applied[who],
                "keys": LinkKeys(0, torch.arange(N), C, "uplink").at(round, who),
            }
        )
        upload, part = uplink.encode(oracle, part, asked)
        for name, tensor in part.items():
            memory[name][who] = tensor
        arrived = key(7, round, who, purpose="arrival").bernoulli(1 - loss)
        decoded = uplink.decompress(upload, None, chosen[who], D)
        _, state = uplink.decode(state, decoded[arrived].sum(0), None, 0.6 * (1 - loss))
        size = size + decoded.abs().sum(0) * uplink.rate(D)
        applied[who[arrived]] = round
        # Everyone is told what was applied: what the next contact would commit.
        settled = copy(memory)
        everyone = turn(round + 1, applied=applied.clone(), epoch=epoch)
        _, settled = uplink.encode(Springs(), settled, everyone)
        apart = (state["shift"] - settled["shift"].sum(0)).abs()
        differences.append(float((apart / (2 * gamma(round + N + 3) * size).clamp(min=1e-300)).max()))
    return differences


@pytest.mark.parametrize(
    "compressor", [RandK(3), RandBlock(2), Identity(), RandK(1), QSGD(3), Natural(), Composed(RandK(3), Natural())]
)
@pytest.mark.parametrize("loss", [0.0, 0.01, 0.3])
def test_the_two_sums_of_memories_never_part(compressor: Compressor, loss: float) -> None:
    assert max(drift(Diana(compressor), loss)) <= 1
    assert max(drift(Diana(compressor), loss, epochs=(10, 11, 37))) <= 1


def test_without_the_commit_rule_the_two_sums_drift_apart() -> None:
    assert max(drift(Hasty(RandK(3)), 0.0)) <= 1
    assert drift(Hasty(RandK(3)), 0.1)[-1] > 1e9


def test_a_new_epoch_zeroes_memories_even_one_that_was_about_to_commit() -> None:
    uplink = Diana(RandK(3))
    memory = fresh(uplink)
    for round in (1, 2, 3):
        _, memory = uplink.encode(Springs(), memory, turn(round, applied=torch.full((N,), round - 1), epoch=4))
    assert memory["shift"].any()
    memory["epoch"][2] = 5  # client 2 was in contact since
    held = memory["shift"][2].clone()
    upload, after = uplink.encode(Springs(), copy(memory), turn(4, applied=torch.full((N,), 3), epoch=5))
    others = [0, 1, 3, 4]
    assert not after["shift"][others].any()
    assert not torch.equal(after["shift"][2], held)  # its packet was acknowledged in this epoch, so it commits
    assert after["epoch"].tolist() == [5] * N
    assert upload.packet is not None
    want = RandK(3).compress(Springs().gradient(points(4)), turn(4).keys).values
    assert torch.equal(upload.packet.values[others], want[others])
    # And from there on the memory works as from round 1.
    _, next_one = uplink.encode(Springs(), after, turn(5, applied=torch.full((N,), 4), epoch=5))
    assert next_one["shift"][others].any()


def test_inactive_chains_leave_diana_memories_untouched() -> None:
    uplink = Diana(RandK(3))
    memory = fresh(uplink)
    for round in (1, 2):
        _, memory = uplink.encode(Springs(), memory, turn(round, applied=torch.full((N,), round - 1)))
    # Chain 1 of client 0 rests for two rounds, both of which are applied; its last packet is committed, then it holds.
    active = torch.ones(N, C, dtype=torch.bool)
    active[0, 1] = False
    upload, memory = uplink.encode(Springs(), memory, turn(3, applied=torch.full((N,), 2), active=active))
    assert upload.packet is not None
    assert not upload.packet.values[0, 1].any()
    assert upload.packet.values[0, 0].any()
    held = memory["shift"][0, 1].clone()
    assert held.any()
    for round in (4, 5):
        _, memory = uplink.encode(Springs(), memory, turn(round, applied=torch.full((N,), round - 1), active=active))
        assert torch.equal(memory["shift"][0, 1], held)
        assert not torch.equal(memory["shift"][0, 0], held)
    assert not uplink.decompress(upload, None, active, D)[0, 1].any()


def test_diana_decodes_memories_plus_scaled_differences_and_moves_by_unscaled_ones() -> None:
    uplink = Diana(RandK(2))
    state = {"shift": torch.ones(C, D, dtype=FLOAT64)}
    total = key(0, purpose="total").normal(C * D).view(C, D)
    estimate, after = uplink.decode(state, total, None, 0.5)
    assert torch.equal(estimate, 1 + 2 * total)
    agree(after["shift"], 1 + total * 2 / D, 3, 1 + total.abs() * 2 / D)
    assert uplink.decode(state, total.float(), None, 1.0)[0].dtype == FLOAT64  # the server's sums are float64


def test_diana_with_the_identity_is_exact_in_every_round_and_learns_at_once() -> None:
    uplink = Diana(Identity())
    memory, state = fresh(uplink), uplink.start(C, D, CPU)
    size = torch.zeros(C, D, dtype=FLOAT64)
    for round in range(1, 6):
        upload, memory = uplink.encode(Springs(), memory, turn(round, applied=torch.full((N,), round - 1)))
        estimate, state = uplink.decode(state, uplink.decompress(upload, None, None, D).sum(0), None, 1.0)
        each = Springs().gradient(points(round))
        size = size + 2 * each.abs().sum(0)  # the gradient, and the memory that was one per round ago
        agree(estimate, each.sum(0), round * (N + 3), size)
        agree(state["shift"], each.sum(0), round * (N + 3), size)


def test_a_dropped_packet_that_was_not_finite_leaves_no_trace() -> None:
    """A gradient that overflows once makes a packet that is refused; the memory must survive it."""
    uplink = Diana(RandK(3))
    _, memory = uplink.encode(Springs(), fresh(uplink), turn(1, applied=never()))
    broken = Springs()
    broken.center = torch.full_like(broken.center, math.nan)
    upload, memory = uplink.encode(broken, memory, turn(2, applied=torch.full((N,), 1)))
    with pytest.raises(DataError, match="not finite"):
        uplink.to_bytes(row(upload, 0), None, None)
    _, memory = uplink.encode(Springs(), memory, turn(3, applied=torch.full((N,), 1)))
    assert bool(torch.isfinite(memory["shift"]).all())


# --- marina ---------------------------------------------------------------------------------------------------------


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


# --- bytes ----------------------------------------------------------------------------------------------------------


@st.composite
def uploads(draw: st.DrawFn) -> tuple[Uplink, torch.dtype, list[bool] | None, Tensor | None, int]:
    compressor = draw(st.sampled_from([RandK(3), RandBlock(2), Identity(), RandK(D), RandK(0.2)]))
    name = draw(st.sampled_from(["dense", "diana", "marina"]))
    uplink = build(name, Identity() if name == "dense" else compressor)
    bools = st.lists(st.booleans(), min_size=C, max_size=C)
    sync = draw(st.none() | bools) if name == "marina" else None
    if sync is not None and not any(sync):
        sync = None  # as a server sends it
    active = draw(st.none() | st.lists(bools, min_size=N, max_size=N))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return uplink, dtype, sync, None if active is None else torch.tensor(active), draw(st.integers(2, 500))


def row(upload: Upload, i: int) -> Upload:
    """Client i's upload out of a stack."""
    packet = upload.packet
    if packet is not None:
        packet = packet._replace(values=packet.values[i], indices=None if packet.indices is None else packet.indices[i])
    return Upload(packet, None if upload.dense is None else upload.dense[i])


@given(uploads())
@settings(max_examples=120, deadline=None)
def test_an_upload_is_its_bits_and_comes_back_to_the_bit(
    case: tuple[Uplink, torch.dtype, list[bool] | None, Tensor | None, int],
) -> None:
    uplink, dtype, sync, active, round = case
    whole = turn(round, sync=sync, active=active, applied=never(), dtype=dtype)
    upload, _ = uplink.encode(Springs(dtype=dtype), fresh(uplink, dtype=dtype), whole)
    decoded = uplink.decompress(upload, whole.sync, active, D)
    assert decoded.dtype == dtype
    for i in range(N):
        mine = None if active is None else active[i]
        data = uplink.to_bytes(row(upload, i), whole.sync, mine)
        asked = [c for c in range(C) if mine is None or bool(mine[c])]
        syncing = sum(sync is not None and sync[c] for c in asked)
        assert 8 * len(data) == uplink.bits(len(asked), syncing, D, dtype)
        device = Turn(**{**vars(whole), "active": mine, "keys": LinkKeys(0, i, C, "uplink").at(round)})
        again = uplink.from_bytes(data, device, D, dtype)
        assert torch.equal(uplink.decompress(again, whole.sync, mine, D), decoded[i])
        assert torch.equal(uplink.decompress(row(upload, i), whole.sync, mine, D), decoded[i])
        for wrong in (data + b"\0", data + data, data[:-1]):
            if len(wrong) != len(data):
                with pytest.raises(DataError, match="bytes, expected"):
                    uplink.from_bytes(wrong, device, D, dtype)


def test_the_first_round_of_marina_travels_dense() -> None:
    uplink = Marina(RandK(2), None)
    here = turn(1, sync=[True] * C)
    upload, _ = uplink.encode(Springs(), fresh(uplink), here)
    data = uplink.to_bytes(row(upload, 0), here.sync, None)
    assert len(data) == C * D * 8
    device = Turn(**{**vars(here), "keys": LinkKeys(0, 0, C, "uplink").at(1)})
    again = uplink.decompress(uplink.from_bytes(data, device, D, FLOAT64), here.sync, None, D)
    assert torch.equal(again, Springs().gradient(points(1))[0])


@pytest.mark.parametrize("sync", [None, [True, False], [True, True]])
def test_uploads_that_are_not_finite_are_refused_both_ways(sync: list[bool] | None) -> None:
    uplink = Marina(RandK(2), None)
    here = turn(2, sync=sync)
    oracle = Springs()
    oracle.center[0] = math.inf
    upload, _ = uplink.encode(oracle, fresh(uplink), here)
    with pytest.raises(DataError, match="not finite"):
        uplink.to_bytes(row(upload, 0), here.sync, None)
    data = uplink.to_bytes(row(upload, 1), here.sync, None)
    device = Turn(**{**vars(here), "keys": LinkKeys(0, 1, C, "uplink").at(2)})
    nan = torch.tensor([math.nan], dtype=FLOAT64).numpy().tobytes()
    with pytest.raises(DataError, match="NaN or infinite"):
        uplink.from_bytes(data[:-8] + nan, device, D, FLOAT64)


def test_a_dense_part_that_is_missing_is_an_error() -> None:
    uplink = Marina(RandK(2), None)
    upload, _ = uplink.encode(Springs(), fresh(uplink), turn(2))
    with pytest.raises(ValueError, match="without its dense part"):
        uplink.to_bytes(row(upload, 0), torch.tensor([True, False]), None)


# --- what is sound --------------------------------------------------------------------------------------------------


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
