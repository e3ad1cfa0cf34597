"""Random bits for rounding: several entries share one 64-bit word where they need few bits each."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsample.random import Key


def coins(key: Key, start: int, end: int, bits: int, dtype: torch.dtype) -> Tensor:
    """(..., end - start) uniform on 0, ..., 2^bits - 1: the coins of entries `start` to `end` of a vector.

    Entry j's coin depends on j and the key alone, whatever the bounds: of int32 two share a word, of int64 each has
    its own. Coins of different entries are independent. `start` must be even.

    Args:
        key: (...) keys. bits: at most 31 for int32, 63 for int64. dtype: int32 or int64.
    """
    count = end - start
    if dtype == torch.int64:
        return key.integers64(count, start) & ((1 << bits) - 1)
    halves = key.integers64((count + 1) // 2, start // 2).view(torch.int32)[..., :count]
    return halves & ((1 << bits) - 1)
