"""The table of `fedsample bench`: what each part measured, as times, ratios within that run, and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Line(NamedTuple):
    """A row of the table.

    Attributes:
        workload: part of the benchmark.
        clients: number of clients; None: it has none.
        what: what was measured.
        ms: milliseconds per round; None: not measured.
        ratio: `ms` relative to that of the row `over`, of the same run.
        over: the row that `ratio` compares with.
        target: the limit that was aimed for, as text: the largest ratio, or with "times ours" the smallest.
        reached: whether the target was met.
        note: why there is no time, or a remark.
    """

    workload: str
    clients: int | None
    what: str
    ms: float | None
    ratio: float | None = None
    over: str = ""
    target: str = ""
    reached: bool | None = None
    note: str = ""


class Quoted(NamedTuple):
    """A time measured elsewhere: never part of a ratio here."""

    workload: str
    clients: int
    system: str
    ms: str


QUOTED_AT = "November 2026, another pair of quiet cores"
QUOTED = (
    Quoted("a", 100, "Flower 1.41, simulation", "430-650"),
    Quoted("a", 100, "pfl-research", "53"),
    Quoted("a", 100, "FedJAX", "11"),
    Quoted("a", 100, "plain torch loop", "9"),
    Quoted("a", 100, "JAX, vmap and scan", "2.9"),
    Quoted("a", 100, "torch.compile, batched, gradient alone", "0.34-0.45"),
    Quoted("a", 100, "one pass over the data", "0.10"),
    Quoted("a", 1000, "Flower 1.41, simulation", "8500"),
    Quoted("a", 1000, "FedJAX", "104"),
    Quoted("a", 1000, "JAX, vmap and scan", "20"),
    Quoted("a", 1000, "torch.compile, batched, gradient alone", "12"),
    Quoted("a", 1000, "one pass over the data", "5"),
    Quoted("b", 100, "pfl-research", "3600"),
    Quoted("b", 100, "Flower 1.41, simulation", "3600"),
    Quoted("b", 100, "plain torch loop", "3100"),
)

SMALL_ROUND = 0.6  # ms per round of workload A with 10 clients, where the gradient is too short for a ratio
GRADIENTS = 2.0  # times the fastest bare gradient, per round of workload A with 100 and 1,000 clients
FLOWER = 400.0  # times ours, of Flower's simulation with 100 clients
ROWS, PEAK = 300, 2.0  # rows per client, and peak memory as a multiple of the data, at 1,000 clients
LOOP = 1.15  # times the plain loop, per round of a network


def workload_a(rows: Sequence[Row]) -> Iterator[Line]:
    """Compare rounds and their parts with the fastest bare gradient for as many clients."""
    for row in rows:
        n, what = row["clients"], row["what"]
        if "why" in row:
            yield Line("a", n, what, None, note=row["why"])
            continue
        gradients = (each for each in rows if each["clients"] == n and each["what"].startswith("gradient"))
        ratio = row["ms"] / min(each["ms"] for each in gradients if "ms" in each)
        line = Line("a", n, what, row["ms"], ratio, "fastest gradient")
        if what.startswith("round") and n == 10:
            line = line._replace(target=f"{SMALL_ROUND} ms", reached=row["ms"] <= SMALL_ROUND)
        elif what.startswith("round") and n in (100, 1000):
            line = line._replace(target=f"at most {GRADIENTS:g} x", reached=ratio <= GRADIENTS)
        yield line


def side_by_side(rows: Sequence[Row]) -> Iterator[Line]:
    """Compare workload A's round here and in Flower's simulation."""
    for row in rows:
        n, ours, theirs = row["clients"], row["ours_ms"], row["flower_ms"]
        yield Line("a-flower", n, f"round: ours, {row['engine']}", ours)
        line = Line("a-flower", n, "round: Flower's simulation", theirs, theirs / ours, "ours")
        aimed = n == 100
        yield line._replace(target=f"at least {FLOWER:g} x", reached=theirs / ours >= FLOWER) if aimed else line


def flower_apps(workload: str, rows: Sequence[Row]) -> Iterator[Line]:
    """Compare rounds of Flower apps here with Flower's simulation or a plain loop."""
    for row in rows:
        n, ours = row["clients"], 1e3 * row["seconds"]
        if "plain_seconds" in row:
            plain = 1e3 * row["plain_seconds"]
            yield Line(workload, n, f"plain torch loop: {row['name']}", plain)
            yield Line(workload, n, f"ours: {row['name']}", ours, ours / plain, "plain loop")
        else:
            theirs = 1e3 * row["flower_seconds"]
            yield Line(workload, n, f"ours: {row['name']}", ours)
            yield Line(workload, n, f"Flower's simulation: {row['name']}", theirs, theirs / ours, "ours")


