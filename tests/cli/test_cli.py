"""The command line: help, configuration, lists, errors and exit codes; nothing here samples."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
import types
import urllib.request
from pathlib import Path
from typing import Any

import commands
import pytest

import fedsample
import fedsample.runs
from fedsample.cli.main import main
from fedsample.config import Experiment, keys, load
from fedsample.config.presets import PRESETS
from fedsample.errors import ConfigError, DivergenceError, Interrupted, QuorumError

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-W", "error", "-m", "fedsample"]


def clean_environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FEDSAMPLE_")}
    return {**kept, "COLUMNS": "120", "NO_COLOR": "1", **extra}


def call(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process forked from one that has imported everything; `test_version` starts Python."""
    done = commands.call(folder, *arguments, environment=environment)
    return subprocess.CompletedProcess(["fedsample", *arguments], done.code, done.out, done.err)


class Engine(types.ModuleType):
    """Stands in for `fedsample.runs`: remembers what it was asked, and fails if told to."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__("fedsample.runs.api")
        self.error = error
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def run(self, source: Any, **options: Any) -> Any:
        self.asked.append((source, options))
        print("round 1")
        if self.error is not None:
            raise self.error
        summary = {"rounds": 3, "rhat_max": float("nan"), "nested": [float("inf"), 1.5]}
        return types.SimpleNamespace(summary=summary, table=lambda: "the table")

    def plan(self, source: Any, overrides: Any) -> dict[str, str]:
        self.asked.append((source, {"overrides": overrides}))
        return {"clients": "10 [of] 10", "uplink": "132 bytes per round"}

    def check(self, experiment: Experiment) -> None:
        self.asked.append((experiment, {}))
        if self.error is not None:
            raise self.error


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    stand_in = Engine()
    monkeypatch.setitem(sys.modules, "fedsample.runs.api", stand_in)
    monkeypatch.setattr(fedsample.runs, "api", stand_in, raising=False)
    monkeypatch.setattr("fedsample.runs.checks.check", stand_in.check)
    monkeypatch.setattr("fedsample.runs.plan.plan", stand_in.plan)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("FEDSAMPLE_")]:
        monkeypatch.delenv(name)
    return stand_in


def here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `main` in this process, for what a stand-in must answer; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["fedsample", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("FLWR_DISABLE_UPDATE_CHECK", "1")
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_is_light_and_quick(tmp_path: Path) -> None:
    code = (
        "import sys, fedsample.cli.main\nsys.argv = ['fedsample', '--help']\ntry:\n    fedsample.cli.main.main()\n"
        "finally:\n    heavy = {'torch', 'flwr', 'ray', 'opacus', 'transformers', 'tensorboard', 'sklearn', "
        "'datasets', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "    print('HEAVY', heavy or None, 'MODULES', len(sys.modules), '.')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "HEAVY None" in done.stdout
    assert all(name in done.stdout for name in ("simulate", "config", "list", "monitor"))
    assert int(done.stdout.split("MODULES ")[1].split()[0]) < 600  # what takes the time; torch alone brings a thousand


@pytest.mark.parametrize(
    "command",
    [
        *("simulate", "config", "config init", "config check", "list", "monitor"),
        *("certs", "certs init", "certs issue", "certs request", "certs sign", "certs show", "doctor", "doctor net"),
    ],
)
def test_every_command_has_help(command: str, tmp_path: Path) -> None:
    done = call(tmp_path, *command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: fedsample " + command in done.stdout


def test_help_of_show_documents_every_variable(tmp_path: Path) -> None:
    done = call(tmp_path, "config", "show", "--help")
    assert done.returncode == 0, done.stderr
    text = re.sub(r"\s+", " ", done.stdout)
    for key in keys():
        assert f"{key.path} ({key.variable}): {key.meaning}" in text


def test_version(tmp_path: Path) -> None:
    """As a user runs it, and with every warning of an import an error."""
    line = [sys.executable, "-W", "error", "-m", "fedsample", "--version"]
    done = subprocess.run(line, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fedsample {fedsample.__version__}\n", "")
    refused = subprocess.run(
        [*line[:-1], "none"], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "Usage: python -m fedsample" in refused.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample"],
        ["simulate", "--rounds", "many"],
        ["list"],
        ["list", "dataset"],
        ["simulate", "--resume"],
        ["simulate", "--resume", "--out", "x", "--set", "seed=1"],
        ["simulate", "run.toml", "--resume", "--out", "x"],
        ["simulate", "--resume", "--out", "x", "--device", "cpu"],
        ["simulate", "--resume", "--out", "x", "--dry-run"],
        ["monitor", "--port", "70000"],
    ],
)
def test_usage_errors_exit_with_2(arguments: list[str], tmp_path: Path) -> None:
    done = call(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage: fedsample" in done.stderr
    assert "Traceback" not in done.stderr


# --- config -----------------------------------------------------------------------------------------------------------


def test_init_writes_the_default_job_once(tmp_path: Path) -> None:
    done = call(tmp_path, "config", "init")
    assert (done.returncode, done.stderr) == (0, "")
    written = tmp_path / "fedsample.toml"
    assert load(written, environment={}) == Experiment()
    written.write_text("seed = 7\n")
    again = call(tmp_path, "config", "init")
    assert again.returncode == 2
    assert again.stderr == (
        "error: fedsample.toml: exists and is left as it is; name another file, or move this one away\n"
    )
    assert written.read_text() == "seed = 7\n"
    lost = call(tmp_path, "config", "init", "none/a.toml")
    assert lost.returncode == 2
    assert lost.stderr == "error: none/a.toml: there is no folder none; make it first, or name another place\n"


def test_show_prints_every_value_and_who_set_it(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('preset = "langevin-marina"\n')
    done = call(tmp_path, "config", "show", "run.toml", "--set", "uplink.k=32", FEDSAMPLE_SEED="4")
    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        'preset = "langevin-marina"  # run.toml',
        "seed = 4  # FEDSAMPLE_SEED",
        'name = "marina"  # preset langevin-marina',
        "k = 32  # --set uplink.k=32",
        "chains = 4",
    ):
        assert line in done.stdout.splitlines()
    want = load({"preset": "langevin-marina", "seed": 4, "uplink": {"k": 32}}, environment={})
    assert load(tomllib.loads(done.stdout), environment={}) == want


@pytest.mark.parametrize("command", [["simulate"], ["config", "show"], ["config", "check"]])
def test_a_bad_configuration_is_one_message_without_traceback(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[uplink]\nkk = 3\n")
    done = call(tmp_path, *command, "run.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: uplink.kk: unknown key; the nearest known key is uplink.k (set by run.toml)\n"
    shown = call(tmp_path, *command, "run.toml", "--debug")
    assert shown.returncode == 2
    assert "Traceback (most recent call last)" in shown.stderr
    assert shown.stderr.endswith(done.stderr)


def test_check_says_ok_or_why_not(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert here(monkeypatch, "config", "check", "--set", "seed=3") == 0
    assert capsys.readouterr().out == "ok: the default job, preset underdamped-diana\n"
    assert engine.asked[0][0].seed == 3
    engine.error = ConfigError("unsound")
    assert here(monkeypatch, "config", "check") == 2
    assert capsys.readouterr().err == "error: unsound\n"


# --- list -------------------------------------------------------------------------------------------------------------


def test_list_presets(tmp_path: Path) -> None:
    done = call(tmp_path, "list", "presets")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in PRESETS)
    rows = json.loads(call(tmp_path, "list", "presets", "--json").stdout)
    assert [row["name"] for row in rows] == list(PRESETS)
    wire = {"uplink", "downlink", "bits per chain and round"}
    assert set(rows[0]) == {"name", "summary", "guarantee", "reference", *wire}


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("datasets", {"digits", "diabetes"}),
        ("models", {"softmax", "linear", "logistic", "mlp"}),
        ("estimators", {"dense", "marina", "diana"}),
        ("compressors", {"identity", "randk", "randblock"}),
    ],
)
def test_list_reads_the_tables_of_the_parts(what: str, names: set[str], tmp_path: Path) -> None:
    done = call(tmp_path, "list", what, "--json")
    assert done.returncode == 0, done.stderr
    assert names <= {row["name"] for row in json.loads(done.stdout)}


def test_a_list_is_a_table_with_a_header(tmp_path: Path) -> None:
    lines = call(tmp_path, "list", "datasets").stdout.splitlines()
    assert re.search(r"name +rows +features +classes", lines[1])
    assert re.search(r"diabetes +442 +10 +- +regression", "\n".join(lines))


# --- simulate, with a stand-in for the engine -------------------------------------------------------------------------


def test_options_become_overrides(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("FEDSAMPLE_CHAINS", "2")
    options = ["--set", "seed=1", "--set", "warmup=10", "--preset", "langevin-marina", "--seed", "5", "--rounds", "90"]
    assert here(monkeypatch, "simulate", *options, "--device", "cuda:1", "--out", "there", "--quiet") == 0
    (configured, asked) = engine.asked[0]
    assert (configured.preset, configured.seed, configured.rounds) == ("langevin-marina", 5, 90)
    assert (configured.fleet.device, configured.warmup, configured.chains) == ("cuda:1", 10, 2)
    assert asked == {
        "out": Path("there"),
        "resume": False,
        "progress": "quiet",
        "check_step": False,
        "overrides": [],
        "replay": None,
    }
    assert capsys.readouterr().out == "round 1\nthe table\n"


def test_resume_hands_over_the_directory_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSAMPLE_SEED", "9")
    assert here(monkeypatch, "simulate", "--resume", "--out", "there") == 0
    assert here(monkeypatch, "simulate", "--resume", "--out", "there", "--check-step") == 0
    asked = {"out": Path("there"), "resume": True, "progress": "auto", "overrides": [], "replay": None}
    assert engine.asked == [(None, {**asked, "check_step": False}), (None, {**asked, "check_step": True})]


def test_json_is_alone_on_standard_output_and_strict(engine: Engine, monkeypatch: Any, capsys: Any) -> None:
    assert here(monkeypatch, "simulate", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"rounds": 3, "rhat_max": None, "nested": [None, 1.5]}
    assert said.err == "round 1\n"


def test_dry_run_samples_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert here(monkeypatch, "simulate", "--dry-run", "--rounds", "2000") == 0
    assert engine.asked[0][0].rounds == 2000
    said = capsys.readouterr().out
    assert "10 [of] 10" in said
    assert "132 bytes per round" in said
    assert "round 1\n" not in said
    assert here(monkeypatch, "simulate", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["clients"] == "10 [of] 10"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DivergenceError("chain 2 left in round 7"), 1, "chain 2 left in round 7"),
        (QuorumError("2 of 10 answered"), 3, "2 of 10 answered"),
        (Interrupted("stopped in round 7"), 130, "stopped in round 7"),
        (
            OSError(errno.ENOSPC, "No space left on device", "there/draws"),
            1,
            "there/draws: No space left on device; free",
        ),
        (OSError(errno.EROFS, "Read-only file system", "there"), 1, "there: Read-only file system; choose a place"),
        (ValueError("first\nsecond"), 1, "unexpected ValueError: first (a defect of fedsample; --debug shows where)"),
        (ZeroDivisionError(), 1, "unexpected ZeroDivisionError: no message"),
    ],
)
def test_each_failure_has_its_code_and_one_message(
    error: Exception, code: int, message: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    engine.error = error
    assert here(monkeypatch, "simulate") == code
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1
    assert here(monkeypatch, "simulate", "--debug") == code
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert type(error).__name__ in said


def test_an_interrupt_exits_with_130(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    engine.error = KeyboardInterrupt()
    assert here(monkeypatch, "simulate") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_full_disk_under_standard_output(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, which this system does not have")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "config", "show"],
            cwd=tmp_path,
            env=clean_environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: No space left on device; free some space")


def test_flowers_telemetry_is_off_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    code = (
        "import os, sys, fedsample.cli.main\nsys.argv = ['fedsample', '--version']\n"
        "try:\n    fedsample.cli.main.main()\n"
        "finally:\n    print(os.environ['FLWR_TELEMETRY_ENABLED'], os.environ['FLWR_DISABLE_UPDATE_CHECK'])"
    )
    for given, want in ({}, "0 1"), ({"FLWR_TELEMETRY_ENABLED": "1"}, "1 1"):
        environment = {k: v for k, v in clean_environment(**given).items() if not k.startswith("FLWR_") or k in given}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == want


# --- monitor ----------------------------------------------------------------------------------------------------------


def test_monitor_needs_a_directory(tmp_path: Path) -> None:
    for arguments, name in (["monitor"], "runs"), (["monitor", "none"], "none"):
        done = call(tmp_path, *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {name}: there is no such directory; give the run directory")


def test_monitor_takes_its_process_with_it(tmp_path: Path) -> None:
    """Whoever ends `fedsample monitor` must not leave a server behind."""
    child = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    code = (
        "import sys; from fedsample.cli.main import _foreground; "
        f"sys.exit(_foreground([sys.executable, '-c', {child!r}]))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGTERM)
        try:
            parent.communicate(timeout=30)  # to the end of the pipe: both have closed it
        except subprocess.TimeoutExpired:
            os.kill(pid, signal.SIGKILL)
            pytest.fail("the server outlived `fedsample monitor`")
    assert parent.returncode == 128 + signal.SIGTERM


def test_monitor_serves_tensorboard_on_this_machine_only(tmp_path: Path) -> None:
    """Until SIGINT, which a shell's `&` has ignored by what it begins; tests/walk types it in front."""
    command = ["bash", "-c", "trap '' INT; exec \"$@\"", "bash", *COMMAND[:1], "-m", "fedsample", "monitor"]
    command += [str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=clean_environment()) as server:
        try:
            assert server.stderr is not None
            found = next((m for line in server.stderr if (m := re.search(r"http://127\.0\.0\.1:\d+", line))), None)
            assert found is not None
            with urllib.request.urlopen(found.group() + "/data/environment", timeout=60) as answer:
                assert json.load(answer)["data_location"] == str(tmp_path)
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)
        except BaseException:
            server.terminate()  # it takes TensorBoard with it
            raise
    assert server.returncode == 130
