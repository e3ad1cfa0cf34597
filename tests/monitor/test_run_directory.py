"""The run directory: whole files or none, one writer, and nothing lost by a kill or a full disk."""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import logging
import os
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedsample.errors import RunDirectoryError
from fedsample.monitor import CheckpointStore, DrawStore, RunDirectory, load_draws, load_rounds, read_jsonl
from fedsample.monitor.atomic_files import write_atomic
from fedsample.monitor.jsonl import JsonLines, to_json, truncate_jsonl

DIGEST = "abc"


def draw(round: int) -> torch.Tensor:
    """What the sampler would draw in a round: known from the round alone."""
    return torch.arange(6, dtype=torch.float64).reshape(2, 3) + 100 * round  # (C, d)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@contextlib.contextmanager
def full_disk(limit: int = 4096) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes: the system then refuses a write as it does on a full disk.

    Keep it around one statement: the limit holds for the test runner's own files too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Directory


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


def test_a_run_that_goes_on_elsewhere_says_what_is_another_there(tmp_path: Path) -> None:
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
    kept = json.loads((tmp_path / "env.json").read_text())
    assert kept["versions"]["torch"] == "2.7.0"
    assert [each["round"] for each in kept["resumed"]] == [60]
    assert kept["resumed"][0]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("text", ["", "[]", "{", '{"versions": 3}'])
def test_a_damaged_env_stops_nothing(text: str, tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path) as run:
        (tmp_path / "env.json").write_text(text)
        assert run.compare_env(3) == []


# Files


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


# Draws


def test_shards_end_at_fixed_rounds_and_load_joins_them(tmp_path: Path) -> None:
    store = DrawStore(tmp_path, 10)
    for round in (3, 10, 11, 20, 35):  # shard 2 stays empty
        store.append(round, draw(round))
    store.flush()
    assert sorted(files(tmp_path)) == ["000000.safetensors", "000001.safetensors", "000003.safetensors"]
    assert load_rounds(tmp_path / "000001.safetensors").tolist() == [11, 20]
    assert load_rounds(tmp_path).tolist() == [3, 10, 11, 20, 35]
    expected = torch.stack([draw(round) for round in (3, 10, 11, 20, 35)], dim=1)  # (C, draws, d)
    assert torch.equal(load_draws(tmp_path), expected)
    assert torch.equal(store.load(), expected)


def test_the_file_is_as_documented_for_other_readers(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    store = DrawStore(tmp_path / "draws", 10)
    store.append(1, draw(1))
    store.append(2, draw(2))
    store.flush()
    stored = load_file(tmp_path / "draws" / "000000.safetensors")
    assert torch.equal(stored["params"], torch.stack([draw(1), draw(2)]))  # draw, chain, parameter
    assert torch.equal(load_draws(tmp_path), load_draws(tmp_path / "draws"))


def test_the_first_shard_may_begin_after_the_warm_up(tmp_path: Path) -> None:
    store = DrawStore(tmp_path, 10, start=100)
    with pytest.raises(RunDirectoryError, match="after round 100; got round 100"):
        store.append(100, draw(100))
    store.append(110, draw(110))
    store.append(111, draw(111))
    store.flush()
    assert load_rounds(tmp_path / "000000.safetensors").tolist() == [110]


def test_appending_copies_the_draw(tmp_path: Path) -> None:
    store = DrawStore(tmp_path, 10)
    state = draw(1)
    store.append(1, state)
    state.zero_()
    assert torch.equal(store.load()[:, 0], draw(1))


def test_flush_writes_only_what_changed_and_never_a_complete_shard(tmp_path: Path) -> None:
    def stamps() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in tmp_path.iterdir()}

    store = DrawStore(tmp_path, 2)
    for round in (1, 2, 3):
        store.append(round, draw(round))
    store.flush()
    before = stamps()
    store.flush()
    assert stamps() == before
    store.append(4, draw(4))
    store.append(5, draw(5))
    store.flush()
    assert stamps()["000000.safetensors"] == before["000000.safetensors"]
    assert stamps()["000001.safetensors"] != before["000001.safetensors"]


