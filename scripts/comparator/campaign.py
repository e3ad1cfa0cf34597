"""Cases run by both checkouts at once, and what their comparison finds."""

from __future__ import annotations

import json
import re
import shutil
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparator.cases import HALF, ROUNDS, Case
from comparator.checkouts import Worker
from comparator.directories import compare_draws, compare_runs, read_draws
from comparator.findings import Finding, Kind, broken, difference, note
from comparator.messages import compare_messages, read_messages

LONGEST = 3600.0  # seconds for all experiments of one process


@dataclass
class Result:
    """What came of a case.

    Attributes:
        name, group: the case's.
        findings: what is not the same.
        refused: whether both checkouts refused it, in the same way.
        fell_back: the engine that was used where another was asked for.
        seconds: that the old checkout took.
        messages: compared, byte by byte.
    """

    name: str
    group: str
    findings: list[Finding] = field(default_factory=list)
    refused: bool = False
    fell_back: str = ""
    seconds: float = 0.0
    messages: int = 0

    @property
    def worst(self) -> Kind:
        """The worst finding; a note where there is none."""
        return max((each.kind for each in self.findings), default=Kind.NOTE)


class Campaign:
    """Two workers, and the cases that they run.

    Args:
        old, new: inside their checkouts; new may be what a self-test makes of old.
    """

    def __init__(self, old: Worker, new: Worker) -> None:
        """Nothing runs yet."""
        self.workers = old, new

    def run(self, cases: Sequence[Case]) -> list[Result]:
        """All cases, in both checkouts at the same time, and then one by one compared."""
        if not cases:
            return []
        began = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda worker: _perform(worker, cases), self.workers))
        print(f"  {len(cases)} cases ran in {time.monotonic() - began:.0f} s", flush=True)
        crossed = [case for case in cases if case.then == "resumed"]
        if crossed:
            _cross(*self.workers, crossed)
        return [self._compare(case) for case in cases]

    def _compare(self, case: Case) -> Result:
        result = Result(case.name, case.group)
        old, new = self.workers
        for name in _runs(case):
            self._compare_outcomes(case, name, result)
        if case.then == "resumed" and not result.refused:
            full = old.folder / "runs" / case.name
            result.findings += _crossed(
                full, new.folder / "crossed" / case.name, outcome_of(new, f"{case.name}+crossed")
            )
        return result

    def _compare_outcomes(self, case: Case, name: str, result: Result) -> None:
        old, new = (outcome_of(worker, name) for worker in self.workers)
        result.seconds += float((old or {}).get("seconds", 0.0))
        if old is None or new is None or "crashed" in (old["ended"], new["ended"]):
            said = " | ".join(_said(worker, each) for worker, each in zip(self.workers, (old, new), strict=True))
            result.findings.append(broken(f"{name}: did not run to its end: {said}"))
        elif old["ended"] != new["ended"]:
            result.findings.append(difference(f"{name}: {_ending(old)} -> {_ending(new)}"))
        elif old["ended"] == "refused":
            result.refused = True
            if old["kinds"][0] != new["kinds"][0]:
                result.findings.append(difference(f"{name}: refused with {old['kinds'][0]} -> {new['kinds'][0]}"))
            elif old["text"] != new["text"]:
                result.findings.append(note(f"{name}: refused for another reason: {old['text']} -> {new['text']}"))
        else:
            self._compare_directories(case, name, result)
            if old["warnings"] != new["warnings"]:
                result.findings.append(note(f"{name}: warnings {old['warnings']} -> {new['warnings']}"))

    def _compare_directories(self, case: Case, name: str, result: Result) -> None:
        runs = [worker.folder / "runs" / name for worker in self.workers]
        found = compare_runs(*runs)
        wanted = case.config.get("fleet", {}).get("engine")
        used = tomllib.loads((runs[0] / "config.toml").read_text(encoding="utf-8"))["fleet"].get("engine")
        if wanted is not None and used != wanted:
            result.fell_back = str(used)
        if case.flower:
            sent = [read_messages(worker.folder / f"{case.name.replace('/', '-')}.messages") for worker in self.workers]
            result.messages += len(sent[0])
            found += compare_messages(*sent)
        what = "" if name == case.name else f"{name.rpartition('+')[2]}: "
        result.findings += [Finding(each.kind, f"{what}{each.text}") for each in found]


def _runs(case: Case) -> list[str]:
    """Run directories that a case makes, by their names."""
    return [case.name, *([f"{case.name}+{case.then}"] if case.then else [])]


