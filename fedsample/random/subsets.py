"""The first k distinct values of a sequence of independent uniform positions: a uniform k-subset for few words.

By symmetry every k-subset is equally likely to come first. The result does not depend on how much of the sequence is
generated, so that single rows, rows together, numpy and torch agree. `together` serves many short rows at once, `alone`
one long row that fills the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Sequence = Callable[[int, int], Tensor]  # (count, start) -> (..., count) int64 positions of each row's sequence


def together(sequence: Sequence, shape: torch.Size, n: int, k: int, device: torch.device) -> Tensor:
    """Draw k-subsets of positions below n for all rows at once: (*shape, k) int64, ascending."""
    if 2 * k > n:
        left = torch.ones((*shape, n), dtype=torch.bool, device=device)
        left.scatter_(-1, together(sequence, shape, n, n - k, device), False)
        return torch.arange(n, device=device).expand(*shape, n)[left].view(*shape, k)
    if k == 0:
        return torch.empty((*shape, 0), dtype=torch.int64, device=device)
    pick = _pick_on_cpu if device.type == "cpu" else _pick
    count = _enough(n, k)
    while (chosen := pick(sequence(count, 0), n, k)) is None:
        count *= 2
    return chosen


@lru_cache(maxsize=64)
def _enough(n: int, k: int) -> int:
    """Number of positions that almost surely hold k <= n / 2 distinct ones: mean plus six standard deviations.

    After i distinct ones the wait for another is geometric with success probability 1 - i / n.
    """
    seen = np.arange(k) / n
    mean, variance = float((1 / (1 - seen)).sum()), float((seen / (1 - seen) ** 2).sum())
    return math.ceil(mean + 6 * math.sqrt(variance)) + 2 * (k > 1)


def _pick(positions: Tensor, n: int, k: int) -> Tensor | None:
    """Pick the first k distinct positions of each row, (..., k) ascending; None if a row has fewer.

    Sorted by position, then by turn, the first of equal positions is the earliest; repeats get a turn after all others.
    """
    count = positions.shape[-1]
    bits = (count - 1).bit_length()
    turns = torch.arange(count, device=positions.device)
    tagged = torch.sort((positions << bits) | turns, dim=-1).values
    place, turn = tagged >> bits, tagged & ((1 << bits) - 1)
    turn[..., 1:].masked_fill_(place[..., 1:] == place[..., :-1], count)
    last = torch.topk(turn, k, dim=-1, largest=False).values.amax(-1, keepdim=True)
    if bool((last == count).any()):
        return None
    return place[turn <= last].view(*positions.shape[:-1], k)


def _pick_on_cpu(positions: Tensor, n: int, k: int) -> Tensor | None:
    """The same by numpy, whose sorts use vector instructions; in uint32 where that suffices."""
    count = positions.shape[-1]
    bits = (count - 1).bit_length()
    kind: np.dtype[Any] = np.dtype(np.uint32 if (n - 1).bit_length() + bits <= 32 else np.int64)
    tagged = positions.numpy().astype(kind)
    tagged <<= kind.type(bits)
    tagged |= np.arange(count, dtype=kind)
    tagged.sort(axis=-1)
    place, turn = tagged >> kind.type(bits), tagged & kind.type((1 << bits) - 1)
    again = place[..., 1:] == place[..., :-1]
    turn[..., 1:] |= again.astype(kind) << kind.type(bits)
    last = np.partition(turn, k - 1, axis=-1)[..., k - 1 : k]
    if last.max(initial=0) >> bits:
        return None
    place |= (turn > last).astype(kind) * kind.type(np.iinfo(kind).max)  # branch-free: sorts to the end
    place.sort(axis=-1)
    return torch.from_numpy(place[..., :k].astype(np.int64))


def alone(sequence: Sequence, n: int, k: int, device: torch.device) -> Tensor:
    """Draw a k-subset of positions below n for one row, for large k: (k,) int64, ascending.

    Each batch draws as many as are missing, so that it never exceeds k distinct ones; repeats are dropped.
    """
    if 2 * k > n:
        left = torch.ones(n, dtype=torch.bool, device=device)
        left[alone(sequence, n, n - k, device)] = False
        return left.nonzero().squeeze(-1)
    kind = torch.int32 if n < 1 << 31 else torch.int64
    kept = torch.empty(0, dtype=kind, device=device)  # ascending, from the first batch
    late = kept  # ascending, the few from later batches
    drawn = 0
    while len(kept) + len(late) < k:
        missing = k - len(kept) - len(late)
        fresh = _distinct(sort(sequence(missing, drawn).to(kind)))
        drawn += missing
        if len(kept) == 0:
            kept = fresh
            continue
        at = torch.searchsorted(kept, fresh).clamp_(max=len(kept) - 1)
        late = _distinct(sort(torch.cat([late, fresh[kept[at] != fresh]])))
    return sort(torch.cat([kept, late])).to(torch.int64)


def sort(words: Tensor) -> Tensor:
    """Sort ascending along the last axis; equal entries are interchangeable, so every library gives the same."""
    if words.device.type == "cpu":
        return torch.from_numpy(np.sort(words.numpy(), axis=-1))
    return torch.sort(words, dim=-1).values


def _distinct(ascending: Tensor) -> Tensor:
    """Drop repeats from an ascending tensor."""
    if len(ascending) < 2:
        return ascending
    if ascending.device.type == "cpu":
        values = ascending.numpy()
        return torch.from_numpy(values[np.concatenate([[True], values[1:] != values[:-1]])])
    new = torch.ones(len(ascending), dtype=torch.bool, device=ascending.device)
    torch.ne(ascending[1:], ascending[:-1], out=new[1:])
    return ascending[new]
