"""`fedsample bench`: tables of what was measured, as Markdown and JSON."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call

from fedsample.cli import bench_runner, bench_table
from fedsample.cli.bench import bench
from fedsample.errors import ConfigError, FedSampleError

pytestmark = pytest.mark.slow


def test_a_part_is_measured_and_written(tmp_path: Path) -> None:
    done = call(tmp_path, "bench", "--quick", "--parts", "a", "--out", "there")
    assert done.code == 0
    report = json.loads((tmp_path / "there" / "bench.json").read_text())
    assert report["machine"].keys() >= {"date", "processor", "cores", "load", "load_end", "torch", "flwr", "ray"}
    lines = {line["what"]: line for line in report["table"]}
    assert {line["workload"] for line in report["table"]} == {"a"}
    fastest = min(line["ms"] for what, line in lines.items() if what.startswith("gradient"))
    for line in lines.values():
        if line["ms"] is not None:
            assert line["ratio"] == pytest.approx(line["ms"] / fastest, rel=0.001)
    ours = lines["round: batched"]
    assert (ours["target"], ours["reached"]) == ("0.6 ms", ours["ms"] <= 0.6)
    text = (tmp_path / "there" / "bench.md").read_text()
    assert text in done.out
    assert text.count("| a | 10 | round: batched |") == 1
    assert "pfl-research | 53 |" in text
    assert "these say that it works" in text


def test_ratios_and_targets_of_every_part() -> None:
    parts: dict[str, list[dict[str, Any]]] = {
        "a": [
            {"clients": 100, "what": "gradient: stacked", "ms": 1.0},
            {"clients": 100, "what": "gradient: torch.compile", "why": "no | compiler"},
            {"clients": 100, "what": "round: stacked", "ms": 2.5},
            {"clients": 1000, "what": "gradient: stacked", "ms": 10.0},
            {"clients": 1000, "what": "round: stacked", "ms": 20.0},
        ],
        "a-flower": [{"clients": 100, "engine": "compiled", "flower_ms": 500.0, "ours_ms": 1.25}],
        "b": [{"clients": 100, "name": "CNN", "seconds": 3.3, "plain_seconds": 3.0}],
        "flower": [{"clients": 10, "name": "idle", "seconds": 0.01, "flower_seconds": 0.5}],
        "c": [{"clients": 20, "model": "lenet5", "ours_ms": 12.0, "loop_ms": 10.0, "processor_ratio": 1.2}],
        "growth": [
            {"engine": "stacked", "ms": 0.2, "peak_mb": 70, "state_kb": 11.0} | case
            for case in (
                {"clients": 1000, "rows": 20, "times_data": 9.0},
                {"clients": 1000, "rows": 300, "times_data": 1.9},
            )
        ],
        "devices": [{"devices": 2, "parameters": 1000, "bare_ms": 2.0, "ours_ms": 3.0}],
    }
    table = bench_table.lines(parts, {})
    found = [(line.workload, line.clients, line.ratio, line.reached) for line in table if line.target or line.over]
    assert found == [
        ("a", 100, 1.0, None),
        ("a", 100, 2.5, False),
        ("a", 1000, 1.0, None),
        ("a", 1000, 2.0, True),
        ("a-flower", 100, 400.0, True),
        ("b", 100, pytest.approx(1.1), None),
        ("flower", 10, 50.0, None),
        ("c", 20, 1.2, False),
        ("growth", 1000, None, True),
        ("devices", 2, 1.5, None),
    ]
    assert bench_table.READERS.keys() == bench_runner.PARTS.keys()
    lines = bench_table.markdown(table).splitlines()
    assert "| a | 100 | gradient: torch.compile |  |  |  |  | no \\| compiler |" in lines
    assert "| a | 100 | round: stacked | 2.5 | 2.5 x fastest gradient | at most 2 x | no |  |" in lines


def test_agreement_with_the_cpu_and_cuda_graphs_have_lines() -> None:
    gradient = {"clients": 100, "what": "gradient: cuda-graph against the CPU", "difference": 2.5e-7, "rtol": 1e-5}
    parts: dict[str, list[dict[str, Any]]] = {
        "a": [
            {"clients": 100, "what": "gradient: cuda-graph", "ms": 1.0},
            {"clients": 100, "what": "round: cuda-graph", "ms": 1.5},
            gradient | {"agree": True},
        ],
        "c": [
            {"clients": 20, "what": "gradient: lenet5", "difference": 0.1, "rtol": 1e-3, "agree": False},
            *(
                {
                    "clients": 20,
                    "model": "lenet5",
                    "ours_ms": ms,
                    "loop_ms": 10.0,
                    "processor_ratio": 1.2,
                    "engine": name,
                }
                for name, ms in (("batched", 11.0), ("cuda-graph", 2.0))
            ),
        ],
    }
    table = bench_table.lines(parts, {})
    assert [(line.what, line.ratio, line.target, line.reached) for line in table] == [
        ("gradient: cuda-graph", 1.0, "", None),
        ("round: cuda-graph", 1.5, "at most 2 x", True),
        ("gradient: cuda-graph against the CPU", None, "at most 1e-05", True),
        ("plain torch loop: lenet5", None, "", None),
        ("round: lenet5", 1.1, "at most 1.15 x", True),
        ("round: lenet5, cuda-graph", 0.2, "at most 1.15 x", True),
        ("gradient: lenet5", None, "at most 0.001", False),
    ]
    assert table[2].note == "they differ by 2.5e-07"


def test_what_is_missing_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    why = bench_runner.why_not("a-flower", "cpu")
    assert "pip install" in why
    assert bench_runner.why_not("a", "cpu") == ""
    (line,) = bench_table.lines({}, {"a-flower": why})
    assert line == ("a-flower", None, "not measured", None, None, "", "", None, why)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no GPU that PyTorch can use; choose cpu") as caught:
        bench_runner.check_device("cuda")
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match="got 'tpu', expected cpu or cuda"):
        bench_runner.check_device("tpu")
    assert bench_runner.why_not("growth", "cuda") == "measured on the CPU only"
    assert [name for name in "abc" if not bench_runner.why_not(name, "cuda")] == ["a", "b", "c"]


def test_a_part_that_fails_does_not_take_the_others_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(name: str, **_: object) -> list[dict[str, Any]]:
        if name == "c":
            raise FedSampleError("it broke")
        return [
            {
                "clients": 10,
                "engine": "stacked",
                "ms": 0.2,
                "rows": 20,
                "peak_mb": 70,
                "times_data": 2.5,
                "state_kb": 11.0,
            }
        ]

    monkeypatch.setattr(bench_runner, "measure", measure)
    with pytest.raises(FedSampleError, match="failed: c; "):
        bench(parts="c,growth", out=tmp_path)
    table = json.loads((tmp_path / "bench.json").read_text())["table"]
    assert [(line["workload"], line["ms"], line["note"][:8]) for line in table] == [
        ("growth", 0.2, "peak mem"),
        ("c", None, "it broke"),
    ]


def test_every_part_has_its_script() -> None:
    assert all((bench_runner.scripts() / part.script).is_file() for part in bench_runner.PARTS.values())


def test_a_bare_machine_without_a_gpu_is_told() -> None:
    script = bench_runner.scripts() / "gpu.py"
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "this machine has no GPU that PyTorch can use; choose cpu" in done.stderr


def test_parts_are_chosen_by_name() -> None:
    assert bench_runner.chosen(" c, a") == ["c", "a"]
    with pytest.raises(ConfigError, match="no part 'z'; expected some of a, "):
        bench_runner.chosen("a,z")
    with pytest.raises(ConfigError, match="no part ''"):
        bench_runner.chosen("")
