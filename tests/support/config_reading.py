"""Configurations as they are read, and as they are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from fedsample.config import Experiment, load
from fedsample.errors import ConfigError


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, type]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value, type(value)


def same(one: Experiment, other: Experiment) -> bool:
    """Equal in value and in type: 1 and 1.0 are different cohorts."""
    return list(leaves(one.model_dump())) == list(leaves(other.model_dump()))


def read(source: Any = None, *overrides: str, **environment: str) -> Experiment:
    return load(source, overrides, environment)


def refusal(source: Any = None, *overrides: str, **environment: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(source, *overrides, **environment)
    assert caught.value.exit_code == 2
    return str(caught.value)
