"""Flower's own commands as processes: their environment, their end, and what they leave behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fedsample


def environment(**more: str) -> dict[str, str]:
    """For a subprocess that finds this fedsample and this Python's commands, and sends nothing home."""
    here, scripts = str(Path(fedsample.__file__).parents[1]), str(Path(sys.executable).parent)
    settings = {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", **more}
    paths = {"PYTHONPATH": here, "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"}
    return {**os.environ, **paths, **settings}


def ended(command: list[str], env: dict[str, str], cwd: Path, seconds: float) -> str:
    """Run a command to its end -> all it said; it and its children are gone afterwards, whatever happens."""
    process = subprocess.Popen(
        command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{command} did not end within {seconds} s:\n{output}") from None
    assert process.returncode == 0, output
    return output


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def end_superlink(home: Path) -> None:
    """End the SuperLink that `flwr run` left behind, known by its own FLWR_HOME, and see it gone."""

    def found() -> list[int]:
        done = subprocess.run(["pgrep", "-f", f"{home}/local-superlink"], capture_output=True, text=True)
        return [int(pid) for pid in done.stdout.split()]

    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in found():
            os.kill(pid, number)
        deadline = time.monotonic() + 15
        while found() and time.monotonic() < deadline:
            time.sleep(0.1)
    assert not found()
