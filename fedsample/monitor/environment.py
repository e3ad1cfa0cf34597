"""What the bits of a run depend on besides its configuration, for `env.json`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = (
    "fedsample",
    "torch",
    "numpy",
    "flwr",
    "flwr-datasets",
    "safetensors",
    "scikit-learn",
    "pydantic",
    "tensorboard",
    "protobuf",
)

DECIDING = (
    "versions.fedsample",
    "versions.torch",
    "versions.numpy",
    "machine",
    "processor",
    "cpu_capability",
    "cxxflags",
    "gpu",
)


def environment() -> dict[str, Any]:
    """Describe what can change a bit of a run besides its configuration: versions, machine, threads, git revision.

    It contains no path, no user or host name, and no environment variable but what decides the compiled engine's code.
    """
    import torch

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": cuda,
        "cuda": torch.version.cuda,
        "cxxflags": _code_flags(),
        "git_revision": _git_revision(),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List in words the differences between two environments that can change the last bits of a draw.

    Args:
        before: an environment, as `environment` returns it.
        now: another; what one of them lacks is not compared.
    """
    found = []
    for name in DECIDING:
        section, _, key = name.rpartition(".")
        old, new = (each.get(section, {}) if section else each for each in (before, now))
        if isinstance(old, Mapping) and key in old and key in new and old[key] != new[key]:
            found.append(f"{key.replace('_', ' ')} {old[key] or 'none'} -> {new[key] or 'none'}")
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "fedsample":
            from fedsample.version import __version__

            return __version__
        return None


def _processor() -> str:
    # platform.processor() is empty on most Linux systems.
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _code_flags() -> str | None:
    """The flags of FEDSAMPLE_CXXFLAGS that decide the code: optimisation, machine, floats; no paths. None: not set."""
    given = os.environ.get("FEDSAMPLE_CXXFLAGS")
    return None if given is None else " ".join(flag for flag in given.split() if flag.startswith(("-O", "-m", "-f")))


def _git_revision() -> str | None:
    """Return the revision of the source, with `-dirty` if tracked files differ; None: an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # a virtual environment inside somebody else's repository is not our source
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
