"""The commands of README.md and of the documents, typed in a clean clone.

pytest -q tests/walk      a stage of .ci/run; about six minutes

Names that a user replaces (hosts, ports, paths of apps and data) are replaced by what is here: loopback, and files that
the tests write.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import textwrap
from pathlib import Path

import pytest
from blocks import ROOT, TYPED, block, blocks, commands, documents
from conftest import Terminal, free_port, last_checkpoint

pytestmark = pytest.mark.timeout(600)

NOT_TYPED = {
    ("docs/architecture.md", "sequenceDiagram"): "no command: a diagram",
    ("README.md", "'.[dev,ray]'"): "the suite itself: .ci/run types it",
    ("docs/devices/README.md", "away 5 s"): "what is printed while a device is away",
    (
        "docs/devices/README.md",
        "pip install --no-deps fedsample",
    ): "installs from an index, where fedsample is not yet; tests/soak/test_devices.py installs the clone so",
    ("docs/devices/protocol.md", "Hello            ->"): "no command: who says what",
    ("docs/devices/protocol.md", "mix(x):"): "no command: formulae",
    ("docs/devices/raspberry-pi.md", "sudo useradd"): "makes a system user",
    ("docs/devices/raspberry-pi.md", "sudo mkdir -p /etc/fedsample"): "writes to /etc as root",
    ("docs/devices/raspberry-pi.md", "systemctl"): "needs systemd and a Raspberry Pi's unit",
    ("docs/flower.md", "flower-superlink"): "Flower takes six seconds per message: tests/soak/test_flower_runtimes.py "
    "runs every preset so, in 25 minutes",
    ("docs/flower.md", "class Carrier"): "no command: an interface",
    ("simulations/digits_reference/README.md", "make_reference.py"): "a long HMC run, whose result is tests/data",
}
README = "README.md"
TABLE = block(README, "held-out accuracy       │")
USE = block(README, "fedsample simulate my.toml")
PYTHON = block(README, "fedsample.build_target")
DATA = block(README, 'file = "patients.csv"')
SERVE = block(README, "fedsample certs init certs")
DEVICE = block(README, "fedsample client localhost:9092")
RESUME = block(README, "--resume --out runs/devices")
TWIN = block(README, "--out runs/twin")
DEVICES = "docs/devices/README.md"
DEVICES_SERVE = block(DEVICES, "fedsample certs init certs")
DEVICES_CLIENT = block(DEVICES, "client localhost:9092")
DEVICES_SAME = block(DEVICES, "assert load_draws")
DEVICES_FILE = block(DEVICES, "--data ward.csv")
DEVICES_KINDS = block(DEVICES, "# hospitals.toml")
DEVICES_TWIN = block(DEVICES, "fedsample simulate hospitals.toml")
REPLAY = block("docs/devices/recovery.md", "--replay run")
CERTIFICATES = "docs/devices/certificates.md"
MAKE = [block(CERTIFICATES, f"fedsample certs {each}") for each in ("init", "issue", "request")]
SIGN, SHOW = block(CERTIFICATES, "fedsample certs sign"), block(CERTIFICATES, "fedsample certs show")
EXAMINE = block(CERTIFICATES, "fedsample doctor net")
FLOWER = "docs/flower.md"
APP_HERE = block(FLOWER, "--app path/of/app --clients 20")
APP_PYTHON = block(FLOWER, "fedsample.run_flower(")
APP_DEVICES = block(FLOWER, "fedsample server --app")
VERSION = block(FLOWER, "flower_version.py")


def test_every_block_is_typed_or_listed() -> None:
    """Those of the flower_app are typed in test_flower_runtimes.py."""
    import test_flower_runtimes  # noqa: F401  what it asks for counts as well

    listed = {(document, each.line) for (document, part) in NOT_TYPED for each in blocks(document) if part in each.text}
    assert len(listed) == len(NOT_TYPED)
    assert not listed & TYPED
    every = {(document, each.line) for document in documents() for each in blocks(document)}
    assert every - listed - TYPED == set()  # type it, or say in NOT_TYPED why not


def test_the_main_job_prints_what_the_readme_shows(main_job: str) -> None:
    assert TABLE.splitlines()[0] in main_job
    labels = re.findall(r"^│ (\S.*?) +│", TABLE, flags=re.MULTILINE)
    assert len(labels) == 19
    assert [label for label in labels if f"│ {label} " not in main_job] == []
    shown, got = (re.search(r"held-out accuracy +│ (0\.\d+)", text) for text in (TABLE, main_job))
    assert shown is not None
    assert got is not None
    assert float(got[1]) == pytest.approx(float(shown[1]), abs=0.01)


def test_use_it(terminal: Terminal) -> None:
    lines = commands(USE)
    replay = "fedsample simulate --replay runs/devices"  # typed where there are devices
    init, monitor = "fedsample config init my.toml", "fedsample monitor runs/mine"
    assert {replay, init, monitor} < set(lines)
    terminal.type(init)
    for line in lines:
        if line not in (replay, init, monitor):
            terminal.type(line)
    assert (terminal.folder / "runs" / "mine" / "summary.json").exists()
    tensorboard = terminal.start(f"exec {monitor} --port {free_port()}")
    assert tensorboard.stdout is not None
    assert any("http://127.0.0.1:" in line for line in tensorboard.stdout)
    tensorboard.send_signal(signal.SIGINT)
    assert tensorboard.wait(60) == 130


def test_a_run_that_is_killed_goes_on(terminal: Terminal) -> None:
    """The first two lines of "Use it", with `kill -9` between them."""
    begin, again, *_ = commands(USE)
    terminal.type("fedsample config init my.toml && cp my.toml whole.toml")
    terminal.type(begin.replace("runs/mine", "runs/whole"))
    process = terminal.start(f"exec {begin}")
    mine = terminal.folder / "runs" / "mine"
    terminal.until(lambda: last_checkpoint(mine) >= 50, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 50 <= last_checkpoint(mine) < 600
    terminal.type(again)
    assert "True" in terminal.type(equal("runs/mine", "runs/whole"))


def equal(one: str, other: str) -> str:
    """The README's own comparison, of other runs."""
    return commands(TWIN)[1].replace("runs/devices", one).replace("runs/twin", other)


