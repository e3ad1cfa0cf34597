"""Messages that come twice, late, in another order or cut short: the draws stay the same."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import ENVIRONMENT, free_port

import fedsample
from fedsample.config import load
from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.address import Address
from fedsample.fleets.grpc.host import Host, serve
from fedsample.fleets.grpc.hub import Hub
from fedsample.monitor import load_draws

POOL = Path(__file__).with_name("device_pool.py")


class Bad:
    """A connection that does to frames what its plan says, in both directions."""

    def __init__(self, context: Any, chance: random.Random, kind: str, rate: float, done: Counter[str]) -> None:
        self._context, self._chance, self._kind, self._rate, self._done = context, chance, kind, rate, done
        self._again: list[Any] = []
        self._held: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def _struck(self, frame: Any) -> bool:
        """Only requests and answers are touched: a greeting that is lost only costs time."""
        whole = frame.WhichOneof("frame") == "piece"
        struck = whole and self._chance.random() < self._rate
        self._done[self._kind] += struck
        return struck

    async def write(self, frame: Any) -> None:
        if self._held is not None:
            held, self._held = self._held, None
            await self._context.write(frame)
            await self._context.write(held)
        elif not self._struck(frame):
            await self._context.write(frame)
        elif self._kind == "duplicated":
            await self._context.write(frame)
            await self._context.write(frame)
        elif self._kind == "delayed":
            await asyncio.sleep(self._chance.random() * 0.1)
            await self._context.write(frame)
        elif self._kind == "reordered":
            await self._context.write(pb.ServerFrame(ping=pb.Ping(number=3)))  # something must come after it
            self._held = frame
            await self.write(pb.ServerFrame(ping=pb.Ping(number=3)))
        else:
            await self._context.write(cut(frame, self._chance))

    async def read(self) -> Any:
        if self._again:
            return self._again.pop()
        frame = await self._context.read()
        if not isinstance(frame, pb.DeviceFrame) or not self._struck(frame):
            return frame
        if self._kind == "duplicated":
            self._again.append(frame)
        elif self._kind == "delayed":
            await asyncio.sleep(self._chance.random() * 0.1)
        elif self._kind == "truncated":
            return cut(frame, self._chance)
        return frame


def cut(frame: Any, chance: random.Random) -> Any:
    """The frame without the end of its data, or of its head."""
    short = type(frame).FromString(frame.SerializeToString())
    if short.piece.data:
        short.piece.data = short.piece.data[: chance.randrange(len(short.piece.data))]
    else:
        short.piece.head = short.piece.head[: chance.randrange(len(short.piece.head))]
    return short


def experiment_of(tmp_path: Path, size: str) -> tuple[dict[str, Any], str]:
    """The settings of a run, and what devices are given: messages of one piece, or of several."""
    common = {"chains": 2, "thin": 1, "monitor": {"every": 8, "tensorboard": False}}
    if size == "small":
        values = {"preset": "langevin-diana", "step_size": 1e-3, "data": {"name": "wine", "clients": 2}}
        return {**common, **values, "rounds": 40, "warmup": 10, "fleet": {"snapshot_rounds": 10}}, "wine"
    rng, d = np.random.default_rng(0), 150_000  # 1.2 MB a message with two chains of float32
    file = tmp_path / "potentials.npz"
    np.savez(file, lam=1 + rng.random((2, d)), a=rng.normal(size=(2, d)))
    values = {"preset": "federated-gd", "temperature": 1.0, "step_size": 0.1, "data": {"kind": "quadratic"}}
    values["data"]["file"], values["data"]["clients"] = str(file), 2  # type: ignore[index]
    return {**common, **values, "rounds": 12, "warmup": 2, "fleet": {"snapshot_rounds": 5}}, str(file)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("kind", ["duplicated", "reordered", "delayed", "truncated"])
def test_the_draws_survive(kind: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, data = experiment_of(tmp_path, size)
    port, chance, done = free_port(), random.Random(f"{kind} {size}"), Counter[str]()
    rate = 0.02 if kind == "truncated" else 0.2 if size == "small" else 0.05  # what is damaged costs a new connection
    serve_well = Hub._serve

    async def serve_badly(self: Hub, seat: Any, stream: Any, context: Any) -> None:
        await serve_well(self, seat, stream, Bad(context, chance, kind, rate, done))

    monkeypatch.setattr(Hub, "_serve", serve_badly)
    command = [sys.executable, str(POOL), f"127.0.0.1:{port}", "2", str(tmp_path / "state"), data]
    devices = subprocess.Popen(command, env=ENVIRONMENT)
    try:
        experiment = load(values, ["fleet.name=grpc"], {})
        serve(experiment, tmp_path / "devices", Host(Address("127.0.0.1", port), None), "quiet")
    finally:
        devices.kill()
        devices.wait()
    assert done[kind] > 0
    draws = load_draws(tmp_path / "devices")
    run = fedsample.run(values, overrides=["fleet.engine=by-client"], out=tmp_path / "here", progress="quiet")
    assert torch.equal(draws, run.draws)
    assert not (tmp_path / "devices" / "forks.jsonl").exists()
