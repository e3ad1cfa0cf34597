"""Differences made on purpose: each must be found, or the comparator is worth nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import load_file, save_file

from comparator.campaign import Campaign
from comparator.cases import Case, laid_over, make_data, on
from comparator.checkouts import Worker
from comparator.directories import compare_runs
from comparator.findings import Finding, Kind
from comparator.messages import compare_messages, read_messages


def self_test(old: Worker, new: Worker, folder: Path) -> int:
    """One run, the same in both; then each difference -> the exit code."""
    data = make_data(folder / "data")
    config = on(data, "logistic", preset="langevin-diana", step_size=0.01)
    case = Case("self-test/same", "self-test", config)
    same = Campaign(old, new).run([case])[0]
    found = {"nothing changed": ([] if same.worst is Kind.NOTE else same.findings)}
    other = Case("self-test/seed", "self-test", laid_over(config, {"seed": 1}))
    Campaign(old, new).run([other])
    run, seed = (worker.folder / "runs" / name for worker, name in ((old, case.name), (new, other.name)))
    changes: dict[str, list[Finding]] = {"another seed": compare_runs(run, seed)}
    for name, change in CHANGES.items():
        changes[name] = compare_runs(run, tampered(run, folder / "tampered" / name.replace(" ", "-"), change))
    changes["no messages"] = compare_messages([], read_messages(folder / "nowhere"))
    changes["one byte of a message"] = compare_messages([{"a": {"base64": "AAAA"}}], [{"a": {"base64": "AAAB"}}])
    failed = bool(found["nothing changed"])
    print(f"nothing changed: {'the same' if not failed else found['nothing changed']}")
    for name, findings in changes.items():
        bad = [each for each in findings if each.kind > Kind.NOTE]
        failed = failed or not bad
        print(f"{name}: {bad[0].text if bad else 'NOT FOUND'}")
    print("\nthe comparator misses a difference" if failed else "\nevery difference was found")
    return 1 if failed else 0


def tampered(run: Path, to: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a run directory with a change in it."""
    shutil.copytree(run, to)
    change(to)
    return to


def flip_a_bit(run: Path) -> None:
    """The last bit of one coordinate of one draw."""
    file = next((run / "draws").glob("*.safetensors"))
    tensors = load_file(file)
    params = tensors["params"].copy()
    flat = params.reshape(-1).view(f"u{params.dtype.itemsize}")
    flat[flat.size // 2] ^= 1
    save_file({**tensors, "params": params}, file)


def count_another_byte(run: Path) -> None:
    """One byte more in the summary's uplink."""
    summary = json.loads((run / "summary.json").read_bytes())
    summary["uplink_bytes_per_client"] += 1
    (run / "summary.json").write_text(json.dumps(summary))


def log_another_byte(run: Path) -> None:
    """One byte more in one row of the log."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows[1]["comm/down_bytes"] += 1
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lose_the_draws(run: Path) -> None:
    """No draw at all: not compared, and so no success."""
    shutil.rmtree(run / "draws")


def forget_a_key(run: Path) -> None:
    """A key of the summary is gone."""
    summary = json.loads((run / "summary.json").read_bytes())
    del summary["rhat_max"]
    (run / "summary.json").write_text(json.dumps(summary))


CHANGES: dict[str, Callable[[Path], None]] = {
    "one bit of a draw": flip_a_bit,
    "one byte of the summary's count": count_another_byte,
    "one byte of a row's count": log_another_byte,
    "no draws": lose_the_draws,
    "a key of the summary gone": forget_a_key,
}
