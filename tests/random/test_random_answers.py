"""Keyed randomness: known answers, a numpy twin that agrees to the bit, and accurate functions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from keyed_twin import Twin, unsigned
from numpy.typing import NDArray
from rounding import near, unit

from fedsample.random import SERVER, Key, key
from fedsample.random.keys import _circle, _log


def same_bits(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Equal shapes, dtypes and bits: -0.0 is not 0.0 here."""
    return one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()


# --- known answers ----------------------------------------------------------------------------------------------------


def test_a_stream_is_splitmix64_as_published() -> None:
    # The first outputs of the reference implementation for seed 1234567 (Vigna, prng.di.unimi.it/splitmix64.c).
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert unsigned(Key(1234567).integers64(4)).tolist() == published


KNOWN_WORDS = [
    ((0,), [0x657CA8FF4B05D8F0, 0x102640FBD7999692, 0xBE63FE84A7D9AFA9]),
    ((1,), [0xF2CA5B128891C346, 0x31ADB1A488E9890F, 0x8713EDC4FE933581]),
    ((-1,), [0x0F070A20218399BF, 0x2AC3CE2237D74FA9, 0xB9E764754BDF938F]),
    ((9223372036854775808,), [0x33948E1BC61DCFD0, 0x35123A34BEF0B981, 0x0D8046643969F1E4]),
    ((0, 1), [0xDB088686F2686EFF, 0x49316B4C690965A6, 0xAFD1225300430F80]),
    ((0, None, 1), [0xBDAEACCC94CAED6E, 0xE94F0A10B5B78B02, 0x98217EEEE5CB24F0]),
    ((0, None, None, 1), [0xAF35BC2AF0EC57FB, 0xCC19525420EC17B2, 0x72C79DFE530FBD1A]),
    ((0, 1, 2, 3, "uplink"), [0x0BE1F9FF05236ED5, 0x80CDDC0DBA7EBF02, 0x1571053C87799D30]),
    ((0, 1, -1, 3, "noise"), [0xA98AF3A9767C0976, 0x674F0393109B8103, 0x6B2ECAC17264A69A]),
    ((20240229, 8000, 99, 3, "faults/presence"), [0xD89612CC687B2A34, 0x9D6DC0722F1F0951, 0x8AACB7D4367BB5F7]),
    ((0, None, None, None, "µ"), [0x7C58811BC3A2DB63, 0xF388CC380AED9397, 0x24C5CA6BFA97CFDF]),
]


@pytest.mark.parametrize(("coordinates", "first"), KNOWN_WORDS)
def test_known_words(coordinates: tuple[Any, ...], first: list[int]) -> None:
    assert unsigned(key(*coordinates).integers64(3)).tolist() == first


def test_known_draws_of_every_kind() -> None:
    k = key(2024, 17, 3, 1, "known")
    assert [u.hex() for u in k.uniform(2).tolist()] == ["0x1.9123d42d6580fp-1", "0x1.c3ac618c68351p-1"]
    five = "0x1.60dd04a699c06p-1 -0x1.fdc1843b196efp-2 -0x1.3eb295666e513p-1 0x1.d3ed7ddd3d201p-4 -0x1.ba791a54b7754p-5"
    assert [z.hex() for z in k.normal(5).tolist()] == five.split()
    three = "0x1.d3812e0000000p-3 0x1.f9d8660000000p-2 0x1.520b400000000p-1"  # other pairs: two words each, not three
    assert [z.hex() for z in k.normal(3, torch.float32).tolist()] == three.split()
    assert k.integers(10, 8).tolist() == [7, 8, 7, 6, 4, 0, 0, 0]
    assert k.bernoulli(0.25, 12).int().tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 0]
    assert k.bernoulli(0.25).item() is False
    assert k.rademacher(8).tolist() == [-1, -1, -1, -1, 1, 1, 1, 1]
    assert k.subset(50, 6).tolist() == [2, 21, 30, 35, 39, 44]
    assert k.permutation(8).tolist() == [3, 2, 0, 1, 5, 6, 7, 4]


# --- the twin agrees to the bit ---------------------------------------------------------------------------------------


SCALARS: list[tuple[Any, ...]] = [
    (0, None, None, None, ""),
    (0, None, None, None, "noise"),
    (1, 1, None, None, "noise"),
    (-1, 1, SERVER, 0, "sync"),
    (-(2**63), 2**31, 7, 3, "uplink"),
    (2**63, 0, 0, 0, "uplink"),
    (2**200 + 5, 10**9, 10**6, 63, "faults/loss"),
    (7, -5, -6, -7, "naïve µ ∂U"),
    (31337, None, 4, None, "batch"),
    (31337, None, None, 4, "batch"),
]
ROUNDS, CLIENTS, CHAINS = np.arange(4)[:, None, None], np.arange(-1, 4)[:, None], np.array([0, 1, 2**62, -(2**63)])
BATCHED: list[tuple[Any, ...]] = [
    (5, None, CLIENTS, CHAINS, "uplink"),
    (-5, ROUNDS, CLIENTS, CHAINS, "a"),
    (5, 3, None, CHAINS, "b"),
    (5, ROUNDS, 2, None, "c"),
]


def both(coordinates: tuple[Any, ...]) -> tuple[Key, Twin]:
    tensors = [torch.from_numpy(c) if isinstance(c, np.ndarray) else c for c in coordinates]
    return key(*tensors), Twin.key(*coordinates)