def networks(rows: Sequence[Row]) -> Iterator[Line]:
    """Compare rounds of networks with a plain loop."""
    seen: set[str] = set()
    for row in rows:
        ours, loop = row["ours_ms"], row["loop_ms"]
        if row["model"] not in seen:
            yield Line("c", row.get("clients"), f"plain torch loop: {row['model']}", loop)
        seen.add(row["model"])
        way = f", {row['engine']}" if row.get("engine", "batched") != "batched" else ""
        line = Line("c", row.get("clients"), f"round: {row['model']}{way}", ours, ours / loop, "plain loop")
        yield line._replace(
            target=f"at most {LOOP} x",
            reached=ours / loop <= LOOP,
            note=f"{row['processor_ratio']} x by processor time",
        )


def growth(rows: Sequence[Row]) -> Iterator[Line]:
    """Compare rounds with more and more clients."""
    for row in rows:
        note = f"peak memory {row['peak_mb']} MB, {row['times_data']} x the data; server state {row['state_kb']} kB"
        line = Line(
            "growth", row["clients"], f"round: {row['engine']}, {row['rows']} rows per client", row["ms"], note=note
        )
        if row["clients"] == 1000 and row["rows"] == ROWS:
            line = line._replace(target=f"peak at most {PEAK:g} x the data", reached=row["times_data"] <= PEAK)
        yield line


def devices(rows: Sequence[Row]) -> Iterator[Line]:
    """Compare rounds over gRPC with bare streams of as many bytes."""
    for row in rows:
        n, size = row["devices"], f"{row['parameters']:,} parameters"
        bare, ours = row["bare_ms"], row["ours_ms"]
        yield Line("devices", n, f"bare streams: {size}", bare)
        yield Line("devices", n, f"round: {size}", ours, ours / bare, "bare streams")


def agreements(workload: str, rows: Sequence[Row]) -> Iterator[Line]:
    """Report how far results on a device are from the CPU's."""
    for row in rows:
        line = Line(workload, row["clients"], row["what"], None, note=f"they differ by {row['difference']:.1e}")
        yield line._replace(target=f"at most {row['rtol']:g}", reached=row["agree"])


READERS: dict[str, Callable[[Sequence[Row]], Iterator[Line]]] = {
    "a": workload_a,
    "a-flower": side_by_side,
    "b": lambda rows: flower_apps("b", rows),
    "flower": lambda rows: flower_apps("flower", rows),
    "c": networks,
    "growth": growth,
    "devices": devices,
}


def lines(parts: Mapping[str, Sequence[Row]], absent: Mapping[str, str]) -> list[Line]:
    """Make the rows of the table.

    Args:
        parts: measured rows by part.
        absent: by part, why it was not measured.
    """
    found: list[Line] = []
    for name, rows in parts.items():
        found += READERS[name]([row for row in rows if "agree" not in row])
        found += agreements(name, [row for row in rows if "agree" in row])
    return found + [Line(name, None, "not measured", None, note=why) for name, why in absent.items()]


def rounded(line: Line) -> dict[str, Any]:
    """Convert a row to JSON: four digits of the ratio, enough to recompute it from the times."""
    ratio = None if line.ratio is None else float(f"{line.ratio:.4g}")
    ms = None if line.ms is None else float(f"{line.ms:.6g}")
    return {**line._asdict(), "ms": ms, "ratio": ratio}


def markdown(table: Sequence[Line]) -> str:
    """Format the table, and below it the times quoted for its parts."""
    rows = [("workload", "clients", "what", "ms per round", "ratio", "target", "reached", "note")]
    for line in table:
        ratio = "" if line.ratio is None else f"{line.ratio:.3g} x {line.over}"
        ms, reached = "" if line.ms is None else f"{line.ms:.3g}", {None: "", True: "yes", False: "no"}[line.reached]
        clients = "" if line.clients is None else f"{line.clients:,}"
        rows.append((line.workload, clients, line.what, ms, ratio, line.target, reached, line.note))
    text = _grid(rows)
    shown = {line.workload.partition("-")[0] for line in table}
    quoted = [(each.workload, f"{each.clients:,}", each.system, each.ms) for each in QUOTED if each.workload in shown]
    if quoted:
        text += f"\nOthers, quoted and not measured here ({QUOTED_AT}):\n\n"
        text += _grid([("workload", "clients", "system", "ms per round"), *quoted])
    return text


def _grid(rows: Sequence[Sequence[str]]) -> str:
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    head, *rest = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *rest]) + "\n"
