"""A server and its devices, each a process of the command line, to be killed at will."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from commands import Command, last_checkpoint, start

from fedsample.fleets.grpc.security import cert_folders

CONFIG = """
preset = "{preset}"
rounds = 240
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

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
QUICK = {
    "fedsample.fleets.grpc.device.connection.FIRST": 0.05
}  # seconds of back-off: a run of seconds need not wait for long


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Federation:
    """A server and its devices, each a process of the command line.

    Attributes:
        running: by name, the last process that was started as "server", "client-0", ...
    """

    def __init__(self, folder: Path, config: str, devices: int, secure: bool = False) -> None:
        self.folder, self.devices, self.port = folder, devices, free_port()
        self.running: dict[str, Command] = {}
        (folder / "experiment.toml").write_text(config)
        self.secure = secure
        if secure:
            cert_folders.init(folder / "certs", ["localhost"], devices)

    def start(self, who: str, *options: str, **how: Any) -> Command:
        """Start a process; see `commands.start` for how."""
        where = f"127.0.0.1:{self.port}"
        identity = ["--certs", f"certs/{who}"] if self.secure else ["--insecure"]
        if who == "server":
            words = ["server", *options, "--listen", where, "--out", "run", *identity]
        else:
            index = who.removeprefix("client-")
            claimed = [] if self.secure else ["--client", index]
            share = ["--data", "wine", "--partition", index, "--partitions", str(self.devices)]
            words = ["client", where, *identity, *claimed, *share, "--state", f"state-{index}", *options]
        process = start(self.folder, *words, "--quiet", **{"constants": QUICK, **how})
        self.running[who] = process
        return process

    def begin(self, **how: Any) -> Command:
        """Start everyone; the server as `how` says."""
        for index in range(self.devices):
            self.start(f"client-{index}")
        return self.start("server", "experiment.toml", **how)

    def kill(self, who: str) -> bool:
        """Kill -9; False where it had ended before."""
        return self.running[who].kill()

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def logged(self, round: int, seconds: float = 90.0) -> None:
        """Wait until the run has a checkpoint of this round or a later one."""
        server, until = self.running["server"], time.monotonic() + seconds
        while last_checkpoint(self.run) < round:
            assert server.running or last_checkpoint(self.run) >= round, server.wait().err
            if time.monotonic() > until:
                pytest.fail(f"no checkpoint of round {round}")
            time.sleep(0.005)

    def end(self, seconds: float = 120.0) -> None:
        """Everyone has ended, and well."""
        for who in ("server", *(name for name in self.running if name != "server")):
            done = self.running[who].wait(seconds if who == "server" else 30)
            assert done.code == 0, f"{who}: {done.err}"

    def stop(self) -> None:
        for process in self.running.values():
            process.kill()

    def snapshots(self, index: int) -> list[int]:
        """Rounds of the snapshots on a device's disk."""
        found = (self.folder / f"state-{index}").glob("*/round-*")
        return sorted(int(each.name[6:]) for each in found if re.fullmatch(r"round-\d+", each.name))
