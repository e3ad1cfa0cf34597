"""All comparisons by name, which of them were asked for, and in which order they run."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from comparator import commands, devices
from comparator.campaign import Campaign, Result
from comparator.cases import PRESETS, cases, make_data
from comparator.checkouts import Worker

_QUICK = ("devices/langevin-diana", "devices/b-elf", "state/langevin-diana/all", "flower-app/b-elf", "command/simulate",
          "interrupted/killed", "printed/presets", "printed/config")  # fmt: skip
_STATES = ("langevin-diana", "underdamped-marina")

Comparison = Callable[[Worker, Worker], Result]


def compare_all(old: Worker, new: Worker, folder: Path, only: Sequence[str] | None, *, quick: bool) -> list[Result]:
    """Run what was asked for, in both checkouts.

    Args:
        old, new: inside the checkouts. folder: for data. only: patterns of names; None: all. quick: the quick ones.
    """
    data = make_data(folder / "data")
    chosen = [case for case in cases(data) if _wanted(case.name, only) and (case.quick or not quick)]
    results = Campaign(old, new).run(chosen)
    began, count = time.monotonic(), 0
    for name, compare in _others(data):
        if _wanted(name, only) and (name in _QUICK or not quick):
            start = time.monotonic()
            result = compare(old, new)
            result.seconds = time.monotonic() - start
            results.append(result)
            count += 1
    print(f"  {count} cases of processes ran in {time.monotonic() - began:.0f} s", flush=True)
    return results


def names(only: Sequence[str] | None, *, quick: bool) -> list[str]:
    """Of everything that `compare_all` would run."""
    nowhere = _Nowhere()
    plain = [case.name for case in cases(nowhere) if case.quick or not quick]
    others = [name for name, _ in _others(nowhere) if name in _QUICK or not quick]
    return [name for name in (*plain, *others) if _wanted(name, only)]


def _others(data: dict[str, Path]) -> Iterator[tuple[str, Comparison]]:
    """What needs processes of the command line."""
    for name in commands.PRINTED:
        yield f"printed/{name}", partial(commands.compare_printed, name=name)
    yield "command/simulate", partial(commands.compare_simulated, data=data)
    for how in commands.SIGNALS:
        yield f"interrupted/{how}", partial(commands.compare_interrupted, data=data, how=how)
    for preset in commands.APP_PRESETS:
        yield f"flower-app/{preset}", partial(commands.compare_app, preset=preset)
    for preset in PRESETS:
        yield f"devices/{preset}", partial(devices.compare_devices, preset=preset)
    for preset in _STATES:
        for who in devices.SIDES:
            yield f"state/{preset}/{who}", partial(devices.compare_state, preset=preset, who=who)


def _wanted(name: str, only: Sequence[str] | None) -> bool:
    return only is None or any(fnmatch.fnmatch(name, pattern) for pattern in only)


class _Nowhere(dict[str, Path]):
    """Files of data that nobody opens, where names alone are wanted."""

    def __missing__(self, name: str) -> Path:
        return Path(name)
