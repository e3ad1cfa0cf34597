"""The running error analysis under which these tests compare potentials."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from loop_reference import analysed


@pytest.fixture
def analysis() -> Iterator[None]:
    """The test runs under a running error analysis."""
    with analysed():
        yield
