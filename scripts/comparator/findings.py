"""What a comparison finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Kind(IntEnum):
    """How bad a finding is."""

    NOTE = 0  # worth a line: another reason for the same refusal, a new key of a summary
    DIFFERENCE = 1  # draws, summaries or bytes that are not the same
    BROKEN = 2  # nothing was compared where something should have been


@dataclass(frozen=True)
class Finding:
    """One thing that is not the same.

    Attributes:
        kind: how bad.
        text: what, where, and both values.
    """

    kind: Kind
    text: str


def difference(text: str) -> Finding:
    """Draws, summaries or bytes are not the same."""
    return Finding(Kind.DIFFERENCE, text)


def broken(text: str) -> Finding:
    """Nothing could be compared."""
    return Finding(Kind.BROKEN, text)


def note(text: str) -> Finding:
    """Worth a line, and no difference of draws."""
    return Finding(Kind.NOTE, text)
