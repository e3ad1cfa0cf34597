"""Error messages for configurations: all invalid settings in one error, each in the words of its field."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError

from fedsample.config.fields import allowed, allowed_at, fields, literal, nearest, sections
from fedsample.config.sections import ScheduleConfig
from fedsample.config.values import TABLES
from fedsample.errors import ConfigError


class Problem(NamedTuple):
    """An invalid setting: its dotted path, and the reason."""

    path: str
    text: str


class SettingsError(ConfigError):
    """All invalid settings of a configuration, one line per setting.

    Args:
        problems: the invalid settings, in order.
        origins: dotted path -> what set it, where known.
    """

    def __init__(self, problems: Sequence[Problem], origins: Mapping[str, str] | None = None) -> None:
        self.problems = problems
        by = origins or {}
        lines = []
        for path, text in problems:
            origin = next((by[key] for key in by if key == path or key.startswith(f"{path}.")), None)
            lines.append(f"{path}: {text}" + (f" (set by {origin})" if origin else ""))
        head = f"{len(lines)} settings cannot be used:\n  " if len(lines) > 1 else ""
        super().__init__(head + "\n  ".join(lines))


def problems_of(error: ValidationError) -> list[Problem]:
    """Translate pydantic's errors, one per setting, into the words of the fields."""
    found: dict[str, Problem] = {}
    for item in error.errors(include_url=False, include_context=False):
        first, *rest = (str(part) for part in item["loc"])
        if first in TABLES and isinstance(item["input"], Mapping) and rest and rest[0] != ScheduleConfig.__name__:
            continue  # a table: the errors inside it are listed too
        path = f"{first}.{rest[0]}" if rest and first in sections() else first
        if item["type"] == "extra_forbidden":
            known = nearest(path, isinstance(item["input"], Mapping)) if path not in TABLES else _near(rest[-1])
            text = f"unknown key; the nearest known key is {known}"
        elif path in sections():
            text = f"got {literal(item['input'])}; expected a table of settings"
        else:
            text = _refused(path, [str(part) for part in item["loc"]][1:], item["input"])
        found.setdefault(path, Problem(path, text))
    return list(found.values())


def _refused(path: str, below: Sequence[str], got: Any) -> str:
    """Explain why a value is invalid, or a value inside a table that is one setting."""
    inside = below[-1] if path in TABLES and below else ""
    field = ScheduleConfig.model_fields.get(inside) or next(
        (field for name, field in ScheduleConfig.model_fields.items() if path in TABLES and name in below), None
    )
    if field is None:
        return f"got {literal(got)}; expected {allowed_at(path)}{_hint(path, got)}"
    name = next(name for name, each in ScheduleConfig.model_fields.items() if each is field)
    return f"got {name} = {literal(got)}; expected {allowed(field.annotation, field)}"


def _near(name: str) -> str:
    """The key of a schedule that is most similar to an unknown one."""
    return max(ScheduleConfig.model_fields, key=lambda known: difflib.SequenceMatcher(None, name, known).ratio())


def _hint(path: str, got: Any) -> str:
    """Advice on an invalid value, or an empty text."""
    if path == "fleet.name" and got == "ray":
        return f'; "{got}" is not part of this version, "local" runs the same chain in one process'
    if isinstance(got, str):
        words = [word for word in get_args(fields()[path].annotation) if isinstance(word, str)]
        close = difflib.get_close_matches(got, words, n=1)
        if close:
            return f'; did you mean "{close[0]}"?'
        value = _number(got)
        if value is not None:
            return f"; write it without quotes and as TOML does: {literal(value)}"
    return ""


def _number(text: str) -> float | bool | None:
    """Parse text as a number or truth value; None if it is neither."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        return None
