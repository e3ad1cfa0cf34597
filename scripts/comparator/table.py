"""The findings, a table of all cases, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from comparator.campaign import Result
from comparator.findings import Kind

_SHOWN = 4  # findings of one case that are printed, draws first
_TITLES = {Kind.NOTE: "note", Kind.DIFFERENCE: "DIFFERENT", Kind.BROKEN: "NOT COMPARED"}


def print_results(results: Sequence[Result], seconds: float) -> int:
    """Print what was found and what was run -> the exit code."""
    for result in results:
        for finding in result.findings[:_SHOWN]:
            print(f"{_TITLES[finding.kind]}: {result.name}: {finding.text}")
        if len(result.findings) > _SHOWN:
            print(f"    and {len(result.findings) - _SHOWN} more of {result.name}")
    header = ("", "cases", "same", "different", "not compared", "refused by both", "fell back", "messages", "seconds")
    rows: list[tuple[str, ...]] = [header]
    for group in dict.fromkeys(result.group for result in results):
        rows.append(_row(group, [result for result in results if result.group == group]))
    rows.append(_row("all", results))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    print()
    for row in rows:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([row[0].ljust(widths[0]), *cells]))
    worst = max((result.worst for result in results), default=Kind.BROKEN)
    verdict = {
        Kind.NOTE: "the same, to the bit",
        Kind.DIFFERENCE: "DIFFERENT",
        Kind.BROKEN: "NOT ALL COMPARED",
    }[worst]
    print(f"\n{verdict}, after {seconds:.0f} s" if results else "\nno case was chosen")
    return 0 if results and worst is Kind.NOTE else 1


def _row(group: str, results: Sequence[Result]) -> tuple[str, ...]:
    counts = [sum(result.worst is kind for result in results) for kind in Kind]
    refused = sum(result.refused for result in results)
    fell_back = sum(bool(result.fell_back) for result in results)
    messages = sum(result.messages for result in results)
    seconds = f"{sum(result.seconds for result in results):.1f}"
    return (group, str(len(results)), *map(str, (*counts, refused, fell_back, messages)), seconds)
