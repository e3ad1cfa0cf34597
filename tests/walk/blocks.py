"""The fenced blocks of README.md and the documents: each is typed by a test here, or listed with a reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TYPED: set[tuple[str, int]] = set()  # documents and lines of the blocks that tests have asked for


class Block(NamedTuple):
    """A fenced block: where it begins, and what is in it."""

    document: str
    line: int
    text: str


def documents() -> list[str]:
    """Paths of everything that a user reads commands in."""
    found = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "simulations").rglob("*.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text()
    fences = re.finditer(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(document, text[: each.start()].count("\n") + 1, each.group(1)) for each in fences]


def block(document: str, part: str) -> str:
    """The text of the one block of a document that holds this; a test that asks for it types it."""
    found = [each for each in blocks(document) if part in each.text]
    assert len(found) == 1, f"{document}: {len(found)} blocks hold {part!r}"
    TYPED.add((document, found[0].line))
    return found[0].text


def commands(text: str) -> list[str]:
    """The commands of a block, without prompts, comments and what they print."""
    lines = text.splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [re.sub(r" +# .*$", "", line) for line in lines]