def test_from_python(terminal: Terminal) -> None:
    before = """
        import numpy as np, torch
        draw = np.random.default_rng(0)
        np.savez("mine.npz", X=draw.normal(size=(60, 4)), y=draw.integers(0, 3, 60), client=np.arange(60) % 3)
        theta = torch.zeros(15)
    """
    (terminal.folder / "it.py").write_text(textwrap.dedent(before) + PYTHON)
    terminal.type("python it.py")


def test_own_data(terminal: Terminal) -> None:
    rows = "\n".join(f"{i % 7},{i * i % 5},{i % 3 % 2},ward-{i % 4}" for i in range(80))
    (terminal.folder / "patients.csv").write_text(f"age,dose,outcome,hospital\n{rows}\n")
    (terminal.folder / "mine.toml").write_text(DATA)
    terminal.type("fedsample simulate mine.toml")


def test_real_devices(terminal: Terminal) -> None:
    """The README's story: three devices; one is killed, then the server; the draws are those of one process."""
    init, serve = commands(SERVE)
    (device,), (resume,), (twin, compare) = commands(DEVICE), commands(RESUME), commands(TWIN)
    port, run = free_port(), terminal.folder / "runs" / "devices"
    terminal.type(init)

    def client(index: int) -> subprocess.Popen[str]:
        return terminal.start(f"exec {device}".replace("9092", str(port)).replace("client-N", f"client-{index}"))

    def server(line: str) -> subprocess.Popen[str]:
        return terminal.start(f"exec {line} --listen 127.0.0.1:{port}")

    process, clients = server(serve), [client(index) for index in range(3)]
    terminal.until(lambda: last_checkpoint(run) >= 50, process)
    clients[1].kill()
    clients[1].wait()
    clients[1] = client(1)
    terminal.until(lambda: last_checkpoint(run) >= 150, process)
    process.kill()
    process.wait()
    assert last_checkpoint(run) < 600
    process = server(resume)
    for each in (process, *clients):
        said, _ = each.communicate(timeout=200)
        assert each.returncode == 0, said
    terminal.type(twin)
    assert terminal.type(compare).strip() == "True"
    terminal.type("fedsample simulate --replay runs/devices")


def test_the_devices_document(terminal: Terminal) -> None:
    port = free_port()
    init, serve = commands(DEVICES_SERVE)
    (device,) = commands(DEVICES_CLIENT)
    terminal.type(init)
    federate(terminal, f"{serve} --listen 127.0.0.1:{port}", [device.replace("9092", str(port))] * 3)
    (twin,) = re.findall(r"`(fedsample simulate [^`]* --out twin)`", (ROOT / DEVICES).read_text())
    terminal.type(twin)
    (terminal.folder / "same.py").write_text(DEVICES_SAME)
    terminal.type("python same.py")
    terminal.type(*commands(REPLAY))
    assert "True" in terminal.type(equal("run", "again"))


def federate(terminal: Terminal, serve: str, devices: list[str]) -> None:
    """Run a server and its devices to their ends."""
    running = [terminal.start(f"exec {serve}")]
    running += [terminal.start(f"exec {re.sub('client-[0N]', f'client-{i}', line)}") for i, line in enumerate(devices)]
    for each in running:
        said, _ = each.communicate(timeout=200)
        assert each.returncode == 0, said


