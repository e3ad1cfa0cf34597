"""Sum over clients in one order on every fleet: a fixed binary tree.

Floating-point sums depend on their order, and replies arrive in any order. Here the sum over clients 0, ..., n - 1 is
the tree that pairs neighbours, ((0 + 1) + (2 + 3)) + ..., an odd last one carried up unchanged. Every level is one
elementwise addition, so a batched fleet and a fleet of processes agree to the bit, and an aligned block of 2^j
clients is a node of the tree, which admits sharding. Its rounding error grows as log n, not n.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def tree_sum(terms: Tensor) -> Tensor:
    """Sum (n, ...) over its first axis by the fixed tree -> (...); n >= 1."""
    if terms.device.type == "cpu" and terms.shape[0] > 1:
        with np.errstate(all="ignore"):  # infinities show up as divergence of the chain
            return torch.from_numpy(np.asarray(_tree(terms.numpy())))
    while terms.shape[0] > 1:
        n = terms.shape[0]
        paired = terms[0 : n - n % 2 : 2] + terms[1:n:2]
        if n % 2:
            paired = torch.cat([paired, terms[-1:]])
        terms = paired
    return terms[0]


def _tree(terms: NDArray[Any]) -> NDArray[Any]:
    """The same by numpy, whose calls on small arrays cost a third of torch's; both add alike, bit for bit."""
    while (n := len(terms)) > 1:
        paired = terms[0 : n - n % 2 : 2] + terms[1:n:2]
        terms = np.concatenate([paired, terms[-1:]]) if n % 2 else paired
    total: NDArray[Any] = terms[0]
    return total


class TreeSum:
    """The same sum term by term: `add` the clients in order, then `total`; keeps O(log n) partial sums."""

    def __init__(self) -> None:
        self._nodes: list[tuple[int, Tensor]] = []  # (level, partial sum), levels strictly falling

    def add(self, term: Tensor) -> None:
        """Add the next client's term; all terms have one shape and dtype."""
        level = 0
        while self._nodes and self._nodes[-1][0] == level:
            term = self._nodes.pop()[1] + term
            level += 1
        self._nodes.append((level, term))

    def total(self) -> Tensor:
        """Return the sum so far; equal to `tree_sum` of the stacked terms, to the bit.

        Raises:
            ValueError: if nothing was added.
        """
        if not self._nodes:
            raise ValueError("the sum of no terms has no shape")
        result = self._nodes[-1][1]
        for _, node in reversed(self._nodes[:-1]):
            result = node + result
        return result
