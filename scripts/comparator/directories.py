"""Two run directories compared to the bit: draws, summary, logged metrics and counted bytes, and who took part."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from comparator import ignored
from comparator.findings import Finding, broken, difference, note

Array = NDArray[Any]


class Draws(NamedTuple):
    """The draws of a run.

    Attributes:
        params: (draws, chains, d).
        rounds: (draws,), the round of each.
    """

    params: Array
    rounds: Array


def compare_runs(old: Path, new: Path) -> list[Finding]:
    """Everything that a run directory says about its chain.

    Args:
        old: made by the old checkout.
        new: made by the new one, from the same configuration.
    """
    found = list(compare_draws(read_draws(old), read_draws(new)))
    found += compare_mapping("summary.json", _json(old / "summary.json"), _json(new / "summary.json"), ignored.SUMMARY)
    found += _compare_metrics(old / "metrics.jsonl", new / "metrics.jsonl")
    found += compare_mapping("config.toml", _toml(old / "config.toml"), _toml(new / "config.toml"), ())
    geometry = _json(old / "geometry.json"), _json(new / "geometry.json")
    found += compare_mapping("geometry.json", *geometry, ignored.GEOMETRY, lax=True)
    found += _compare_tensors("geometry.safetensors", old, new)
    for name in ("params.json", "participation.jsonl", "forks.jsonl"):
        found += _compare_text(name, old / name, new / name)
    return found


def read_draws(run: Path) -> Draws:
    """The draws of a run directory, in the order of rounds; none where there is no file."""
    shards = [load_file(file) for file in sorted((run / "draws").glob("*.safetensors"))]
    if not shards:
        return Draws(np.zeros((0, 0, 0)), np.zeros(0, np.int64))
    return Draws(*(np.concatenate([shard[name] for shard in shards]) for name in ("params", "rounds")))


def compare_draws(old: Draws, new: Draws) -> Iterator[Finding]:
    """Bit by bit; the first entry that differs is named, with its distance in units in the last place."""
    if old.params.size == 0 or new.params.size == 0:
        yield broken(f"no draws: {old.params.size} entries in the old run, {new.params.size} in the new one")
        return
    if old.params.dtype != new.params.dtype or old.params.shape[1:] != new.params.shape[1:]:
        shapes = " -> ".join(f"{each.params.dtype} {each.params.shape}" for each in (old, new))
        yield difference(f"draws: shape (draws, chains, d) {shapes}")
        return
    if not np.array_equal(old.rounds, new.rounds):
        yield difference(f"draws: of rounds {_some(old.rounds)} -> {_some(new.rounds)}")
    count = min(len(old.rounds), len(new.rounds))
    bits = [each.params[:count].view(f"u{each.params.dtype.itemsize}") for each in (old, new)]
    differs = bits[0] != bits[1]
    if not differs.any():
        return
    at, chain, coordinate = (int(index) for index in np.argwhere(differs)[0])
    here, there = old.params[at, chain, coordinate], new.params[at, chain, coordinate]
    distances = units_between(old.params[:count][differs], new.params[:count][differs])
    yield difference(
        f"draws: first at round {old.rounds[at]}, chain {chain}, coordinate {coordinate}: {here!s} -> {there!s}, "
        f"{units_between(here, there)[0]:,} units in the last place apart; {int(differs.sum()):,} of {differs.size:,} "
        f"entries differ, by at most {max(distances):,} units"
    )


def units_between(one: Array, other: Array) -> list[int]:
    """How many floating-point numbers lie from each entry of one array to that of another of its dtype."""
    return [abs(a - b) for a, b in zip(_ordinals(one), _ordinals(other), strict=True)]


def _ordinals(values: Array) -> list[int]:
    """Floats numbered in their order, so that neighbours differ by one and both zeros are 0."""
    flat = np.atleast_1d(values)
    signed = flat.view(f"i{flat.dtype.itemsize}").tolist()
    lowest = -(1 << (8 * flat.dtype.itemsize - 1))
    return [each if each >= 0 else lowest - each for each in signed]


def _some(rounds: Array) -> str:
    return f"{len(rounds)} from {rounds[0]} to {rounds[-1]}" if len(rounds) else "none"


# --- small files ------------------------------------------------------------------------------------------------------


def _json(file: Path) -> Mapping[str, Any]:
    return dict(json.loads(file.read_bytes())) if file.exists() else {}


def _toml(file: Path) -> Mapping[str, Any]:
    return dict(_leaves(tomllib.loads(file.read_text(encoding="utf-8")))) if file.exists() else {}


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def compare_mapping(
    what: str, old: Mapping[str, Any], new: Mapping[str, Any], ignore: tuple[str, ...], *, lax: bool = False
) -> Iterator[Finding]:
    """Values by key: one that changed or is gone is a difference (if `lax`, gone is a note), a new one is a note."""
    if not old and not new:
        yield broken(f"{what}: neither run has one")
        return
    for name in [name for name in old if name not in ignore]:
        if name not in new:
            yield (note if lax else difference)(f"{what}: {name} = {old[name]!r} is gone")
        elif not _same(old[name], new[name]):
            yield difference(f"{what}: {name} = {old[name]!r} -> {new[name]!r}")
    if added := [name for name in new if name not in old and name not in ignore]:
        yield note(f"{what}: the new run has {', '.join(added)} too")


def _same(old: Any, new: Any) -> bool:
    """Equal, and of one type: 1 is not 1.0; JSON writes floats so that they come back to the bit."""
    return type(old) is type(new) and json.dumps(old) == json.dumps(new)


def _compare_metrics(old: Path, new: Path) -> Iterator[Finding]:
    """Logged rounds that both have: the log drops a row where the disk is behind."""
    rows = [_rows(file) for file in (old, new)]
    common = rows[0].keys() & rows[1].keys()
    if not common:
        yield broken(f"metrics.jsonl: no round in both, {sorted(rows[0])} and {sorted(rows[1])}")
        return
    if rows[0].keys() != rows[1].keys():
        yield note(
            f"metrics.jsonl: rounds {sorted(rows[0].keys() ^ rows[1].keys())} in one only, dropped by a busy disk"
        )
    clocked = (*ignored.METRICS, *ignored.DEVICE_METRICS)
    for round in sorted(common):
        kept = [{tag: value for tag, value in row[round].items() if not tag.startswith(clocked)} for row in rows]
        found = list(compare_mapping(f"metrics.jsonl: round {round}", kept[0], kept[1], ()))
        yield from found
        if found:
            return  # later rounds follow


def _rows(file: Path) -> dict[int, dict[str, Any]]:
    """Metrics by round; what came late lies in a second object of its round."""
    found: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        row = json.loads(line)
        found.setdefault(row["round"], {}).update(row)
    return found


def _compare_tensors(name: str, old: Path, new: Path) -> Iterator[Finding]:
    tensors = [load_file(run / name) if (run / name).exists() else {} for run in (old, new)]
    if not tensors[0].keys() & tensors[1].keys():
        yield note(f"{name}: no tensor in both")
        return
    if gone := sorted(tensors[0].keys() ^ tensors[1].keys()):
        yield note(f"{name}: {', '.join(gone)} in one only")
    for key in sorted(tensors[0].keys() & tensors[1].keys()):
        one, other = tensors[0][key], tensors[1][key]
        if one.dtype != other.dtype or one.shape != other.shape or one.tobytes() != other.tobytes():
            yield difference(f"{name}: {key} {one.dtype} {one.shape} -> {other.dtype} {other.shape}, or other values")


def _compare_text(name: str, old: Path, new: Path) -> Iterator[Finding]:
    one, other = (file.read_text(encoding="utf-8").splitlines() if file.exists() else None for file in (old, new))
    if one == other:
        return
    if one is None or other is None:
        yield difference(f"{name}: in the {'new' if one is None else 'old'} run only")
        return
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    lines = [text[at] if at < len(text) else "(ends)" for text in (one, other)]
    yield difference(f"{name}: line {at + 1}: {lines[0]} -> {lines[1]}")
