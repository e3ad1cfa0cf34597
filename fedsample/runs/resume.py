"""Continuing a run: find the checkpoint, and restore state, draws and curves from it."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from fedsample.config import Experiment
from fedsample.config.loading import digest
from fedsample.errors import RunDirectoryError
from fedsample.monitor.checkpoint import Checkpoint, CheckpointStore
from fedsample.monitor.draws import load_draws, load_rounds
from fedsample.protocol.exchange import Fleet
from fedsample.protocol.recovery import Recovers
from fedsample.runs.live_metrics import LiveMetrics


def latest_checkpoint(store: CheckpointStore, experiment: Experiment, path: Path) -> Checkpoint | None:
    """Return the checkpoint from which the run in `path` continues; None: it was stopped before it had one.

    Raises:
        RunDirectoryError: if there are draws without a checkpoint, or more rounds than the configuration has.
    """
    checkpoint = store.latest(digest(experiment))
    if checkpoint is None and len(load_rounds(path)):
        raise RunDirectoryError(
            f"{store.folder} holds no checkpoint, but there are draws: it was emptied, and going on would begin again; "
            "restore a checkpoint, or start a new run in another directory with --out"
        )
    if checkpoint is not None and checkpoint.round > experiment.rounds:
        raise RunDirectoryError(
            f"the run has done {checkpoint.round} rounds, but its config.toml says "
            f"rounds = {experiment.rounds}: raise it"
        )
    return checkpoint


def common_checkpoint(
    store: CheckpointStore, checkpoint: Checkpoint, fleet: Fleet, fingerprint: str, path: Path
) -> Checkpoint:
    """Return the latest checkpoint, of the same data, that the clients can restore too.

    Args:
        store: the run's checkpoints.
        checkpoint: the run's latest.
        fleet: the clients.
        fingerprint: identifies the data.
        path: the run directory.

    Raises:
        RunDirectoryError: if it is of other data, or damaged.
    """
    if checkpoint.meta["data"] != fingerprint:
        raise RunDirectoryError(
            f"the data are not those that the run in {path} began with: restore them, or start a new run in another "
            "directory with --out"
        )
    rounds = [round for round in store.rounds() if round <= checkpoint.round]  # a later one is damaged
    common = fleet.common(rounds) if isinstance(fleet, Recovers) else None
    return checkpoint if common is None or common == checkpoint.round else checkpoint_at(store, common)


def checkpoint_at(store: CheckpointStore, round: int) -> Checkpoint:
    """Return the checkpoint of a round.

    Raises:
        RunDirectoryError: if it is damaged.
    """
    checkpoint = store.at(round)
    if checkpoint is None:
        raise RunDirectoryError(
            f"the checkpoint of round {round} in {store.folder} is damaged, and the clients remember no other: "
            "restore it from a copy, or start a new run in another directory with --out"
        )
    return checkpoint


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def has_ended(path: Path, round: int) -> bool:
    """Whether the run once ended with this round: then its log is complete."""
    try:
        return bool(json.loads((path / "summary.json").read_bytes())["rounds"] == round)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def recall(metrics: LiveMetrics, path: Path, round: int) -> None:
    """Feed the draws so far to the live metrics, so that the curves continue."""
    rounds = load_rounds(path).tolist() if round > 0 else []
    if rounds:
        for at, draw in zip(rounds, load_draws(path).unbind(1), strict=True):
            metrics.see(at, draw)
