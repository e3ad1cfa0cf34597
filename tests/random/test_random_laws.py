"""Keyed randomness: known answers, a numpy twin that agrees to the bit, laws, independence, and no generator."""

from __future__ import annotations

import ast
import hashlib
import itertools
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray
from rounding import ELEMENTARY, near, unit
from torch import Tensor

import fedsample
import fedsample.random.keys
import fedsample.random.subsets
from fedsample.compression import RandK
from fedsample.estimators import Diana, Links
from fedsample.fleets.faults import Faults
from fedsample.fleets.local import LocalFleet
from fedsample.random import SERVER, Key, key
from fedsample.random.keys import _circle, _log
from fedsample.strategies import Baoab, Cohort, Driver, Stability
from fedsample.targets import GaussianPrior, GeneralizedLinear
from fedsample.targets.metric import Identity

Words = NDArray[np.uint64]
Coordinate = int | NDArray[np.int64] | None


def unsigned(words: Tensor) -> Words:
    return words.numpy().view(np.uint64)


def same_bits(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Equal shapes, dtypes and bits: -0.0 is not 0.0 here."""
    return one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()


# --- the twin: numpy uint64, written from the definition and not from the torch code --------------------------------

GAMMA, FOLD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03)
LOG = (
    "3FE5555555555593 3FD999999997FA04 3FD2492494229359 3FCC71C51D8E78AF 3FC7466496CB03DE 3FC39A09D078C69F "
    "3FC2F112DF3E5244"
)
SIN = "BFC5555555555549 3F8111111110F8A6 BF2A01A019C161D5 3EC71DE357B1FE7D BE5AE5E68A2B9CEB 3DE5D93A5ACFD57C"
COS = "3FA555555555554C BF56C16C16C15177 3EFA01A019CB1590 BE927E4F809C52AD 3E21EE9EBDB4B1C4 BDA8FAE9BE8838D4"


def coefficients(words: str) -> NDArray[np.float64]:
    """The bit patterns that fdlibm prints beside its decimal constants."""
    return np.array([int(word, 16) for word in words.split()], dtype=np.uint64).view(np.float64)


def horner(x: NDArray[np.float64], words: str) -> NDArray[np.float64]:
    value = np.zeros_like(x)
    for coefficient in coefficients(words)[::-1]:
        value = value * x + coefficient
    return value


class Twin:
    """The streams of the keys `words`, in numpy alone."""

    def __init__(self, words: Words) -> None:
        self.words = words

    @staticmethod
    def mix(z: Words) -> Words:
        with np.errstate(over="ignore"):  # numpy warns of scalars that wrap, which is the point here
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))

    @classmethod
    def key(cls, seed: int, round: Coordinate, client: Coordinate, chain: Coordinate, purpose: str) -> Twin:
        result = cls(cls.mix(np.array(seed % 2**64, dtype=np.uint64))).fold(purpose)
        for name, value in (("client", client), ("chain", chain), ("round", round)):
            if value is not None:
                result = result.fold(name).fold(value)
        return result

    def fold(self, value: int | str | NDArray[np.int64]) -> Twin:
        if isinstance(value, str):
            value = int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little")
        salt = np.array(value % 2**64, np.uint64) if isinstance(value, int) else value.view(np.uint64)
        with np.errstate(over="ignore"):
            return Twin(self.mix(self.mix(self.words) ^ (salt * GAMMA + FOLD)))

    def integers64(self, n: int) -> Words:
        return self.mix(self.words[..., None] + np.arange(1, n + 1, dtype=np.uint64) * GAMMA)

    def uniform(self, n: int) -> NDArray[np.float64]:
        return (self.integers64(n) >> np.uint64(11)) / 2.0**53

    def integers(self, high: int, n: int) -> NDArray[np.int64]:
        return np.minimum(np.floor(self.uniform(n) * high), high - 1).astype(np.int64)

    def bernoulli(self, probability: float, n: int) -> NDArray[np.bool_]:
        return self.uniform(n) < probability

    def rademacher(self, n: int) -> NDArray[np.float64]:
        return np.where(self.integers64(n) >= np.uint64(2**63), -1.0, 1.0)

    def order(self, n: int) -> NDArray[np.int64]:
        """Positions by their words as signed numbers, where the low bits are replaced by the position."""
        width = np.uint64(max(1, (n - 1).bit_length()))
        tagged = (self.integers64(n) >> width << width) + np.arange(n, dtype=np.uint64)
        return np.argsort(tagged.view(np.int64), axis=-1)

    def subset(self, n: int, k: int) -> NDArray[np.int64]:
        """The first k distinct of uniform positions, ascending; above n / 2 all but the first n - k."""
        rows = self.integers(n, 40 * n).reshape(-1, 40 * n).tolist()
        few = [set(list(dict.fromkeys(row))[: min(k, n - k)]) for row in rows]
        chosen = [sorted(row if 2 * k <= n else set(range(n)) - row) for row in few]
        return np.array(chosen, dtype=np.int64).reshape(*self.words.shape, k)

    def normal(self, n: int) -> NDArray[np.float64]:
        pairs = -(-n // 2)
        words = self.integers64(2 * pairs)
        u = ((words[..., :pairs] >> np.uint64(11)) + np.uint64(1)) / 2.0**53
        mantissa, exponent = np.frexp(u)
        low = mantissa < math.sqrt(0.5)
        f = np.where(low, 2.0 * mantissa, mantissa) - 1.0
        e = (exponent - low).astype(np.float64)
        s = f / (2.0 + f)
        z = s * s
        half = 0.5 * (f * f)
        ln2 = coefficients("3FE62E42FEE00000 3DEA39EF35793C76")
        log = e * ln2[0] - ((half - (s * (half + z * horner(z, LOG)) + e * ln2[1])) - f)
        radius = np.sqrt(-2.0 * log)
        other = words[..., pairs:]
        angle = (((other >> np.uint64(13)) + 0.5) / 2.0**51 - 0.5) * (math.pi / 2)
        w = angle * angle
        sine = angle + (angle * w) * horner(w, SIN)
        cosine = 1.0 - (0.5 * w - (w * w) * horner(w, COS))
        cosine = np.where(other & np.uint64(1), -cosine, cosine)
        swap = (other & np.uint64(2)).astype(bool)
        return np.concatenate([radius * np.where(swap, sine, cosine), radius * np.where(swap, cosine, sine)], axis=-1)[
            ..., :n
        ]


# --- known answers --------------------------------------------------------------------------------------------------


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


# --- the twin agrees to the bit -------------------------------------------------------------------------------------

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


# --- accuracy of the elementary functions ---------------------------------------------------------------------------


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


# --- laws -----------------------------------------------------------------------------------------------------------


def z_of_mean(values: NDArray[Any], mean: float, deviation: float) -> float:
    return abs(float(values.mean()) - mean) / (deviation / math.sqrt(values.size))


# Keys that differ in one coordinate only, as close as they come; (200,) keys a family.
STEPS = torch.arange(200)
FAMILIES: dict[str, Key] = {
    "round": key(0, STEPS, 0, 0, "law"),
    "client": key(0, 1, STEPS, 0, "law"),
    "chain": key(0, 1, 0, STEPS, "law"),
    "seed": Key(torch.stack([key(s, 1, 0, 0, "law").tensor() for s in range(200)])),
    "purpose": Key(torch.stack([key(0, 1, 0, 0, f"law{s}").tensor() for s in range(200)])),
    "bits": key(0, torch.tensor([0] + [1 << b for b in range(63)] * 4)[:200], 0, torch.arange(200) // 64, "law"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_normals_are_normal_within_and_across_keys(family: str) -> None:
    draws = FAMILIES[family].normal(250).numpy()  # (200 keys, 250)
    assert z_of_mean(draws, 0, 1) < 5
    assert z_of_mean(draws**2, 1, math.sqrt(2)) < 5
    assert z_of_mean(draws**3, 0, math.sqrt(15)) < 5
    assert z_of_mean(draws**4, 3, math.sqrt(96)) < 5
    assert scipy.stats.kstest(draws.ravel(), "norm").pvalue > 1e-6
    # The first draw of each key: one number a key is how coins and starts are used.
    assert scipy.stats.kstest(draws[:, 0], "norm").pvalue > 1e-6
    assert scipy.stats.kstest((draws**2).sum(1), "chi2", args=(250,)).pvalue > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbouring_keys_are_uncorrelated(family: str) -> None:
    draws = FAMILIES[family].normal(250).numpy()
    bound = 5.0
    for lag in (1, 2, 16):  # 64-bit words, so lags that are powers of two share most bits of the coordinate
        here, there = draws[:-lag], draws[lag:]
        size = math.sqrt(here.size)
        assert abs((here * there).mean()) * size < bound
        assert abs(((here**2 - 1) * (there**2 - 1)).mean()) / 2 * size < bound
        assert abs((here[:, 1:] * there[:, :-1]).mean()) * size < bound  # nor is one stream the next one's, shifted
    for lag in (1, 2, 125):  # within a stream; 125 apart lie the two normals of a pair
        here, there = draws[:, :-lag], draws[:, lag:]
        assert abs((here * there).mean()) * math.sqrt(here.size) < bound
        assert abs(((here**2 - 1) * (there**2 - 1)).mean()) / 2 * math.sqrt(here.size) < bound


def assert_avalanche(keys: Key) -> None:
    """Every output bit is balanced, and flips with probability one half from one key to the next."""
    words = unsigned(keys.integers64(40))
    for each in (words, words[1:] ^ words[:-1]):
        bits = np.unpackbits(each.reshape(-1, 1).view(np.uint8), axis=-1)
        z = (bits.mean(0) - 0.5) * 2 * math.sqrt(len(bits))
        assert np.abs(z).max() < 5.5, z


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_is_balanced_and_flips_between_neighbours(family: str) -> None:
    assert_avalanche(FAMILIES[family])


def test_a_weak_mixer_is_caught() -> None:
    class Weak(Key):
        def integers64(self, n: int) -> Tensor:  # the counter without the finaliser
            return self.tensor().unsqueeze(-1) + torch.arange(1, n + 1) * 0x1E3779B97F4A7C15

    with pytest.raises(AssertionError):
        assert_avalanche(Weak(torch.arange(200)))


def test_purposes_and_coordinates_never_share_a_stream() -> None:
    some = (None, 0, 1, 2)
    keys = [key(*each) for each in itertools.product((0, 1), some, (*some, SERVER), some, ("", "a"))]
    words = {k.words for k in keys}
    assert len(words) == len(keys)
    assert key(0, client=1).words != key(0, chain=1).words != key(0, round=1).words
    streams = torch.stack([k.integers64(8) for k in keys]).flatten()
    assert len(streams.unique()) == len(streams)


def test_seeds_of_any_sign_and_size() -> None:
    seeds = [0, 1, -1, 2, -2, 2**31, -(2**31), 2**32, 2**63 - 1, 2**63, -(2**63) + 1, 2**64 - 3]
    assert len({key(seed).words for seed in seeds}) == len(seeds)
    for seed in seeds:
        assert 0 <= key(seed, purpose="x").words < 2**64  # type: ignore[operator]
        assert bool(torch.isfinite(key(seed, 1, 2, 3, "x").normal(50)).all())
    assert key(-1).words == key(2**64 - 1).words  # seeds count modulo 2^64


def test_fold_never_repeats_for_different_values() -> None:
    values = torch.cat([torch.arange(-50_000, 50_000), torch.tensor([1 << b for b in range(20, 63)])])
    assert len(key(0).fold(values).tensor().unique()) == len(values)


def test_uniform_integers_and_signs() -> None:
    keys = FAMILIES["round"]
    uniform = keys.uniform(250)
    assert uniform.dtype == torch.float64
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
    assert scipy.stats.kstest(uniform.numpy().ravel(), "uniform").pvalue > 1e-6
    assert torch.equal(uniform * 2**53, (uniform * 2**53).round())
    assert scipy.stats.chisquare(np.bincount(keys.integers(13, 250).numpy().ravel(), minlength=13)).pvalue > 1e-6
    assert z_of_mean(keys.rademacher(250).numpy(), 0, 1) < 5
    assert set(keys.rademacher(250, torch.float32).unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.999])
def test_bernoulli_has_its_probability(p: float) -> None:
    for family in ("round", "client", "chain"):
        assert z_of_mean(FAMILIES[family].bernoulli(p, 250).numpy(), p, math.sqrt(p * (1 - p))) < 5
    single = key(0, torch.arange(20_000), SERVER, 0, "sync").bernoulli(p)  # one coin per round, as marina tosses it
    assert single.shape == (20_000,)
    assert z_of_mean(single.numpy(), p, math.sqrt(p * (1 - p))) < 5


def test_bernoulli_zero_never_and_one_always() -> None:
    keys = FAMILIES["round"]
    assert not keys.bernoulli(0.0, 500).any()
    assert keys.bernoulli(1.0, 500).all()
    assert not keys.bernoulli(0.0).any()
    assert keys.bernoulli(1.0).all()


def key_whose_first_word_is(word: int) -> Key:
    """Undo the finaliser, step by step, and the first increment."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        whole = word
        for _ in range(64 // shift + 1):  # the high bits are right, and each pass mends the next ones
            whole = word ^ (whole >> shift)
        word = whole * pow(factor, -1, 1 << 64) % 2**64
    return Key((word - 0x9E3779B97F4A7C15) % 2**64)


@pytest.mark.parametrize("word", [0, 1, 2**64 - 1, 2**63, 2**63 - 1, 2**11 - 1, 2**64 - 2**11])
def test_extreme_words_make_no_extreme_draws(word: int) -> None:
    k = key_whose_first_word_is(word)
    assert unsigned(k.integers64(1)).tolist() == [word]
    uniform = float(k.uniform(1))
    assert uniform == (word >> 11) / 2**53
    assert 0 <= uniform < 1
    assert not k.bernoulli(0.0)
    assert k.bernoulli(1.0)
    assert bool(k.bernoulli(2.0**-53)) == (word < 2**11)
    assert bool(k.bernoulli(1 - 2.0**-53)) == (word < 2**64 - 2**11)
    for high in (1, 2, 3, 10, 2**53):
        assert int(k.integers(high, 1)) == min(int(uniform * high), high - 1)
    radius = float(k.normal(2).norm())
    assert radius == near(math.sqrt(-2 * math.log(uniform + 2.0**-53)), 2 * ELEMENTARY + 4)
    assert radius < 8.6


def assert_uniform_subsets(subsets: NDArray[np.int64], n: int, *, ordered: bool = False) -> None:
    """(N, k) subsets of n: each, and with it each element and each pair, equally likely; `ordered`: each order too."""
    count, k = subsets.shape
    member = np.zeros((count, n))
    np.put_along_axis(member, subsets, 1.0, axis=1)
    assert (member.sum(1) == k).all()
    one = k / n
    assert np.abs(member.mean(0) - one).max() < 5 * math.sqrt(one * (1 - one) / count) + 1e-12
    pair = k * (k - 1) / (n * (n - 1)) if n > 1 else 0.0
    together = (member.T @ member / count)[~np.eye(n, dtype=bool)]
    assert np.abs(together - pair).max(initial=0) < 5 * math.sqrt(pair * (1 - pair) / count) + 1e-12
    every = itertools.permutations(range(n), k) if ordered else itertools.combinations(range(n), k)
    number = {chosen: i for i, chosen in enumerate(every)}
    counts = np.bincount([number[tuple(row)] for row in subsets.tolist()], minlength=len(number))
    if len(number) > 1:
        assert scipy.stats.chisquare(counts).pvalue > 1e-6


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (5, 1), (5, 2), (5, 4), (6, 3), (4, 4)])
def test_every_subset_is_equally_likely(n: int, k: int) -> None:
    rounds = torch.arange(12_000)
    assert_uniform_subsets(key(3, rounds, 1, 0, "uplink").subset(n, k).numpy(), n)
    assert_uniform_subsets(key(3, 7, rounds, 0, "uplink").subset(n, k).numpy(), n)


