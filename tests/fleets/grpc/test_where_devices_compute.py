"""Where a device computes: in a thread of its own, or in between where that is brief."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import torch

from fedsample.fleets.grpc.device import connection
from fedsample.fleets.grpc.device.connection import STEADY, Connection
from fedsample.fleets.grpc.framing.frames import Message
from fedsample.fleets.grpc.framing.headers import Name
from fedsample.protocol.wire import Parcel


class Half:
    """In place of a `Replica`: notes the thread, and the number of threads for tensors, of each answer."""

    def __init__(self) -> None:
        self.threads: list[tuple[bool, int]] = []
        self.pause = 0.0

    def answer(self, message: Message) -> Message:
        self.threads.append((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        time.sleep(self.pause)
        return message


def test_brief_estimates_are_made_where_they_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BRIEF", 0.1)
    half, before = Half(), torch.get_num_threads()
    device = Connection("nowhere:1", None, 0, lambda _: None)  # type: ignore[arg-type, return-value]

    async def ask(kind: str, count: int = 1) -> None:
        for _ in range(count):
            message = Message(Name(b"r" * 16, 1, 1, 0, b"d" * 16, 1), kind, Parcel({}))
            answered: Any = half
            assert await device._answered(answered, message) is message

    async def go() -> None:
        await device._compute(torch.get_num_threads)  # a thread's number is its own from the first look on
        await device._compute(torch.set_num_threads, before + 1)
        torch.set_num_threads(before)
        await ask("query.exact", STEADY)  # these never count
        await ask("train", STEADY)
        assert half.threads == [(False, before + 1)] * 2 * STEADY
        await ask("train")
        assert half.threads.pop() == (True, before + 1)  # as many threads, or sums would round otherwise
        await ask("query.exact")
        half.pause = 0.15
        await ask("train")
        half.pause = 0.0
        await ask("train")
        assert [here for here, _ in half.threads[-3:]] == [False, True, False]

    try:
        asyncio.run(go())
    finally:
        torch.set_num_threads(before)
        device.close()
