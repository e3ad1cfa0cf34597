"""Flower's own runtimes, by the commands that the documents give: the draws and the bytes of one process.

Not in the suite: Ray and a SuperLink take half a minute to start. All thirteen presets under both runtimes:
tests/soak/test_flower_runtimes.py.
"""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from blocks import ROOT, block
from conftest import Terminal, free_port

from fedsample.monitor.draws import load_draws

pytest.importorskip("ray", reason="Flower's simulation runtime needs Ray: pip install 'fedsample[ray]'")
pytestmark = pytest.mark.timeout(600)

ROUNDS = 20
SMALL = {
    "FEDSAMPLE_ROUNDS": str(ROUNDS),
    "FEDSAMPLE_WARMUP": "0",
    "FEDSAMPLE_THIN": "1",
    "FEDSAMPLE_CHAINS": "2",
    "FEDSAMPLE_DATA__NAME": "diabetes",
    "FEDSAMPLE_DATA__CLIENTS": "3",
    "FEDSAMPLE_MODEL__NAME": "linear",
}
APP_README = "simulations/flower_app/README.md"
RUN = block(APP_README, "num-supernodes=10")
END = block(APP_README, "kill $(pgrep")
CHANGED = block(APP_README, "langevin-marina")


def summary(run: Path) -> dict[str, object]:
    return dict(json.loads((run / "summary.json").read_text()))


def test_simulate_on_flowers_runtime(terminal: Terminal) -> None:
    (line,) = re.findall(r"`(fedsample simulate --set fleet.name=flower)`", (ROOT / "README.md").read_text())
    small = {**SMALL, "FEDSAMPLE_FLEET__PARTICIPATION": "0.7", "FEDSAMPLE_MONITOR__EVERY": "7"}
    said = terminal.type(f"{line} --out run --quiet --json", **small)
    assert f'"rounds": {ROUNDS}' in said
    assert "DEPRECATED" not in said
    terminal.type("fedsample simulate --set fleet.engine=by-client --out twin --quiet", **small)
    run, twin = terminal.folder / "run", terminal.folder / "twin"
    assert torch.equal(load_draws(run), load_draws(twin))
    for name in ("uplink_bytes_per_client", "downlink_bytes_per_client", "step_size"):
        assert summary(run)[name] == summary(twin)[name]


@pytest.fixture
def flower_home(terminal: Terminal) -> Iterator[dict[str, str]]:
    """Flower's variables, with a SuperLink of our own; the document's command ends it."""
    home = terminal.folder / "flower-home"
    exports = dict(re.findall(r"^export (\w+)=(\S+)$", RUN, flags=re.MULTILINE))
    assert exports.pop("FLWR_HOME") == "$PWD/.flwr"
    ports = ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT")
    yield {"FLWR_HOME": str(home), **exports, **{name: str(free_port()) for name in ports}}
    terminal.type(f"export FLWR_HOME={home}; {END.strip()}")
    found = f"pgrep -f '{home}/local-superlin[k]'"
    terminal.type(f"for i in $(seq 150); do {found} > /dev/null || exit 0; sleep 0.1; done; exit 1")


def test_the_app_under_flwr_run(terminal: Terminal, clone: Path, flower_home: dict[str, str]) -> None:
    """The README's own command, with fewer clients and rounds; then the other one, as it is."""
    (line,) = re.findall(r"^flwr run .*$", RUN, flags=re.MULTILINE)
    out = terminal.folder / "out"
    settings = f'rounds={ROUNDS} warmup=0 thin=1 chains=2 data.name="diabetes" data.clients=3 model.name="linear"'
    line = line.replace("num-supernodes=10", "num-supernodes=3")
    said = terminal.type(f"cd {clone} && {line} --run-config '{settings} app.out=\"{out}\"'", **flower_home)
    assert f"{ROUNDS} draws of 2 chains" in said
    terminal.type("fedsample simulate --set fleet.engine=by-client --out twin --quiet", **SMALL)
    assert torch.equal(load_draws(out), load_draws(terminal.folder / "twin"))
    said = terminal.type(f"cd {clone} && {CHANGED}", **flower_home)
    marina = tomllib.loads((clone / "marina-draws" / "config.toml").read_text())
    assert marina["preset"] == "langevin-marina"
    assert load_draws(clone / "marina-draws").shape[1] > 0
    shutil.rmtree(clone / "marina-draws")


def test_what_flowers_runtime_gave_is_what_it_gives(terminal: Terminal) -> None:
    """The record that the suite compares our Grid with, by five of Flower's strategies."""
    (script,) = (ROOT / "tests").rglob("five_strategies.py")
    (record,) = (ROOT / "tests").rglob("flower_strategies.json")
    terminal.type(f"python {script} now.json")
    got, want = json.loads((terminal.folder / "now.json").read_text()), json.loads(record.read_text())
    assert got.keys() == want.keys()
    for name, results in want.items():
        np.testing.assert_allclose(got[name]["arrays"], results["arrays"], rtol=1e-5)
        for when in ("train", "evaluate"):
            for round, metrics in results[when].items():
                assert got[name][when][round] == pytest.approx(metrics, rel=1e-5)
