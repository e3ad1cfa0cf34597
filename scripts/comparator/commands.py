"""The command line: what it prints, runs that are stopped or killed, and a Flower app in one process."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tomli_w

from comparator import ignored
from comparator.campaign import Result, refused_with_version
from comparator.cases import on
from comparator.checkouts import Ended, Worker
from comparator.directories import compare_draws, compare_mapping, compare_runs, read_draws
from comparator.findings import Finding, broken, difference, note
from comparator.messages import compare_messages, read_messages

_LONGEST = 180.0  # seconds for one command
_LONG = 4000  # rounds of a run that is stopped half-way
APP_PRESETS = ("underdamped-diana", "qlsd-plus-plus", "b-elf")
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGTERM}

PRINTED: dict[str, Sequence[str]] = {
    "presets": ("list", "presets", "--json"),
    "estimators": ("list", "estimators", "--json"),
    "compressors": ("list", "compressors", "--json"),
    "samplers": ("list", "samplers", "--json"),
    "models": ("list", "models", "--json"),
    "datasets": ("list", "datasets", "--json"),
    "config": ("config", "show"),
    "plan": ("simulate", "--dry-run", "--json"),
}


def both(work: Callable[[Worker], Any], old: Worker, new: Worker) -> list[Any]:
    """The same in both checkouts at once."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, (old, new)))


def compare_printed(old: Worker, new: Worker, name: str) -> Result:
    """What a command says: other words are a note, as no draw depends on them."""
    result = Result(f"printed/{name}", "printed")
    ended = both(lambda worker: worker.command(*PRINTED[name], name=f"printed-{name}").wait(_LONGEST), old, new)
    texts = [each.out for each in ended]
    if any(each.code for each in ended) or not all(texts):
        result.findings.append(broken(" | ".join(f"exit {each.code}: {each.err[-500:]}" for each in ended)))
    elif texts[0] != texts[1]:
        lines = [text.splitlines() for text in texts]
        first = next((pair for pair in zip(*lines, strict=False) if pair[0] != pair[1]), ("", "more or fewer lines"))
        result.findings.append(note(f"{first[0].strip()} -> {first[1].strip()}"))
    return result


def compare_simulated(old: Worker, new: Worker, data: Mapping[str, Path]) -> Result:
    """`python -m fedsample simulate FILE --json`: the run directory, and the summary as it is printed."""
    result = Result("command/simulate", "command line")
    settings = on(data, "classes", preset="langevin-marina", step_size=0.01, monitor={"tensorboard": True})

    def simulate(worker: Worker) -> Ended:
        file = worker.folder / "simulate.toml"
        file.write_text(tomli_w.dumps(settings))
        return worker.command("simulate", file, "--json", "--out", "simulated", name="simulate").wait(_LONGEST)

    ended = both(simulate, old, new)
    if any(each.code for each in ended):
        result.findings.append(broken(" | ".join(f"exit {each.code}: {each.err[-500:]}" for each in ended)))
        return result
    result.findings += compare_runs(old.folder / "simulated", new.folder / "simulated")
    printed = [json.loads(each.out) for each in ended]
    result.findings += compare_mapping("--json", printed[0], printed[1], ignored.SUMMARY)
    return result


def compare_interrupted(old: Worker, new: Worker, data: Mapping[str, Path], how: str) -> Result:
    """A run of the old checkout that dies between two checkpoints, taken up by the new one."""
    result = Result(f"interrupted/{how}", "left by old, resumed by new")
    settings = on(data, "quadratic", preset="langevin-diana", step_size=0.01, rounds=_LONG)
    file = old.folder / f"{how}.toml"
    file.write_text(
        tomli_w.dumps(settings | {"monitor": {"every": 500, "tensorboard": False, "checkpoint_seconds": 0}})
    )
    full, part, taken = old.folder / f"{how}-full", old.folder / f"{how}-part", new.folder / f"{how}-taken"
    whole = old.command("simulate", file, "--quiet", "--out", full, name=f"{how}-full").wait(_LONGEST)
    job = old.command("simulate", file, "--quiet", "--out", part, name=f"{how}-part")
    until = time.monotonic() + _LONGEST
    while last_checkpoint(part) < 1 and not job.over.is_set() and time.monotonic() < until:
        time.sleep(0.002)
    job.signal(SIGNALS[how])
    died = job.wait(_LONGEST)
    at = last_checkpoint(part)
    if whole.code or died.code not in (-9, 130) or not 0 < at < _LONG:
        said = f"exit {whole.code} and {died.code}, last checkpoint {at}: {whole.err[-500:]} {died.err[-500:]}"
        result.findings.append(broken(f"the old checkout's run was not stopped half-way: {said}"))
        return result
    shutil.copytree(part, taken)
    ended = new.command("simulate", "--resume", "--quiet", "--out", taken, name=f"{how}-taken").wait(_LONGEST)
    result.findings += _taken_up(f"after round {at} of {_LONG}", full, taken, ended)
    return result


def _taken_up(what: str, full: Path, taken: Path, ended: Ended) -> list[Finding]:
    if ended.code == 0:
        return [
            Finding(each.kind, f"{what}: {each.text}") for each in compare_draws(read_draws(full), read_draws(taken))
        ]
    refusal = re.search(r"(?s)error: (.*)", ended.err)
    if refusal is None or "Traceback" in ended.err:
        return [difference(f"{what}: neither went on nor refused: exit {ended.code}, {ended.err[-1500:]}")]
    return refused_with_version(what, refusal.group(1).strip())


def last_checkpoint(run: Path) -> int:
    """Round of the newest whole checkpoint; -1: none."""
    found = [each.name for each in (run / "checkpoint").glob("round-*") if re.fullmatch(r"round-\d+", each.name)]
    return max((int(name.removeprefix("round-")) for name in found), default=-1)


def compare_app(old: Worker, new: Worker, preset: str) -> Result:
    """Each checkout's own `simulations/flower_app`, its two components in one process, and all their messages."""
    result = Result(f"flower-app/{preset}", "Flower app in one process")
    config = f'preset="{preset}" rounds=20 warmup=0 thin=1 chains=8 data.name="wine" data.clients=2'

    def simulate(worker: Worker) -> Ended:
        out, app = f"app-{preset}", str(worker.installed.source / "simulations" / "flower_app")
        given = ["--app", app, "--clients", "2", "--run-config", f'{config} app.out="{out}"', "--quiet"]
        capture = worker.folder / f"{out}.messages"
        return worker.command("simulate", *given, name=out, capture=capture).wait(_LONGEST)

    ended = both(simulate, old, new)
    if any(each.code for each in ended):
        result.findings.append(broken(" | ".join(f"exit {each.code}: {each.err[-1000:]}" for each in ended)))
        return result
    outs = [worker.folder / f"app-{preset}" for worker in (old, new)]
    result.findings += compare_draws(*(read_draws(out) for out in outs))
    summaries = [json.loads((out / "summary.json").read_bytes()) for out in outs]
    result.findings += compare_mapping("summary.json", summaries[0], summaries[1], ignored.SUMMARY)
    sent = [read_messages(worker.folder / f"app-{preset}.messages") for worker in (old, new)]
    result.messages = len(sent[0])
    result.findings += compare_messages(*sent)
    return result
