"""`fedsample bench`: the cost of a round, beside lower bounds and alternatives."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fedsample.errors import FedSampleError


def bench(
    parts: Annotated[
        str | None, typer.Option(help="Which, with commas: a, a-flower, b, flower, c, growth, devices; by default all.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it works.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.md.")] = Path("bench"),
    device: Annotated[str, typer.Option(help="cpu or cuda; a GPU measures parts a, b and c.")] = "cpu",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure rounds against bare gradients, plain loops, bare streams and Flower's own runtimes, in one run.

    Prints one table and writes it as JSON and Markdown. All parts take about ten minutes on two quiet cores; keep other
    work away meanwhile. A part that cannot be measured here has a line that says why.
    """
    from fedsample.cli import bench_runner, bench_table

    names = list(bench_runner.PARTS) if parts is None else bench_runner.chosen(parts)
    bench_runner.check_device(device)
    out.mkdir(parents=True, exist_ok=True)
    measured: dict[str, list[dict[str, Any]]] = {}
    absent: dict[str, str] = {}
    machine, failed = bench_runner.machine(), []
    report: dict[str, Any] = {"machine": machine, "quick": quick, "device": device, "parts": measured, "absent": absent}
    report["quoted"] = [each._asdict() | {"when": bench_table.QUOTED_AT} for each in bench_table.QUOTED]
    for name in names:
        why = bench_runner.why_not(name, device)
        try:
            if why:
                absent[name] = why
            else:
                measured[name] = bench_runner.measure(name, quick=quick, device=device)
        except FedSampleError as error:  # the other parts are kept
            absent[name] = str(error)
            failed.append(name)
        machine["load_end"] = [round(each, 2) for each in os.getloadavg()]
        report["table"] = [bench_table.rounded(line) for line in bench_table.lines(measured, absent)]
        text = bench_runner.markdown(report)
        (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (out / "bench.md").write_text(text, encoding="utf-8")
    typer.echo(text)
    typer.echo(f"written to {out / 'bench.json'} and {out / 'bench.md'}")
    if failed:
        raise FedSampleError(f"failed: {', '.join(failed)}; their messages are above, the other parts are written")
