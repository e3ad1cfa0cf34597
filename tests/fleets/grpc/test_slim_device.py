"""A device needs what requirements-device.txt names, and no more; `tests/walk/test_slim_processes.py` runs some."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import slim

ROOT = Path(__file__).parents[3]
HEAVY = {"flwr", "ray", "opacus", "tensorboard", "scikit-learn", "scipy", "datasets", "flwr-datasets"}


def test_the_versions_are_those_that_are_tested() -> None:
    names = slim.required(slim.REQUIREMENTS.read_text())
    pinned = set((ROOT / "constraints.txt").read_text().replace("_", "-").lower().splitlines())
    for line in slim.REQUIREMENTS.read_text().splitlines():
        assert line.startswith("#") or line in pinned
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {slim.normal(re.split(r"[<>=\[]", each)[0]) for each in project["dependencies"]}
    assert set(names) <= needed
    assert slim.closure(names).isdisjoint(HEAVY)
