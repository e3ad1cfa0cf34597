"""The run directory and its files: whole or none, one writer, and nothing lost by a full disk."""

from __future__ import annotations

import errno
import getpass
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_files import files, full_disk

from fedsample.errors import RunDirectoryError
from fedsample.monitor import RunDirectory, read_jsonl
from fedsample.monitor.atomic_files import write_atomic
from fedsample.monitor.jsonl import JsonLines, to_json, truncate_jsonl

# --- the directory ----------------------------------------------------------------------------------------------------


def test_a_new_directory_is_made_with_its_parents_and_can_be_opened_again(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "runs" / "one") as run:
        run.write_config("rounds = 3\n")
    with RunDirectory.open(tmp_path / "runs" / "one") as run:
        assert run.read_config() == "rounds = 3\n"
        assert run.checkpoint.is_dir()
        assert run.draws.is_dir()


def test_a_directory_that_holds_something_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirectoryError, match=r"not empty \(it holds thesis.tex\).*--resume.*--out"):
        RunDirectory.create(tmp_path)
    assert files(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_run_killed_before_its_configuration_leaves_a_directory_that_can_be_used(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path).close()
    with pytest.raises(RunDirectoryError, match=r"no config\.toml.*without --resume"):
        RunDirectory.open(tmp_path)
    with RunDirectory.create(tmp_path) as run:
        run.write_config("")
    with pytest.raises(RunDirectoryError, match="not empty"):
        RunDirectory.create(tmp_path)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    for path in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(RunDirectoryError, match=r"is a file or lies below one.*--out"):
            RunDirectory.create(path)
    with pytest.raises(RunDirectoryError, match=r"nothing to resume: .* is not a directory"):
        RunDirectory.open(tmp_path / "out")
    with pytest.raises(RunDirectoryError, match=r"nothing to resume: .* does not exist"):
        RunDirectory.open(tmp_path / "none")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_read_only_place_is_refused_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(RunDirectoryError, match=r"cannot be written .*choose another with --out"):
        RunDirectory.create(tmp_path / "new")


def test_one_process_at_a_time_and_death_frees_the_directory(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom fedsample.monitor import RunDirectory\n"
        "run = RunDirectory.create(sys.argv[1])\nrun.write_config('')\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "ready\n"
        with pytest.raises(RunDirectoryError, match=rf"in use by another process \(process {child.pid}\)"):
            RunDirectory.open(tmp_path)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    RunDirectory.open(tmp_path).close()


def test_a_refused_second_writer_does_not_free_the_first(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path) as run:
        run.write_config("")
        for _ in range(2):
            with pytest.raises(RunDirectoryError, match="in use"):
                RunDirectory.open(tmp_path)


def test_env_holds_versions_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "hunter2-token")
    with RunDirectory.create(tmp_path) as run:
        run.write_env(device="cpu")
    text = (tmp_path / "env.json").read_text()
    env = json.loads(text)
    assert env["versions"]["torch"] == torch.__version__
    assert env["versions"]["fedsample"]
    assert env["python"] == platform.python_version()
    assert env["threads"] == torch.get_num_threads()
    assert env["cpu_count"] == os.cpu_count()
    assert env["device"] == "cpu"
    for secret in ("hunter2-token", str(Path.home()), str(tmp_path), f'"{getpass.getuser()}"', f'"{platform.node()}"'):
        assert secret not in text


def test_a_run_that_goes_on_elsewhere_says_what_is_another_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDSAMPLE_CXXFLAGS", raising=False)
    with RunDirectory.create(tmp_path) as run:
        run.write_env()
        as_written = (tmp_path / "env.json").read_bytes()
        assert run.compare_env(30) == []
        assert (tmp_path / "env.json").read_bytes() == as_written
        env = json.loads(as_written)
        env["versions"] |= {"torch": "2.7.0", "protobuf": "1"}  # protobuf changes no draw
        run.write_json("env.json", env | {"gpu": "A100", "cpu_count": 1})
        assert run.compare_env(60) == [f"torch 2.7.0 -> {torch.__version__}", "gpu A100 -> none"]
        assert run.compare_env(90) == []  # it has been here since
        monkeypatch.setenv("FEDSAMPLE_CXXFLAGS", "-O3 -I/home/someone/include -march=x86-64-v2")
        assert run.compare_env(95) == ["cxxflags none -> -O3 -march=x86-64-v2"]
    kept = json.loads((tmp_path / "env.json").read_text())
    assert kept["versions"]["torch"] == "2.7.0"
    assert [each["round"] for each in kept["resumed"]] == [60, 95]
    assert kept["resumed"][0]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("text", ["", "[]", "{", '{"versions": 3}'])
def test_a_damaged_env_stops_nothing(text: str, tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path) as run:
        (tmp_path / "env.json").write_text(text)
        assert run.compare_env(3) == []


# --- its files --------------------------------------------------------------------------------------------------------


def test_json_is_strict(tmp_path: Path) -> None:
    value = {
        "nan": float("nan"),
        "inf": [float("-inf"), 1.5],
        "count": torch.tensor(3),
        "gone": torch.tensor(float("nan")),
    }
    with RunDirectory.create(tmp_path) as run:
        run.write_json("summary.json", value)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert stored == {"nan": None, "inf": [None, 1.5], "count": 3, "gone": None}
    assert to_json({"x": 0.1}) == '{"x": 0.1}'


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, b"old")
    with full_disk(), pytest.raises(RunDirectoryError, match=r"5,000 bytes are needed, [\d,]+ are free.*--resume"):
        write_atomic(path, b"x" * 5000)
    assert files(tmp_path) == {"summary.json": b"old"}


