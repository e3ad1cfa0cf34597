"""Every preset under Flower's own runtimes: the draws of LocalFleet bit for bit, and the bytes that were counted.

pytest -q tests/soak/test_flower_runtimes.py      25 minutes on two busy cores, most of it Flower's own

Once in its simulation runtime, under `flwr run` with Ray; once on a SuperLink with two SuperNodes, each a process of
the command line on loopback. The app is the one of simulations/flower_app; in the copy that is run here, its ClientApp
has a mod that writes down how many bytes each message's arrays hold. There are eight chains because coins travel in
whole bytes, of which the bits that fill the last are not counted.

A SuperNode starts a process for each message, so on SuperNodes most presets are prepared in the server's own process
and only their rounds are messages; WHOLE=1 in the environment prepares all of them over messages, as in simulation.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import fedsample
from fedsample.config.loading import of_run_config
from fedsample.config.presets import PRESETS
from fedsample.monitor import load_draws

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from flower_commands import end_superlink, ended, environment, free_port

APP = Path(__file__).parents[2] / "simulations" / "flower_app"
SETTINGS = {
    "rounds": 3,
    "warmup": 0,
    "thin": 1,
    "chains": 8,
    "step_size": 1e-3,
    "start.at": "zeros",
    "data.kind": "csv",
    "data.target": "y",
    "data.clients": 2,
    "model.name": "linear",
    "monitor.every": 3,
}
CLIENT = """
import json
from pathlib import Path
from fedsample.clients.app import client_app

def octets(message):
    records = message.content.array_records.values() if message.has_content() else ()
    return sum(len(array.data) for record in records for array in record.values())

def measured(message, context, call_next):
    down = octets(message)
    reply = call_next(message, context)
    out = Path(str(context.run_config["app.out"]))
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"messages-{context.node_config['partition-id']}.jsonl").open("a") as file:
        file.write(json.dumps([message.metadata.message_type, down, octets(reply)]) + "\\n")
    return reply

app = client_app(mods=[measured])
"""
SERVER = """
from dataclasses import replace
import sampling
from fedsample.runs.build import build_fleet
from fedsample.protocol.exchange import Traffic

over_messages = sampling.prepare

def prepare(experiment, problem, links, fleet, progress):
    found = over_messages(experiment, problem, links, build_fleet(experiment, problem, links), progress)
    return replace(found, geometry=replace(found.geometry, traffic=Traffic()))

@sampling.app.lifespan()
def lifespan(context):
    sampling.prepare = over_messages if context.run_config["app.whole"] else prepare
    yield

