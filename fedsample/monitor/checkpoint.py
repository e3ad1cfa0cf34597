"""Checkpoints that are whole or absent: `checkpoint/round-00000123/{tensors.safetensors, meta.json}`.

A checkpoint is written into a temporary folder, flushed to the disk and renamed; the last two are kept. Checksums in
`meta.json` find a damaged one, whose predecessor is then used. No pickle: reading one runs no code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedsample.errors import RunDirectoryError
from fedsample.monitor.atomic_files import TEMPORARY, disk_error, listed, sync_folder, write_durable

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2
FORMAT = 1
_NAME = re.compile(r"round-\d{8,}")
_log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A stored checkpoint: its round, the tensors by name, and JSON metadata."""

    round: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: where they lie; created if missing.
        digest: identifies the configuration, such as a hash of it; a checkpoint of another one is refused.
        kept: how many to keep; the oldest are deleted.
    """

    def __init__(self, folder: Path, digest: str = "", kept: int = KEPT) -> None:
        self.folder = folder
        self.digest = digest
        self.kept = kept

    def save(self, round: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Store a checkpoint durably and delete all but the last ones.

        The state after a round is a function of the configuration: a whole checkpoint of the same round stays.

        Args:
            round: >= 0; 0 is the state before round 1.
            tensors: any shapes, dtypes and devices; they are copied to the CPU.
            meta: JSON values: numbers, strings, booleans, None, lists and tables of them. Floats keep every bit.

        Raises:
            RunDirectoryError: the disk is full or failing; earlier checkpoints stand.
        """
        from safetensors.torch import save

        data = save({name: _owned(tensor) for name, tensor in tensors.items()})
        content = {
            "format": FORMAT,
            "round": round,
            "digest": self.digest,
            "tensors_sha256": hashlib.sha256(data).hexdigest(),
            "meta": json.loads(json.dumps(dict(meta))),  # as it will be read: the checksum sorts keys as strings
        }
        text = json.dumps({"sha256": _checksum(content), **content}, indent=1).encode()
        target = self.folder / f"round-{round:08d}"
        if target.exists() and self._is_same(target):
            return
        temporary = self.folder / (target.name + TEMPORARY)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write_durable(temporary / "tensors.safetensors", data)
            write_durable(temporary / "meta.json", text)
            sync_folder(temporary)
            shutil.rmtree(target, ignore_errors=True)  # a damaged one, or one of another configuration
            os.rename(temporary, target)
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise disk_error(target, len(data) + len(text), error) from error
        self._prune(round)

    def rounds(self) -> list[int]:
        """List the rounds that have a checkpoint, newest first; whether they are whole is not checked."""
        return [_round(path) for path in self._stored()]

    def rewind(self, round: int) -> None:
        """Delete the checkpoints after a round: the run continues from there, and may take another path.

        Raises:
            RunDirectoryError: if one cannot be deleted.
        """
        for path in self._stored():
            if _round(path) > round:
                try:
                    shutil.rmtree(path)
                except OSError as error:
                    raise disk_error(path, 0, error) from error

    def at(self, round: int) -> Checkpoint | None:
        """Read the checkpoint of one round; None if there is none, or it is damaged.

        Raises:
            RunDirectoryError: the checkpoint belongs to another configuration.
        """
        for path in self._stored():
            if _round(path) != round:
                continue
            try:
                found, checkpoint = _read(path)
            except (OSError, ValueError, KeyError, TypeError) as error:
                _log.warning("checkpoint %s is damaged (%s) and is skipped", path, error)
                return None
            if found != self.digest:
                raise self._foreign(path, found, self.digest)
            return checkpoint
        return None

    def latest(self, expected_digest: str | None = None) -> Checkpoint | None:
        """Read the newest checkpoint that is whole; None: there is none yet.

        Args:
            expected_digest: used in place of the store's own.

        Raises:
            RunDirectoryError: all are damaged, or the newest belongs to another configuration.
        """
        digest = self.digest if expected_digest is None else expected_digest
        problems = []
        for path in self._stored():
            try:
                found, checkpoint = _read(path)
            except (OSError, ValueError, KeyError, TypeError) as error:
                problems.append(f"{path.name}: {error}")
                _log.warning("checkpoint %s is damaged (%s) and is skipped", path, error)
                continue
            if found != digest:
                raise self._foreign(path, found, digest)
            return checkpoint
        if problems:
            raise RunDirectoryError(
                f"no checkpoint in {self.folder} is whole ({'; '.join(problems)}): restore one from a copy, or start "
                f"a new run in another directory with --out"
            )
        return None

    def _foreign(self, path: Path, found: str, expected: str) -> RunDirectoryError:
        return RunDirectoryError(
            f"{path} is a checkpoint of another configuration (digest {found or 'none'}, expected "
            f"{expected or 'none'}): the run's config.toml was changed after it began, or by another version; "
            f"restore that file, or start a new run in another directory with --out"
        )

    def _stored(self) -> list[Path]:
        """List the checkpoints on the disk, newest first."""
        found = [path for path in listed(self.folder) if _NAME.fullmatch(path.name)]
        return sorted(found, key=_round, reverse=True)

    def _is_same(self, target: Path) -> bool:
        try:
            return _read(target)[0] == self.digest
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _prune(self, round: int) -> None:
        """Delete all but the last ones up to `round`; later ones are damaged, or the run would continue from them."""
        stored = self._stored()
        kept = [path for path in stored if _round(path) <= round][: self.kept]
        with contextlib.suppress(OSError):  # what cannot be deleted is tried again next time
            for path in stored:
                if path not in kept:
                    shutil.rmtree(path)
            for path in listed(self.folder):
                if path.name.endswith(TEMPORARY):
                    shutil.rmtree(path)


def _round(path: Path) -> int:
    return int(path.name.removeprefix("round-"))


def _owned(tensor: Tensor) -> Tensor:
    """Copy to a contiguous CPU tensor that shares memory with no other, as safetensors requires."""
    import torch

    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> tuple[str, Checkpoint]:
    """Read digest and checkpoint; raises OSError, ValueError, KeyError or TypeError if it is damaged."""
    from safetensors.torch import load

    content = json.loads((path / "meta.json").read_bytes())
    if content.pop("sha256", None) != _checksum(content):
        raise ValueError("the checksum of meta.json does not match")
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}, expected {FORMAT}")
    data = (path / "tensors.safetensors").read_bytes()
    if hashlib.sha256(data).hexdigest() != content["tensors_sha256"]:
        raise ValueError("the checksum of tensors.safetensors does not match")
    return str(content["digest"]), Checkpoint(int(content["round"]), load(data), content["meta"])