def test_a_write_is_on_the_disk_before_it_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("replace"), replace(old, new))[1])
    write_atomic(tmp_path / "file", b"data")
    assert events == ["fsync", "replace", "fsync"]  # the file, then its name


def test_participation_is_logged_and_cut_back(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path) as run:
        run.write_config("")
        for round in range(1, 6):
            run.append_participation(round, [0, round])
        run.sync()
        assert len(list(read_jsonl(tmp_path / "participation.jsonl"))) == 5
    with open(tmp_path / "participation.jsonl", "a") as file:
        file.write('{"round": 6, "cli')  # killed here
    with RunDirectory.open(tmp_path) as run:
        run.rewind(3)
        run.append_participation(4, [7])
    rows = list(read_jsonl(tmp_path / "participation.jsonl"))
    assert rows == [{"round": r, "clients": [0, r]} for r in (1, 2, 3)] + [{"round": 4, "clients": [7]}]


def test_truncation_keeps_late_rows_of_early_rounds_and_does_not_touch_a_file_that_fits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1}\n{"round": 3}\n{"round": 1, "late": 1}\n{"round": 2}\n')
    truncate_jsonl(path, 2)
    assert [row["round"] for row in read_jsonl(path)] == [1, 1, 2]
    stamp = path.stat().st_ino
    truncate_jsonl(path, 2)
    assert path.stat().st_ino == stamp
    path.write_text('{"round": 1}\n{"round": 2')
    truncate_jsonl(path, 9)
    assert path.read_text() == '{"round": 1}\n'
    truncate_jsonl(tmp_path / "none.jsonl", 1)  # nothing logged yet


def test_a_full_disk_tears_no_line_and_the_rows_follow_when_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.append({"round": 1})
    with full_disk(30), pytest.raises(RunDirectoryError, match="no room"):
        lines.append({"round": 2, "text": "x" * 40})
    assert path.read_text() == '{"round": 1}\n'
    lines.append({"round": 3})
    lines.close()
    assert [row["round"] for row in read_jsonl(path)] == [1, 2, 3]


def test_a_damaged_line_is_reported_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1}\n{"rou\n{"round": 2}\n')
    with pytest.raises(RunDirectoryError, match="line 2 is damaged"):
        list(read_jsonl(path))
