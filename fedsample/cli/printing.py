"""Printing results of commands: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType


def print_rich(renderable: RenderableType) -> None:
    """Print a `rich` renderable to standard output."""
    from rich.console import Console

    Console().print(renderable)


def print_json(value: Any) -> None:
    """Print strict JSON: non-finite numbers become null."""

    def finite(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: finite(below) for key, below in item.items()}
        if isinstance(item, list | tuple):
            return [finite(below) for below in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    typer.echo(json.dumps(finite(value), indent=2, allow_nan=False))


def grid(rows: Sequence[Mapping[str, Any]], header: bool = True) -> RenderableType:
    """Lay out rows with the same keys as a table; the first column names the row."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_header=header)
    for number, name in enumerate(rows[0] if rows else ()):
        table.add_column(Text(name), no_wrap=number == 0, style="bold" if number == 0 else "", overflow="fold")
    for row in rows:
        table.add_row(*(Text("-" if value is None else str(value)) for value in row.values()))
    return table


def cards(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Lay out rows with many columns, one below the other; the first column is the heading."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        (_, heading), *rest = row.items()
        table.add_row(Text(str(heading), style="bold"), Text(str(rest[0][1])))
        for name, value in rest[1:]:
            table.add_row(Text(f"  {name}"), Text(str(value)))
        table.add_row()
    return table
