"""The benchmarks behind `fedsample bench`: scripts, each run in a fresh process, with one report of their rows."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fedsample.cli import bench_table as table
from fedsample.errors import ConfigError, FedSampleError


class Part(NamedTuple):
    """One benchmark.

    Attributes:
        script: file name.
        title: what it compares.
        full: arguments of a full measurement.
        quick: arguments of a short one.
        ray: whether it starts Flower's simulation.
        cuda: whether it takes --device.
    """

    script: str
    title: str
    full: tuple[str, ...]
    quick: tuple[str, ...]
    ray: bool = False
    cuda: bool = False


PARTS = {
    "a": Part(
        "workload_a.py",
        "Workload A: a Langevin-MARINA round of logistic regression against the bare gradient",
        ("--torch-compile",),
        ("--clients", "10", "--rounds", "40", "--repeats", "2"),
        cuda=True,
    ),
    "a-flower": Part(
        "workload_a_flower.py",
        "Workload A under Flower's simulation runtime",
        (),
        ("--clients", "2", "--rounds", "2"),
        ray=True,
    ),
    "b": Part(
        "flower_app.py",
        "Workload B: FedAvg of a CNN as a Flower app against a plain loop",
        ("--only", "cnn"),
        ("--only", "cnn", "--cnn-rounds", "1"),
        cuda=True,
    ),
    "flower": Part(
        "flower_app.py",
        "Flower apps against Flower's simulation runtime",
        ("--only", "overhead"),
        ("--only", "overhead", "--clients", "2"),
        ray=True,
    ),
    "c": Part(
        "workload_c.py",
        "Workload C: QLSD++ of networks against a plain loop",
        (),
        ("--models", "lenet5", "--rounds", "1"),
        cuda=True,
    ),
    "growth": Part(
        "growth.py", "Growth with the number of clients", (), ("--clients", "10", "--full", "--rounds", "3")
    ),
    "devices": Part(
        "devices.py", "Devices over gRPC against bare streams", (), ("--devices", "2", "--large", "--rounds", "5")
    ),
}


def scripts() -> Path:
    """Find the folder of the scripts: in the installed package, or in the source tree.

    Raises:
        FedSampleError: if they are in neither.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "bench", package.parent / "simulations" / "benchmarks"):
        if (folder / "workload_a.py").is_file():
            return folder
    raise FedSampleError("the benchmark scripts are missing from this installation: install fedsample from its wheel")


def chosen(parts: str) -> list[str]:
    """Split a comma-separated list of names.

    Raises:
        ConfigError: if one is unknown.
    """
    names = [name.strip() for name in parts.split(",")]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ConfigError(f"--parts: there is no part {unknown[0]!r}; expected some of {', '.join(PARTS)}")
    return names


def check_device(device: str) -> None:
    """Refuse a device that is unknown or not available.

    Raises:
        ConfigError: if it is.
    """
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device: got {device!r}, expected cpu or cuda")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device cuda, but this machine has no GPU that PyTorch can use; choose cpu")


def why_not(name: str, device: str) -> str:
    """Why a part cannot be measured here; empty: it can be."""
    part = PARTS[name]
    if not (scripts() / part.script).is_file():
        return f"{part.script} is not in this installation"
    if device == "cuda" and not part.cuda:
        return "measured on the CPU only"
    if part.ray and importlib.util.find_spec("ray") is None:
        return "Flower's simulation needs Ray: pip install 'fedsample[ray]'"
    return ""


def measure(name: str, *, quick: bool, device: str = "cpu") -> list[dict[str, Any]]:
    """Run a part in a fresh process with one thread -> its rows.

    Raises:
        FedSampleError: if it fails.
    """
    part = PARTS[name]
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "rows.json"
        to_file = part.script == "flower_app.py"
        form = ["--out", str(out)] if to_file else ["--json"]
        form += ["--device", device] if part.cuda else []
        command = [sys.executable, str(scripts() / part.script), *form, *(part.quick if quick else part.full)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise FedSampleError(f"benchmark {name} failed with exit code {done.returncode}; its message is above")
        found = json.loads(out.read_text() if to_file else done.stdout)
    rows: list[dict[str, Any]] = found if isinstance(found, list) else found["rows"]
    return rows


def machine() -> dict[str, Any]:
    """Describe the machine of the measurement."""
    import torch

    from fedsample.version import __version__

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "processor": _processor(),
        "cores": os.cpu_count(), "load": [round(each, 2) for each in os.getloadavg()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(), "torch": torch.__version__, "fedsample": __version__,
        "flwr": _version("flwr"), "ray": _version("ray"),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def markdown(report: Mapping[str, Any]) -> str:
    """Format the report: date, machine and the table."""
    about = report["machine"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "flwr", "ray") if about[name])
    where = about["gpu"] if report["device"] == "cuda" else f"{about['cores']} cores of {about['processor']}"
    quick = " Small sizes (--quick): these say that it works, not how fast it is." if report["quick"] else ""
    head = (
        f"Measured {about['date']} on {where}, one thread, {versions}, load {about['load'][0]} at the start and "
        f"{about['load_end'][0]} at the end.{quick}"
    )
    return f"{head}\n\n{table.markdown(table.lines(report['parts'], report['absent']))}"
