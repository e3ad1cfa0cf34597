"""Flower apps as folders: `fedsample simulate --app`, what is imported from where, and bad folders."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsample.cli.main import main
from fedsample.errors import ConfigError
from fedsample.fleets.flower_grid import imported, read_app
from fedsample.fleets.flower_grid.adapter import overridden

PROJECT = """
[project]
name = "app"
version = "1"
[tool.flwr.app]
publisher = "someone"
[tool.flwr.app.components]
serverapp = "part.server:app"
clientapp = "part.client:app"
[tool.flwr.app.config]
rounds = 2
text = "none"
nested.rate = 0.5
"""
SERVER = """
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
from part.task import NAME
app = ServerApp()
@app.main()
def main(grid, context):
    from part.late import OTHER  # imported while the app runs
    config = context.run_config
    for _ in range(config["rounds"]):
        replies = grid.send_and_receive([Message(RecordDict(), n, "train") for n in grid.get_node_ids()], timeout=20)
        print(NAME, OTHER, len(list(replies)), config["text"], config["nested.rate"])
    if config["text"] == "raise":
        raise ValueError("boom")
    if config["text"] == "leave":
        raise SystemExit(5)
"""
CLIENT = """
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(message, context):
    if context.run_config["text"] == "fail":
        raise KeyError("nothing")
    return Message(RecordDict(), reply_to=message)
"""


def written(folder: Path, name: str = "first", **files: str) -> Path:
    """An app in a folder; `files` are other contents of its modules, "" leaves one out."""
    part = folder / "part"
    part.mkdir(parents=True)
    late = "import part.task\nOTHER = part.task.NAME.upper()"
    modules = {"__init__": "\n", "server": SERVER, "client": CLIENT, "task": f"NAME = {name!r}", "late": late}
    for module, text in (modules | {key: value for key, value in files.items() if key != "pyproject"}).items():
        if text:
            (part / f"{module}.py").write_text(text)
    project = files.get("pyproject", PROJECT)
    if project:
        (folder / "pyproject.toml").write_text(project)
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """`fedsample simulate ...` in this process: exit code, standard output and error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedsample", "simulate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "COLUMNS", "NO_COLOR"):
        monkeypatch.setenv(name, "1" if name == "NO_COLOR" else "200" if name == "COLUMNS" else "0")
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", False)
    return run


def test_a_stock_app_runs(command: Any, tmp_path: Path) -> None:
    app = written(tmp_path / "app")
    code, out, err = command("--app", app)
    assert (code, out) == (0, "first FIRST 10 none 0.5\n" * 2)
    assert "10 clients, 20 replies, 0." in err
    override = ["--run-config", "rounds=1 nested.rate=2.5", "--run-config", "text='a b'"]
    code, out, err = command("--app", app, "--clients", "3", *override, "--quiet")
    assert (code, out, err) == (0, "first FIRST 3 a b 2.5\n", "")


def test_as_many_clients_as_its_own_federation_simulates(command: Any, tmp_path: Path) -> None:
    federation = (
        '[tool.flwr.federations]\ndefault = "local"\n[tool.flwr.federations.local]\noptions.num-supernodes = 4\n'
    )
    assert "first FIRST 4" in command("--app", written(tmp_path / "app", pyproject=PROJECT + federation))[1]


def test_a_server_app_that_raises(command: Any, tmp_path: Path) -> None:
    app = written(tmp_path / "app")
    code, _, err = command("--app", app, "--run-config", 'text="raise"')
    assert code == 1
    assert "server.py" in err
    assert err.endswith(f"error: {app}: the ServerApp raised ValueError: boom\n")
    assert command("--app", app, "--run-config", 'text="leave"')[0] == 5


def test_client_apps_that_raise_are_counted(command: Any, tmp_path: Path) -> None:
    code, out, err = command("--app", written(tmp_path / "app"), "--clients", 2, "--run-config", 'text="fail" rounds=1')
    assert (code, out) == (0, "first FIRST 2 fail 0.5\n")
    assert "2 clients, 2 replies, 2 of them errors" in err


