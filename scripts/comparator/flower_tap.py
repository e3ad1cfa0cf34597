"""Writes down Flower's messages on their way, inside a process that runs a checkout.

It taps two places, both Flower's own, which no move of fedsample's modules touches: the grid of Flower's simulation
runtime (messages to and from other processes) and `ClientApp.__call__` (clients of this process). What it finds nothing
at, the comparison of the file reports: no message is an error there.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_GRIDS = (
    ("flwr.superlink.grid.inmemory_grid", "InMemoryGrid"),  # flwr 1.41
    ("flwr.server.grid.inmemory_grid", "InMemoryGrid"),  # before
)


@contextlib.contextmanager
def tapped(file: Path) -> Iterator[None]:
    """Append every message to a file while it lasts: pushed in the order of sending, replies under the same numbers."""
    written = _Written(file)
    with contextlib.ExitStack() as stack:
        for module, name in _GRIDS:
            with contextlib.suppress(ImportError, AttributeError):
                grid = getattr(importlib.import_module(module), name)
                stack.enter_context(_wrapped(grid, "push_messages", written.pushing))
                stack.enter_context(_wrapped(grid, "pull_messages", written.pulling))
        app = importlib.import_module("flwr.clientapp").ClientApp
        stack.enter_context(_wrapped(app, "__call__", written.calling))
        try:
            yield
        finally:
            written.close()


@contextlib.contextmanager
def _wrapped(kind: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    before = getattr(kind, name)

    @functools.wraps(before)
    def wrapped(self: Any, *args: Any, **options: Any) -> Any:
        return around(functools.partial(before, self), *args, **options)

    setattr(kind, name, wrapped)
    try:
        yield
    finally:
        setattr(kind, name, before)


class _Written:
    """Messages by number, in a file once all are there."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        self._lines: dict[tuple[int, str], dict[str, Any]] = {}
        self._numbers: dict[str, int] = {}

    def pushing(self, push: Callable[..., Any], messages: Any, *args: Any, **options: Any) -> Any:
        """Note what is sent and under which number."""
        sent = list(messages)
        seen = [_read(message, "down") for message in sent]
        names = list(push(sent, *args, **options))
        with self._lock:
            for name, fields in zip(names, seen, strict=True):
                number = self._numbers[name] = len(self._numbers)
                self._lines[number, "down"] = fields
        return names

    def pulling(self, pull: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Note what comes back, under the number of what it answers."""
        replies = list(pull(*args, **options))
        with self._lock:
            for reply in replies:
                number = self._numbers.get(reply.metadata.reply_to_message_id, -1)
                self._lines[number, "up"] = _read(reply, "up")
        return replies

    def calling(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Note what a client of this process gets and gives."""
        message = args[0] if args else options["message"]
        down = _read(message, "down")
        reply = call(*args, **options)
        with self._lock:
            number = len(self._numbers)
            self._numbers[f"called {number}"] = number
            self._lines[number, "down"], self._lines[number, "up"] = down, _read(reply, "up")
        return reply

    def close(self) -> None:
        """Write the file."""
        with self._file.open("a") as out:
            for number, way in sorted(self._lines):
                out.write(json.dumps(self._lines[number, way]) + "\n")


def _read(message: Any, way: str) -> dict[str, Any]:
    """What must be the same: type and group, every record's values, every array's form and bytes; no ids, no times."""
    kind = message.metadata.message_type
    fields: dict[str, Any] = {"title": f"{way} {kind} {message.metadata.group_id}", "type": kind}
    fields["group"] = message.metadata.group_id
    if not message.has_content():
        return fields | {"error": str(message.error)}
    for name, record in message.content.items():
        for key, value in record.items():
            where = f"{name}/{key}"
            if hasattr(value, "stype"):
                fields[f"{where}/form"] = [value.dtype, list(value.shape), value.stype]
                value = bytes(value.data)
            fields[where] = {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value
    return fields
