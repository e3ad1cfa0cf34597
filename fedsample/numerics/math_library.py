"""Warm up the maths library, so that every run on a machine uses the same code paths."""

from __future__ import annotations

import torch

_ELEMENTARY = "exp expm1 log log1p log2 log10 sin cos tan asin acos atan tanh erf erfc erfinv trunc"


def choose_paths() -> None:
    """Call each elementary function once, in a single thread.

    MKL chooses its code path in the first call. If two threads make that call at the same time, one of them may get
    values of a less exact path, once: without this about one run in fifty with two threads differed from the others.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for name in _ELEMENTARY.split():
            getattr(torch, name)(one)
