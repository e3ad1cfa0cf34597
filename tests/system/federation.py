"""A server and its devices, each a process of the command line, to be killed at will."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsample.fleets.grpc import certs

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

CONFIG = """
preset = "{preset}"
rounds = 400
warmup = 40
thin = 4
chains = 2
step_size = 1e-3
[data]
name = "wine"
clients = {devices}
[monitor]
every = 25
[fleet]
snapshot_rounds = 20
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Federation:
    """A server and its devices, each a process of the command line."""

    def __init__(self, folder: Path, config: str, devices: int, secure: bool = False) -> None:
        self.folder, self.devices, self.port = folder, devices, free_port()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "experiment.toml").write_text(config)
        self.secure = secure
        if secure:
            certs.init(folder / "certs", ["localhost"], devices)

    def start(self, who: str, *options: str) -> subprocess.Popen[bytes]:
        where = f"127.0.0.1:{self.port}"
        identity = ["--certs", f"certs/{who}"] if self.secure else ["--insecure"]
        if who == "server":
            command = ["server", *options, "--listen", where, "--out", "run", *identity]
        else:
            index = who.removeprefix("client-")
            claimed = [] if self.secure else ["--client", index]
            share = ["--data", "wine", "--partition", index, "--partitions", str(self.devices)]
            command = ["client", where, *identity, *claimed, *share, "--state", f"state-{index}"]
        line = [sys.executable, "-m", "fedsample", *command, "--quiet"]
        with (self.folder / f"{who}.log").open("ab") as log:
            process = subprocess.Popen(line, cwd=self.folder, stdout=log, stderr=log, env=ENVIRONMENT)
        self.running[who] = process
        return process

    def begin(self) -> subprocess.Popen[bytes]:
        for index in range(self.devices):
            self.start(f"client-{index}")
        return self.start("server", "experiment.toml")

    def kill(self, who: str) -> None:
        self.running[who].kill()
        self.running[who].wait()

    def logged(self, round: int, seconds: float = 90.0) -> None:
        """Wait until the run has a checkpoint of this round or a later one."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            stored = [int(path.name[6:]) for path in (self.folder / "run" / "checkpoint").glob("round-????????")]
            if max(stored, default=-1) >= round:
                return
            assert self.running["server"].poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.02)
        pytest.fail(f"no checkpoint of round {round}: {(self.folder / 'server.log').read_text()}")

    def end(self, seconds: float = 120.0) -> None:
        assert self.running["server"].wait(seconds) == 0, (self.folder / "server.log").read_text()
        for who, process in self.running.items():
            assert process.wait(30) == 0, (self.folder / f"{who}.log").read_text()

    def stop(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()
