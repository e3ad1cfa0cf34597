"""The directory of one run: its lock, its small files, and cutting it back to a checkpoint.

    config.toml  env.json  metrics.jsonl  participation.jsonl  events.out.tfevents.*  bytes/  draws/  checkpoint/
    summary.json  lock

A process holds `lock` (flock) for as long as it writes, so two never write in one directory; the system releases it
when the process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedsample.errors import RunDirectoryError
from fedsample.monitor.atomic_files import TEMPORARY, disk_error, write_atomic
from fedsample.monitor.environment import differences, environment
from fedsample.monitor.jsonl import JsonLines, to_json, truncate_jsonl

_FOLDERS = ("checkpoint", "draws")
_EARLY = ("config.toml", "env.json", "params.json", "geometry.json", "geometry.safetensors", "run.json", "setup.json")


class RunDirectory:
    """A run directory that this process has locked; make one with `create` or `open`, end with `close` or `with`.

    Attributes:
        path: the directory.
        draws: its folder of draws, for a `DrawStore`.
        checkpoint: its folder of checkpoints, for a `CheckpointStore`.
    """

    def __init__(self, path: Path, lock: int | None, made: bool = False) -> None:
        """Called by `create` and `open`; use those."""
        self.path = path
        self.draws = path / "draws"
        self.checkpoint = path / "checkpoint"
        self._lock, self._made = lock, made
        self._participation = JsonLines(path / "participation.jsonl", buffered=True)
        self._forks = JsonLines(path / "forks.jsonl", buffered=True)

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Self:
        """Start a new run in `path`, which must not exist or be empty.

        A directory in which a run was killed before it wrote its configuration counts as empty.

        Raises:
            RunDirectoryError: it is a file, holds something, cannot be written, or another process is using it.
        """
        folder = Path(path)
        made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise RunDirectoryError(
                f"{folder} is a file or lies below one: expected a directory; choose another with --out"
            ) from error
        except OSError as error:
            raise disk_error(folder, 0, error) from error
        _refuse_unless_blank(folder)
        lock = _acquire(folder)
        try:
            _refuse_unless_blank(folder)  # another process may have been faster
            _make_folders(folder)
        except RunDirectoryError:
            _release(lock)
            raise
        return cls(folder, lock, made)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open the run in `path`.

        Raises:
            RunDirectoryError: there is no run, it cannot be written, or another process is using it.
        """
        folder = Path(path)
        if not folder.is_dir():
            what = "is not a directory" if folder.exists() else "does not exist"
            raise RunDirectoryError(
                f"nothing to resume: {folder} {what}; expected the directory of an earlier run (--out); start a new "
                f"run without --resume"
            )
        missing = [name for name in ("config.toml", "checkpoint") if not (folder / name).exists()]
        if missing:
            raise RunDirectoryError(
                f"nothing to resume in {folder}: it has no {' and no '.join(missing)}, so it is no run directory or "
                f"its run ended before it began; start a new run without --resume, in an empty directory"
            )
        lock = _acquire(folder)
        try:
            _make_folders(folder)
        except RunDirectoryError:
            _release(lock)
            raise
        return cls(folder, lock)

    def write_config(self, toml_text: str) -> None:
        """Write the resolved configuration; from then on the directory counts as a run."""
        write_atomic(self.path / "config.toml", toml_text.encode())

    def read_config(self) -> str:
        """Read the configuration as TOML text."""
        try:
            return (self.path / "config.toml").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunDirectoryError(
                f"{self.path / 'config.toml'} cannot be read ({error}): expected the configuration of the run as TOML; "
                f"restore it, or start a new run"
            ) from error

    def write_env(self, **extra: Any) -> None:
        """Write versions, machine and threads, on which the bits of a run depend too; see `environment`."""
        self.write_json("env.json", environment() | extra)

    def compare_env(self, round: int) -> list[str]:
        """List in words what differs from the environment of the last start; env.json gets it under `resumed`.

        Nothing differs where env.json is missing or damaged.

        Args:
            round: the round after which the run continues.
        """
        try:
            kept = json.loads((self.path / "env.json").read_bytes())
            earlier = [kept, *kept.get("resumed", [])]
            now = environment()
            changed = differences(earlier[-1], now)
        except (OSError, ValueError, AttributeError, TypeError):
            return []
        if changed:
            self.write_json("env.json", kept | {"resumed": [*earlier[1:], {"round": round} | now]})
        return changed

    def write_json(self, name: str, value: Any) -> None:
        """Store `value` as strict JSON in the file `name`, atomically; NaN and infinities become null."""
        write_atomic(self.path / name, (to_json(value, indent=2) + "\n").encode())

    def append_participation(self, round: int, clients: Sequence[int]) -> None:
        """Log the clients that took part in a round; on the disk after `sync`."""
        self._participation.append({"round": round, "clients": list(clients)})

    def append_fork(self, round: int, clients: Sequence[int]) -> None:
        """Log the clients whose lost memory forked the chain at a round; on the disk after `sync`."""
        self._forks.append({"round": round, "clients": list(clients)})

    def discard(self) -> None:
        """Undo `create` if a run failed before its first checkpoint: the directory is deleted, or can be used again."""
        with contextlib.suppress(OSError):
            for name in _EARLY:
                for file in (self.path / name, self.path / (name + TEMPORARY)):
                    file.unlink(missing_ok=True)
            if self._made:
                for name in _FOLDERS:
                    (self.path / name).rmdir()
                (self.path / "lock").unlink(missing_ok=True)
                self.path.rmdir()

    def sync(self) -> None:
        """Wait until the participation log is on the disk; call it before a checkpoint that relies on it."""
        self._participation.sync()
        self._forks.sync()

    def rewind(self, round: int) -> None:
        """Cut every `.jsonl` file back to the rounds up to `round`; a torn last line is removed too."""
        self._participation.close()
        self._forks.close()
        for file in sorted(self.path.glob("*.jsonl")):
            truncate_jsonl(file, round)

    def close(self) -> None:
        """Write pending data and release the lock; may be called twice."""
        try:
            self._participation.close()
            self._forks.close()
        finally:
            _release(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        """Return itself, already locked."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, so that the directory is unlocked even if the run failed."""
        self.close()


def _make_folders(folder: Path) -> None:
    try:
        for name in _FOLDERS:
            (folder / name).mkdir(exist_ok=True)
    except OSError as error:
        raise disk_error(folder, 0, error) from error


def _refuse_unless_blank(folder: Path) -> None:
    try:
        found = sorted(entry.name for entry in folder.iterdir() if not _is_blank(entry))
    except OSError as error:
        raise disk_error(folder, 0, error) from error
    if found:
        listed = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise RunDirectoryError(
            f"{folder} is not empty (it holds {listed}): a new run needs an empty directory; go on with the run that "
            f"lies there with --resume, or choose another directory with --out"
        )


def _is_blank(entry: Path) -> bool:
    """Whether `create` made it: the lock, an empty folder of ours, a partly written small file."""
    if entry.name in _FOLDERS and entry.is_dir():
        return not any(entry.iterdir())
    return entry.name in ("lock", "config.toml" + TEMPORARY)


def _acquire(folder: Path) -> int | None:
    """Lock the directory; None: the operating system or the file system has no locks."""
    try:
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise disk_error(folder, 0, error) from error
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        os.close(handle)
        return None
    except OSError as error:
        owner = os.pread(handle, 32, 0).decode(errors="replace").strip() if hasattr(os, "pread") else ""
        os.close(handle)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return None  # a network file system without locks must not stop a run
        raise RunDirectoryError(
            f"{folder} is in use by another process{f' ({owner})' if owner else ''}: one process may write in a run "
            f"directory; wait for it or stop it, or choose another directory with --out"
        ) from error
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()}\n".encode())
    return handle


def _release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
