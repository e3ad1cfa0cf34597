r"""Standardise by sums over clients: no client sees another's rows, and simulation and devices agree bit for bit.

Two exchanges. With n_i training rows x on client i, and y where a number is predicted,

    first     N = sum_i n_i,    s = sum_i sum x        mean m = s / N
    second    q = sum_i sum (x - m)^2                  deviation sigma = sqrt(q / N), population style

and x becomes (x - m) / sigma. A deviation below 1e-12 |m| is rounding error of a constant column and is replaced by 1.
The second sum is about the mean, since s and sum x^2 alone lose all digits if m is large. All sums are float64 along
fixed trees, over a client's rows and then over clients, so that simulation and devices agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fedsample.data.base import Array, FederatedData
from fedsample.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_CONSTANT = 1e-12
_TOO_LARGE = "values too large to standardise (above about 1e150): rescale that column"


def first_sums(data: FederatedData) -> Tensor:
    """Compute what one client sends first: its number of rows and their sum, (1 + p,); for numeric targets (2 + p,).

    Args:
        data: one client's data, not yet standardised; p numbers per row.

    Raises:
        DataError: if a sum overflows float64.
    """
    rows = _columns(data, data.x, data.y)
    import torch

    with np.errstate(over="ignore"):
        return _checked(torch.cat([torch.tensor([len(rows)], dtype=torch.float64), _sum(rows)]), data.name)


def second_sums(data: FederatedData, first: Tensor) -> Tensor:
    """Compute what one client sends second: squared distances from the mean over all clients, (p,) or (p + 1,).

    Args:
        data: as for `first_sums`.
        first: the first sums, added over all clients.

    Raises:
        DataError: if there are no rows, sums have another shape, or a sum overflows float64.
    """
    rows = _columns(data, data.x, data.y)
    mean = _mean(first, rows.shape[1])
    with np.errstate(over="ignore"):
        return _checked(_sum(np.square(rows - mean)), data.name)


@dataclass(frozen=True, eq=False)
class Scale:
    """Mean and standard deviation of every column.

    Attributes:
        mean: (p,) or, with a numeric target, which is last, (p + 1,) float64.
        deviation: likewise, > 0.
    """

    mean: Array
    deviation: Array

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Scale:
        """Compute the scale from the sums over all clients.

        Raises:
            DataError: if there are no rows, or sums are not finite, negative, or of shapes that do not fit.
        """
        mean = _mean(first, len(second))
        total = second.numpy()
        if not (np.isfinite(total).all() and (total >= 0).all()):
            raise DataError(f"the sums of squares of all clients hold {total.min()} to {total.max()}: {_TOO_LARGE}")
        deviation = np.sqrt(total / float(first[0]))
        return cls(mean, np.where(deviation > _CONSTANT * np.abs(mean), deviation, 1.0))

    def apply(self, data: FederatedData) -> FederatedData:
        """Standardise training and held-out rows, of one client or of all.

        Raises:
            DataError: if rows have another number of columns.
        """
        shape = data.x.shape[1:]
        p, numeric = math.prod(shape), data.classes is None
        if len(self.mean) != p + numeric:
            raise DataError(f"the scale has {len(self.mean)} columns, but {data.name} has {p + numeric}")
        mean, deviation = self.mean[:p].reshape(shape), self.deviation[:p].reshape(shape)
        scaled = replace(data, x=(data.x - mean) / deviation, x_test=(data.x_test - mean) / deviation)
        if not numeric:
            return scaled
        y_mean, y_scale = float(self.mean[-1]), float(self.deviation[-1])
        return replace(
            scaled,
            y=(data.y - y_mean) / y_scale,
            y_test=(data.y_test - y_mean) / y_scale,
            target_mean=y_mean,
            target_scale=y_scale,
        )


def standardize(data: FederatedData) -> FederatedData:
    """Standardise the data of all clients in a simulation, in the same two exchanges as devices.

    Raises:
        DataError: if there are no training rows, or values are too large.
    """
    from fedsample.numerics.tree_sum import TreeSum

    shares = [data.client(client) for client in range(data.clients)]
    first, second = TreeSum(), TreeSum()
    for share in shares:
        first.add(first_sums(share))
    for share in shares:
        second.add(second_sums(share, first.total()))
    return Scale.of(first.total(), second.total()).apply(data)


def _columns(data: FederatedData, x: Array, y: Array) -> Array:
    """Flatten rows to (n_i, p) float64; with a numeric target, (n_i, p + 1)."""
    flat = x.reshape(len(x), math.prod(x.shape[1:])).astype(np.float64, copy=False)
    return np.concatenate([flat, y[:, None]], axis=1) if data.classes is None else flat


def _sum(rows: Array) -> Tensor:
    """Sum rows (n_i, p) -> (p,) by the fixed tree."""
    import torch

    from fedsample.numerics.tree_sum import tree_sum

    return tree_sum(torch.from_numpy(np.ascontiguousarray(rows))) if len(rows) else torch.zeros(rows.shape[1]).double()


def _checked(sums: Tensor, name: str) -> Tensor:
    if not sums.isfinite().all():
        raise DataError(f"{name} holds {_TOO_LARGE}")
    return sums


def _mean(first: Tensor, columns: int) -> Array:
    """Compute the mean (p,) from the first sums over all clients."""
    if tuple(first.shape) != (1 + columns,) or not bool(first.isfinite().all()):
        raise DataError(
            f"the first sums have shape {tuple(first.shape)}, expected ({1 + columns},) finite numbers: the number of "
            "rows, then one sum a column"
        )
    rows = float(first[0])
    if rows < 1 or rows != int(rows):
        raise DataError(f"the clients hold {rows:g} training rows together, expected at least one to standardise by")
    return np.asarray(first[1:].numpy() / rows)
