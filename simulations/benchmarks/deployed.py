"""A round of two devices over gRPC against a round of Flower's deployed runtime with two SuperNodes, both on loopback.

    python simulations/benchmarks/deployed.py [--rounds 4] [--json]

Flower: a SuperLink, two SuperNodes and the app of simulations/flower_app under `flwr run`; a round is the time between
two messages to a node, over several, which are those of the preparation. Ours: `fedsample server`
and two `fedsample client` processes on the same experiment, which report the seconds per round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

APP = Path(__file__).parents[1] / "flower_app"
SETTINGS = {"preset": "federated-gd", "warmup": 0, "thin": 1, "chains": 1, "step_size": 1e-3}
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def running(*commands: list[str], folder: Path, env: dict[str, str]) -> Iterator[None]:
    """Run processes that end with the block, together with all that they have started."""
    started = []
    try:
        for number, command in enumerate(commands):
            with (folder / f"log-{number}.txt").open("wb") as log:
                started.append(subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, process_group=0))
        yield
    finally:
        for process in started:
            try:
                os.killpg(process.pid, 9)
            except ProcessLookupError:
                pass
            process.wait()


def flower(rounds: int, seconds: float) -> float:
    """Seconds of a round of Flower's deployed runtime."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home, ports = folder / "home", [free_port() for _ in range(3)]
        home.mkdir()
        connection = f'address = "127.0.0.1:{ports[0]}"\ninsecure = true\n'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "here"\n\n[superlink.here]\n{connection}')
        env = {**os.environ, **QUIET, "FLWR_HOME": str(home), "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
        app = the_app(folder / "app")
        here = ["--insecure", "--host", "127.0.0.1", "--port"]
        link = [tool("flower-superlink"), *here, str(ports[0])]
        nodes = [
            [tool("flower-supernode"), *here, str(ports[1 + i]), "--superlink", f"127.0.0.1:{ports[0]}",
             "--node-config", f"partition-id={i} num-partitions=2"]
            for i in range(2)
        ]  # fmt: skip
        run = [tool("flwr"), "run", str(app), "here", "--stream"]
        with running(link, *nodes, folder=folder, env=env):
            time.sleep(5)  # wait until they listen
            with running(run, folder=folder / "home", env=env):
                until = time.monotonic() + seconds
                start, before = 0.0, 0
                while time.monotonic() < until:
                    got = (folder / "log-1.txt").read_text().count("Receiving: ")
                    if not start and got >= 2:  # the first call has started processes that stay
                        start, before = time.monotonic(), got
                    if start and got >= before + rounds:
                        return (time.monotonic() - start) / (got - before)
                    time.sleep(0.02)
            logs = "".join(path.read_text()[-2000:] for path in sorted(folder.glob("**/log-*.txt")))
            raise RuntimeError(f"Flower has not made {rounds} rounds in {seconds:g} s: {logs}")


def the_app(folder: Path) -> Path:
    """Copy the app, with the benchmark's settings in place of its own."""
    shutil.copytree(APP, folder)
    head, _ = (folder / "pyproject.toml").read_text().split("[tool.flwr.app.config]")
    settings = SETTINGS | {"rounds": 1, "data.name": "diabetes", "data.clients": 2, "model.name": "linear"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in (settings | {"app.out": "draws"}).items()]
    (folder / "pyproject.toml").write_text("\n".join([head, "[tool.flwr.app.config]", *lines, ""]))
    return folder


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise RuntimeError(f"{name} is not installed: pip install 'fedsample'")
    return found


def ours(rounds: int) -> float:
    """Seconds of a round of a server and two devices, processes of the command line, with mutual TLS."""
    from fedsample.fleets.grpc.security import cert_folders

    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        cert_folders.init(folder / "certs", ["localhost"], 2)
        lines = [f"{key} = {json.dumps(value)}" for key, value in (SETTINGS | {"rounds": rounds}).items()]
        lines += ['[data]\nname = "diabetes"\nclients = 2', '[model]\nname = "linear"']
        (folder / "experiment.toml").write_text("\n".join(lines))
        command, where, env = [sys.executable, "-m", "fedsample"], f"127.0.0.1:{port}", {**os.environ, **QUIET}
        clients = [
            [*command, "client", where, "--certs", f"certs/client-{i}", "--data", "diabetes", "--partition", str(i),
             "--partitions", "2", "--state", f"state-{i}", "--quiet"]
            for i in range(2)
        ]  # fmt: skip
        server = [*command, "server", "experiment.toml", "--listen", where, "--out", "run", "--certs", "certs/server"]
        with running(*clients, folder=folder, env=env):
            done = subprocess.run(
                [*server, "--quiet"], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
            )
            if done.returncode:
                raise RuntimeError(f"fedsample server failed: {done.stdout}{done.stderr}")
            return float(json.loads((folder / "run" / "summary.json").read_text())["seconds_per_round"])


def measure(rounds: int = 4) -> list[dict[str, Any]]:
    """One row."""
    mine = ours(2000)
    theirs = flower(rounds, 90.0)
    mine = min(mine, ours(2000))
    return [
        {"devices": 2, "flower_s": round(theirs, 3), "ours_ms": round(1e3 * mine, 3), "ratio": round(theirs / mine)}
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.rounds)
    print(json.dumps(rows, indent=1) if options.json else "\n".join(map(str, rows)))


if __name__ == "__main__":
    main()
