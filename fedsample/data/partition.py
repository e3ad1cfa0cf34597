"""Partition rows over clients with flwr-datasets' partitioners, as plain arrays.

| partition | rule |
|---|---|
| dirichlet | the rows of each class are split over the clients in proportions drawn from Dirichlet(alpha, ..., alpha) |
| iid | a seeded shuffle, then equal shares |
| shards | rows sorted by target, cut into two equal shards per client, assigned at random |
| natural | by the client that the source names |

Note what Dirichlet means here: one draw *per class over the clients* (Yurochkin et al. 2019, arXiv 1905.12022), so a
small alpha skews the sizes of the shares as well as their labels. Another convention draws each client's label
proportions and keeps the sizes equal.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np

from fedsample.data.base import Array
from fedsample.errors import ConfigError, DataError

_BINS = 10  # quantile bins that stand in for classes where the target is a number
_ALPHA_MAX = 1e6  # even shares up to a thousandth; far above, numpy's draws overflow silently
_SHARDS = 2  # shards per client, as in McMahan et al. (2017), arXiv 1602.05629


def assign(scheme: str, targets: Array, clients: int, alpha: float, seed: int) -> Array:
    """Assign every row to one client.

    Args:
        scheme: "dirichlet", "iid" or "shards".
        targets: (N,) int64 classes, or float64 targets: dirichlet then uses ten quantile bins of them as classes.
        clients: number of clients n, 1 <= n <= N.
        alpha: Dirichlet concentration in (0, 1e6]; small is skewed. Only dirichlet uses it.
        seed: integer >= 0; equal seeds give equal assignments.

    Returns:
        (N,) int64 in [0, n): the client of each row. iid and shards give every client a row; dirichlet does if one of
        eleven draws has no empty share, and otherwise leaves some clients without rows, which is sound.

    Raises:
        ConfigError: if there is no such scheme, or `clients`, `alpha` or `seed` is out of range.
        DataError: if there are more clients than rows, or flwr-datasets is not installed.
    """
    rows = len(targets)
    if clients < 1:
        raise ConfigError(f"data.clients = {clients}, expected at least 1")
    if seed < 0:
        raise ConfigError(f"seed = {seed}, expected at least 0")
    if clients > rows:
        raise DataError(f"data.clients = {clients}, but there are only {rows} training rows: lower data.clients")
    if scheme == "dirichlet":
        return _dirichlet(targets, clients, alpha, seed)
    if scheme == "iid":
        _installed()
        from flwr_datasets.partitioner import IidPartitioner

        shuffled = np.random.default_rng(seed).permutation(rows)  # the partitioner itself does not shuffle
        return _owners(IidPartitioner(clients), shuffled, targets[shuffled], clients)
    if scheme == "shards":
        _installed()
        from flwr_datasets.partitioner import ShardPartitioner

        # Its default shard size, floor(N / 2n), would assign the last rows to no client; rounding up covers every row.
        partitioner = ShardPartitioner(
            clients,
            partition_by="target",
            shard_size=-(-rows // (_SHARDS * clients)),
            keep_incomplete_shard=True,
            shuffle=False,
            seed=seed,
        )
        return _owners(partitioner, np.arange(rows), targets, clients)
    raise ConfigError(f'data.partition = {scheme!r}, expected "dirichlet", "iid", "shards" or "natural"')


def natural(owners: Array) -> tuple[Array, tuple[str, ...]]:
    """Partition by the client names in the source.

    Args:
        owners: (N,) integer or text label of each row's client.

    Returns:
        (N,) int64 in [0, n), and the n labels; client i is the i-th label in sorted order.
    """
    names, codes = np.unique(owners, return_inverse=True)
    return codes.astype(np.int64), tuple(str(name) for name in names)


def _dirichlet(targets: Array, clients: int, alpha: float, seed: int) -> Array:
    if not 0 < alpha <= _ALPHA_MAX:
        raise ConfigError(
            f"data.alpha = {alpha}, expected a number above 0, at most {_ALPHA_MAX:g} (0.1 is very skewed, 100 nearly "
            'even; for even shares choose data.partition = "iid")'
        )
    _installed()
    from flwr_datasets.partitioner import DirichletPartitioner

    classes = targets
    if targets.dtype.kind == "f":
        edges = np.quantile(targets, np.linspace(0, 1, _BINS + 1)[1:-1])
        classes = np.searchsorted(edges, targets, side="right")

    def split(least: int) -> Array:
        partitioner = DirichletPartitioner(
            clients,
            partition_by="target",
            alpha=float(alpha),
            min_partition_size=least,
            self_balancing=False,
            shuffle=False,
            seed=seed,
        )
        return _owners(partitioner, np.arange(len(targets)), classes, clients)

    try:
        return split(least=1)
    except ValueError:  # it gives up after eleven draws; only then are empty shares allowed
        return split(least=0)


def _installed() -> None:
    """Raise if flwr-datasets is missing; a device with its own file does not need it."""
    if importlib.util.find_spec("flwr_datasets") is None:
        raise DataError(
            "sharing rows out needs flwr-datasets, which is not installed here: pip install flwr-datasets, or give "
            "this machine a file of its own"
        )


def _owners(partitioner: Any, order: Array, targets: Array, clients: int) -> Array:
    """Run a partitioner on rows `order` with targets (N,) in that order; return the client of each row."""
    import datasets

    owners = np.full(len(order), -1, dtype=np.int64)
    with warnings.catch_warnings():
        # Two warnings that do not concern the user: that a Dirichlet draw with an empty share is being repeated, and
        # that `datasets` calls pyarrow's sort with an argument that pyarrow 25 renamed.
        warnings.filterwarnings("ignore", message="The specified min_partition_size", category=UserWarning)
        warnings.filterwarnings("ignore", message="Specifying null_placement in SortOptions", category=FutureWarning)

        class Whole(datasets.Dataset):  # type: ignore[misc]
            """Returns a column as one array: `datasets` 4 makes it lazy, and partitioners would fetch it row by row."""

            def __getitem__(self, key: Any) -> Any:
                found = super().__getitem__(key)
                return found[:] if isinstance(key, str) else found

        frame = Whole.from_dict({"row": order, "target": targets}).with_format("numpy")
        partitioner.dataset = frame
        for client in range(clients):
            share = np.asarray(partitioner.load_partition(client)["row"][:], dtype=np.int64)
            if (owners[share] >= 0).any():
                raise DataError(f"{type(partitioner).__name__} gave rows to two clients: report this with your data")
            owners[share] = client
    if (owners < 0).any():
        raise DataError(f"{type(partitioner).__name__} left {int((owners < 0).sum())} rows to no client: report this")
    return owners
