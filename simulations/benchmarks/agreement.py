"""How far two ways to compute the same are apart, as a row of a benchmark. Needs torch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def difference(found: Tensor, want: Tensor) -> float:
    """The largest difference over the largest magnitude; infinite where one is not finite."""
    a, b = (each.detach().to("cpu", torch.float64) for each in (found, want))
    apart = float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(torch.float64).tiny))
    return apart if apart < float("inf") else float("inf")


def agreement(what: str, found: Tensor, want: Tensor, rtol: float, clients: int | None = None) -> dict[str, Any]:
    """The row: rtol 0 asks for the same bits."""
    apart = difference(found, want)
    return {"clients": clients, "what": what, "difference": apart, "rtol": rtol, "agree": apart <= rtol}


def plainly(device: torch.device) -> None:
    """On a GPU, float32 with all its bits, and sums of convolutions in a fixed order: or equality would mean little."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