def test_devices_with_their_own_files(terminal: Terminal) -> None:
    port, pooled = free_port(), []
    terminal.type("fedsample certs init certs --server-name localhost --clients 3")
    (device,) = commands(DEVICES_FILE)
    (twin,) = commands(DEVICES_TWIN)
    (terminal.folder / "hospitals.toml").write_text(DEVICES_KINDS)
    lines = []
    for index in range(3):
        rows = [f"{i % 7},{(i * i + index) % 5},{(i // 2 + index) % 2}" for i in range(60)]
        (terminal.folder / f"ward{index}.csv").write_text("\n".join(["age,dose,outcome", *rows, ""]))
        pooled += [f"{row},{index}" for row in rows]
        lines.append(device.replace("sampler.example.org:9092", f"localhost:{port}").replace("ward", f"ward{index}"))
    (terminal.folder / "all.csv").write_text("\n".join(["age,dose,outcome,hospital", *pooled, ""]))
    serve = f"fedsample server hospitals.toml --certs certs/server --listen 127.0.0.1:{port} --out run"
    federate(terminal, serve, lines)
    terminal.type(twin)
    assert "True" in terminal.type(equal("run", "twin"))


def test_certificates(terminal: Terminal) -> None:
    for text in MAKE:
        terminal.type(*commands(text))
    shutil.copy(terminal.folder / "device" / "request.csr", terminal.folder)
    terminal.type(*commands(SIGN))
    for name in ("cert.pem", "ca.pem"):
        shutil.copy(terminal.folder / "back" / name, terminal.folder / "device")
    said = terminal.type(*commands(SHOW))
    assert all(line in said for line in SHOW.splitlines()[1:4])
    (line,) = commands(EXAMINE)
    said = terminal.type(line.replace("sampler.example.org:8443", f"127.0.0.1:{free_port()}"), code=1)
    assert EXAMINE.splitlines()[-1] in said
    assert re.findall(r"^([a-z ]+?) +(?:ok|failed|skipped) ", said, flags=re.MULTILINE)[:4] == [
        *("certificates", "dns", "tcp", "tls")
    ]


APP = {
    "pyproject.toml": """
        [project]
        name = "averages"
        version = "1.0.0"
        [tool.flwr.app.components]
        serverapp = "server_app:app"
        clientapp = "client_app:app"
        [tool.flwr.app.config]
        num-server-rounds = 3
        lr = 0.5
    """,
    "server_app.py": """
        import numpy as np
        from flwr.app import ArrayRecord
        from flwr.serverapp import ServerApp
        from flwr.serverapp.strategy import FedAvg
        app = ServerApp()
        @app.main()
        def main(grid, context):
            strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=2)
            rounds = context.run_config.get("num-server-rounds", 3)
            result = strategy.start(grid, ArrayRecord([np.ones(3)]), rounds)
            print("ended at", result.arrays.to_numpy_ndarrays()[0])
    """,
    "client_app.py": """
        from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
        from flwr.clientapp import ClientApp
        app = ClientApp()
        @app.train()
        def train(message, context):
            arrays = [each * (1 - context.run_config["lr"]) for each in message.content["arrays"].to_numpy_ndarrays()]
            metrics = MetricRecord({"num-examples": 1})
            return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)
    """,
}


@pytest.fixture
def app(terminal: Terminal) -> Path:
    """A stock Flower app, where the document says it is."""
    folder = terminal.folder / "path" / "of" / "app"
    folder.mkdir(parents=True)
    for name, text in APP.items():
        (folder / name).write_text(textwrap.dedent(text))
    return folder


def test_flower_apps_in_one_process(terminal: Terminal, app: Path) -> None:
    said = terminal.type(*commands(APP_HERE))
    assert "ended at [0.59" in said  # 0.9 ** 5
    before = "from client_app import app as client_app\nfrom server_app import app as server_app\n"
    (app / "it.py").write_text(before + APP_PYTHON)
    assert "ended at [0.72" in terminal.type("cd path/of/app && python it.py")


def test_flower_apps_on_devices(terminal: Terminal, app: Path) -> None:
    port = free_port()
    serve, device = commands(APP_DEVICES)
    terminal.type("fedsample certs init certs --server-name localhost --clients 2")
    shutil.copy(app / "client_app.py", terminal.folder)
    device = device.replace("sampler.example.org:9092", f"localhost:{port}")
    federate(terminal, serve.replace("0.0.0.0:9092", f"127.0.0.1:{port}"), [device] * 2)


def test_another_version_of_flower(terminal: Terminal, clone: Path) -> None:
    (line,) = commands(VERSION)
    terminal.type(f"cd {clone} && {line}", TMPDIR=os.fspath(terminal.folder))
