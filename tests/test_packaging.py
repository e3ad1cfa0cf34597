"""What stands beside the package: one version everywhere, links that lead somewhere, forms and hooks that work."""

from __future__ import annotations

import os
import re
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from fedsample.version import __version__

ROOT = Path(__file__).resolve().parents[1]
CITATION = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", *(f"docs/{name}.md" for name in ("architecture", "flower")))


def cited(field: str) -> str:
    """A plain field of CITATION.cff."""
    found = re.search(rf"^{field}: *\"?([^\"\n]+)\"?$", CITATION, re.MULTILINE)
    assert found, f"CITATION.cff has no {field}"
    return found[1]


def yaml_of(path: Path) -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    if not path.exists():
        pytest.skip(f"{path.name} is not part of an sdist")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_one_version() -> None:
    assert PROJECT["project"]["version"] == __version__
    assert cited("version") == __version__


def test_the_citation_has_what_the_project_has() -> None:
    assert cited("cff-version") == "1.2.0"
    assert cited("license") == PROJECT["project"]["license"]
    assert date.fromisoformat(cited("date-released"))
    assert CITATION.partition("keywords:")[2].strip().replace("- ", "").split("\n  ") == PROJECT["project"]["keywords"]


def test_the_sdist_takes_what_belongs_there_and_nothing_that_is_not() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]
    assert not [name for name in included if not (ROOT / name).exists()]
    pages = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"}
    assert pages | {"docs", "scripts", "constraints.txt", "requirements-device.txt"} <= set(included)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("http") or (path.parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "docs/architecture.md"])
def test_the_readme_links_to_the_pages_for_contributors(page: str) -> None:
    assert f"]({page})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_files_that_contributing_names_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:fedsample|scripts|tests|docs)/[\w./-]*\w)", text))
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]
    assert set(re.findall(r"\b(test_\w+\.py)\b", text)) <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}


def test_check_is_a_command() -> None:
    path = ROOT / "scripts" / "check"
    assert os.access(path, os.X_OK)
    assert path.read_text(encoding="utf-8").startswith("#!")


def test_hooks_download_nothing() -> None:
    for each in yaml_of(ROOT / ".pre-commit-config.yaml")["repos"]:
        assert each["repo"] == "local"
        assert all(hook["language"] == "system" and "additional_dependencies" not in hook for hook in each["hooks"])


@pytest.mark.parametrize("name", ["bug", "wrong-posterior", "feature"])
def test_a_form_is_one_that_github_shows(name: str) -> None:
    form = yaml_of(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert set(form) <= {"name", "description", "title", "labels", "assignees", "body"}
    assert all(isinstance(form[key], str) and form[key] for key in ("name", "description"))
    asked = [element for element in form["body"] if element["type"] != "markdown"]
    assert asked
    assert (
        len({element["id"] for element in asked}) == len({each["attributes"]["label"] for each in asked}) == len(asked)
    )
    for element in form["body"]:
        assert set(element) <= {"type", "id", "attributes", "validations"}
        assert element["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        attributes = element["attributes"]
        assert attributes["value" if element["type"] == "markdown" else "label"]
        if element["type"] == "dropdown":
            assert all(isinstance(option, str) for option in attributes["options"])
            assert len(set(attributes["options"])) == len(attributes["options"])
        if element["type"] == "checkboxes":
            assert all(set(option) <= {"label", "required"} for option in attributes["options"])
