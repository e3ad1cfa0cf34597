"""Files that are either the old one or the new one, whole: written to a temporary file, flushed to disk, renamed.

A reader and a process killed at any moment see one of the two; a full disk leaves the old one as it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

from fedsample.errors import RunDirectoryError

TEMPORARY = ".tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically and durably.

    Raises:
        RunDirectoryError: the disk is full, read-only or failing; the old file is unchanged.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write_durable(temporary, data)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise disk_error(path, len(data), error) from error


def write_durable(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk; raises OSError."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def listed(folder: Path) -> list[Path]:
    """List a folder, in any order; empty if there is none. One system call: an interrupt leaves nothing open."""
    try:
        return [folder / name for name in os.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in a folder durable; where the system cannot (Windows) they are only atomic."""
    with contextlib.suppress(PermissionError, AttributeError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def disk_error(path: Path, needed: int, error: OSError) -> RunDirectoryError:
    """Make the error for a failed write: what happened, how much space was needed, and that nothing is lost."""
    if error.errno in _FULL:
        try:
            free = f"{shutil.disk_usage(path.parent).free:,} are free"
        except OSError:
            free = "the free space is unknown"
        return RunDirectoryError(
            f"no room on the disk or in the quota for {path}: {needed:,} bytes are needed, {free}. What was written "
            f"before is whole: free some space and go on with --resume"
        )
    if error.errno in _FORBIDDEN:
        return RunDirectoryError(
            f"{path} cannot be written ({error.strerror}): expected a writable directory; choose another with --out"
        )
    return RunDirectoryError(
        f"{path} cannot be written ({error.strerror or error}): check the disk, then go on with --resume"
    )
