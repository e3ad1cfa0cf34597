"""The benchmarks behind `fedsample bench`: scripts, each run in a fresh process, and their rows in one report."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fedsample.errors import ConfigError, FedSampleError


class Part(NamedTuple):
    """One benchmark.

    Attributes:
        script: its file. title: what it compares. quick: arguments that make it short.
    """

    script: str
    title: str
    quick: tuple[str, ...]


PARTS = {
    "a": Part(
        "workload_a.py",
        "Workload A: a Langevin-MARINA round of logistic regression against the bare gradient, ms",
        ("--clients", "10", "--rounds", "40", "--repeats", "2", "--engines", "batched"),
    ),
    "a-flower": Part(
        "workload_a_flower.py", "Workload A under Flower's simulation runtime, ms", ("--clients", "2", "--rounds", "2")
    ),
    "flower": Part(
        "flower_app.py", "Flower apps, and FedAvg of a CNN (workload B)", ("--only", "overhead", "--clients", "2")
    ),
    "c": Part(
        "workload_c.py",
        "Workload C: QLSD++ of networks against a plain loop, ms",
        ("--models", "lenet5", "--rounds", "1"),
    ),
    "growth": Part("growth.py", "Growth with the number of clients", ("--clients", "10", "--rounds", "3")),
    "devices": Part(
        "devices.py", "Devices over gRPC against bare streams", ("--devices", "2", "--large", "--rounds", "5")
    ),
}


def scripts() -> Path:
    """Where the scripts lie: in the installed package, or in the source tree.

    Raises:
        FedSampleError: if they are nowhere.
    """
    package = Path(__file__).parent
    for folder in (package / "bench", package.parent / "simulations" / "benchmarks"):
        if (folder / "workload_a.py").is_file():
            return folder
    raise FedSampleError("the benchmark scripts are missing from this installation: install fedsample from its wheel")


def chosen(parts: str) -> list[str]:
    """The names in a list with commas; empty: all.

    Raises:
        ConfigError: if one is unknown.
    """
    names = [name.strip() for name in parts.split(",") if name.strip()] or list(PARTS)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ConfigError(f"--parts: there is no part {unknown[0]!r}; expected some of {', '.join(PARTS)}")
    return names


def measure(names: Sequence[str], *, quick: bool) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Run parts one after the other -> each part's name and rows.

    Raises:
        FedSampleError: if one fails.
    """
    folder = scripts()
    for name in names:
        part = PARTS[name]
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "rows.json"
            form = ["--out", str(out)] if name == "flower" else ["--json"]
            command = [sys.executable, str(folder / part.script), *form, *(part.quick if quick else ())]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            if done.returncode:
                raise FedSampleError(f"benchmark {name} failed with exit code {done.returncode}; its message is above")
            text = out.read_text() if name == "flower" else done.stdout
        found = json.loads(text)
        yield name, found if isinstance(found, list) else found["rows"]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    import fedsample

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "processor": _processor(),
        "cores": os.cpu_count(), "load": [round(each, 2) for each in os.getloadavg()],
        "python": platform.python_version(), "torch": torch.__version__, "fedsample": fedsample.__version__,
    }  # fmt: skip


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    about = report["machine"]
    lines = [
        f"Measured {about['date']} on {about['cores']} cores of {about['processor']}, torch {about['torch']}, load "
        f"{about['load'][0]} at the start."
    ]
    for name, rows in report["parts"].items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines += ["", f"### {PARTS[name].title}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"
