"""Whole Flower apps on our Grid: what Flower's own runtime gives, and our own app with its draws."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import five_strategies
import numpy as np
import pytest
import torch
from five_strategies import CLIENTS, ROUNDS, STRATEGIES
from flwr.serverapp.strategy import Result
from rounding import gamma, propagated

import fedsample
from fedsample.config import load
from fedsample.fleets.flower_grid import imported, read_app, run_flower
from fedsample.monitor.draws import load_draws

pytestmark = pytest.mark.slow

FLOWER_APP = Path(__file__).parents[3] / "simulations" / "flower_app"


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    """Results by strategy on our Grid."""
    results: dict[str, Result] = {}
    run = run_flower(five_strategies.server_app(results), five_strategies.client_app, CLIENTS)
    assert (run.answered, run.failed) == (len(STRATEGIES) * CLIENTS * (2 * ROUNDS + 1), 0)
    return five_strategies.plain(results)


@pytest.fixture(scope="module")
def flowers() -> dict[str, Any]:
    """Results by strategy in Flower's simulation runtime, as tests/walk finds them in every run of CI."""
    return dict(json.loads((Path(__file__).parents[2] / "data" / "flower_strategies.json").read_text()))


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_give_what_flowers_runtime_gives(name: str, ours: dict[str, Any], flowers: dict[str, Any]) -> None:
    got, want = ours[name], flowers[name]
    assert np.abs(want["arrays"]).max() > 0.01
    # Replies are averaged in the order in which they come; a round of ten steps with momentum 1 / 2 carries what
    # differs on by no more than 1 / (1 - 1 / 2), and the server's own step by as much again.
    size = max(1.0, float(np.abs(want["arrays"]).max()))
    bound = propagated(2 * gamma(10 * 64 + 2 * CLIENTS) * size, 4.0, ROUNDS)
    assert bound < 1e-9
    np.testing.assert_allclose(got["arrays"], want["arrays"], rtol=0, atol=bound)
    for when in ("train", "evaluate"):
        assert list(got[when]) == list(want[when]) == [str(round) for round in range(1, ROUNDS + 1)]
        for round, metrics in want[when].items():
            assert got[when][round] == pytest.approx(metrics, rel=bound, abs=bound)


def test_strategies_differ_from_each_other(ours: dict[str, Any]) -> None:
    """So that no comparison above holds for another reason."""
    points = [np.array(result["arrays"]) for result in ours.values()]
    for i, point in enumerate(points):
        assert all(np.abs(point - other).max() > 1e-3 for other in points[:i])


SPINNING = {
    "pyproject.toml": '[tool.flwr.app.components]\nserverapp = "server:app"\nclientapp = "client:app"\n',
    "server.py": """
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    print(len(list(grid.send_and_receive(messages, timeout=2))))
    raise ValueError("boom")
""",
    "client.py": """
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(message, context):
    while context.node_config["partition-id"] == 1:
        torch.ones(10).sum()
    return Message(RecordDict(), reply_to=message)
""",
}


def test_a_client_that_computes_for_good_does_not_keep_the_command_from_ending(tmp_path: Path) -> None:
    for name, text in SPINNING.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "fedsample", "simulate", "--app", str(tmp_path), "--clients", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "1\n"), done.stderr
    assert done.stderr.endswith("the ServerApp raised ValueError: boom\n")


def test_our_own_app_draws_what_the_local_fleet_draws(tmp_path: Path) -> None:
    app = read_app(FLOWER_APP)
    settings = {"rounds": 12, "warmup": 2, "thin": 1, "chains": 2, "data.clients": 3, "uplink.k": 5, "seed": 4}
    settings |= {"data.name": "diabetes", "model.name": "linear", "monitor.every": 12}
    with imported(app) as (server, client):
        run_flower(server, client, 3, app.config | settings | {"app.out": str(tmp_path / "out")})
    local = [f"{name}={value}" for name, value in settings.items()]
    experiment = load({"preset": "underdamped-diana"}, [*local, "fleet.engine=by-client"], {})
    run = fedsample.run(experiment, out=tmp_path / "local", progress="quiet")
    assert torch.equal(load_draws(tmp_path / "out"), run.draws)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == {name: run.summary[name] for name in summary}