@pytest.mark.parametrize("checkpoint", range(13))
@pytest.mark.parametrize("killed", [1, 6, 8, 9, 12])
def test_resumed_draws_are_the_files_of_an_uninterrupted_run(tmp_path: Path, checkpoint: int, killed: int) -> None:
    def sample(store: DrawStore, first: int, last: int) -> None:
        for round in range(first, last + 1):
            if round % 3 != 0:
                store.append(round, draw(round))

    whole = DrawStore(tmp_path / "whole", 4)
    sample(whole, 1, 12)
    whole.flush()
    checkpoint = min(checkpoint, killed)
    broken = DrawStore(tmp_path / "broken", 4)
    sample(broken, 1, killed)
    broken.flush()  # at least as far as the checkpoint
    (tmp_path / "broken" / "000009.safetensors.tmp").write_bytes(b"torso")
    again = DrawStore(tmp_path / "broken", 4)
    kept = again.resume(checkpoint)
    assert kept == sum(round % 3 != 0 for round in range(1, checkpoint + 1))
    assert load_rounds(tmp_path / "broken").tolist() == [r for r in range(1, checkpoint + 1) if r % 3 != 0]
    sample(again, checkpoint + 1, 12)
    again.flush()
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_resume_refuses_draws_that_do_not_fit_and_changes_nothing(tmp_path: Path) -> None:
    store = DrawStore(tmp_path, 4)
    for round in range(1, 8):
        store.append(round, draw(round))
    store.flush()
    before = files(tmp_path)
    with pytest.raises(RunDirectoryError, match="holds 5 draws up to round 5, but the checkpoint counts 6"):
        DrawStore(tmp_path, 4).resume(5, expected=6)
    with pytest.raises(RunDirectoryError, match="shards of 3 rounds were expected"):
        DrawStore(tmp_path, 3).resume(5)
    assert files(tmp_path) == before
    assert DrawStore(tmp_path, 4).resume(5, expected=5) == 5


def test_old_draws_are_not_overwritten_unasked(tmp_path: Path) -> None:
    store = DrawStore(tmp_path, 4)
    store.append(1, draw(1))
    store.flush()
    with pytest.raises(RunDirectoryError, match="draws of an earlier run: resume it"):
        DrawStore(tmp_path, 4).append(1, draw(1))


def test_a_full_disk_keeps_the_older_shard_and_the_draws_in_memory(tmp_path: Path) -> None:
    store = DrawStore(tmp_path, 1000)
    store.append(1, draw(1))
    store.flush()
    before = files(tmp_path)
    for round in range(2, 100):
        store.append(round, draw(round))
    needed = r"no room .*000000\.safetensors: [\d,]+ bytes are needed.*--resume"
    with full_disk(), pytest.raises(RunDirectoryError, match=needed):
        store.flush()
    assert files(tmp_path) == before
    store.flush()
    assert load_rounds(tmp_path).tolist() == list(range(1, 100))


def test_missing_and_damaged_draws_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="holds no draws"):
        load_draws(tmp_path)
    assert load_rounds(tmp_path).tolist() == []
    store = DrawStore(tmp_path, 4)
    store.append(1, draw(1))
    store.flush()
    path = tmp_path / "000000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    for read in (load_draws, load_rounds, lambda folder: DrawStore(folder, 4).resume(1)):
        with pytest.raises(RunDirectoryError, match=r"000000\.safetensors is damaged"):
            read(tmp_path)


# Checkpoints


def state(round: int) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    tensors = {
        "params": draw(round),
        "momenta": draw(round).float().t(),  # not contiguous
        "round_of": torch.tensor(round),
        "present": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
    }
    return tensors, {"step_size": 0.1 + round / 3, "names": ["a", "b"], "epochs": {"0": round}, "nothing": None}


def save(store: CheckpointStore, round: int) -> None:
    store.save(round, *state(round))


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, DIGEST)
    assert store.latest() is None
    save(store, 7)
    found = CheckpointStore(tmp_path, DIGEST).latest()
    assert found is not None
    tensors, meta = state(7)
    assert found.round == 7
    assert found.meta == meta
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    base = draw(0)
    store = CheckpointStore(tmp_path)
    store.save(0, {"all": base, "same": base, "row": base[1]}, {3: "a number as a key", 10: float("inf")})
    found = store.latest()
    assert found is not None
    assert torch.equal(found.tensors["row"], base[1])
    assert found.meta == {"3": "a number as a key", "10": float("inf")}


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, DIGEST)
    for round in (0, 5, 40, 123456789):
        save(store, round)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00000040", "round-123456789"]
    found = store.latest()
    assert found is not None
    assert found.round == 123456789


