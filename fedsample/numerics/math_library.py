"""One code path of the numerical library for every run on a machine."""

from __future__ import annotations

import torch

_ELEMENTARY = "exp expm1 log log1p log2 log10 sin cos tan asin acos atan tanh erf erfc erfinv trunc"


def choose_paths() -> None:
    """Call each elementary function once, alone.

    MKL chooses its code path in the first call. Where two threads make that at the same time, one of them may get the
    values of a less exact path, once: about one run in fifty with two threads then differed from the others.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for name in _ELEMENTARY.split():
            getattr(torch, name)(one)
