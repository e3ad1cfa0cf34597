"""Draws, files and full disks for a run directory."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import torch


def draw(round: int) -> torch.Tensor:
    """What the sampler would draw in a round: known from the round alone."""
    return torch.arange(6, dtype=torch.float64).reshape(2, 3) + 100 * round  # (C, d)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@contextlib.contextmanager
def full_disk(limit: int = 4096) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes: the system then refuses a write as it does on a full disk.

    Keep it around one statement: the limit holds for the test runner's own files too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
