"""The whole table of compressors: what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressor_table import NAMES, blocks_of, gaussian, make

from fedsample.compression import (
    QSGD,
    Identity,
    LowRank,
    PermK,
    RandK,
    Scaled,
    ScaledSign,
    TopK,
    bit_packing,
    build,
    cache_blocks,
    qsgd,
)
from fedsample.errors import ConfigError


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QSGD(0), r"levels = 0; choose an integer in 1\.\.32767"),
        (lambda: QSGD(-3), r"levels = -3"),
        (lambda: QSGD(40_000), r"levels = 40000"),
        (lambda: QSGD(2.0), r"levels = 2.0"),  # type: ignore[arg-type]
        (lambda: QSGD(True), r"levels = True"),
        (lambda: TopK(9).count(8), r"topk: k = 9 coordinates of 8 parameters; choose 1 <= k <= 8"),
        (lambda: TopK(0.0).alpha(8), r"topk: k = 0.0 is read as a fraction and must lie in \(0, 1\]"),
        (lambda: TopK(1.5).bits(8, torch.float32), r"k = 1.5"),
        (lambda: TopK(True).count(8), r"k = True is read as a fraction"),
        (lambda: PermK(0), r"clients = 0; give the number of clients, at least 1"),
        (lambda: LowRank(0, blocks_of(16)), r"rank = 0 of matrices \(4, 4\); choose an integer in 1\.\.4"),
        (lambda: LowRank(5, blocks_of(16)), r"rank = 5 of matrices \(4, 4\); choose an integer in 1\.\.4"),
        (lambda: LowRank(1, []), r"matrices none"),
        (lambda: LowRank(1, [torch.zeros(2, 2, dtype=torch.int64)]), r"hold each position once"),
        (lambda: LowRank(1, blocks_of(16)).count(17), r"hold 16 parameters, the vector 17; give the model's blocks"),
        (lambda: build("randk"), r"randk needs k"),
        (lambda: build("permk"), r"permk needs the number of clients"),
        (lambda: build("lowrank"), r"lowrank needs the parameter matrices"),
        (lambda: build("qsgd", levels=0), r"levels = 0"),
        (lambda: build("natural+randk", 1), r"a selection \(randk.*\) and then a quantiser.*randk\+natural"),
        (lambda: build("randk+topk", 1), r"a selection"),
        (lambda: build("randk+sign", 1), r"randk\+sign: no constant is known.*randk\+natural, or topk\+sign"),
        (lambda: build("randk+scaled-qsgd", 1), r"no constant is known"),
        (lambda: build("scaled-topk", 1), r"topk is contractive already: leave out"),
        (lambda: build("topk+qsgd", 9, levels=1).alpha(20), r"omega = 2 of qsgd at K = 9.*topk\+scaled-qsgd"),
        (lambda: TopK(1).omega(4), r"topk is contractive, not unbiased.*choose an unbiased one"),
        (lambda: ScaledSign().omega(4), r"sign is contractive"),
        (lambda: LowRank(1, blocks_of(16)).omega(16), r"lowrank is contractive"),
        (lambda: Scaled(RandK(1)).omega(4), r"scaled-randk is contractive"),
        (lambda: build("topk+natural", 1).omega(4), r"topk\+natural is contractive"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_independence_is_stated() -> None:
    assert {name: make(name, 16).independence for name in NAMES[:10]} == {
        "identity": "deterministic",
        "randk": "independent",
        "randblock": "shared-permutation",
        "topk": "deterministic",
        "qsgd": "independent",
        "natural": "independent",
        "sign": "deterministic",
        "bf16": "independent",
        "permk": "partition",
        "lowrank": "independent",
    }
    assert [name for name in NAMES[:10] if make(name, 16).everyone] == ["permk"]
    assert Identity().alpha(3) == 1


@pytest.mark.parametrize("levels", [1, 7, 127, 32_767])
def test_fixed_point_by_numpy_is_that_of_torch_and_never_passes_the_top(levels: int) -> None:
    """Vectors with one large entry reach the top exactly; numpy leaves out the clamp that torch applies."""
    whole, fraction = qsgd._fixed_point(torch.float32, levels)
    top = levels << fraction
    for seed in range(200):
        scale = 10.0 ** (seed % 75 - 37)
        vector = gaussian(5, torch.float32, seed) * torch.tensor([1.0, 1e-3, 1e-5, 1e-9, 0.0]) * scale
        norm = cache_blocks.two_norm(vector).unsqueeze(-1)
        if float(norm) > 0:
            drawn = []
            for draw in (qsgd._draw_on_cpu, qsgd._draw):
                for coin in (0, 1 << fraction - 1, (1 << fraction) - 1):
                    drawn.append(torch.empty(5, dtype=torch.int32))
                    draw(vector, norm, top, fraction, torch.full((5,), coin, dtype=whole), drawn[-1])
            assert torch.equal(torch.stack(drawn[:3]), torch.stack(drawn[3:]))
            assert int(torch.stack(drawn).abs().max()) <= levels


@pytest.mark.parametrize("width", [3, 5, 8, 9, 12, 16])
def test_what_is_taken_off_codes_and_what_checks_see(width: int) -> None:
    """`minus` after the check, of the last codes too; `low` shows every lowest byte once."""
    codes = np.random.default_rng(width).integers(0, 1 << width, 3 * 8 * 1000 + 5, dtype=np.uint16)
    seen: list[np.ndarray] = []
    data = bit_packing.pack(codes, width, check=lambda piece: seen.append(piece.copy()), low=width >= 8)
    read: list[np.ndarray] = []
    again = bit_packing.unpack(
        data, len(codes), width, np.uint16, lambda piece: read.append(piece.copy()), 3, width >= 8
    )
    assert np.array_equal(again, codes - np.uint16(3))
    for found in (np.concatenate(seen), np.concatenate(read)):
        assert np.array_equal(found, codes.astype(np.uint8) if width >= 8 else codes)
