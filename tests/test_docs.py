"""The documents say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedsample.config import keys
from fedsample.config.presets import PRESETS

ROOT = Path(__file__).parents[1]


def test_every_setting_is_documented_as_it_is() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    for key in keys():
        row = f"| `{key.path}` | {key.meaning} | {key.allowed} | `{key.default or 'unset'}` |"
        assert row in text, f"docs/configuration.md lacks or contradicts {key.path}"
    documented = re.findall(r"^\| `([a-z_.]+)` \|", text, re.MULTILINE)
    assert documented == [key.path for key in keys()]


def test_every_preset_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for name in PRESETS:
        assert f"| `{name}`" in text


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/configuration.md",
        "docs/methods.md",
        "docs/run-directory.md",
        *(f"docs/devices/{name}.md" for name in ("README", "certificates", "protocol", "raspberry-pi", "recovery")),
    ],
)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{document} links to {target}"
