"""Image layouts: rows with or without a channel axis, first or last; networks take (C, H, W)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from fedsample.errors import ConfigError

Layout = Literal["grey", "first", "last"]


def layout_of(
    shape: Sequence[int], sizes: Sequence[int], channels: Sequence[int], model: str
) -> tuple[Layout, int, int]:
    """Find the channel axis of a row.

    Args:
        shape: shape of one row: (S, S), (C, S, S) or (S, S, C).
        sizes: allowed image sizes S.
        channels: allowed numbers of channels C.
        model: name of the network, for the message.

    Returns:
        The layout, the number of channels C and the size S.

    Raises:
        ConfigError: if the shape fits none of them.
    """
    row = tuple(shape)
    for size in sizes:
        for channel in channels:
            if row == (size, size) and channel == 1:
                return "grey", 1, size
            if row == (channel, size, size):
                return "first", channel, size
            if row == (size, size, channel):
                return "last", channel, size
    side = " or ".join(f"{size}x{size}" for size in sizes)
    raise ConfigError(
        f'model.name = "{model}" takes images of {side} pixels with {" or ".join(map(str, channels))} channels, but '
        f'a row has shape {row}: store X as (rows, height, width[, channels]), or choose "softmax" or "mlp"'
    )


def to_planes(images: Tensor, layout: Layout) -> Tensor:
    """Convert images (..., row) of a layout to (..., C, H, W)."""
    if layout == "grey":
        return images.unsqueeze(-3)
    return images if layout == "first" else images.movedim(-1, -3)
