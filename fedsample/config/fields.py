"""Settings by dotted path: what each accepts, in words, and its value in TOML."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from fedsample.config.sections import Section, Settings, Word

PREFIX = "FEDSAMPLE_"
OF_THE_MACHINE = frozenset({"FEDSAMPLE_CXXFLAGS"})  # environment variables that are not settings, see `targets.fused`


def variable(path: str) -> str:
    """Name the environment variable that sets a key: FEDSAMPLE_UPLINK__K for uplink.k."""
    return PREFIX + path.replace(".", "__").upper()


@cache
def sections() -> dict[str, type[Section]]:
    """Name and class of each table."""
    kinds = ((name, field.annotation) for name, field in Settings.model_fields.items())
    return {name: kind for name, kind in kinds if isinstance(kind, type) and issubclass(kind, Section)}


@cache
def fields() -> dict[str, FieldInfo]:
    """Dotted path and field of each setting, top level first."""
    top = {name: field for name, field in Settings.model_fields.items() if name not in sections()}
    below = {f"{name}.{key}": f for name, table in sections().items() for key, f in table.model_fields.items()}
    return {**top, **below}


def nearest(path: str, table: bool = False) -> str:
    """Find the known key (or section, for a table) most similar to an unknown one, in whole and in its last part."""
    section, _, last = path.rpartition(".")

    def score(known: str) -> float:
        place, _, name = known.rpartition(".")
        likeness = (difflib.SequenceMatcher(None, a, b).ratio() for a, b in ((path, known), (last, name)))
        return sum(likeness) + (0.5 if section and section == place else 0)

    return max(sections() if table else fields(), key=score)


def word_for_none(path: str) -> str:
    """The word for None at this path; empty if None is written by leaving the key out."""
    functions = (m.func for m in fields()[path].metadata if isinstance(m, BeforeValidator))
    return next((function.text for function in functions if isinstance(function, Word)), "")


def written(path: str, value: Any) -> str:
    """Write a value as TOML; empty for None that is written by leaving the key out."""
    if value is None:
        return f'"{word_for_none(path)}"' if word_for_none(path) else ""
    return literal(value)


def literal(value: Any) -> str:
    """Write a value as inline TOML; as Python's `repr` if TOML cannot."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(literal(item) for item in value) + "]"
    try:
        return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")
    except (TypeError, ValueError):
        return repr(value)


def allowed_at(path: str) -> str:
    """Describe in words what a setting accepts, from its annotation."""
    field = fields()[path]
    word = word_for_none(path)
    return allowed(field.annotation, field) + (f' or "{word}"' if word else "")


def allowed(annotation: Any, field: FieldInfo | None = None) -> str:
    """Describe an annotation in words; `field` carries its bounds."""
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return allowed(arguments[0], next((a for a in arguments[1:] if isinstance(a, FieldInfo)), None))
    if kind in (Union, types.UnionType):
        return " or ".join(allowed(part) for part in arguments if part is not type(None))
    if kind is Literal:
        return ("" if len(arguments) == 1 else "one of ") + ", ".join(f'"{word}"' for word in arguments)
    if kind is list:
        return f"a list, each {allowed(arguments[0])}"
    if isinstance(kind := annotation, type) and issubclass(kind, BaseModel):
        return "a table with " + ", ".join(kind.model_fields)
    if field is not None and field.examples:
        return "text such as " + ", ".join(f'"{example}"' for example in field.examples)
    name = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [(signs[s], getattr(m, s)) for m in (field.metadata if field else ()) for s in signs if hasattr(m, s)]
    return name + " and".join(f" {sign} {bound}" for sign, bound in found)
