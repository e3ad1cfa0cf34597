"""Files of one JSON object per line, appended during a run and cut back to a round when it is resumed."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fedsample.errors import RunDirectoryError
from fedsample.monitor.atomic_files import disk_error, write_atomic


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinities become null, numpy and torch scalars plain numbers, tensors lists."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value


class JsonLines:
    """Appends one object per line; a failed write leaves no torn line behind.

    Args:
        path: the file.
        buffered: keep lines in memory until `sync` or until the buffer is full, for a line every round.
    """

    def __init__(self, path: Path, *, buffered: bool = False) -> None:
        self.path = path
        self._buffer = bytearray()
        self._limit = 1 << 16 if buffered else 0
        self._file: BinaryIO | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one object.

        Raises:
            RunDirectoryError: the disk is full or failing; unwritten lines are kept and tried again.
        """
        self._buffer += (to_json(row) + "\n").encode()
        if len(self._buffer) > self._limit:
            self._drain()

    def sync(self) -> None:
        """Wait until all lines are on the disk; call it before a checkpoint that relies on them."""
        self._drain()
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write the remaining lines and close; another append opens the file again."""
        try:
            self._drain()
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _drain(self) -> None:
        if not self._buffer:
            return
        whole: int | None = None
        try:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)
            whole = os.fstat(self._file.fileno()).st_size
            written = 0
            while written < len(self._buffer):
                written += self._file.write(self._buffer[written:]) or 0
        except OSError as error:
            if self._file is not None and whole is not None:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), whole)
            raise disk_error(self.path, len(self._buffer), error) from error
        self._buffer.clear()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, none if it does not exist; a torn last line, of a killed process, is skipped.

    Raises:
        RunDirectoryError: a damaged line that is not the last.
    """
    for number, line in enumerate(_lines(path), 1):
        row = _parse(line)
        if row is not None:
            yield row
        elif line.endswith(b"\n"):
            raise RunDirectoryError(f"{path}, line {number} is damaged: expected one JSON object; delete that line")


def truncate_jsonl(path: Path, round: int) -> None:
    """Keep the lines of rounds up to `round`, and remove the others and damaged ones; atomic."""
    kept = bytearray()
    size = 0
    for line in _lines(path):
        size += len(line)
        row = _parse(line) if line.endswith(b"\n") else None
        if row is not None and isinstance(row.get("round"), int) and row["round"] <= round:
            kept += line
    if len(kept) != size:
        write_atomic(path, bytes(kept))


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except FileNotFoundError:
        return


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
