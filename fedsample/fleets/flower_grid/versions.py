"""The versions of Flower that the adapter supports; does not import Flower."""

from __future__ import annotations

import os
import re

from fedsample.errors import ConfigError

OLDEST = (1, 41)  # the first supported version
NEWEST = (1, 43)  # the first unsupported version, as in pyproject.toml
UNCHECKED = "FLOWER_VERSION_UNCHECKED"  # set to 1, it accepts any version: for trying the contract tests on a new one


def check(version: str) -> None:
    """Refuse a version of Flower that the adapter does not support.

    Raises:
        ConfigError: with the supported range and how to install it.
    """
    if os.environ.get(UNCHECKED) == "1":
        return
    digits = re.match(r"(\d+)\.(\d+)", version)
    if digits is None or not OLDEST <= (int(digits[1]), int(digits[2])) < NEWEST:
        oldest, newest = (".".join(map(str, each)) for each in (OLDEST, NEWEST))
        raise ConfigError(
            f"flwr {version} is installed, and fedsample uses parts of Flower that change between versions: it knows "
            f"{oldest} up to, not including, {newest}; pip install 'flwr>={oldest},<{newest}'"
        )