def _perform(worker: Worker, cases: Iterable[Case]) -> None:
    """Run cases in two processes one after the other: what is made, and what is made of it."""
    first, second = [], []
    for case in cases:
        first.append(_experiment(worker, case.name, {"source": case.config}, case))
        if case.then == "resumed":
            half = {**case.config, "rounds": HALF}
            first.append(_experiment(worker, f"{case.name}+half", {"source": half}))
            second.append(_experiment(worker, f"{case.name}+resumed", {"resume": True}))
        if case.then == "replayed":
            second.append(_experiment(worker, f"{case.name}+replayed", {"replay": f"runs/{case.name}"}))
    worker.experiments(first, "experiments").wait(LONGEST)
    for case in cases:
        half_way = worker.folder / "runs" / f"{case.name}+half"
        if case.then == "resumed" and half_way.exists():
            _extend(half_way, worker.folder / "runs" / f"{case.name}+resumed")
    if second:
        worker.experiments(second, "second-experiments").wait(LONGEST)


def _experiment(worker: Worker, name: str, arguments: Mapping[str, Any], case: Case | None = None) -> dict[str, Any]:
    (worker.folder / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
    work = {"arguments": {**arguments, "out": f"runs/{name}"}, "outcome": str(_outcome_file(worker, name))}
    if case is not None and case.flower:
        work["capture"] = str(worker.folder / f"{case.name.replace('/', '-')}.messages")
    return work


def _cross(old: Worker, new: Worker, cases: Sequence[Case]) -> None:
    """The new checkout goes on with runs that the old one has left half-way."""
    works = []
    for case in cases:
        half_way = old.folder / "runs" / f"{case.name}+half"
        if half_way.exists():
            _extend(half_way, new.folder / "crossed" / case.name)
        arguments = {"resume": True, "out": f"crossed/{case.name}"}
        works.append({"arguments": arguments, "outcome": str(_outcome_file(new, f"{case.name}+crossed"))})
    new.experiments(works, "crossed").wait(LONGEST)


def _extend(half_way: Path, to: Path) -> None:
    """A copy of a finished run whose configuration asks for all rounds, which is how a run is extended."""
    shutil.copytree(half_way, to)
    file = to / "config.toml"
    text, changed = re.subn(rf"(?m)^rounds = {HALF}$", f"rounds = {ROUNDS}", file.read_text(encoding="utf-8"))
    if changed != 1:
        raise RuntimeError(f"{file} does not say rounds = {HALF} once")
    file.write_text(text, encoding="utf-8")


def _crossed(full: Path, crossed: Path, outcome: Mapping[str, Any] | None) -> list[Finding]:
    """What the new checkout made of a run of the old one: its draws, or a refusal that names the version."""
    what = "the old run, resumed by the new checkout"
    if outcome is None or outcome["ended"] == "crashed":
        return [broken(f"{what}: did not end: {(outcome or {}).get('text', 'no word')}")]
    if outcome["ended"] == "refused":
        return refused_with_version(what, outcome["text"])
    return [Finding(each.kind, f"{what}: {each.text}") for each in compare_draws(read_draws(full), read_draws(crossed))]


def refused_with_version(what: str, text: str) -> list[Finding]:
    """A refusal to go on is as good as going on where it names the version that can."""
    if re.search(r"\b\d+\.\d+(\.\d+)?\b", text):
        return [note(f"{what}: refused, with the version that can: {text}")]
    return [difference(f"{what}: refused, and no version is named that can: {text}")]


def _outcome_file(worker: Worker, name: str) -> Path:
    return worker.folder / f"{name.replace('/', '-')}.outcome.json"


def outcome_of(worker: Worker, name: str) -> dict[str, Any] | None:
    """How an experiment ended; None: it did not."""
    file = _outcome_file(worker, name)
    if not file.exists():
        return None
    return dict(json.loads(file.read_text(encoding="utf-8").replace(str(worker.folder), "(its folder)")))


def _ending(outcome: Mapping[str, Any]) -> str:
    return outcome["ended"] if outcome["ended"] == "well" else f"{outcome['kinds'][0]}: {outcome['text']}"


def _said(worker: Worker, outcome: Mapping[str, Any] | None) -> str:
    label = worker.installed.label
    return f"{label}: {'no outcome, its process died' if outcome is None else outcome.get('text', 'well')}"
