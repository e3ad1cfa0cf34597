"""Draw a client's minibatch for one gradient: without replacement, by key, the same on every fleet."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsample.random import Key

_TAG_BITS = 24  # fixed, so that the order of a client's rows does not depend on the clients beside it


def draw_rows(keys: Key, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A minibatch without replacement for each key: the rows with the smallest random words.

    Args:
        keys: (m, C) keys.
        rows: (m,) number of rows of each client.
        size: batch size, >= 1.

    Returns:
        Positions (m, C, b) within the client's rows, b = min(size, largest client), and a mask (m, C, b) of those that
        count: a client with fewer rows than b uses all of them. A client's draw depends on its own key and rows only.
    """
    most = max(1, int(rows.max()) if len(rows) else 1)
    bits = max(_TAG_BITS, (most - 1).bit_length())
    tag = torch.arange(most, dtype=torch.int64, device=rows.device)
    words = (keys.integers64(most) & ~((1 << bits) - 1)) | tag  # (m, C, most), no two equal
    absent = tag >= rows[:, None, None]
    words = torch.where(absent, torch.iinfo(torch.int64).max - most + tag, words)
    chosen = torch.topk(words, min(size, most), dim=-1, largest=False, sorted=True)
    return chosen.indices, chosen.indices < rows[:, None, None]
