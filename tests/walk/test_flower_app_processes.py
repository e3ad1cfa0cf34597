"""A stock Flower app on devices that are processes of their own, of which one is killed: what one process gives."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from federation import ENVIRONMENT, free_port

from fedsample.fleets.flower_grid import AppFolder, imported, read_app, run_flower

pytestmark = pytest.mark.timeout(600)

RAISED = 2  # Flower's code

APP = {
    "pyproject.toml": """
[project]
name = "averages"
version = "1.2.3"
[tool.flwr.app.components]
serverapp = "averages.server:app"
clientapp = "averages.client:app"
[tool.flwr.app.config]
num-server-rounds = 3
rate = 0.5
out = "result.json"
wait = 0
""",
    "averages/__init__.py": "",
    "averages/server.py": """
import json
from pathlib import Path
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from averages.forks import forked

app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config
    initial = ArrayRecord([np.linspace(-1, 1, 7, dtype=np.float32), np.ones((2, 3))])
    result = FedAvg().start(grid, initial, config["num-server-rounds"])
    ask = lambda **what: [
        Message(RecordDict({"config": ConfigRecord(what)}), node, "query") for node in grid.get_node_ids()
    ]
    before = list(grid.send_and_receive(ask()))
    failed = [each.error for each in grid.send_and_receive(ask(boom="1")) if each.has_error()]
    after = list(grid.send_and_receive(ask(wait=config["wait"])))
    Path(config["out"]).write_text(json.dumps({
        "arrays": [array.tolist() for array in result.arrays.to_numpy_ndarrays()],
        "metrics": {str(round): dict(each) for round, each in result.evaluate_metrics_clientapp.items()},
        "before": [dict(each.content["said"]) for each in before],
        "after": [dict(each.content["said"]) for each in after],
        "errors": [[each.code, each.reason] for each in failed],
        "forked": forked() + [code for each in after for code in each.content["said"]["forked"]],
    }))
""",
    "averages/forks.py": """
import multiprocessing
import time
import warnings

warnings.filterwarnings("ignore", "This process", DeprecationWarning)  # is multi-threaded: Python 3.12 and later

def forked():
    \"\"\"Exit codes of some processes, begun as torch's DataLoader begins its workers.\"\"\"
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=time.sleep, args=(0.02,)) for _ in range(12)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [child.exitcode for child in children]
""",
    "averages/client.py": """
import os
import time
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from averages.forks import forked

app = ClientApp()

@app.train()
def train(message, context):
    share = context.node_config["partition-id"] + context.node_config["num-partitions"] / 7
    told = message.content["arrays"].to_numpy_ndarrays()
    seen = context.state.get("seen", MetricRecord({"messages": 0}))
    context.state["seen"] = MetricRecord({"messages": seen["messages"] + 1})
    moved = [each - (each - share) * each.dtype.type(context.run_config["rate"]) for each in told]
    metrics = MetricRecord({"num-examples": 3 + context.node_config["partition-id"], "share": share})
    return Message(RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message)

@app.evaluate()
def evaluate(message, context):
    norm = float(sum(np.square(each).sum() for each in message.content["arrays"].to_numpy_ndarrays()))
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 2, "norm": norm})}), reply_to=message)

@app.query()
def query(message, context):
    asked, partition = message.content["config"], context.node_config["partition-id"]
    if asked.get("boom") == str(partition):
        context.state["seen"] = MetricRecord({"messages": -1000})
        raise ValueError("boom")
    if asked.get("wait") and partition == 1 and not os.path.exists("killed"):
        open("working", "w").close()
        time.sleep(60)  # until this process is killed
    said = ConfigRecord({"pid": os.getpid(), "seen": context.state["seen"]["messages"], "partition": partition})
    said["forked"] = forked()
    return Message(RecordDict({"said": said}), reply_to=message)
""",
}


def written(folder: Path) -> AppFolder:
    for name, text in APP.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return read_app(folder)


# --- processes --------------------------------------------------------------------------------------------------------


def start(folder: Path, who: str, *words: str) -> subprocess.Popen[bytes]:
    with (folder / f"{who}.log").open("ab") as log:
        line = [sys.executable, "-m", "fedsample", *words, "--insecure"]
        return subprocess.Popen(line, cwd=folder, stdout=log, stderr=log, env=ENVIRONMENT)


def until(condition: Callable[[], bool], *logs: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "\n".join(log.read_text() for log in logs)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Path]]:
    """An app on three processes, of which a device is killed while it has a message; what it wrote, and its folder."""
    folder = tmp_path_factory.mktemp("devices")
    written(folder)
    where = f"127.0.0.1:{free_port()}"

    def client(index: int, app: str) -> subprocess.Popen[bytes]:
        named = ["--client", str(index), "--app", app, "--state", "state", "--quiet"]
        return start(folder, f"client-{index}", "client", where, *named)

    running = [client(0, "."), client(1, "averages.client:app")]
    try:
        server = start(
            folder, "server", "server", "--app", ".", "--clients", "2", "--listen", where, "--run-config", "wait=1"
        )
        running.append(server)
        logs = [folder / f"{who}.log" for who in ("server", "client-0", "client-1")]
        until((folder / "working").exists, *logs)
        running[1].kill()
        running[1].wait()
        (folder / "killed").touch()
        running.append(client(1, "averages.client:app"))
        assert server.wait(60) == 0, logs[0].read_text()
        for process in (running[0], running[-1]):
            assert process.wait(30) == 0, logs[1].read_text() + logs[2].read_text()
        yield json.loads((folder / "result.json").read_text()), folder
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_devices_give_what_one_process_gives(
    devices: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = written(tmp_path)
    monkeypatch.chdir(tmp_path)
    with imported(app) as (server, client):
        run_flower(server, client, 2, app.config)
    want, got = json.loads(Path("result.json").read_text()), devices[0]
    assert got["arrays"] == want["arrays"]
    assert abs(got["arrays"][0][0] + 1) > 0.1
    assert got["metrics"] == want["metrics"]
    assert list(got["metrics"]) == ["1", "2", "3"]
    assert got["errors"] == want["errors"]


def test_what_an_app_forks_lives(devices: tuple[dict[str, Any], Path]) -> None:
    assert devices[0]["forked"] == [0] * 36


def test_a_client_that_raises_is_flowers_error(devices: tuple[dict[str, Any], Path]) -> None:
    assert devices[0]["errors"] == [[RAISED, "<class 'ValueError'>:<'boom'>"]]


def test_a_killed_device_keeps_its_context(devices: tuple[dict[str, Any], Path]) -> None:
    (first, second), (same, again) = devices[0]["before"], devices[0]["after"]
    assert first == same
    assert second["pid"] != again["pid"]
    assert [second["seen"], again["seen"], again["partition"]] == [3, 3, 1]


def test_the_log_says_who_went_and_came(devices: tuple[dict[str, Any], Path]) -> None:
    log = (devices[1] / "server.log").read_text()
    assert "waiting for 2 devices at 127.0.0.1:" in log
    assert log.index("client 1 is away") < log.index("client 1 is back")
    assert ".: 2 clients, 18 replies, 1 of them errors" in log
