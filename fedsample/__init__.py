"""Federated posterior sampling on Flower: `fedsample.run(config) -> Run`, its configuration and its errors.

Names are resolved on first use, so that `import fedsample` loads nothing but the standard library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedsample.errors import (
    ClientError,
    CompileError,
    ConfigError,
    DataError,
    DivergenceError,
    FedSampleError,
    Interrupted,
    QuorumError,
    RunDirectoryError,
    UnsoundError,
)
from fedsample.version import __version__

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.fleets.flower_grid import FlowerRun, run_flower
    from fedsample.runs.api import Run, build_target, run

__all__ = [
    "ClientError",
    "CompileError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "Experiment",
    "FedSampleError",
    "FlowerRun",
    "Interrupted",
    "QuorumError",
    "Run",
    "RunDirectoryError",
    "UnsoundError",
    "__version__",
    "build_target",
    "run",
    "run_flower",
]

_LAZY = {
    "Experiment": "fedsample.config",
    "FlowerRun": "fedsample.fleets.flower_grid",
    "Run": "fedsample.runs.api",
    "build_target": "fedsample.runs.api",
    "run": "fedsample.runs.api",
    "run_flower": "fedsample.fleets.flower_grid",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'fedsample' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, whether imported yet or not."""
    return sorted({*globals(), *__all__})
