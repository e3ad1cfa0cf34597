"""A clean clone of this repository with a virtual environment of its own, and commands typed there as a user would.

The environment sees the packages of the one that runs pytest, so that only fedsample itself is installed anew. Runs are
shortened by FEDSAMPLE_* variables alone: what is typed is what the documents say.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blocks import ROOT, block

RUN = block("README.md", "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt . ")
SHORT = {
    "FEDSAMPLE_ROUNDS": "600",
    "FEDSAMPLE_WARMUP": "200",
    "FEDSAMPLE_FLEET__SNAPSHOT_ROUNDS": "50",
    "FEDSAMPLE_MONITOR__CHECKPOINT_SECONDS": "0",
}


class Terminal:
    """Types commands in a folder."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self._environment = folder, environment
        self._running: list[subprocess.Popen[str]] = []

    def start(self, command: str, **variables: str) -> subprocess.Popen[str]:
        """Begin a command, which goes on in a process group of its own; all it says is in `stdout`."""
        self._running.append(
            subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", command],
                cwd=self.folder,
                env={**self._environment, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return self._running[-1]

    def type(self, command: str, code: int = 0, **variables: str) -> str:
        """Run a command to its end -> all it said."""
        print(f"$ {command}")
        process = self.start(command, **variables)
        said, _ = process.communicate(timeout=500)
        assert process.returncode == code, said
        return said

    def end(self) -> None:
        """Kill what still runs."""
        for process in self._running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def until(self, ready: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
        """Wait for a state of the files that a process makes."""
        end = time.monotonic() + seconds
        while not ready():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, "not ready"
            time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def last_checkpoint(run: Path) -> int:
    """Round of the newest checkpoint on the disk; -1: none."""
    found = [int(p.name[6:]) for p in (run / "checkpoint").glob("round-*") if re.fullmatch(r"round-\d+", p.name)]
    return max(found, default=-1)


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last commit, as `git clone` gives it."""
    folder = tmp_path_factory.mktemp("walk") / "fedsample"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def environment(clone: Path) -> dict[str, str]:
    """Variables of a user's shell, in which `fedsample` is the clone's."""
    dropped = ("FEDSAMPLE_", "PYTHONPATH", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    path = os.pathsep.join([str(clone / ".venv" / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**kept, "PATH": path, "COLUMNS": "120", "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="session")
def main_job(clone: Path, environment: dict[str, str]) -> str:
    """What the README's first command prints, once it has installed the clone and run the main job."""
    install, begun = " -c constraints.txt .", "python3 -m venv .venv && "
    command = RUN.strip()
    assert command.startswith(begun)
    assert install in command
    seen = f"echo {sysconfig.get_path('purelib')} > $(echo .venv/lib/python3.*/site-packages)/shared.pth && "
    command = begun + seen + command.removeprefix(begun).replace(install, " -c constraints.txt --no-deps .")
    terminal = Terminal(clone, environment)
    try:
        said = terminal.type(command)
    finally:
        terminal.end()
    for script in Path(sys.executable).parent.glob("fl*"):  # Flower's commands, in the clone's Python
        first, _, rest = script.read_text().partition("\n")
        if first.startswith("#!"):
            own = clone / ".venv" / "bin" / script.name
            own.write_text(f"#!{own.with_name('python')}\n{rest}")
            own.chmod(0o755)
    return said


@pytest.fixture
def terminal(clone: Path, environment: dict[str, str], main_job: str, tmp_path: Path) -> Iterator[Terminal]:
    """A shell in an empty folder, with fedsample installed; runs in it are short."""
    shell = Terminal(tmp_path, {**environment, **SHORT})
    yield shell
    shell.end()
