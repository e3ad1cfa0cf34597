"""Data of quadratic clients, whose posterior is Gaussian and known in closed form.

For client i, with centre a_i and Hessian H_i,

    U_i(theta) = 1/2 (theta - a_i)^T H_i (theta - a_i),   pi = N(P^-1 sum_i H_i a_i, P^-1),   P = sum_i H_i.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedsample.data.base import Array, check_finite, default_feature_names
from fedsample.data.npz import read_archive
from fedsample.data.table import source_path
from fedsample.errors import DataError

if TYPE_CHECKING:
    from fedsample.config import DataConfig


@dataclass(frozen=True, eq=False)
class QuadraticData:
    """Curvatures and centres of n quadratic clients in d dimensions.

    Attributes:
        lam: (n, d) float64 curvature of each client and coordinate, >= 0, or (n, d, d) dense symmetric Hessians.
        a: (n, d) float64 centres.
        prior_precision: precision of an isotropic Gaussian prior, added to the sum of curvatures; 0: flat.
        name: name of the data in tables and logs.

    Raises:
        DataError: if there is NaN, shapes do not fit, a curvature is negative, or the sum is not positive definite.
    """

    lam: Array = field(repr=False)
    a: Array = field(repr=False)
    prior_precision: float = 0.0
    name: str = "quadratic"

    def __post_init__(self) -> None:
        """Check each client's potential, and the sum."""
        check_potentials(self.lam, self.a, self.name)
        total, d = self.lam.sum(axis=0), self.dim
        total = np.linalg.eigvalsh(total) if self.dense else total
        total = total + self.prior_precision
        if total.min() <= 1e-14 * d * total.max():
            raise DataError(
                f"the curvatures of all clients and the prior sum to {total.min():.3g} in some direction, expected "
                "above 0 in all: the posterior is improper there; add curvature or set model.prior_scale"
            )

    @property
    def clients(self) -> int:
        """Number of clients n."""
        return len(self.a)

    @property
    def dim(self) -> int:
        """Number of parameters d."""
        return int(self.a.shape[1])

    @property
    def dense(self) -> bool:
        """Whether `lam` holds full Hessians."""
        return self.lam.ndim == 3


def check_potentials(lam: Array, a: Array, name: str) -> None:
    """Refuse invalid potentials, one client at a time.

    Args:
        lam: (n, d) float64 curvatures, or (n, d, d) Hessians.
        a: (n, d) float64 centres.
        name: name of the data, for the message.

    Raises:
        DataError: if there is NaN, shapes do not fit, a Hessian is not symmetric, or a curvature is negative.
    """
    if a.ndim != 2 or 0 in a.shape or a.dtype != np.float64:
        raise DataError(f"a has shape {a.shape} and dtype {a.dtype}, expected (clients, d) in float64")
    n, d = a.shape
    if lam.shape not in ((n, d), (n, d, d)) or lam.dtype != np.float64:
        raise DataError(
            f"the curvatures have shape {lam.shape} and dtype {lam.dtype}, expected ({n}, {d}) or "
            f"({n}, {d}, {d}) in float64 to fit the centres"
        )
    check_finite(lam, default_feature_names(lam.shape[1:]), f"the curvatures of {name}")
    check_finite(a, default_feature_names(a.shape[1:]), f"the centres of {name}")
    dense = lam.ndim == 3
    skew = np.abs(lam - lam.swapaxes(1, 2)).max(axis=(1, 2)) if dense else np.zeros(n)  # (n,)
    if (skew > 1e-10 * np.abs(lam).reshape(n, -1).max(axis=1)).any():
        client = int(skew.argmax())
        raise DataError(f"the Hessian of client {client} is not symmetric: expected H = (H + H^T) / 2")
    values = np.linalg.eigvalsh(lam) if dense else lam  # (n, d)
    slack = 1e-12 * d * np.abs(values).max(axis=1) if dense else 0.0  # rounding error of a zero eigenvalue
    lowest = values.min(axis=1)  # (n,)
    if (lowest < -slack).any():
        client = int(np.argmin(lowest))
        raise DataError(
            f"client {client} has curvature {lowest[client]:.3g} in some direction, expected >= 0 in all: its "
            "potential has no lower bound"
        )


def load_quadratic(config: DataConfig, prior_precision: float = 0.0) -> QuadraticData:
    """Read quadratic clients from an .npz file, see `read_quadratic`.

    Args:
        config: the section [data] of an experiment, with `kind = "quadratic"` and `file`.
        prior_precision: 1 / prior_scale^2, or 0 for a flat prior: what the prior adds to the curvature.

    Raises:
        DataError: if the file cannot be read, or its quadratic clients are not valid.
    """
    lam, a, name = read_quadratic(source_path(config.file, "quadratic"))
    return QuadraticData(lam, a, prior_precision, config.name or name)


def read_quadratic(path: Path) -> tuple[Array, Array, str]:
    """Read curvatures, centres and a name from an .npz file; checks only their form.

    The file holds the centres `a`, (n, d) or (n,) where d = 1, and one of `lam`, (n, d), or (n,) for the same curvature
    in every coordinate; or `H` (or `lam`), (n, d, d), dense Hessians.

    Raises:
        DataError: if the file cannot be read, or lacks these arrays.
    """
    arrays = read_archive(path)
    held = ", ".join(map(repr, arrays)) or "nothing"
    if "a" not in arrays or ("lam" in arrays) == ("H" in arrays):
        raise DataError(f"{path.name} holds {held}, expected 'a' (centres) and one of 'lam' or 'H' (curvatures)")
    key = "lam" if "lam" in arrays else "H"
    for name in ("a", key):
        if arrays[name].dtype.kind not in "iuf" or arrays[name].ndim == 0:
            raise DataError(
                f"{path.name}: {name} has shape {arrays[name].shape} and dtype {arrays[name].dtype}, "
                "expected an array of real numbers"
            )
    a, lam = arrays["a"].astype(np.float64), arrays[key].astype(np.float64)
    if a.ndim == 1:
        a = a[:, None]
    if key == "H" and lam.ndim != 3:
        raise DataError(f"{path.name}: H has shape {lam.shape}, expected (clients, d, d)")
    if key == "lam" and lam.ndim == 1 and len(lam) == len(a):
        lam = np.repeat(lam[:, None], a.shape[1], axis=1)
    return lam, a, path.stem
