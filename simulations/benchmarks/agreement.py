"""Difference between two ways to compute the same, as a benchmark row. Needs torch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def difference(found: Tensor, want: Tensor) -> float:
    """Largest difference over largest magnitude; infinite if a value is not finite."""
    a, b = (each.detach().to("cpu", torch.float64) for each in (found, want))
    apart = float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(torch.float64).tiny))
    return apart if apart < float("inf") else float("inf")


def agreement(what: str, found: Tensor, want: Tensor, rtol: float, clients: int | None = None) -> dict[str, Any]:
    """Make the row; rtol 0 demands bitwise equality."""
    apart = difference(found, want)
    return {"clients": clients, "what": what, "difference": apart, "rtol": rtol, "agree": apart <= rtol}


def plainly(device: torch.device) -> None:
    """Set full float32 precision and deterministic convolutions on a GPU, so that comparisons mean something."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
