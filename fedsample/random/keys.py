"""Keyed random streams: the same key gives the same draw on every fleet, device and library.

There is no generator and no state. A draw is a pure function of `(seed, purpose, client, chain, round)`: the
coordinates are folded into a 64-bit key with the SplitMix64 finaliser, and word i of a key's stream is

    word(key, i) = mix(key + (i + 1) * GAMMA)   (mod 2^64),

SplitMix64 itself (Steele, Lea & Flood, OOPSLA 2014, doi 10.1145/2660193.2660195) started at the key. Everything is
64-bit integer arithmetic, so CPU, CUDA and numpy agree to the bit. Normals are made in float64 from additions,
multiplications, divisions and square roots alone, which IEEE 754 rounds the same way everywhere (library logarithms
and sines do not), and are rounded to the wanted dtype last.

Keys may be batched: a key over clients (n, 1) and chains (C,) draws (n, C, ...) at once, each entry equal to the
draw of its own scalar key.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsample.random.subsets import alone, sort, together

SERVER = -1  # the client index under which the server draws

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_FOLD = 0xD1B54A32D192ED03  # an odd constant that makes fold(value) differ from word(i)
_MASK = (1 << 64) - 1
_CPU = torch.device("cpu")
_PIECE = 1 << 14  # words made together on a CPU: they and their scratch fit its cache
_ALONE = 1 << 16  # from this many positions on, subsets are drawn key by key, since one fills the cache
_local = threading.local()
_27, _30, _31, _FACTOR_1, _FACTOR_2 = (np.uint64(each) for each in (27, 30, 31, _MIX_1, _MIX_2))
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10

# Minimax polynomials of log, sin and cos on their reduced ranges; coefficients published with FreeBSD's msun / fdlibm
# (Sun Microsystems, 1993): e_log.c, k_sin.c, k_cos.c. Errors stay below one unit in the last place.
_LOG = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
_SIN = (
    -1.66666666666666324348e-01,
    8.33333333332248946124e-03,
    -1.98412698298579493134e-04,
    2.75573137070700676789e-06,
    -2.50507602534068634195e-08,
    1.58969099521155010221e-10,
)
_COS = (
    4.16666666666666019037e-02,
    -1.38888888888741095749e-03,
    2.48015872894767294178e-05,
    -2.75573143513906633035e-07,
    2.08757232129817482790e-09,
    -1.13596475577881948265e-11,
)


def _signed(word: int) -> int:
    """The two's-complement int64 with the same 64 bits."""
    word &= _MASK
    return word - (1 << 64) if word >> 63 else word


def _shift(words: Tensor, by: int) -> Tensor:
    """Logical right shift; torch's `>>` on int64 is arithmetic, and on a CPU ten times slower than numpy's."""
    if words.device.type == "cpu":
        return torch.from_numpy(np.asarray(words.numpy().view(np.uint64) >> np.uint64(by)).view(np.int64))
    return (words >> by) & ((1 << (64 - by)) - 1)


