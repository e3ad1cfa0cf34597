"""Write experiments and settings as text: TOML, a template to fill in, the rows of a table."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import NamedTuple

from fedsample.config.experiment import Experiment
from fedsample.config.fields import allowed_at, fields, variable, written
from fedsample.config.values import flatten


class Key(NamedTuple):
    """One setting: dotted path, environment variable, what is allowed, default (as in TOML; "" is unset), meaning."""

    path: str
    variable: str
    allowed: str
    default: str
    meaning: str


def keys() -> list[Key]:
    """List all settings, in the order of the TOML file."""
    defaults = dict(flatten(Experiment().model_dump()))
    return [
        Key(path, variable(path), allowed_at(path), written(path, defaults[path]), field.description or "")
        for path, field in fields().items()
    ]


def dump_toml(experiment: Experiment, origins: Mapping[str, str] | None = None) -> str:
    """Write every resolved value as TOML: `load(tomllib.loads(dump_toml(e))) == e`.

    Args:
        experiment: the experiment to write.
        origins: dotted path -> remark, written as a comment after the value (see `trace`).
    """
    lines = []
    section = ""
    for path, value in flatten(experiment.model_dump()):
        table, _, key = path.rpartition(".")
        if table != section:
            lines += ["", f"[{table}]"]
            section = table
        if text := written(path, value):
            remark = (origins or {}).get(path)
            lines.append(f"{key} = {text}" + (f"  # {remark}" if remark else ""))
    return "\n".join(lines) + "\n"


def template() -> str:
    """Write a TOML file of the default job: the preset is set, all other keys are comments with their meaning."""
    lines = ["# An experiment of fedsample. Keys in comments show their defaults; uncomment one to change it.", ""]
    section = ""
    for key in keys():
        table, _, name = key.path.rpartition(".")
        if table != section:
            lines += ["", f"[{table}]"]
            section = table
        lines += textwrap.wrap(f"{key.meaning} ({key.allowed})", 96, initial_indent="# ", subsequent_indent="#   ")
        lines.append(f"{name} = {key.default}" if name == "preset" else f"# {name} = {key.default}".rstrip())
    return "\n".join(lines) + "\n"
