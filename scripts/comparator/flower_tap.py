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
        self._lines: dict[int, dict[str, dict[str, Any]]] = {}  # by number: what went down, what came up
        self._numbers: dict[str, int] = {}
        self._batches: dict[int, int] = {}  # by number: the push that it was part of
        self._pushes = 0

    def pushing(self, push: Callable[..., Any], messages: Any, *args: Any, **options: Any) -> Any:
        """Note what is sent and under which number."""
        sent = list(messages)
        seen = [_read(message, "down") for message in sent]
        names = list(push(sent, *args, **options))
        with self._lock:
            self._pushes += 1
            for name, fields in zip(names, seen, strict=True):
                self._note(name, self._pushes, {"down": fields})
        return names

    def pulling(self, pull: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Note what comes back, under the number of what it answers."""
        replies = list(pull(*args, **options))
        with self._lock:
            for reply in replies:
                number = self._numbers.get(reply.metadata.reply_to_message_id, -1)
                self._lines.setdefault(number, {})["up"] = _read(reply, "up")
        return replies

    def calling(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Note what a client of this process gets and gives."""
        message = args[0] if args else options["message"]
        down = _read(message, "down")
        reply = call(*args, **options)
        with self._lock:
            self._pushes += 1
            self._note(f"called {self._pushes}", self._pushes, {"down": down, "up": _read(reply, "up")})
        return reply

    def _note(self, name: str, batch: int, lines: dict[str, dict[str, Any]]) -> None:
        number = self._numbers[name] = len(self._numbers)
        self._lines[number], self._batches[number] = lines, batch

    def close(self) -> None:
        """Write the file; messages that were pushed together by what they say, as the order of nodes is random."""
        batches: dict[int, list[str]] = {}
        for number, lines in self._lines.items():
            text = "".join(json.dumps(lines[way]) + "\n" for way in ("down", "up") if way in lines)
            batches.setdefault(self._batches.get(number, 0), []).append(text)
        with self._file.open("a") as out:
            for _, texts in sorted(batches.items()):
                out.writelines(sorted(texts))


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
