"""Data that several files of this folder use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from link_rigs import CLIENTS, D


@pytest.fixture
def quadratics(tmp_path: Path) -> dict[str, Any]:
    """Five clients that disagree, in 12 dimensions."""
    rng = np.random.default_rng(2)
    file = tmp_path / "q.npz"
    np.savez(file, lam=rng.uniform(0.3, 2.0, (CLIENTS, D)), a=rng.normal(size=(CLIENTS, D)))
    return {"kind": "quadratic", "file": str(file)}
