"""The comparator of two checkouts, scripts/same_draws: what it must find, on run directories made here."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def comparator() -> Iterator[Mapping[str, Any]]:
    sys.path.insert(0, str(SCRIPTS))
    names = ("directories", "findings", "frames", "messages", "self_test", "cases")
    yield {name: importlib.import_module(f"comparator.{name}") for name in names}
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What is compared of a run of 8 rounds, in two shards of draws."""
    folder = tmp_path / "run"
    (folder / "draws").mkdir(parents=True)
    draws = np.random.default_rng(0).normal(size=(8, 2, 3)).astype(np.float32)
    for shard in range(2):
        part = slice(4 * shard, 4 * shard + 4)
        tensors = {"params": draws[part], "rounds": np.arange(1, 9)[part]}
        save_file(tensors, folder / "draws" / f"{shard:06d}.safetensors")
    summary = {"seconds": 0.5, "rhat_max": 1.5, "uplink_bytes_per_client": 100.0, "warnings": []}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [{"round": r, "bytes": r, "comm/down_bytes": 8.0 * r, "time/server": 0.1, "mcmc/ess/min": 3} for r in (4, 8)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.toml").write_text("rounds = 8\n[fleet]\nthreads = 1\n")
    (folder / "geometry.json").write_text(json.dumps({"step_size": 0.1, "sha256": "a"}))
    save_file({"mean": np.zeros(3)}, folder / "geometry.safetensors")
    (folder / "params.json").write_text("[]")
    return folder


def test_a_copy_is_the_same_whatever_a_clock_said(comparator: Mapping[str, Any], run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"seconds": 9.0}))
    text = (copy / "metrics.jsonl").read_text().replace('"time/server": 0.1', '"time/server": 7.0')
    (copy / "metrics.jsonl").write_text(text.replace('"mcmc/ess/min": 3', '"mcmc/ess/min": 4'))
    assert comparator["directories"].compare_runs(run, copy) == []


CHANGES = ("flip_a_bit", "count_another_byte", "log_another_byte", "lose_the_draws", "forget_a_key")


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_found_alone(comparator: Mapping[str, Any], run: Path, tmp_path: Path, change: str) -> None:
    self_test = comparator["self_test"]
    assert set(self_test.CHANGES.values()) == {getattr(self_test, name) for name in CHANGES}
    changed = self_test.tampered(run, tmp_path / "changed", getattr(self_test, change))
    (found,) = comparator["directories"].compare_runs(run, changed)
    kinds = comparator["findings"].Kind
    assert found.kind is (kinds.BROKEN if change == "lose_the_draws" else kinds.DIFFERENCE)


def test_a_draw_that_differs_is_named_to_the_last_place(
    comparator: Mapping[str, Any], run: Path, tmp_path: Path
) -> None:
    changed = comparator["self_test"].tampered(run, tmp_path / "changed", comparator["self_test"].flip_a_bit)
    (found,) = comparator["directories"].compare_runs(run, changed)
    for part in ("round 3", "chain 0", "coordinate 0", "1 units in the last place", "1 of 48 entries"):
        assert part in found.text


@pytest.mark.parametrize(("one", "other", "distance"), [(1.0, 1.0, 0), (0.0, -0.0, 0), (-5e-324, 5e-324, 2)])
def test_units_in_the_last_place_cross_zero(
    comparator: Mapping[str, Any], one: float, other: float, distance: int
) -> None:
    assert comparator["directories"].units_between(np.array([one]), np.array([other])) == [distance]


def test_another_zero_is_another_draw(comparator: Mapping[str, Any]) -> None:
    directories = comparator["directories"]
    plus, minus = (directories.Draws(np.full((1, 1, 1), zero), np.ones(1, np.int64)) for zero in (0.0, -0.0))
    assert len(list(directories.compare_draws(plus, minus))) == 1


def test_no_message_is_no_success(comparator: Mapping[str, Any]) -> None:
    compare, kinds = comparator["messages"].compare_messages, comparator["findings"].Kind
    message = {"title": "up", "data": {"base64": "AAAA"}}
    assert [each.kind for each in compare([], [])] == [kinds.BROKEN]
    assert [each.kind for each in compare([message], [])] == [kinds.BROKEN]
    assert [each.kind for each in compare([message], [message, message])] == [kinds.DIFFERENCE]
    assert "byte 2 of 3: 0x00 -> 0x01" in compare([message], [{**message, "data": {"base64": "AAAB"}}])[0].text
    assert compare([message], [dict(message)]) == []


def test_frames_are_read_as_the_protocol_says(comparator: Mapping[str, Any]) -> None:
    from fedsample.fleets.grpc import fedsample_pb2 as pb

    name = pb.Name(run=b"r" * 16, term=1, round=7, client=1, digest=b"d" * 16, sequence=3)
    header = [pb.Field(name="round", integer=7), pb.Field(name="mark", integer=12345)]
    arrays = [pb.Array(name="points", dtype="float32", shape=[2, 3], stype="fedsample.dense.v1", size=24)]
    head = pb.Head(name=name, kind="train", header=header, arrays=arrays)
    frame = pb.ServerFrame(piece=pb.Piece(head=head.SerializeToString(), data=bytes(24), crc=5))
    read = comparator["frames"].read_frame(frame.SerializeToString(), up=False)
    assert read["title"] == "down piece train 7"
    assert read["head.name.sequence"] == 3
    assert read["head.arrays.stype"] == "fedsample.dense.v1"
    assert read["head.header.name"] == "round"
    assert not {"crc", "head.name.run", "head.name.digest"} & read.keys()
    assert "mark" not in read.values()
    pong = pb.DeviceFrame(pong=pb.Pong(number=1)).SerializeToString()
    assert comparator["frames"].read_frame(pong, up=True) is None


def test_every_preset_has_its_cases(comparator: Mapping[str, Any]) -> None:
    from fedsample.config.presets import PRESETS

    cases = comparator["cases"]
    assert set(cases.PRESETS) == set(PRESETS)
    names = [case.name for case in cases.cases(defaultdict(Path))]
    assert len(names) == len(set(names))
    wanted = [f"{p}/{e}/{t}/{n}" for p in PRESETS for e in cases.ENGINES for t in cases.DTYPES for n in (1, 2)]
    assert set(wanted) <= set(names)
