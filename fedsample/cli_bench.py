"""`fedsample bench`: what a round costs, beside what it could cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def bench(
    parts: Annotated[
        str, typer.Option(help="Which, with commas: a, a-flower, flower, c, growth, devices; by default all.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it works.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.md.")] = Path("bench"),
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure rounds against bare gradients, plain loops, bare streams and Flower's own runtimes, in one run.

    Prints the tables and writes them as JSON and Markdown. All parts take about ten minutes on two quiet cores; keep
    other work away meanwhile.
    """
    from fedsample import benchmarks

    names = benchmarks.chosen(parts)
    out.mkdir(parents=True, exist_ok=True)
    measured: dict[str, list[dict[str, Any]]] = {}
    report = {"machine": benchmarks.machine(), "quick": quick, "parts": measured}
    for name, rows in benchmarks.measure(names, quick=quick):
        measured[name] = rows
        (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    text = benchmarks.markdown(report)
    (out / "bench.md").write_text(text)
    typer.echo(text)
    typer.echo(f"written to {out / 'bench.json'} and {out / 'bench.md'}")