def test_a_biased_subset_is_caught() -> None:
    draws = key(3, torch.arange(12_000)).integers(5, 1)
    contiguous = torch.cat([draws, (draws + 1) % 5], dim=1).sort().values.numpy()  # right for each, wrong for pairs
    with pytest.raises(AssertionError):
        assert_uniform_subsets(contiguous, 5)


def test_every_permutation_is_equally_likely() -> None:
    assert_uniform_subsets(key(3, torch.arange(12_000), purpose="p").permutation(4).numpy(), 4, ordered=True)
    assert torch.equal(key(0).permutation(1000).sort().values, torch.arange(1000))


@pytest.mark.parametrize("n", [1, 2, 3, 20, 650, 3000])
def test_rows_together_alone_and_on_a_device_choose_the_same(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's and torch's picks, and the path of large vectors, of one definition; and when rows need a second look."""
    keys = key(9, torch.arange(3).unsqueeze(-1), chain=torch.arange(20), purpose="rows")
    for k in sorted({0, 1, n // 20, n // 3, n // 2, n // 2 + 1, n - 1, n}):
        rows = keys.subset(n, k)
        assert rows.shape == (3, 20, k)
        assert torch.equal(key(9, 2, chain=7, purpose="rows").subset(n, k), rows[2, 7])
        variants: list[tuple[Any, str, Any]] = [
            (fedsample.random.keys, "_ALONE", 0),
            (fedsample.random.subsets, "_pick_on_cpu", fedsample.random.subsets._pick),
            (fedsample.random.subsets, "_enough", lambda n, k: max(1, k)),
        ]
        for module, name, value in variants:
            with monkeypatch.context() as patch:
                patch.setattr(module, name, value)
                assert torch.equal(keys.subset(n, k), rows), name


def test_large_subsets_are_subsets() -> None:
    chosen = key(8, torch.arange(3), purpose="big").subset(100_000, 5_000)
    assert all(len(row.unique()) == 5_000 for row in chosen)
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < 100_000
    inside = chosen.to(torch.float64).mean(-1)
    assert float(((inside - 49_999.5).abs() / (100_000 / math.sqrt(12 * 5_000))).max()) < 5


def test_draws_of_one() -> None:
    k = key(4, torch.arange(3), purpose="one")
    assert k.permutation(1).tolist() == [[0]] * 3
    assert k.subset(1, 1).tolist() == [[0]] * 3
    assert k.integers(1, 1).tolist() == [[0]] * 3
    assert k.normal(1).shape == k.uniform(1).shape == (3, 1)
    assert key(4).normal(1).shape == (1,)
    assert key(4).bernoulli(0.5).shape == ()
    assert key(4).normal(0).shape == (0,)


def test_keys_are_values() -> None:
    assert key(1, 2, 3, 4, "x") == key(1, 2, 3, 4, "x")
    assert hash(key(1, 2, 3, 4, "x")) == hash(key(1, 2, 3, 4, "x"))
    assert key(1, 2, 3, 4, "x", device="meta").device == torch.device("meta")


# --- no generator anywhere ------------------------------------------------------------------------------------------

_TORCH_DRAWS = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli",
    "multinomial", "poisson", "binomial", "dropout", "alpha_dropout", "manual_seed", "seed", "initial_seed",
    "get_rng_state", "set_rng_state", "fork_rng", "Generator", "default_generator", "random", "distributions",
    "init", "kaiming_uniform_", "xavier_uniform_",
}  # fmt: skip
_METHODS = {
    "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_", "geometric_", "log_normal_",
    "multinomial", "manual_seed", "manual_seed_all",
}  # fmt: skip


def generators(source: str, *, seeded_numpy: bool) -> list[str]:
    """Every use of a generator with a state, as 'line: name'; `seeded_numpy` allows numpy's default_rng(seed)."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # local name -> what it stands for
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                names[each.asname or each.name.split(".")[0]] = each.name if each.asname else each.name.split(".")[0]
                if each.name.split(".")[0] == "random" or each.name.startswith("numpy.random"):
                    found.append(f"{node.lineno}: import {each.name}")
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for each in node.names:
                names[each.asname or each.name] = f"{node.module}.{each.name}"
                if node.module.split(".")[0] == "random":
                    found.append(f"{node.lineno}: from random import {each.name}")

    def path(node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return names.get(node.id, "")
        if isinstance(node, ast.Attribute):
            root = path(node.value)
            return f"{root}.{node.attr}" if root else ""
        return ""

    allowed = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and seeded_numpy
        and path(node.func) == "numpy.random.default_rng"
        and (node.args or node.keywords)
        and not any(isinstance(a, ast.Constant) and a.value is None for a in node.args)
    }
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute | ast.Name) or id(node) in inner or id(node) in allowed:
            continue
        parts = path(node).split(".")
        draws = parts[0] == "torch" and any(part in _TORCH_DRAWS for part in parts[1:])
        fills = isinstance(node, ast.Attribute) and node.attr in _METHODS
        if draws or fills or parts[:2] == ["numpy", "random"]:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return sorted(set(found))


