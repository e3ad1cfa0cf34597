"""Checkpoints: the last two, whole, and nothing lost by a kill or a full disk."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_files import draw, full_disk

from fedsample.errors import RunDirectoryError
from fedsample.monitor import CheckpointStore

DIGEST = "abc"


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
