"""Runs with two real devices over gRPC: what travels, and what one checkout makes of what the other left on disks."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from comparator.campaign import Result, refused_with_version
from comparator.cases import HALF, ROUNDS
from comparator.checkouts import Ended, Job, Worker
from comparator.directories import compare_draws, compare_runs, read_draws
from comparator.findings import Finding, broken, difference
from comparator.frames import read_frame
from comparator.messages import compare_messages
from comparator.relay import Relay

DEVICES = 2
_LONGEST = 180.0  # seconds for one run of devices
_GRACE = 8.0  # seconds for the others to end by themselves once one has failed
_IN_A_RUN = "device-0-in-a-run"
SIDES = {  # whether the server, device 0 and device 1 go on in the new checkout
    "all": (True, True, True),
    "server": (True, False, False),
    "device-0": (False, True, False),
    _IN_A_RUN: (False, True, False),
}
_HELD_ROUND = 14  # the round whose request to device 0 is kept back while another checkout takes its place


class Place(NamedTuple):
    """Where a run with devices lies.

    Attributes:
        run: the server's directory.
        states: a folder for each device.
    """

    run: Path
    states: tuple[Path, ...]

    @classmethod
    def below(cls, folder: Path) -> Place:
        """The usual names in a folder of its own."""
        return cls(folder / "run", tuple(folder / f"state-{index}" for index in range(DEVICES)))


@dataclass
class Served:
    """How a run with devices went.

    Attributes:
        ended: the server and each device.
        frames: what passed on the streams of each client, in order, up and down apart.
    """

    ended: tuple[Ended, ...]
    frames: list[dict[str, Any]]

    @property
    def well(self) -> bool:
        """Whether all ended as they should."""
        return all(each.code == 0 for each in self.ended)

    @property
    def errors(self) -> str:
        """What those said that did not."""
        return " | ".join(f"exit {each.code}: {each.err.strip()[-1500:]}" for each in self.ended if each.code)


def configuration(preset: str, **more: Any) -> dict[str, Any]:
    """A run of devices on a built-in data set."""
    return {
        "preset": preset,
        "rounds": ROUNDS,
        "warmup": 0,
        "thin": 1,
        "chains": 2,
        "step_size": 1e-3,
        "data": {"name": "wine", "clients": DEVICES},
        "monitor": {"every": 5, "tensorboard": False},
        "fleet": {"snapshot_rounds": HALF, **more.pop("fleet", {})},
        **more,
    }


def serve(
    server: Worker, devices: Sequence[Worker], place: Place, config: Mapping[str, Any] | None, name: str,
    replace_by: Worker | None = None,
) -> Served:  # fmt: skip
    """A server and its devices to their end, over a relay.

    Args:
        server, devices: the checkouts that they run in. place: where it all lies.
        config: of a new run; None: the one in `place` goes on.
        name: of its files of output.
        replace_by: device 0 is killed before its round `_HELD_ROUND`, and goes on in this checkout.
    """
    port = _free_port()
    hold = None if replace_by is None else _Hold()
    with Relay(port, hold) as relay:
        if config is None:
            words = ["--resume"]
        else:
            place.run.parent.mkdir(parents=True, exist_ok=True)
            (place.run.parent / "experiment.toml").write_text(tomli_w.dumps(dict(config)))
            words = [str(place.run.parent / "experiment.toml")]
        words += ["--listen", f"127.0.0.1:{port}", "--out", str(place.run), "--insecure", "--quiet"]
        started = [server.command("server", *words, name=f"{name}-server")]
        for index, worker in enumerate(devices):
            started.append(_device(worker, relay.port, index, place, name))
        if replace_by is not None:
            relay.held.wait(_LONGEST)
            started[1].kill()
            started[1] = _device(replace_by, relay.port, 0, place, f"{name}-again")
        ended = _to_the_end(started)
    return Served(ended, _in_order(relay.frames))


def _to_the_end(jobs: Sequence[Job]) -> tuple[Ended, ...]:
    """Wait for all; where one has failed the others wait for it in vain, and are ended."""
    end = time.monotonic() + _LONGEST
    while time.monotonic() < end and not all(job.over.is_set() for job in jobs):
        if any(job.over.is_set() and job.code for job in jobs):
            end = min(end, time.monotonic() + _GRACE)
        time.sleep(0.05)
    waiting = [not job.over.is_set() for job in jobs]
    ended = [job.wait(0) for job in jobs]
    why = "ended because another had failed, or it took too long"
    return tuple(each._replace(err=why) if late else each for each, late in zip(ended, waiting, strict=True))


def _device(worker: Worker, port: int, index: int, place: Place, name: str) -> Any:
    share = ["--data", "wine", "--partition", str(index), "--partitions", str(DEVICES)]
    identity = ["--insecure", "--client", str(index), "--attempts", "20"]
    where = f"127.0.0.1:{port}"
    return worker.command(
        "client", where, *identity, *share, "--state", place.states[index], "--quiet", name=f"{name}-device-{index}"
    )


class _Hold:
    """Keeps back one request: the first of a round to device 0."""

    def __init__(self) -> None:
        self._done = False

    def __call__(self, raw: bytes, up: bool) -> bool:
        """Whether this frame is the one."""
        if up or self._done:
            return False
        frame = read_frame(raw, up=False) or {}
        wanted = frame.get("head.kind") == "train" and frame.get("head.name.round") == _HELD_ROUND
        self._done = wanted and frame.get("head.name.client", 0) == 0
        return self._done


def _in_order(streams: Sequence[Sequence[tuple[bool, bytes]]]) -> list[dict[str, Any]]:
    """Frames by client, way and time; streams of one client one after the other."""
    frames: list[tuple[int, bool, dict[str, Any]]] = []
    for stream in streams:
        read = [(up, read_frame(raw, up=up)) for up, raw in stream]
        client = next((int(frame.get("client", 0)) for up, frame in read if up and frame is not None), 0)
        frames += [(client, up, frame) for up, frame in read if frame is not None]
    return [{"client": client, **frame} for client, _, frame in sorted(frames, key=lambda each: each[:2])]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- cases ------------------------------------------------------------------------------------------------------------


def compare_devices(old: Worker, new: Worker, preset: str) -> Result:
    """A preset with two devices of each checkout: draws, summary, and every frame between server and devices."""
    result = Result(f"devices/{preset}", "devices over gRPC")
    places = [Place.below(worker.folder / "devices" / preset) for worker in (old, new)]

    def served_by(worker: Worker, place: Place) -> Served:
        return serve(worker, (worker,) * DEVICES, place, configuration(preset), f"devices-{preset}")

    with ThreadPoolExecutor(2) as pool:
        served = list(pool.map(served_by, (old, new), places))
    if not all(each.well for each in served):
        result.findings.append(broken(" || ".join(each.errors or "well" for each in served)))
        return result
    result.messages = len(served[0].frames)
    result.findings += compare_runs(places[0].run, places[1].run)
    result.findings += compare_messages(served[0].frames, served[1].frames)
    return result


def compare_state(old: Worker, new: Worker, preset: str, who: str) -> Result:
    """What the old checkout's server and devices left on their disks, taken up by the new one, wholly or in part.

    Args:
        old, new: the checkouts. preset: what runs. who: a name of `SIDES`, which goes on in the new one.
    """
    result = Result(f"state/{preset}/{who}", "left by old, resumed by new")
    settings = configuration(preset)
    mine = old.folder / "states" / preset
    full, half, place = (Place.below(each) for each in (mine / "full", mine / "half", new.folder / f"{preset}-{who}"))
    if not full.run.exists():  # once, for all of `SIDES`
        for made, rounds in (full, ROUNDS), (half, HALF):
            first = serve(
                old, (old,) * DEVICES, made, {**settings, "rounds": rounds}, f"{made.run.parent.name}-{preset}"
            )
            if not first.well:
                result.findings.append(broken(f"the old checkout's own run failed: {first.errors}"))
    if who == _IN_A_RUN:
        served = serve(old, (old,) * DEVICES, place, settings, f"{who}-{preset}", replace_by=new)
    else:
        shutil.copytree(half.run.parent, place.run.parent)
        _extend(place.run)
        server, *devices = (new if side else old for side in SIDES[who])
        served = serve(server, devices, place, None, f"{who}-{preset}")
    result.messages = len(served.frames)
    result.findings += _taken_up(full.run, place.run, served)
    return result


def _taken_up(full: Path, run: Path, served: Served) -> list[Finding]:
    """The old checkout's draws, or a refusal that names the version which can go on."""
    if served.well:
        return list(compare_draws(read_draws(full), read_draws(run)))
    said = [each.err for each in served.ended if each.code not in (0, -9)]
    refusals = [match.group(1) for text in said if (match := re.search(r"(?s)error: (.*)", text))]
    if not refusals or any("Traceback" in text for text in said):
        return [difference(f"neither went on nor refused: {served.errors}")]
    return refused_with_version("devices", refusals[0].strip())


def _extend(run: Path) -> None:
    file = run / "config.toml"
    with contextlib.suppress(FileNotFoundError):
        text = file.read_text(encoding="utf-8")
        file.write_text(re.sub(rf"(?m)^rounds = {HALF}$", f"rounds = {ROUNDS}", text), encoding="utf-8")