PLANTED = [
    "import torch\nx = torch.randn(3)",
    "import torch as t\nx = t.rand(3)",
    "from torch import randint\nx = randint(0, 3, (1,))",
    "from torch import randn as draw\nx = draw(3)",
    "import torch\ntorch.manual_seed(0)",
    "import torch\ntorch.cuda.manual_seed_all(0)",
    "import torch\ndraw = torch.randperm",
    "import torch\ng = torch.Generator()",
    "import torch\nx = torch.empty(3).normal_()",
    "def f(x):\n    return x.uniform_(0, 1)",
    "def f(x):\n    x.bernoulli_(0.5)\n    return x",
    "def f(x):\n    return x.random_()",
    "import torch\nx = torch.multinomial(w, 3)",
    "def f(w):\n    return w.multinomial(3)",
    "from torch.distributions import Normal\nx = Normal(0, 1)",
    "from torch import nn\nnn.init.zeros_(w)",
    "from torch.nn import functional as F\ny = F.dropout(x)",
    "import random\nx = random.random()",
    "from random import shuffle\nshuffle(x)",
    "import random as r",
    "import numpy as np\nnp.random.seed(0)",
    "import numpy as np\nx = np.random.normal()",
    "import numpy as np\nx = np.random.RandomState(0)",
    "import numpy\nx = numpy.random.shuffle(y)",
    "from numpy import random\nx = random.rand(3)",
    "from numpy.random import normal\nx = normal()",
    "import numpy.random",
    "import numpy as np\nrng = np.random.default_rng()",
    "import numpy as np\nrng = np.random.default_rng(None)",
    "import numpy as np\nmake = np.random.default_rng",
]
HARMLESS = [
    "from fedsample.random import key\nx = key(0).normal(3)",
    "import fedsample.random\nx = fedsample.random.key(0).uniform(2)",
    "from fedsample import random\nx = random.key(0)",
    "import torch\nx = torch.zeros(3).sum()\nnormal = 1",
    "'torch.randn and np.random.seed in a docstring'",
    "from fedsample.compression import RandK\nx = RandK(3)",
]
SEEDED = "import numpy as np\nx = np.random.default_rng(0).permutation(9)"


