"""Draws on the disk, in shards that end at fixed rounds: `draws/000000.safetensors`, `000001`, ...

Shard s holds the draws of rounds `start + s R < round <= start + (s + 1) R`: tensor `params` (draws, C, d), and
`rounds` (draws,) int64, the round of each. The files at the end are thus the same wherever a run was interrupted. A
complete shard is never written again; the last, partial one is rewritten whole, atomically, with each `flush`. The
header carries a checksum of both tensors, which `load_draws` checks.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsample.errors import RunDirectoryError
from fedsample.monitor.atomic_files import TEMPORARY, disk_error, listed, sync_folder, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"


class DrawStore:
    """Appends draws to a folder of shards.

    Args:
        folder: where the shards lie; created if missing.
        shard_rounds: R >= 1, rounds per shard; memory holds at most one shard.
        start: the round after which shard 0 begins, such as the last of the warm-up, which has no draws.
    """

    def __init__(self, folder: Path, shard_rounds: int, *, start: int = 0) -> None:
        """Check whether the folder holds draws: then `resume` must be called before `append`."""
        if shard_rounds < 1:
            raise RunDirectoryError(f"expected shards of at least one round, got {shard_rounds}")
        self.folder = folder
        self._shard_rounds = shard_rounds
        self._start = start
        self._shard: int | None = None  # the shard in memory
        self._rounds: list[int] = []
        self._draws: list[Tensor] = []
        self._last = start
        self._dirty = False
        self._unread = bool(_shards(folder))

    def append(self, round: int, draw: Tensor) -> None:
        """Add the draw of a round; the tensor is copied.

        Args:
            round: larger than every round before.
            draw: (C, d).

        Raises:
            RunDirectoryError: as for `flush`, which a finished shard calls.
        """
        if self._unread:
            raise RunDirectoryError(
                f"{self.folder} holds draws of an earlier run: resume it, or use an empty directory"
            )
        if round <= self._last:
            raise RunDirectoryError(f"draws come in order of rounds, after round {self._last}; got round {round}")
        shard = self._index(round)
        if shard != self._shard:
            self.flush()
            self._shard, self._rounds, self._draws = shard, [], []
        self._draws.append(draw.detach().to("cpu", copy=True))
        self._rounds.append(round)
        self._last = round
        self._dirty = True

    def flush(self) -> None:
        """Write the shard in memory if it has changed, durably.

        Raises:
            RunDirectoryError: the disk is full or failing; the older shard is unchanged, and a later flush tries again.
        """
        if self._dirty and self._shard is not None:
            import torch

            self._write(self._shard, torch.stack(self._draws), torch.tensor(self._rounds))
            self._dirty = False

    def resume(self, round: int, expected: int | None = None) -> int:
        """Keep the draws up to `round` and delete the others.

        Args:
            round: the round of the checkpoint from which the run continues.
            expected: the number of draws according to that checkpoint; None: not checked.

        Returns:
            The number of draws kept.

        Raises:
            RunDirectoryError: a shard is damaged or of another length, or there are not `expected` draws.
        """
        stored = {int(path.stem): load_rounds(path).tolist() for path in _shards(self.folder)}
        for shard, rounds in stored.items():
            if any(self._index(value) != shard for value in rounds):
                raise RunDirectoryError(
                    f"shard {shard} of {self.folder} holds rounds {rounds[0]} to {rounds[-1]}, but shards of "
                    f"{self._shard_rounds} rounds were expected: the configuration was changed; restore it, or start "
                    f"a new run"
                )
        kept = {shard: sum(1 for value in rounds if value <= round) for shard, rounds in stored.items()}
        count = sum(kept.values())
        if expected is not None and count != expected:
            raise RunDirectoryError(
                f"{self.folder} holds {count} draws up to round {round}, but the checkpoint counts {expected}: files "
                f"were removed or changed; restore them, or start a new run in another directory"
            )
        self._cut(stored, kept)
        return count

    def load(self) -> Tensor:
        """All draws so far, (C, draws, d); see `load_draws`."""
        self.flush()
        return load_draws(self.folder)

    def _cut(self, stored: dict[int, list[int]], kept: dict[int, int]) -> None:
        """Keep the first `kept[s]` draws of each shard on the disk, and load the last shard with draws into memory."""
        self._shard, self._rounds, self._draws, self._last, self._dirty = None, [], [], self._start, False
        for shard, rounds in stored.items():
            path, keep = self._path(shard), kept[shard]
            if keep == 0:
                path.unlink()
                continue
            self._shard, self._rounds, self._last = shard, rounds[:keep], rounds[keep - 1]
            if keep < len(rounds) or shard == max(s for s in kept if kept[s]):
                with _open(path) as file:
                    self._draws = [draw.clone() for draw in file.get_slice("params")[:keep]]
                self._dirty = keep < len(rounds)
                self.flush()
        for leftover in listed(self.folder):
            if leftover.name.endswith(TEMPORARY):
                leftover.unlink()
        if self.folder.is_dir():
            sync_folder(self.folder)
        self._unread = False

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}{SUFFIX}"

    def _index(self, round: int) -> int:
        return (round - self._start - 1) // self._shard_rounds

    def _write(self, shard: int, params: Tensor, rounds: Tensor) -> None:
        from safetensors.torch import save

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.folder, params.nbytes, error) from error
        data = save({"params": params, "rounds": rounds}, {"sha256": _checksum(params, rounds)})
        write_atomic(self._path(shard), data)


def load_draws(path: Path) -> Tensor:
    """Load the draws of a run as (C, draws, d), in the order of rounds.

    Memory holds them once: the tensor is sized from the shards' headers and filled shard by shard.

    Args:
        path: the run directory, its folder `draws`, or one shard.

    Raises:
        RunDirectoryError: no draws there, or a damaged shard.
    """
    import torch
    from safetensors import SafetensorError

    files = _shards(path)
    if not files:
        raise RunDirectoryError(f"{path} holds no draws: expected draws/000000{SUFFIX}, ...; has the warm-up ended?")
    counts = []
    for file in files:
        with _open(file) as shard:
            counts.append(shard.get_slice("params").get_shape()[0])
            like = shard.get_slice("params")[:1]  # (1, C, d)
    draws = torch.empty(like.shape[1], sum(counts), like.shape[2], dtype=like.dtype)
    for file, count, end in zip(files, counts, accumulate(counts), strict=True):
        with _open(file) as shard:
            params, rounds = shard.get_tensor("params"), shard.get_tensor("rounds")
            if (shard.metadata() or {}).get("sha256") != _checksum(params, rounds):
                raise SafetensorError("the checksum does not match")
            draws[:, end - count : end] = params.transpose(0, 1)
    return draws


def _checksum(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.numpy().data)
    return found.hexdigest()


def load_rounds(path: Path) -> Tensor:
    """Load the round of each draw, (draws,) int64; empty: there are none. Arguments as for `load_draws`."""
    import torch

    rounds = [torch.empty(0, dtype=torch.int64)]
    for file in _shards(path):
        with _open(file) as shard:
            rounds.append(shard.get_tensor("rounds"))
    return torch.cat(rounds)


def _shards(path: Path) -> list[Path]:
    """List the shards in a run directory, in a folder of draws, or `path` itself, in order."""
    if path.is_file():
        return [path]
    folder = path / "draws" if (path / "draws").is_dir() else path
    shards = (file for file in listed(folder) if file.suffix == SUFFIX and file.stem.isdigit())
    return sorted(shards, key=lambda file: int(file.stem))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise RunDirectoryError(
            f"{path} is damaged ({error}): expected tensors params and rounds; restore it from a copy, or start a new "
            f"run"
        ) from error
