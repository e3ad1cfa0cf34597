"""`fedsample bench`: tables of what was measured, as Markdown and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import call

from fedsample import benchmarks
from fedsample.errors import ConfigError


@pytest.mark.slow
def test_a_part_is_measured_and_written(tmp_path: Path) -> None:
    done = call(tmp_path, "bench", "--quick", "--parts", "a", "--out", "there")
    assert done.code == 0
    report = json.loads((tmp_path / "there" / "bench.json").read_text())
    assert report["machine"].keys() >= {"date", "processor", "cores", "load", "torch"}
    rows = {row["what"]: row for row in report["parts"]["a"]}
    fastest = min(row["ms"] for what, row in rows.items() if what.startswith("gradient"))
    ours = rows["round: batched"]
    assert ours["ratio"] == pytest.approx(ours["ms"] / fastest, rel=0.01)
    text = (tmp_path / "there" / "bench.md").read_text()
    assert text in done.out
    assert text.count("| round: batched |") == 1


def test_every_part_has_its_script() -> None:
    assert all((benchmarks.scripts() / part.script).is_file() for part in benchmarks.PARTS.values())


def test_parts_are_chosen_by_name() -> None:
    assert benchmarks.chosen("") == list(benchmarks.PARTS)
    assert benchmarks.chosen(" c, a") == ["c", "a"]
    with pytest.raises(ConfigError, match="no part 'b'; expected some of a, "):
        benchmarks.chosen("a,b")
