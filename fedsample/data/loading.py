"""From a configuration to clients: read, decide the task, set test rows apart, standardise, share out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedsample.data.base import Array, FederatedData, Task
from fedsample.data.builtin import read_builtin
from fedsample.data.columns import read_columns
from fedsample.data.labels import Targets, targets
from fedsample.data.npz import read_npz
from fedsample.data.partition import assign, natural
from fedsample.data.table import Table, source_path
from fedsample.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fedsample.config import DataConfig

DEFAULT_FRACTION = 0.2


def load(config: DataConfig, seed: int, task: Task | None = None) -> FederatedData:
    """Load a dataset and share its training rows out over the clients.

    Test rows are the first entries of `numpy.random.default_rng(0).permutation(rows)`, whatever the seed, so that runs
    with different seeds are scored on the same rows. Standardising subtracts the training rows' mean from every feature
    and divides by their standard deviation (a constant feature becomes zero in the training rows); in regression the
    target is treated the same way, and `target_mean`, `target_scale` lead back. A client keeps its rows in the order of
    the source.

    | kind | test rows by default | standardised by default |
    |---|---|---|
    | builtin | 360 of digits, a fifth (rounded down) of the others | all but digits, whose pixels are divided by 16 |
    | npz | X_test of the file, else none | no: used exactly as it is |
    | csv, parquet | a fifth, rounded down | yes |

    A file that names its clients (`client` of an npz, `data.client_column`) is split by those names, in sorted order:
    `data.partition` is then "natural" or its default, and `data.clients` is not used.

    Args:
        config: the section [data] of an experiment.
        seed: the experiment's seed, >= 0; it decides the partition and nothing else.
        task: what the model predicts (`fedsample.models.task_of`); None: the data decide, see `labels.targets`.

    Raises:
        DataError: the source cannot be read or does not hold what is needed.
        ConfigError: options that contradict each other or the source.
    """
    table = _read(config)
    target = targets(table, task)
    train, x_test, y_test = _hold_out(table, target, config.test_fraction)
    x, y = table.x[train], target.y[train]
    mean, scale = 0.0, 1.0
    if table.standardize if config.standardize is None else config.standardize:
        x, x_test, _, _ = _standardise(x, x_test, table.name)
        if target.classes is None:
            y, y_test, y_mean, y_scale = _standardise(y, y_test, table.name)
            mean, scale = float(y_mean), float(y_scale)
    owners, names = _share_out(config, table, y, train, seed)
    order = np.argsort(owners, kind="stable")
    return FederatedData(
        name=table.name,
        x=x[order],
        y=y[order],
        offsets=np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(names)))]).astype(np.int64),
        x_test=x_test,
        y_test=y_test,
        classes=target.classes,
        feature_names=table.feature_names,
        client_names=names,
        class_names=target.class_names,
        target_mean=mean,
        target_scale=scale,
    )


def _read(config: DataConfig) -> Table:
    if config.kind == "builtin":
        return read_builtin(config.name)
    if config.kind == "npz":
        table = read_npz(source_path(config.file, config.kind))
        return replace(table, name=config.name or table.name)
    if config.kind in ("csv", "parquet"):
        table = read_columns(source_path(config.file, config.kind), config.kind, config.target, config.client_column)
        return replace(table, name=config.name or table.name)
    raise ConfigError(f"data.kind = {config.kind!r} holds no rows: read it with load_quadratic")


def _hold_out(table: Table, target: Targets, fraction: float | None) -> tuple[Array, Array, Array]:
    """Indices of the training rows in source order, and the test rows (x, y) in the order of the permutation."""
    rows = len(table.x)
    if fraction is not None and not 0 <= fraction < 1:
        raise ConfigError(f"data.test_fraction = {fraction}, expected a number in [0, 1)")
    if table.x_test is not None and target.y_test is not None:
        if fraction:
            raise ConfigError(
                f"data.test_fraction = {fraction}, but {table.name} brings its own test rows (X_test): leave it out"
            )
        return np.arange(rows), table.x_test, target.y_test
    # An explicit 0.2 means the same rows as the default, where the source has one.
    default = fraction is None or (fraction == DEFAULT_FRACTION and table.test_rows > 0)
    count = table.test_rows if default or fraction is None else int(fraction * rows + 1e-9)
    test = np.random.default_rng(0).permutation(rows)[:count]
    keep = np.ones(rows, dtype=bool)
    keep[test] = False
    return np.flatnonzero(keep), table.x[test], target.y[test]


def _standardise(train: Array, test: Array, name: str) -> tuple[Array, Array, Array, Array]:
    """Centre and scale by the training rows: (train, test, mean, scale)."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean, scale = np.asarray(train.mean(axis=0)), np.asarray(train.std(axis=0))
    if not (np.isfinite(mean).all() and np.isfinite(scale).all()):
        raise DataError(f"{name} holds values too large to standardise (above about 1e150): rescale that column")
    # A constant column has a deviation of zero, or of some rounding errors; dividing by it would make noise of it.
    scale = np.where(scale > 1e-12 * np.abs(mean), scale, 1.0)
    return (train - mean) / scale, (test - mean) / scale, mean, scale


def _share_out(config: DataConfig, table: Table, y: Array, train: Array, seed: int) -> tuple[Array, tuple[str, ...]]:
    """(N,) client of each training row, and the names of the clients."""
    if table.owners is not None:
        if config.partition not in ("natural", "dirichlet"):
            raise ConfigError(
                f"data.partition = {config.partition!r}, but {table.name} names the client of each row: choose "
                '"natural", or take the client column out of the file'
            )
        owners, names = natural(table.owners)
        return owners[train], names
    if config.partition == "natural":
        raise ConfigError(
            f'data.partition = "natural", but {table.name} does not name clients: give an npz file an array "client", '
            'set data.client_column for csv and parquet, or choose "dirichlet", "iid" or "shards"'
        )
    owners = assign(config.partition, y, config.clients, config.alpha, seed)
    return owners, tuple(str(client) for client in range(config.clients))
