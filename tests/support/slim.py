"""The command line as on a device that has only what requirements-device.txt names: python slim.py ARGUMENTS.

Every other distribution that is installed here is hidden, as if it were not.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

REQUIREMENTS = Path(__file__).parents[2] / "requirements-device.txt"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(text: str) -> list[str]:
    """Names of the distributions in a requirements file."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [normal(line.partition("==")[0]) for line in lines if line]


def closure(names: list[str]) -> set[str]:
    """These distributions and what they need, without extras."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                todo.append(normal(need.name))
    return found


class Without:
    """A finder of modules that does not find some: to all that ask, they are not installed."""

    def __init__(self, finder: Any, modules: set[str]) -> None:
        self.finder, self.modules = finder, modules

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        return None if name.partition(".")[0] in self.modules else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def hide(names: list[str] | None = None) -> None:
    """Hide all but these distributions and what they need; None: but those of requirements-device.txt."""
    allowed = closure(required(REQUIREMENTS.read_text()) if names is None else names)
    owners = metadata.packages_distributions()
    hidden = {module for module, each in owners.items() if not {normal(name) for name in each} & allowed}
    hidden -= {"fedsample", "slim", *sys.stdlib_module_names}
    for module in [name for name in sys.modules if name.partition(".")[0] in hidden]:
        del sys.modules[module]  # what looked up the distributions
    sys.meta_path[:] = [Without(finder, hidden) for finder in sys.meta_path]


if __name__ == "__main__":
    hide()
    from fedsample.cli.main import main

    sys.argv[0] = "fedsample"
    main()
