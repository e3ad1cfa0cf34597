"""ResNet-20 without batch statistics: filter response normalisation and Swish.

Batch normalisation makes a row's likelihood depend on the rest of its batch, so that no posterior is defined. Filter
response normalisation (Singh & Krishnan 2020, arXiv 1911.09737, equations 1-3) uses one row's own map per channel,

    nu^2 = mean over pixels of x^2,   y = gamma x / sqrt(nu^2 + eps) + beta,   z = max(y, tau),

and Swish makes the rest smooth. The network is the one of "What are Bayesian neural network posteriors really like?"
(Izmailov, Vikram, Hoffman & Wilson 2021, arXiv 2104.14421, appendix): 274,042 parameters for ten classes, biases before
each normalisation and the threshold tau included, so that its published HMC predictions can serve as a reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsample.models.images import layout_of, to_planes

_WIDTHS = (16, 32, 64)
_EPSILON = 1e-6  # avoids division by zero on a map of zeros
_BLOCKS = 3  # residual blocks per stage: 6 * 3 + 2 = 20 layers


class FilterResponseNorm(nn.Module):
    """Normalises each channel of each image by its own mean square; see the equation above.

    Args:
        channels: number of channels C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        square = input.square().mean(dim=(-2, -1), keepdim=True)  # (B, C, 1, 1)
        scaled = input * torch.rsqrt(square + _EPSILON)
        return torch.maximum(self.gamma[:, None, None] * scaled + self.beta[:, None, None], self.tau[:, None, None])


class _Convolution(nn.Module):
    """A convolution that keeps the size (or halves it, at stride 2), followed by normalisation."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, kernel: int = 3, intercept: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, bias=intercept)
        self.norm = FilterResponseNorm(outputs)
        # The reference pads as XLA's "same": at stride 2 an even map needs one line, below and to the right.
        before = (kernel - stride) // 2
        self.padding = (before, kernel - stride - before) * 2 if kernel > stride else (0, 0, 0, 0)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.norm(self.conv(functional.pad(input, self.padding)))
        return output


class _Block(nn.Module):
    """swish(shortcut(x) + normalised conv(swish(normalised conv(x))))."""

    def __init__(self, inputs: int, outputs: int, stride: int, intercept: bool) -> None:
        super().__init__()
        self.first = _Convolution(inputs, outputs, stride, intercept=intercept)
        self.second = _Convolution(outputs, outputs, intercept=intercept)
        self.shortcut = (
            nn.Identity() if stride == 1 else _Convolution(inputs, outputs, stride, kernel=1, intercept=intercept)
        )

    def forward(self, input: Tensor) -> Tensor:
        return functional.silu(self.shortcut(input) + self.second(functional.silu(self.first(input))))


class ResNet20(nn.Module):
    """ResNet-20 with filter response normalisation and Swish, for images of 32x32 pixels and 3 channels.

    Args:
        shape: shape of one row, (32, 32, 3) or (3, 32, 32).
        outputs: number of outputs K.
        intercept: whether the layers have biases.
    """

    def __init__(self, shape: Sequence[int], outputs: int, intercept: bool = True) -> None:
        super().__init__()
        self.layout, channels, _ = layout_of(shape, (32,), (3,), "resnet20")
        self.stem = _Convolution(channels, _WIDTHS[0], intercept=intercept)
        widths = [_WIDTHS[0], *(width for width in _WIDTHS for _ in range(_BLOCKS))]
        self.blocks = nn.ModuleList(
            _Block(a, b, stride=1 if a == b else 2, intercept=intercept) for a, b in pairwise(widths)
        )
        self.head = nn.Linear(_WIDTHS[-1], outputs, bias=intercept)

    def forward(self, input: Tensor) -> Tensor:
        """(B, *shape) -> (B, K)."""
        state = functional.silu(self.stem(to_planes(input, self.layout)))  # (B, 16, 32, 32)
        for block in self.blocks:
            state = block(state)
        output: Tensor = self.head(state.mean(dim=(-2, -1)))  # (B, 64) -> (B, K)
        return output
