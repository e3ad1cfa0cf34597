"""Keyed randomness a second time, in numpy: written from the definition and not from the torch code."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]
Coordinate = int | NDArray[np.int64] | None


def unsigned(words: Tensor) -> Words:
    return words.numpy().view(np.uint64)


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
