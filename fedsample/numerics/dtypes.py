"""Floating-point types by the names that configurations use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    pass

DTYPES = {"float32": torch.float32, "float64": torch.float64}
