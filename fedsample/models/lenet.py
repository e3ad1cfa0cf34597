"""LeNet-5 (LeCun, Bottou, Bengio & Haffner 1998, Proc. IEEE 86(11), figure 2).

    image -> conv 6 @ 5x5 -> tanh -> mean 2x2 -> conv 16 @ 5x5 -> tanh -> mean 2x2 -> 120 -> 84 -> K

The second convolution sees all six maps, and the output layer is linear, as in most implementations since. tanh and
mean pooling are the original's; they keep the potential smooth, which max pooling and ReLU would not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsample.models.images import layout_of, to_planes


class LeNet5(nn.Module):
    """LeNet-5 for images of 32x32 pixels, or 28x28 padded to that; 1 or 3 channels.

    Args:
        shape: shape of one row, (S, S), (C, S, S) or (S, S, C).
        outputs: number of outputs K.
        intercept: whether the layers have biases.
    """

    def __init__(self, shape: Sequence[int], outputs: int, intercept: bool = True) -> None:
        super().__init__()
        self.layout, channels, size = layout_of(shape, (28, 32), (1, 3), "lenet5")
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=(32 - size) // 2, bias=intercept)
        self.conv2 = nn.Conv2d(6, 16, 5, bias=intercept)
        self.fc1 = nn.Linear(16 * 5 * 5, 120, bias=intercept)
        self.fc2 = nn.Linear(120, 84, bias=intercept)
        self.fc3 = nn.Linear(84, outputs, bias=intercept)

    def forward(self, input: Tensor) -> Tensor:
        """(B, *shape) -> (B, K)."""
        state = to_planes(input, self.layout)  # (B, C, S, S)
        state = functional.avg_pool2d(torch.tanh(self.conv1(state)), 2)  # (B, 6, 14, 14)
        state = functional.avg_pool2d(torch.tanh(self.conv2(state)), 2)  # (B, 16, 5, 5)
        state = torch.tanh(self.fc1(state.flatten(-3)))  # (B, 120)
        output: Tensor = self.fc3(torch.tanh(self.fc2(state)))
        return output