@pytest.mark.parametrize("source", PLANTED)
def test_the_scan_sees_a_planted_generator(source: str) -> None:
    assert generators(source, seeded_numpy=True)
    assert generators(source, seeded_numpy=False)


@pytest.mark.parametrize("source", HARMLESS)
def test_the_scan_passes_what_is_harmless(source: str) -> None:
    assert generators(source, seeded_numpy=False) == []


def test_the_scan_allows_a_seeded_generator_where_asked() -> None:
    assert generators(SEEDED, seeded_numpy=True) == []
    assert generators(SEEDED, seeded_numpy=False)


def test_no_file_of_the_package_uses_a_generator() -> None:
    root = Path(fedsample.__file__).parent
    # An installed package has the benchmarks in `bench`: what they compare with draws as its users would.
    # Flower's apps draw from the global generators: `global_rng.py` keeps both sides' states apart, for them alone.
    apart = root / "fleets" / "flower_grid" / "global_rng.py"
    files = sorted(each for each in root.rglob("*.py") if root / "bench" not in each.parents and each != apart)
    assert len(files) > 40
    assert root / "random" / "keys.py" in files
    assert apart.exists()
    found = {
        str(file.relative_to(root)): uses
        for file in files
        # A dataset's published rule may name numpy's generator and its seed; nothing else may.
        if (uses := generators(file.read_text(encoding="utf-8"), seeded_numpy=file.parent == root / "data"))
    }
    assert found == {}


