"""Split rows into training and held-out rows, by client.

| `data.holdout` | held-out rows |
|---|---|
| pooled | the first of `numpy.random.default_rng(0).permutation(rows)`, whatever the seed; the same for every n |
| keyed | of client i's n_i rows the first floor(f n_i + 1/2) of a permutation keyed by the seed and i |

Pooled ones are scored by the server; if rows are on devices, client i scores every n-th of them from the i-th on. Keyed
ones each client finds without knowing the others; a device with its own file always does so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedsample.data.base import Array
from fedsample.data.partition import assign, natural
from fedsample.data.table import Table
from fedsample.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fedsample.config import DataConfig

DEFAULT_FRACTION = 0.2


@dataclass(frozen=True, eq=False)
class Split:
    """The training and held-out rows of a table.

    Attributes:
        train: the training rows of each client, ascending.
        test: held-out rows of the table, or of its own test rows if it has some.
        names: one name per client.
        bounds: client i holds out test[bounds[i]:bounds[i + 1]]; None: test[i::n].
    """

    train: tuple[Array, ...]
    test: Array
    names: tuple[str, ...]
    bounds: tuple[int, ...] | None = None

    def share(self, client: int) -> Split:
        """Return one client's part of the split.

        Raises:
            DataError: if there is no such client.
        """
        n = len(self.names)
        if not 0 <= client < n:
            raise DataError(f"there is no share {client}: the rows are split over clients 0 to {n - 1}")
        own = slice(client, None, n) if self.bounds is None else slice(self.bounds[client], self.bounds[client + 1])
        return Split((self.train[client],), self.test[own], (self.names[client],))


def split(config: DataConfig, table: Table, y: Array, seed: int) -> Split:
    """Hold out test rows and partition the others over the clients.

    Args:
        config: the section [data] of an experiment.
        table: the table as read from its source.
        y: (N,) int64 classes or float64 targets of its rows, not standardised.
        seed: the experiment's seed, >= 0.

    Raises:
        ConfigError: if options contradict each other or the source.
        DataError: if there are more clients than rows.
    """
    if config.holdout == "keyed":
        owners, names = _owners(config, table, y, np.arange(len(y)), seed)
        parts = [
            keyed_split(table, rows, config.test_fraction, seed, client)
            for client, rows in enumerate(_by_client(owners, np.arange(len(y)), len(names)))
        ]
        train = tuple(part.train[0] for part in parts)
        if table.x_test is not None:
            return Split(train, np.arange(len(table.x_test)), names)
        bounds = np.cumsum([0, *(len(part.test) for part in parts)])
        return Split(train, np.concatenate([part.test for part in parts]), names, tuple(bounds.tolist()))
    rows, test = _pooled(table, config.test_fraction)
    owners, names = _owners(config, table, y[rows], rows, seed)
    return Split(tuple(_by_client(owners, rows, len(names))), test, names)


def keyed_split(table: Table, rows: Array, fraction: float | None, seed: int, client: int) -> Split:
    """Hold out some of a client's own rows, by its key.

    Args:
        table: the table that holds the rows.
        rows: (n_i,) the client's rows in the table, ascending.
        fraction: f in [0, 1); None: by the source's own rule, 0.2 or none.
        seed: the experiment's seed.
        client: the client's index, which keys the draw.

    Returns:
        Training and held-out rows, both in the table's order; if the table has its own test rows, those are held out.

    Raises:
        ConfigError: if the fraction is out of range, or positive for a table with its own test rows.
    """
    if table.x_test is not None:
        _check_fraction(table, fraction)
        return Split((rows,), np.arange(len(table.x_test)), (str(client),))
    if fraction is None:
        fraction = 0.0 if table.test_rows is None else DEFAULT_FRACTION
    _check_fraction(table, fraction)
    count = math.floor(fraction * len(rows) + 0.5)
    if not count:  # nothing is held out
        return Split((rows,), rows[:0], (str(client),))
    from fedsample.random import key

    order = key(seed, client=client, purpose="holdout").permutation(len(rows)).numpy()
    return Split((rows[np.sort(order[count:])],), rows[np.sort(order[:count])], (str(client),))


def _by_client(owners: Array, rows: Array, clients: int) -> list[Array]:
    """Group rows by client, in the order given; some clients may have none."""
    order = np.argsort(owners, kind="stable")
    return np.split(rows[order], np.cumsum(np.bincount(owners, minlength=clients))[:-1])


def _check_fraction(table: Table, fraction: float | None) -> None:
    if fraction is not None and not 0 <= fraction < 1:
        raise ConfigError(f"data.test_fraction = {fraction}, expected a number in [0, 1)")
    if table.x_test is not None and fraction:
        raise ConfigError(
            f"data.test_fraction = {fraction}, but {table.name} brings its own test rows (X_test): leave it out"
        )


def _pooled(table: Table, fraction: float | None) -> tuple[Array, Array]:
    """Indices of the training rows in source order, and of the test rows in the order of the permutation."""
    rows = len(table.x)
    _check_fraction(table, fraction)
    if table.x_test is not None:
        return np.arange(rows), np.arange(len(table.x_test))
    # An explicit 0.2 means the same rows as the default, where the source has one.
    default = fraction is None or (fraction == DEFAULT_FRACTION and table.test_rows is not None)
    count = (table.test_rows or 0) if default or fraction is None else int(fraction * rows + 1e-9)
    test = np.random.default_rng(0).permutation(rows)[:count]
    keep = np.ones(rows, dtype=bool)
    keep[test] = False
    return np.flatnonzero(keep), test


def _owners(config: DataConfig, table: Table, y: Array, rows: Array, seed: int) -> tuple[Array, tuple[str, ...]]:
    """Return the client (N,) of each of these rows, whose targets are y, and the names of the clients."""
    if table.owners is not None:
        if config.partition not in ("natural", "dirichlet"):
            raise ConfigError(
                f"data.partition = {config.partition!r}, but {table.name} names the client of each row: choose "
                '"natural", or take the client column out of the file'
            )
        owners, names = natural(table.owners)
        return owners[rows], names
    if config.partition == "natural":
        raise ConfigError(
            f'data.partition = "natural", but {table.name} does not name clients: give an npz file an array "client", '
            'set data.client_column for csv and parquet, or choose "dirichlet", "iid" or "shards"'
        )
    owners = assign(config.partition, y, config.clients, config.alpha, seed)
    return owners, tuple(str(client) for client in range(config.clients))