def _mix(words: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of the 64-bit words."""
    if words.device.type == "cpu":
        mixed = words.numpy().view(np.uint64).copy(order="C")
        _mix_(mixed, np.empty_like(mixed))
        return torch.from_numpy(mixed.view(np.int64))
    words = (words ^ _shift(words, 30)) * _signed(_MIX_1)
    words = (words ^ _shift(words, 27)) * _signed(_MIX_2)
    return words ^ _shift(words, 31)


def _mix_(words: NDArray[np.uint64], scratch: NDArray[np.uint64]) -> None:
    """The same in place, by numpy, whose 64-bit shifts use vector instructions."""
    np.right_shift(words, _30, out=scratch)
    np.bitwise_xor(words, scratch, out=words)
    np.multiply(words, _FACTOR_1, out=words)
    np.right_shift(words, _27, out=scratch)
    np.bitwise_xor(words, scratch, out=words)
    np.multiply(words, _FACTOR_2, out=words)
    np.right_shift(words, _31, out=scratch)
    np.bitwise_xor(words, scratch, out=words)


def _scratch(size: int) -> NDArray[np.uint64]:
    """This thread's scratch array, reused if small: allocating it anew costs more than the mixing."""
    if size > _PIECE:
        return np.empty(size, dtype=np.uint64)
    if not hasattr(_local, "words"):
        _local.words = np.empty(_PIECE, dtype=np.uint64)
    words: NDArray[np.uint64] = _local.words
    return words[:size]


def _mix_int(word: int) -> int:
    word = ((word ^ (word >> 30)) * _MIX_1) & _MASK
    word = ((word ^ (word >> 27)) * _MIX_2) & _MASK
    return word ^ (word >> 31)


@lru_cache(maxsize=256)
def _name_word(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@lru_cache(maxsize=64)
def _counters(n: int, device: torch.device) -> Tensor:
    """Increments (i + 1) * GAMMA of the stream, (n,)."""
    return torch.arange(1, n + 1, dtype=torch.int64, device=device) * _signed(_GAMMA)


@lru_cache(maxsize=64)
def _increments(n: int) -> NDArray[np.uint64]:
    """The same on a CPU as a numpy array, cached so that no piece goes through torch."""
    return _counters(n, _CPU).numpy().view(np.uint64)


def _stream(keys: NDArray[np.uint64], start: int, out: NDArray[np.uint64]) -> None:
    """Fill (..., n) with words start, start + 1, ... of the streams of `keys` (...), piece by piece in the cache."""
    n = out.shape[-1]
    if out.size <= _PIECE:
        first = keys if start == 0 else keys + np.uint64((start * _GAMMA) & _MASK)
        np.add(first[..., None], _increments(n), out=out)
        _mix_(out, _scratch(out.size).reshape(out.shape))
        return
    length = min(n, max(1, _PIECE // max(1, keys.size)))
    increments = _increments(length)
    scratch = _scratch(keys.size * length).reshape(*keys.shape, length)
    direct = keys.size == 1 or length == n  # a single key's block of the output is contiguous
    work = out if direct else np.empty_like(scratch)
    for at in range(0, n, max(1, length)):
        size = min(length, n - at)
        origin = keys + np.uint64(((start + at) * _GAMMA) & _MASK)
        block = out[..., at : at + size] if direct else work[..., :size]
        np.add(origin[..., None], increments[:size], out=block)
        _mix_(block, scratch[..., :size])
        if not direct:
            out[..., at : at + size] = block


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's rule with separate multiplications and additions: fused ones would round differently."""
    total = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        total = (total + coefficient) * x
    return total + coefficients[0]


def _log(u: Tensor) -> Tensor:
    """Natural logarithm of float64 0 < u <= 1 from exactly rounded operations only."""
    shifted = u.view(torch.int64) + (0x3FF0000000000000 - 0x3FE6A09E667F3BCD)
    exponent = ((shifted >> 52) - 1023).to(torch.float64)
    mantissa = ((shifted & 0x000FFFFFFFFFFFFF) + 0x3FE6A09E667F3BCD).view(torch.float64)  # in [sqrt(1/2), sqrt(2))
    f = mantissa - 1.0
    s = f / (f + 2.0)
    z = s * s
    tail = _polynomial(z, _LOG) * z
    half = f * f * 0.5
    return exponent * _LN2_HIGH - ((half - (s * (half + tail) + exponent * _LN2_LOW)) - f)


def _sqrt_(x: Tensor) -> Tensor:
    """Correctly rounded square roots of float64, in place.

    On the CPU torch hands them to Intel's vector library, which misses the last bit in 0.7 % of them; numpy does not.
    """
    if x.device.type != "cpu":
        return x.sqrt_()
    values = x.numpy()
    np.sqrt(values, out=values)
    return x


def _circle(words: Tensor) -> tuple[Tensor, Tensor]:
    """A uniform point of the unit circle for each word: 51 bits of angle in (-pi/4, pi/4), one swap, one sign."""
    angle = ((_shift(words, 13).to(torch.float64) + 0.5) * 2.0**-51 - 0.5) * (math.pi / 2)
    square = angle * angle
    sine = angle + angle * square * _polynomial(square, _SIN)
    cosine = 1.0 - (square * 0.5 - square * square * _polynomial(square, _COS))
    cosine = torch.where((words & 1).bool(), -cosine, cosine)
    swap = (words & 2).bool()
    return torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)


@dataclass(frozen=True)
class Key:
    """A 64-bit key, or a tensor of them, from which draws are made.

    Attributes:
        words: a Python integer in [0, 2^64) for a single key, or an int64 tensor (...) of keys.
        device: where draws are made.
    """

    words: int | Tensor
    device: torch.device = _CPU

    @property
    def shape(self) -> torch.Size:
        """The batch shape (...) that every draw begins with."""
        return self.words.shape if isinstance(self.words, Tensor) else torch.Size()

    def tensor(self) -> Tensor:
        """The keys as an int64 tensor (...)."""
        if isinstance(self.words, Tensor):
            return self.words
        return torch.tensor(_signed(self.words), dtype=torch.int64, device=self.device)

    def fold(self, value: int | str | Tensor) -> Key:
        """Derive a key from this one and `value`: a name, an integer, or an int64 tensor that broadcasts against it.

        For a fixed key, different values never give the same key (the map is a bijection of 64-bit words).
        """
        if isinstance(value, str):
            value = _name_word(value)
        if isinstance(value, int) and isinstance(self.words, int):
            return Key(_mix_int(_mix_int(self.words) ^ ((value * _GAMMA + _FOLD) & _MASK)), self.device)
        if isinstance(value, int):
            salt: int | Tensor = _signed(value * _GAMMA + _FOLD)
        else:
            salt = value * _signed(_GAMMA) + _signed(_FOLD)
        parent = _mix(self.words) if isinstance(self.words, Tensor) else _signed(_mix_int(self.words))
        return Key(_mix(salt ^ parent if isinstance(salt, Tensor) else parent ^ salt), self.device)  # type: ignore[arg-type]

    def integers64(self, n: int, start: int = 0, out: Tensor | None = None) -> Tensor:
        """(..., n) int64: n words of the stream from number `start` on, all 64 bits uniform; on a CPU into `out`."""
        keys = self.tensor()
        if keys.device.type == "cpu":
            words = torch.empty((*keys.shape, n), dtype=torch.int64) if out is None else out
            _stream(keys.numpy().view(np.uint64), start, words.numpy().view(np.uint64))
            return words
        return _mix((keys + _signed(start * _GAMMA)).unsqueeze(-1) + _counters(n, self.device))

    def uniform(self, n: int, start: int = 0) -> Tensor:
        """(..., n) float64, uniform on the multiples of 2^-53 in [0, 1); from words `start`, start + 1, ..."""
        return self._scaled(n, start, 2.0**-53)

    def integers(self, high: int, n: int, start: int = 0) -> Tensor:
        """(..., n) int64, uniform on 0, ..., high - 1 to within high / 2^53; from words `start`, start + 1, ..."""
        return self._scaled(n, start, high * 2.0**-53).to(torch.int64).clamp_(max=high - 1)

    def _scaled(self, n: int, start: int, unit: float) -> Tensor:
        """(..., n) float64: the words' upper 53 bits times `unit`, in which a power of two changes no rounding."""
        words = self.integers64(n, start)
        if words.device.type != "cpu":
            return _shift(words, 11).to(torch.float64) * unit
        upper = words.numpy().view(np.uint64)
        np.right_shift(upper, np.uint64(11), out=upper)
        return torch.from_numpy(np.asarray(upper * np.float64(unit)))

    def bernoulli(self, probability: float, n: int | None = None) -> Tensor:
        """(...) or (..., n) bool, True with the given probability, to within 2^-53."""
        coins = _shift(self.integers64(1 if n is None else n), 11) < math.ceil(probability * 2**53)
        return coins.squeeze(-1) if n is None else coins

    def rademacher(self, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """(..., n) of `dtype`: +1 or -1, each with probability one half."""
        return (1 - 2 * _shift(self.integers64(n), 63)).to(dtype)

    def normal(self, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """(..., n) standard normals: Box & Muller (1958) in float64, then rounded to `dtype`."""
        pairs = (n + 1) // 2
        words = self.integers64(2 * pairs)
        uniform = (_shift(words[..., :pairs], 11) + 1).to(torch.float64) * 2.0**-53  # in (0, 1]
        radius = _sqrt_(_log(uniform) * -2.0)
        first, second = _circle(words[..., pairs:])
        return torch.cat([radius * first, radius * second], dim=-1)[..., :n].to(dtype)

    def _tagged(self, n: int) -> tuple[Tensor, int]:
        """(..., n) random words whose low bits hold their position, so that no two are equal and sorting is exact."""
        mask = (1 << max(1, (n - 1).bit_length())) - 1
        return (self.integers64(n) & ~mask) | torch.arange(n, dtype=torch.int64, device=self.device), mask

    def subset(self, n: int, k: int) -> Tensor:
        """(..., k) int64, ascending: k of the positions 0, ..., n - 1 without replacement, every subset equally likely.

        These are the first k distinct values of `integers(n, ...)`, by symmetry equally likely to within its n / 2^53,
        for little more than k words; above n / 2 the complement is drawn. See `subsets.py`.
        """
        if n < _ALONE:
            return together(lambda count, start: self.integers(n, count, start), self.shape, n, k, self.device)
        rows = [
            alone(lambda count, start, one=Key(word, self.device): one.integers(n, count, start), n, k, self.device)  # type: ignore[misc]
            for word in self.tensor().flatten()
        ]
        return torch.stack(rows).view(*self.shape, k)

    def permutation(self, n: int) -> Tensor:
        """(..., n) int64: a permutation of 0, ..., n - 1, every one equally likely."""
        words, mask = self._tagged(n)
        return sort(words) & mask

    def permuted(self, n: int, start: int, end: int) -> Tensor:
        """(end - start,) int64: places `start` to `end` of `permutation(n)`, of a single key.

        On a CPU only the words that may lie there are kept and sorted: those within eight deviations of the places'
        quantiles. How many lie below is counted, so that which places they take is known, not guessed.
        """
        if self.device.type != "cpu" or self.shape or n < _ALONE:
            return self.permutation(n)[..., start:end]
        bits = max(1, (n - 1).bit_length())
        margin = 8 * math.isqrt(n)
        low = max(0, ((start - margin) << 64) // n >> bits << bits)  # thresholds, as unsigned, without tags
        high = min(1 << 64, (((end + margin) << 64) // n >> bits) + 1 << bits)
        shift, width, wrapped = np.uint64(((1 << 63) - low) & _MASK), np.uint64(high - low - 1), np.uint64(-low & _MASK)
        words = torch.empty(min(n, _PIECE), dtype=torch.int64)
        kept, below = [], 0
        for at in range(0, n, _PIECE):
            count = min(n - at, _PIECE)
            block = self.integers64(count, at, out=words[:count]).numpy()
            moved = block.view(np.uint64) + shift  # from the lower threshold, which sorts signed words as unsigned
            if low:
                below += int(np.count_nonzero(moved >= wrapped))
            inside = np.flatnonzero(moved <= width)
            kept.append((block[inside] & -(1 << bits)) | (inside + at))
        found = np.concatenate(kept)
        if start < below or end > below + len(found):  # never seen: one chance in 10^14
            return self.permutation(n)[start:end]
        return sort(torch.from_numpy(found))[start - below : end - below] & ((1 << bits) - 1)


def key(
    seed: int,
    round: int | Tensor | None = None,
    client: int | Tensor | None = None,
    chain: int | Tensor | None = None,
    purpose: str = "",
    device: torch.device | str = "cpu",
) -> Key:
    """Make the key of a draw; leaving a coordinate out shares the draw across its values.

    Args:
        seed: the experiment's seed, any integer.
        round: an integer, or an int64 tensor that broadcasts against `client` and `chain`; None: left out.
        client: likewise; the server is client `SERVER`.
        chain: likewise.
        purpose: what the draw is for; different purposes never share a stream.
        device: where draws are made; their values do not depend on it.
    """
    result = Key(_mix_int(seed & _MASK), torch.device(device)).fold(purpose)
    for name, coordinate in (("client", client), ("chain", chain), ("round", round)):
        if coordinate is not None:
            result = result.fold(name).fold(coordinate)
    return result