@pytest.mark.parametrize("file", ["meta.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "empty", "short", "flipped"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    store = CheckpointStore(tmp_path, DIGEST)
    save(store, 1)
    save(store, 2)
    hurt(tmp_path / "round-00000002" / file, damage)
    with caplog.at_level(logging.WARNING):
        found = store.latest()
    assert found is not None
    assert found.round == 1
    assert torch.equal(found.tensors["params"], draw(1))
    assert "round-00000002 is damaged" in caplog.text
    hurt(tmp_path / "round-00000001" / file, damage)
    with pytest.raises(RunDirectoryError, match=r"no checkpoint in .* is whole .*restore one from a copy"):
        store.latest()


def hurt(path: Path, damage: str) -> None:
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "flipped":
        data[-20] ^= 4
        path.write_bytes(data)
    else:
        path.write_bytes(data[: 0 if damage == "empty" else len(data) - 9])


def test_going_on_from_the_older_one_replaces_the_damaged_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, DIGEST)
    save(store, 1)
    save(store, 4)
    hurt(tmp_path / "round-00000004" / "meta.json", "short")
    save(store, 3)  # the damaged one must not count as one of two
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00000001", "round-00000003"]
    save(store, 4)
    found = store.latest()
    assert found is not None
    assert found.round == 4


@pytest.mark.parametrize("point", ["meta.json", "rename"])
def test_a_kill_while_saving_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    import fedsample.monitor.checkpoint as module

    class Killed(BaseException):
        pass

    store = CheckpointStore(tmp_path, DIGEST)
    save(store, 1)
    with monkeypatch.context() as patch:
        write = module.write_durable

        def die_at_meta(path: Path, data: bytes) -> None:
            write(path, data[: len(data) // 2] if path.name == "meta.json" else data)
            if path.name == "meta.json":
                raise Killed

        def die(*_: object) -> None:
            raise Killed

        if point == "rename":
            patch.setattr(os, "rename", die)
        else:
            patch.setattr(module, "write_durable", die_at_meta)
        with pytest.raises(Killed):
            save(store, 2)
    again = CheckpointStore(tmp_path, DIGEST)
    found = again.latest()
    assert found is not None
    assert found.round == 1
    save(again, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00000001", "round-00000002"]


def test_kill_9_while_saving_without_end(tmp_path: Path) -> None:
    program = (
        "import itertools, sys, torch\nfrom pathlib import Path\nfrom fedsample.monitor import CheckpointStore\n"
        "store = CheckpointStore(Path(sys.argv[1]))\n"
        "for round in itertools.count():\n"
        "    store.save(round, {'params': torch.full((20000,), round)}, {'round': round})\n"
        "    print(round, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    saved = -1
    while saved < 5:
        saved = int(child.stdout.readline())
    child.kill()
    saved = max([saved, *(int(line) for line in child.stdout.read().splitlines(True) if line.endswith("\n"))])
    child.wait()
    child.stdout.close()
    found = CheckpointStore(tmp_path).latest()
    assert found is not None
    assert found.round in (saved, saved + 1)  # saved, perhaps, but not yet reported
    assert found.meta == {"round": found.round}
    assert torch.equal(found.tensors["params"], torch.full((20000,), found.round))


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "rename", lambda old, new: (events.append("rename"), rename(old, new))[1])
    save(CheckpointStore(tmp_path, DIGEST), 1)
    assert events == ["fsync", "fsync", "fsync", "rename", "fsync"]  # two files, their folder, then the name


def test_the_same_round_again_leaves_the_whole_checkpoint_alone(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, DIGEST)
    save(store, 2)
    stamp = (tmp_path / "round-00000002").stat().st_ino
    save(store, 2)
    assert (tmp_path / "round-00000002").stat().st_ino == stamp


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path, DIGEST), 1)
    with pytest.raises(RunDirectoryError, match=r"checkpoint of another configuration \(digest abc, expected xyz\)"):
        CheckpointStore(tmp_path, DIGEST).latest("xyz")
    with pytest.raises(RunDirectoryError, match="restore that file, or start a new run"):
        CheckpointStore(tmp_path, "xyz").latest()


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, DIGEST)
    save(store, 1)
    with full_disk(), pytest.raises(RunDirectoryError, match=r"no room .*round-00000002: [\d,]+ bytes are needed"):
        store.save(2, {"params": torch.zeros(5000)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["round-00000001"]
    found = store.latest()
    assert found is not None
    assert found.round == 1
