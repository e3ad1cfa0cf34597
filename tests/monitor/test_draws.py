"""Draws of a run: shards that are whole, and resume as if never interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_files import draw, files, full_disk

from fedsample.errors import RunDirectoryError
from fedsample.monitor import DrawStore, load_draws, load_rounds


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
