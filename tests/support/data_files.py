"""Configurations of data, and files to read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rounding import gamma

DEFAULTS: dict[str, Any] = {
    "name": None,
    "kind": "builtin",
    "file": None,
    "clients": 4,
    "partition": "dirichlet",
    "alpha": 0.3,
    "target": None,
    "client_column": None,
    "test_fraction": None,
    "standardize": None,
    "holdout": "pooled",
    "features": None,
    "labels": None,
}


def config(**given: Any) -> Any:
    """The section [data], without the checks that `fedsample.config` adds."""
    return SimpleNamespace(**{**DEFAULTS, **given})


def npz(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "some.npz", **arrays)
    return str(folder / "some.npz")


def csv(folder: Path, text: str) -> str:
    (folder / "some.csv").write_text(text)
    return str(folder / "some.csv")


def assert_standard(scaled: np.ndarray, raw: np.ndarray) -> None:
    """Mean 0 and deviation 1, to the rounding of sums of N numbers of the raw column's size over its deviation."""
    size = (np.abs(raw) + np.abs(raw).mean(0)).mean(0) / raw.std(0)
    bound = 2 * gamma(3 * len(raw) + 8) * size
    assert np.all(np.abs(scaled.mean(0)) <= bound)
    assert np.all(np.abs(scaled.std(0) - 1) <= bound)
    assert np.all(bound < 1e-9)


X = np.zeros((4, 1))
Y = np.array([0, 1, 0, 1])
