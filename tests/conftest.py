"""Settings of the whole suite: one thread per process, Flower kept quiet, and equal shares drawn only once."""

from __future__ import annotations

import functools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fedsample.data import partition

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _shares_are_drawn_once() -> Iterator[None]:
    """A Dirichlet partition takes 30 ms, and hundreds of tests ask for the same few: the second time it is a copy."""
    drawn: dict[Any, np.ndarray] = {}
    draw = partition._dirichlet

    @functools.wraps(draw)
    def remembered(targets: np.ndarray, clients: int, alpha: float, seed: int) -> np.ndarray:
        key = (targets.tobytes(), targets.dtype.str, clients, alpha, seed)
        if key not in drawn:
            drawn[key] = draw(targets, clients, alpha, seed)
        return drawn[key].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "_dirichlet", remembered)
        yield
