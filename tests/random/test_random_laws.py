"""Keyed randomness: laws of the draws, and independence."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from keyed_twin import unsigned
from numpy.typing import NDArray
from rounding import ELEMENTARY, near
from torch import Tensor

import fedsample
import fedsample.random.keys
import fedsample.random.subsets
from fedsample.random import SERVER, Key, key


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
