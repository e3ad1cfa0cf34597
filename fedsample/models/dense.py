"""Models of flat features: one linear layer, or several with a smooth activation between them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """outputs = W x + b, with the features of a row flattened row-major first.

    Args:
        shape: shape of one row.
        outputs: number of outputs K.
        intercept: whether there is a bias b.
    """

    def __init__(self, shape: Sequence[int], outputs: int, intercept: bool = True) -> None:
        super().__init__(int(torch.Size(shape).numel()), outputs, bias=intercept)
        self.row_axes = len(shape)

    def forward(self, input: Tensor) -> Tensor:
        """(..., *shape) -> (..., K)."""
        return super().forward(input.flatten(-self.row_axes))


class Mlp(nn.Module):
    """Multilayer perceptron with tanh between its layers.

    It is smooth, so that its gradient is Lipschitz, as Langevin dynamics needs; at a kink it would not be.

    Args:
        shape: shape of one row.
        hidden: width of each hidden layer; empty: a linear model.
        outputs: number of outputs K.
        intercept: whether the layers have biases.
    """

    def __init__(
        self,
        shape: Sequence[int],
        hidden: Sequence[int],
        outputs: int,
        intercept: bool = True,
    ) -> None:
        super().__init__()
        widths = [int(torch.Size(shape).numel()), *hidden, outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=intercept) for a, b in pairwise(widths))
        self.row_axes = len(shape)

    def forward(self, input: Tensor) -> Tensor:
        """(..., *shape) -> (..., K)."""
        state: Tensor = self.layers[0](input.flatten(-self.row_axes))  # (..., p) -> (..., first width)
        for layer in self.layers[1:]:
            state = layer(torch.tanh(state))
        return state