def test_apps_with_the_same_names_do_not_mix(tmp_path: Path) -> None:
    path = list(sys.path)
    one, two = (read_app(written(tmp_path / name, name)) for name in ("one", "two"))
    with imported(one) as (server, client):
        outer = sys.modules["part.task"]
        assert (type(server), type(client)) == (ServerApp, ClientApp)
        with imported(two):
            assert sys.modules["part.task"].NAME == "two"
        assert sys.modules["part.task"] is outer
        assert sys.path[0] == str(tmp_path / "one")
    assert sys.path == path
    assert not {name for name in sys.modules if name.partition(".")[0] == "part"}
    (tmp_path / "one" / "part" / "task.py").write_text("NAME = 'changed since'")
    with imported(one):
        assert sys.modules["part.task"].NAME == "changed since"


def test_a_package_in_src_is_found_without_installing(command: Any, tmp_path: Path) -> None:
    app, path = written(tmp_path / "app"), list(sys.path)
    (app / "src").mkdir()
    (app / "part").rename(app / "src" / "part")
    assert command("--app", app, "--clients", "2")[:2] == (0, "first FIRST 2 none 0.5\n" * 2)
    assert sys.path == path
    assert not {name for name in sys.modules if name.partition(".")[0] == "part"}
    with imported(read_app(written(tmp_path / "other", "other"))):  # no `src`, and none of the first one's modules
        assert sys.modules["part.task"].NAME == "other"


def test_a_folder_of_data_hides_no_package(tmp_path: Path) -> None:
    import numpy

    app = written(tmp_path / "app")
    (app / "numpy").mkdir()
    with imported(read_app(app)):
        assert sys.modules["numpy"] is numpy
    assert sys.modules["numpy"] is numpy


COMPONENTS = '[tool.flwr.app.components]\nserverapp = "part.server:app"\nclientapp = "part.client:app"\n'


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"pyproject": ""}, "there is no pyproject.toml"),
        ({"pyproject": "[project"}, "no valid TOML"),
        ({"pyproject": "[project]\nname = 'a'"}, r"no table \[tool.flwr.app.components\]"),
        ({"pyproject": "tool = 3"}, r"no table \[tool.flwr.app.components\]"),
        ({"pyproject": "[tool.flwr.app.components]\nclientapp = 'a:b'"}, "serverapp in .* is None"),
        ({"pyproject": COMPONENTS.replace("part.client:app", "part.client")}, "clientapp in .* is 'part.client'"),
        ({"pyproject": COMPONENTS + "[tool.flwr.app.config]\nx = [1]"}, "The value for key x"),
        (
            {"client": ""},
            "ClientApp 'part.client:app' cannot be imported: ModuleNotFoundError: No module named 'part.c",
        ),
        ({"server": "import no_such_package"}, "cannot be imported: ModuleNotFoundError: No module named 'no_such_p"),
        ({"server": "def f(:"}, "cannot be imported: SyntaxError"),
        ({"client": "x = 1"}, "cannot be imported: AttributeError: .* has no attribute 'app'"),
        ({"client": SERVER}, "'part.client:app' is of type ServerApp, expected ClientApp"),
    ],
)
def test_folders_that_hold_no_app(files: dict[str, str], text: str, command: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "app", **files)
    path = list(sys.path)
    with pytest.raises(ConfigError, match=text), imported(read_app(folder)):
        pass
    assert sys.path == path
    code, out, err = command("--app", folder)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("roundss=3", "sets roundss, and the app has no such key .* it has: nested.rate, rounds, text"),
        ("rounds=3 text", "'text' is no key=value"),
        ("text=abc", "invalid format"),
        ("missing.toml", "No such file"),
    ],
)
def test_overrides_that_fit_no_app(line: str, text: str, command: Any, tmp_path: Path) -> None:
    app = written(tmp_path / "app")
    with pytest.raises(ConfigError, match=text):
        overridden(read_app(app).config, [line])
    assert command("--app", app, "--run-config", line)[0] == 2


def test_overrides_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "other.toml"
    file.write_text("rounds = 7\n[nested]\nrate = 0.25\n")
    assert overridden({"rounds": 2, "nested.rate": 0.5, "x": "y"}, [str(file)]) == {
        "rounds": 7,
        "nested.rate": 0.25,
        "x": "y",
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--clients", "3"], "--clients and --run-config need --app"),
        (["--app", ".", "--seed", "0"], "--seed: not with --app"),
        (["--app", ".", "--check-step"], "--check-step: not with --app"),
        (["--app", ".", "x.toml", "--json"], "FILE, --json: not with --app"),
        (["--app", ".", "--clients", "0"], "0 is not in the range"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], text: str, command: Any) -> None:
    code, _, err = command(*arguments)
    assert code == 2
    assert text in err