@pytest.mark.parametrize("coordinates", SCALARS + BATCHED, ids=lambda c: f"{c[0]}-{c[4]}")
def test_the_numpy_twin_agrees_to_the_bit(coordinates: tuple[Any, ...]) -> None:
    k, twin = both(coordinates)
    assert same_bits(unsigned(k.tensor()), twin.words)
    assert same_bits(unsigned(k.integers64(7)), twin.integers64(7))
    for name in ("x", "round", ""):
        assert same_bits(unsigned(k.fold(name).tensor()), twin.fold(name).words)
    for value in (0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1, 3**50):
        assert same_bits(unsigned(k.fold(value).tensor()), twin.fold(value).words)
    for n in (1, 2, 3, 64, 65, 1001):
        assert same_bits(k.uniform(n).numpy(), twin.uniform(n))
        assert same_bits(k.normal(n).numpy(), twin.normal(n))
        assert same_bits(k.normal(n, torch.float32).numpy(), twin.normal(n).astype(np.float32))
        assert same_bits(k.rademacher(n).numpy(), twin.rademacher(n))
        assert same_bits(k.permutation(n).numpy(), twin.order(n))
        for high in (1, 2, 7, 2**40 + 1):
            assert same_bits(k.integers(high, n).numpy(), twin.integers(high, n))
        for p in (0.0, 2.0**-53, 0.1, 1 / 3, 0.5, 1 - 2.0**-53, 1.0):
            assert same_bits(k.bernoulli(p, n).numpy(), twin.bernoulli(p, n))
        for chosen in {1, (n + 1) // 2, n}:
            assert same_bits(k.subset(n, chosen).numpy(), twin.subset(n, chosen))
    assert same_bits(k.bernoulli(0.3).numpy(), twin.bernoulli(0.3, 1)[..., 0])


def test_the_twin_agrees_over_many_normals() -> None:
    k, twin = both((99, np.arange(400), None, None, "many"))
    assert same_bits(k.normal(1000).numpy(), twin.normal(1000))


def test_folds_by_tensor_and_by_integer_agree() -> None:
    values = [0, 1, -1, 12345, 2**63 - 1, -(2**63)]
    scalar, batched = key(3, purpose="p"), key(3, purpose="p").fold(torch.tensor(values))
    nested = batched.fold(9).fold("x").fold(torch.tensor([[4], [5]]))
    for i, value in enumerate(values):
        assert unsigned(scalar.fold(value).tensor()) == unsigned(batched.tensor())[i]
        for j, last in enumerate((4, 5)):
            assert unsigned(scalar.fold(value).fold(9).fold("x").fold(last).tensor()) == unsigned(nested.tensor())[j, i]


def test_batched_keys_draw_what_their_scalar_keys_draw() -> None:
    clients, chains = torch.tensor([SERVER, 0, 5]), torch.tensor([0, 9])
    grid = key(11, 42, clients.unsqueeze(-1), chains, "grid")
    assert grid.shape == (3, 2)
    draws = {
        "words": lambda k: k.integers64(5),
        "uniform": lambda k: k.uniform(5),
        "integers": lambda k: k.integers(10, 5),
        "coin": lambda k: k.bernoulli(0.4),
        "coins": lambda k: k.bernoulli(0.4, 5),
        "signs": lambda k: k.rademacher(5, torch.float32),
        "normal": lambda k: k.normal(5),
        "normal32": lambda k: k.normal(5, torch.float32),
        "subset": lambda k: k.subset(9, 4),
        "permutation": lambda k: k.permutation(9),
    }
    for name, draw in draws.items():
        together = draw(grid)
        for i, client in enumerate(clients.tolist()):
            for j, chain in enumerate(chains.tolist()):
                assert torch.equal(together[i, j], draw(key(11, 42, client, chain, "grid"))), name


def test_a_longer_draw_does_not_change_words_but_pairs_normals_anew() -> None:
    k = key(1)
    assert torch.equal(k.integers64(9)[:4], k.integers64(4))
    assert torch.equal(k.normal(7), k.normal(8)[:7])  # the same number of pairs


# --- accuracy of the elementary functions -----------------------------------------------------------------------------


def test_the_logarithm_is_accurate_to_one_unit_in_the_last_place() -> None:
    edge = [2.0**-53, 2.0**-52, 0.5, 1.0, 1 - 2.0**-53, 1 - 2.0**-52, math.sqrt(0.5), np.nextafter(math.sqrt(0.5), 0)]
    u = torch.cat([torch.tensor(edge, dtype=torch.float64), key(0).uniform(20_000) + 2.0**-53])
    exact = np.log(u.numpy().astype(np.longdouble))
    error = np.abs(_log(u).numpy() - exact) / np.maximum(np.spacing(np.abs(exact.astype(np.float64))), 5e-324)
    assert error.max() < 1.0
    assert float(_log(torch.ones(1, dtype=torch.float64))) == 0.0


def test_circle_points_lie_on_the_circle_in_all_eight_octants() -> None:
    extreme = torch.tensor([0, 1, 2, 3, -1, -2, -3, -4, 1 << 62, -(1 << 62), (1 << 63) - 1, -(1 << 63)])
    x, y = _circle(torch.cat([extreme, key(0).integers64(20_000)]))
    assert (
        float((x * x + y * y - 1).abs().max()) <= 2 * 4 * unit()
    )  # cosine and sine off by an ulp at most, and three here
    counts = np.bincount(((torch.atan2(y, x).numpy() + math.pi) // (math.pi / 4)).astype(int), minlength=8)
    assert scipy.stats.chisquare(counts).pvalue > 1e-6
    middle = torch.tensor([0, 1, 2, 3]) - (1 << 63)  # the angle is the top 51 bits; bit 0 the sign, bit 1 the swap
    assert torch.stack(_circle(middle), -1).round().tolist() == [[1, 0], [-1, 0], [0, 1], [0, -1]]
    least = [float(part) for part in _circle(torch.tensor(0))]  # half a step above -pi / 4
    assert least == near([math.sqrt(0.5), -math.sqrt(0.5)], 4)
