"""Uplink estimators: dense ones, and DIANA's memories that commit in two steps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from rounding import agree, gamma, near
from torch import Tensor
from uplink_turns import CPU, FLOAT64, C, D, N, Springs, fresh, never, points, row, turn

from fedsample.compression import QSGD, Composed, Compressor, Identity, LinkKeys, Natural, RandBlock, RandK
from fedsample.errors import DataError
from fedsample.estimators import Dense, Diana, Memory, Oracle, Turn, Upload, build
from fedsample.random import key


def copy(memory: Memory) -> Memory:
    """Encoding consumes a memory, so what is compared afterwards is copied."""
    return {name: tensor.clone() for name, tensor in memory.items()}


# --- dense ------------------------------------------------------------------------------------------------------------


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


# --- diana: the commit in two steps -----------------------------------------------------------------------------------


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


def drift(uplink: Diana, loss: float, rounds: int = 25, epochs: tuple[int, ...] = ()) -> list[float]:
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
    assert max(drift(Diana(compressor), loss, epochs=(5, 6, 19))) <= 1


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
