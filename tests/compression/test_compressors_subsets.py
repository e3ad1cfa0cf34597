"""PermK's disjoint subsets, large subsets, and compressors in an estimator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compressor_table import FLOAT64, UNBIASED, device_keys, gaussian, make, many_keys, same_packets
from rounding import agree
from torch import Tensor

import fedsample.random.keys
from fedsample.compression import LinkKeys, Packet, PacketKeys, PermK, RandBlock, RandK, build
from fedsample.errors import ConfigError
from fedsample.estimators import Diana
from fedsample.estimators.base import Turn
from fedsample.random import key

# --- PermK ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(1, 5), (3, 6), (3, 7), (4, 2), (5, 1)])
def test_permk_gives_every_coordinate_to_one_client(n: int, d: int) -> None:
    compressor = PermK(n)
    keys = LinkKeys(0, torch.arange(n), 50, "uplink").at(3)
    shares = compressor.support(keys, d)  # (n, C, K)
    for chain in range(50):
        held = shares[:, chain].flatten()
        assert sorted(held[held < d].tolist()) == list(range(d))
    assert n == 1 or d == 1 or len({str(shares[:, c].tolist()) for c in range(50)}) > 1  # chains draw their own
    vector = gaussian(d)
    decoded = compressor.decompress(compressor.compress(vector.expand(n, 50, d), keys), d)
    agree(decoded.mean(0), vector.expand(50, d), n + 2)  # equal vectors: exact
    assert compressor.omega(d) == n - 1


def test_permk_needs_to_know_the_client() -> None:
    keys = PacketKeys(key(0), key(1), 1)
    with pytest.raises(ConfigError, match="must name client and chain"):
        PermK(3).compress(torch.ones(4), keys)
    with pytest.raises(ConfigError, match="client 3 of 3"):
        PermK(3).compress(torch.ones(4), device_keys(client=3))


# --- large subsets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 700, 30_000, 50_000, 69_999, 70_000])
def test_a_large_subset_is_ascending_distinct_and_the_same_alone_and_in_a_batch(k: int) -> None:
    n, keys = 70_000, key(0, chain=torch.arange(2))
    rows = keys.subset(n, k)
    assert rows.shape == (2, k)
    assert rows.dtype == torch.int64
    assert (rows[:, 1:] > rows[:, :-1]).all()
    assert int(rows.min()) >= 0
    assert int(rows.max()) < n
    assert torch.equal(key(0, chain=1).subset(n, k), rows[1])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_every_large_subset_is_equally_likely(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedsample.random.keys, "_ALONE", 2)
    n, count = 5, 6000
    rows = key(7, chain=torch.arange(count)).subset(n, k)
    codes, seen = (2**rows).sum(-1).unique(return_counts=True)
    cells = math.comb(n, k)
    assert len(codes) == cells
    statistic = float(((seen - count / cells) ** 2).sum() / (count / cells))
    assert statistic < cells - 1 + 5 * math.sqrt(2 * cells)


def test_the_first_distinct_of_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedsample.random.keys, "_ALONE", 2)
    for seed in range(200):
        n, k = 20, 1 + seed % 10
        sequence = key(seed).integers(n, 400).tolist()
        assert key(seed).subset(n, k).tolist() == sorted(
            dict.fromkeys(sequence).keys() & set(list(dict.fromkeys(sequence))[:k])
        )


@pytest.mark.parametrize("kind", [RandK, RandBlock])
def test_long_vectors_are_compressed_alike(kind: Any) -> None:
    d, keys = 100_003, device_keys()
    vector = gaussian(d, torch.float32)
    compressor = kind(0.03)
    packet = compressor.compress(vector, keys)
    assert packet.indices is not None
    assert len(packet.indices.unique()) == compressor.count(d)
    back = compressor.from_bytes(compressor.to_bytes(packet), keys, d, torch.float32)
    assert same_packets(packet, back)
    block = compressor.decompress(packet, d)
    assert torch.equal(block[packet.indices], packet.values)


@pytest.mark.parametrize("name", ["qsgd", "natural", "bf16", "sign", "topk"])
def test_pieces_of_a_long_vector_draw_their_own_coins(name: str) -> None:
    d = (1 << 16) + 5
    vector = torch.full((d,), 0.7)
    compressor = build(name, 0.1, levels=300)
    packet = compressor.compress(vector, device_keys())
    tail = compressor.compress(vector.expand(2, d), many_keys(2))
    assert same_packets(
        packet,
        Packet(
            *(
                None if p is None else p[0]
                for p in compressor.compress(vector.expand(1, d), LinkKeys(0, 0, 1, "uplink").at(1))[:3]
            )
        ),
    )  # type: ignore[arg-type]
    if name in ("qsgd", "natural", "bf16"):
        assert not torch.equal(packet.values[:4096], packet.values[32768 : 32768 + 4096])
        assert not torch.equal(tail.values[0], tail.values[1])
    back = compressor.from_bytes(compressor.to_bytes(packet), device_keys(), d, torch.float32)
    assert same_packets(packet, back)


# --- in an estimator --------------------------------------------------------------------------------------------------


class Line:
    """An oracle of one client: gradient of |x - a|^2 / 2."""

    full = True

    def gradient(self, point: Tensor, *, full: bool = False) -> Tensor:
        return point - 1.5


@pytest.mark.parametrize("name", [*UNBIASED, "identity"])
@pytest.mark.parametrize("active", [None, (True, False)])
def test_diana_keeps_any_packet_until_it_is_acknowledged(name: str, active: tuple[bool, ...] | None) -> None:
    d, chains = 9, 2
    uplink = Diana(make(name, d))
    memory = uplink.memory((chains, d), FLOAT64, torch.device("cpu"))
    link = LinkKeys(0, 1, chains, "uplink")
    mask = None if active is None else torch.tensor(active)
    want = torch.zeros(chains, d, dtype=FLOAT64)
    size = torch.zeros_like(want)
    applied = 0
    for round in range(1, 6):
        turn = Turn(
            round, gaussian(chains * d, seed=round).view(chains, d), None, None, mask, applied, 0, link.at(round)
        )
        upload, memory = uplink.encode(Line(), memory, turn)
        agree(memory["shift"], want, 2 * round + 2, size)
        data = uplink.to_bytes(upload, None, mask)
        assert 8 * len(data) == uplink.bits(chains if mask is None else 1, 0, d, FLOAT64)
        back = uplink.from_bytes(data, turn, d, FLOAT64)
        dense = uplink.decompress(upload, None, mask, d)
        assert torch.equal(uplink.decompress(back, None, mask, d), dense)
        if round != 3:  # whose reply is lost
            want = want + dense * uplink.rate(d)
            size = size + dense.abs() * uplink.rate(d)
            applied = round