app = sampling.app
"""
PREPARED_BY_NODES = PRESETS if os.environ.get("WHOLE") else ("federated-gd",)  # 3 exchanges; the others 24 and more
TOGETHER = 3  # runs at a time on the SuperNodes, which otherwise sleep between the messages of one
OFFLINE = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def settings(folder: Path) -> dict[str, Any]:
    """Of an experiment on 2 parameters, a slope and an intercept: then the preparation takes few messages."""
    rows = "".join(f"{(7 * i) % 100 / 50 - 1},{(i * i) % 31 / 31}\n" for i in range(100))
    (folder / "rows.csv").write_text("x,y\n" + rows)
    return {**SETTINGS, "data.file": str(folder / "rows.csv")}


def the_app(folder: Path) -> Path:
    """A copy of the app, with the settings of these tests and the mod."""
    shutil.copytree(APP, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    head, _ = (folder / "app" / "pyproject.toml").read_text().split("[tool.flwr.app.config]")
    config = {"preset": "underdamped-diana", **settings(folder), "app.out": "draws", "app.whole": True}
    lines = [f"{key} = {json.dumps(value)}" for key, value in config.items()]
    (folder / "app" / "pyproject.toml").write_text("\n".join([head, "[tool.flwr.app.config]", *lines, ""]))
    (folder / "app" / "client_app.py").write_text(CLIENT)
    (folder / "app" / "server_app.py").rename(folder / "app" / "sampling.py")
    (folder / "app" / "server_app.py").write_text(SERVER)
    return folder / "app"


def check(folder: Path, preset: str, *, whole: bool) -> None:
    """What the run left is what LocalFleet gives, and its messages hold the bytes that it counts.

    Args:
        folder: of the app. preset: which run. whole: whether the preparation was messages too.
    """
    out = folder / preset
    experiment = of_run_config({"preset": preset, **settings(folder), "fleet.engine": "by-client"})
    local = fedsample.run(experiment, out=folder / f"local-{preset}", progress="quiet")
    assert local.draws.shape == (8, 3, 2)
    assert torch.equal(load_draws(out), local.draws)
    summary = json.loads((out / "summary.json").read_text())
    counted = [name for name in summary if "bytes" in name]
    assert len(counted) == 3
    for name in summary if whole else summary.keys() - counted:
        assert summary[name] == local.summary[name], name
    if not whole:
        rounds = (local.summary[f"{part}uplink_bytes_per_client"] for part in ("", "preparation_"))
        assert summary["uplink_bytes_per_client"] == next(rounds) - next(rounds)
    lines = [line for path in out.glob("messages-*.jsonl") for line in path.read_text().splitlines()]
    messages = [json.loads(line) for line in lines]
    assert [kind for kind, _, _ in messages].count("train") == 3 * 2  # of eight chains, each asks who it wants
    assert sum(down for _, down, _ in messages) == 2 * summary["downlink_bytes_per_client"]
    assert sum(up for _, _, up in messages) == 2 * summary["uplink_bytes_per_client"]


def command(app: Path, preset: str, *where: str, whole: bool = True) -> list[str]:
    config = f'preset="{preset}" app.out="{app.parent / preset}" app.whole={str(whole).lower()}'
    return ["flwr", "run", str(app), *where, "--stream", "--run-config", config]


# --- `flwr run` in the simulation runtime -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """The app and an environment; the SuperLink that the first `flwr run` leaves behind serves the others."""
    folder = tmp_path_factory.mktemp("simulated")
    ports = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": free_port(), "FLWR_LOCAL_CONTROL_API_PORT": free_port()}
    env = environment(FLWR_HOME=str(folder / "home"), **OFFLINE, **ports)
    try:
        yield the_app(folder), env
    finally:
        end_superlink(folder / "home")


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Flower's simulation runtime needs Ray: pip install 'fedsample[ray]'",
)
@pytest.mark.parametrize("preset", PRESETS)
def test_in_flowers_simulation_runtime(preset: str, simulated: tuple[Path, dict[str, str]]) -> None:
    app, env = simulated
    nodes = ["--federation-config", "num-supernodes=2 client-resources-num-cpus=1"]
    ended([*command(app, preset), *nodes], env, app.parent, 300)
    check(app.parent, preset, whole=True)


# --- a SuperLink and two SuperNodes -----------------------------------------------------------------------------------


@contextmanager
def running(words: list[str], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, and whatever it has started with it."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, cwd=log.parent, env=env, stdout=file, stderr=file, start_new_session=True
        )  # its group is what ends
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def listening(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until a process answers on its port."""
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"nothing listens on port {port}: {process.args}")


@pytest.fixture(scope="module")
def deployed(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[Path, dict[str, Future[str]]]]:
    """The runs of all presets that were asked for, on one federation, some at a time."""
    tests = [item for item in request.session.items if "deployed" in getattr(item, "fixturenames", ())]
    presets = [item.callspec.params["preset"] for item in tests if isinstance(item, pytest.Function)]
    folder = tmp_path_factory.mktemp("deployed")
    link, *nodes = [free_port() for _ in range(3)]
    (folder / "home").mkdir()
    here = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    (folder / "home" / "config.toml").write_text(here)
    env, app = environment(FLWR_HOME=str(folder / "home"), **OFFLINE), the_app(folder)
    with ExitStack() as stack:
        words = ["flower-superlink", "--insecure", "--port", link]
        listening(stack.enter_context(running(words, folder / "superlink.txt", env)), int(link))
        for i, port in enumerate(nodes):
            words = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}", "--port", port]
            words += ["--node-config", f"partition-id={i} num-partitions=2"]
            stack.enter_context(running(words, folder / f"supernode-{i}.txt", env))
        pool = ThreadPoolExecutor(TOGETHER)
        try:
            runs = {
                name: pool.submit(ended, command(app, name, "here", whole=name in PREPARED_BY_NODES), env, folder, 1800)
                for name in presets
            }
            yield folder, runs
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.parametrize("preset", PRESETS)
def test_on_a_superlink_with_two_supernodes(preset: str, deployed: tuple[Path, dict[str, Future[str]]]) -> None:
    folder, runs = deployed
    said = runs[preset].result()
    assert (folder / preset / "summary.json").exists(), said
    check(folder, preset, whole=preset in PREPARED_BY_NODES)
