"""Random bits for rounding: two entries share one 64-bit word where they need at most 31 bits each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedsample.compression.cache_blocks import PIECE
from fedsample.random import Key


class Coins:
    """Random integers for the entries of a vector ("coins"), piece by piece, in one buffer.

    Entry j's coin depends on j and its key alone: two int32 coins share a word, an int64 coin has its own. Coins of
    different entries are independent and uniform on 0, ..., 2^bits - 1.

    Args:
        key: (...) keys.
        d: number of entries of a vector.
        bits: random bits per coin, at most 31 for int32, 63 for int64.
        dtype: int32 or int64.
    """

    def __init__(self, key: Key, d: int, bits: int, dtype: torch.dtype) -> None:
        self._key, self._mask = key, (1 << bits) - 1
        self._pair = 2 if dtype == torch.int32 else 1
        self._dtype = dtype
        most = (min(d, PIECE) + self._pair - 1) // self._pair
        plain = key.device.type == "cpu"
        self._buffer = torch.empty((*key.shape, most), dtype=torch.int64) if plain else None

    def take(self, start: int, end: int) -> Tensor:
        """(..., end - start) coins of the entries `start` (even) to `end`, valid until the next call."""
        count = (end - start + self._pair - 1) // self._pair
        buffer = None if self._buffer is None else self._buffer[..., :count]
        words = self._key.integers64(count, start // self._pair, out=buffer)
        coins = words.view(self._dtype)[..., : end - start]
        if buffer is None:
            return coins.bitwise_and_(self._mask)
        plain = coins.numpy()
        np.bitwise_and(plain, self._mask, out=plain)
        return coins