def sample_a_little() -> Tensor:
    """A few rounds of everything that draws: noise, momenta, coins, cohorts, masks, minibatches, faults."""
    keys = key(5, purpose="data")
    x, y = keys.normal(40 * 3).view(40, 3), keys.integers(2, 40)
    clients = GeneralizedLinear(x, y, torch.tensor([0, 10, 25, 40]), "categorical", 2)
    uplink = Diana(RandK(0.5))
    faults = Faults(3, 5, loss=0.2, dropout=0.05, dropout_rounds=2.0)
    fleet = LocalFleet(clients, uplink, 5, 2, batch_size=4, faults=faults)
    sampler = Driver(
        Baoab(step_size=0.05, temperature=1.0, seed=5, friction=1.0),
        Links(uplink),
        GaussianPrior(1.0),
        Identity(torch.zeros(clients.d, dtype=torch.float64)),
        cohort=Cohort(3, 2, 5, 2),
        stability=Stability(1.0, 1.0, 1e6),
    )
    state = sampler.begin(torch.zeros(2, clients.d, dtype=torch.float64))
    for _ in range(20):
        request = sampler.request(state)
        state = sampler.update(state, request, fleet.exchange(request))
    return state.params


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Fails if the global generators of torch, numpy or Python have moved."""

    def states() -> tuple[bytes, ...]:
        legacy = np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().numpy().tobytes(), repr(legacy).encode(), repr(random.getstate()).encode()

    before = states()
    yield
    assert states() == before, "a global generator has moved"


def test_sampling_leaves_the_global_generators_alone_and_ignores_them() -> None:
    with untouched_generators():
        first = sample_a_little()
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        torch.manual_seed(77)
        np.random.seed(77)  # noqa: NPY002
        random.seed(77)
        again = sample_a_little()
        for move in (lambda: torch.rand(1), lambda: np.random.rand(), random.random):  # noqa: NPY002
            with pytest.raises(AssertionError, match="moved"), untouched_generators():  # the guard can fail
                move()
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
    assert torch.equal(first, again)
    assert bool(torch.isfinite(first).all())
    assert float(first.std()) > 0


@pytest.mark.parametrize(("n", "start", "end"), [(100, 20, 40), (70_000, 0, 70_000), (200_003, 0, 10_000),
    (200_003, 190_003, 200_003), (200_003, 77_777, 90_000), (1 << 17, 5, 6)])  # fmt: skip
def test_places_of_a_permutation_are_those_of_the_whole(
    n: int, start: int, end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of a large one without making the whole, which is what is left where the guess fails."""
    keys = [key(seed, purpose="places") for seed in range(3)]
    whole = [one.permutation(n) for one in keys]
    if n > 1 << 16:
        monkeypatch.delattr(Key, "permutation")
    for one, places in zip(keys, whole, strict=True):
        assert torch.equal(one.permuted(n, start, end), places[start:end])
