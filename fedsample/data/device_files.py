"""A device's data: its own file, or one client's share of a dataset that every device has.

The steps from a device's rows to its likelihood; only the schema and the sums leave the device:

    own = read_device(...)            the data as stored
    schema = own.schema                   -> server; all of them merge into the agreed one
    data = own.fit(agreed)                columns, categories and labels as agreed
    first = first_sums(data)              -> server; the sum of all comes back; only if agreed.standardize
    second = second_sums(data, total)     -> server; the sum of all comes back
    data = Scale.of(total, squares).apply(data)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedsample.data.base import Array, FederatedData
from fedsample.data.builtin import datasets
from fedsample.data.columns import read_columns
from fedsample.data.loading import read_table, split_of
from fedsample.data.npz import read_npz
from fedsample.data.quadratic import check_potentials, read_quadratic
from fedsample.data.schema import Schema
from fedsample.data.schema_apply import fit
from fedsample.data.schema_merge import merge, table_schema
from fedsample.data.split import Split, keyed_split
from fedsample.data.table import Table, nearest, source_path
from fedsample.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fedsample.config import DataConfig, Experiment
    from fedsample.data.base import Task

_SUFFIXES = {".csv": "csv", ".parquet": "parquet", ".npz": "npz"}


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a device.

    Attributes:
        table: the source, which may hold other clients' rows too.
        split: this client's rows in `table`.
        schema: the schema that the device sends to the server.
    """

    table: Table
    split: Split
    schema: Schema

    @property
    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """This client's x, y, held-out x and held-out y as stored in the source, for a fingerprint."""
        table, train, test = self.table, self.split.train[0], self.split.test
        x_test = table.x if table.x_test is None else table.x_test
        y_test = table.y if table.y_test is None else table.y_test
        return table.x[train], table.y[train], x_test[test], y_test[test]

    def fit(self, agreed: Schema) -> FederatedData:
        """Convert this client's rows to the agreed schema, not yet standardised.

        Raises:
            DataError: if a column, category, label or shape is not in the agreed schema.
        """
        return fit(self.table, agreed, self.split)


@dataclass(frozen=True, eq=False)
class Potential:
    """The quadratic potential of a device.

    Attributes:
        lam: (1, d) float64 curvature, or (1, d, d) Hessian.
        a: (1, d) float64 centre.
    """

    lam: Array
    a: Array

    @property
    def schema(self) -> Schema:
        """The schema that the device sends to the server."""
        return Schema("quadratic", (self.a.shape[1],), rows=1)

    def fit(self, agreed: Schema) -> Potential:
        """Return this potential if it fits the agreed schema.

        Raises:
            DataError: if it does not fit.
        """
        if agreed.kind != "quadratic" or agreed.shape != self.schema.shape:
            raise DataError(
                f"this device holds a quadratic in {self.a.shape[1]} dimensions, but the clients agreed on "
                f"{agreed.kind} of shape {agreed.shape}: give all clients one kind of data"
            )
        return self


DeviceRows = Rows | Potential


def read_device(
    experiment: Experiment,
    index: int,
    *,
    task: Task | None,
    data: str | None = None,
    target: str | None = None,
    partition: int | None = None,
    partitions: int | None = None,
) -> DeviceRows:
    """Read this device's data.

    | data | what is read |
    |---|---|
    | a .csv, .parquet or .npz file | all its rows are this client's, some of them held out by its key |
    | an .npz file of quadratics | potential number `partition`; not needed for a file of one client |
    | a built-in set | client `partition` of `partitions`, as in a simulation with that many clients |
    | None | client `partition` of the data that the experiment itself names, which must be on this device |

    Args:
        experiment: the server's configuration.
        index: index of this device's client, which keys the rows that it holds out of a file.
        task: what the model predicts; None: the data decide.
        data: a path or the name of a built-in set; None: the experiment's data.
        target: name of the column to predict in a csv or parquet file; None: the experiment's.
        partition: number of the share, from 0.
        partitions: number of shares.

    Raises:
        ConfigError: if options contradict each other.
        DataError: if the source cannot be read or lacks what is needed.
    """
    check_source(data, target, partition, partitions)
    if data is None and partition is not None:
        given = experiment.data
        known = given.client_column is None and given.kind in ("builtin", "csv", "parquet")
        if known and partitions not in (None, given.clients):
            raise ConfigError(f"--partitions {partitions}, but data.clients = {given.clients}: leave --partitions out")
        _no_target(target, "the experiment's own data")
        return _share(experiment, given, task, partition, partitions)
    if is_builtin(data):
        if partition is None or partitions is None:
            raise ConfigError(
                f"--data {data} is a built-in set, of which a device takes one share: pass --partition and --partitions"
            )
        changes = {"kind": "builtin", "name": data, "file": None, "clients": partitions, "target": None}
        config = experiment.data.model_copy(update={**changes, "client_column": None})
        return _share(experiment, config, task, partition, partitions)
    return _file(experiment, index, str(data), target, task, partition, partitions)


def check_source(data: str | None, target: str | None, partition: int | None, partitions: int | None) -> None:
    """Refuse options of `read_device` that no experiment could use, before there is an experiment.

    Raises:
        ConfigError: if options contradict each other.
        DataError: if the file does not exist.
    """
    if partition is not None and partition < 0:
        raise ConfigError(f"--partition {partition}, expected at least 0")
    if None not in (partition, partitions):
        _check_partition(partition or 0, None, partitions or 0)
    if is_builtin(data):
        _no_target(target, "a built-in set")
    elif data is not None:
        _kind(data)
        _path(data)
    elif partition is None:
        raise ConfigError(
            "this device is given no data: pass --data FILE for its own, or --partition to take a share of what the "
            "experiment names; or --app, where the server runs a Flower app"
        )


def is_builtin(data: str | None) -> bool:
    """Whether `data` names a built-in set, and not a file."""
    return data is not None and data in {fact.name for fact in datasets()} and not Path(data).is_file()


def agreed_schema(experiment: Experiment, schemas: list[Schema]) -> Schema:
    """Merge the clients' schemas into the agreed one, with the experiment's features and labels; see `merge`.

    Raises:
        DataError: if the clients do not agree.
        ConfigError: if the data do not fit the model, or the experiment states features or labels that nothing could
            hold.
    """
    agreed = merge(schemas, experiment.data.features, experiment.data.labels)
    _check_kind(experiment, agreed.kind == "quadratic", "the clients' data")
    return agreed


def _share(
    experiment: Experiment, config: DataConfig, task: Task | None, partition: int, partitions: int | None
) -> DeviceRows:
    """Read one client's share of a dataset that every device has."""
    if config.kind == "quadratic":
        return _potential(source_path(config.file, "quadratic"), partition, partitions)
    table = read_table(config)
    whole = table_schema(table, task, config.standardize)
    agreed = merge([whole], config.features, config.labels, [table.name])
    parts = split_of(config, table, agreed, experiment.seed)
    _check_partition(partition, partitions, len(parts.names))
    own = parts.share(partition)
    return Rows(table, own, table_schema(table, task, config.standardize, len(own.train[0]) + len(own.test)))


def _file(
    experiment: Experiment,
    index: int,
    data: str,
    target: str | None,
    task: Task | None,
    partition: int | None,
    partitions: int | None,
) -> DeviceRows:
    """Read this device's own file."""
    kind, path = _kind(data), _path(data)
    if kind == "npz" and experiment.model.name == "quadratic":
        _no_target(target, "a quadratic")
        return _potential(path, partition, partitions)
    if partition is not None or partitions is not None:
        raise ConfigError(
            f"--partition goes with a built-in set or with potentials, but all rows of {path.name} are this device's: "
            "leave it out, or give each device a file with its own rows"
        )
    _check_kind(experiment, False, path.name)
    if kind == "npz":
        _no_target(target, "an npz file")
        table = read_npz(path)
        if table.owners is not None:
            raise DataError(f"{path.name} names the client of each row, but all are this device's: drop 'client'")
    else:
        table = read_columns(path, kind, target or experiment.data.target, None)
    settings = experiment.data
    schema = table_schema(table, task, settings.standardize)
    own = keyed_split(table, np.arange(len(table.x)), settings.test_fraction, experiment.seed, index)
    return Rows(table, own, schema)


def _kind(data: str) -> str:
    kind = _SUFFIXES.get(Path(data).suffix.lower())
    if kind is None:
        names = [fact.name for fact in datasets()]
        raise ConfigError(
            f"--data {data}: expected a file that ends in {', '.join(_SUFFIXES)}, or a built-in set, one of "
            f"{', '.join(names)}.{nearest(data, names)}"
        )
    return kind


def _path(data: str) -> Path:
    path = Path(data).expanduser()
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise DataError(f"--data {data} {found}: expected a file; check the path (relative paths start here)")
    return path


def _potential(path: Path, partition: int | None, partitions: int | None) -> Potential:
    lam, a, name = read_quadratic(path)
    check_potentials(lam, a, name)
    if partition is None and len(a) > 1:
        raise ConfigError(
            f"{path.name} holds {len(a)} potentials: pass --partition, from 0 to {len(a) - 1}, to take one (a file of "
            f"one holds a of shape (1, d))"
        )
    partition = partition or 0
    _check_partition(partition, partitions, len(a))
    return Potential(lam[partition : partition + 1], a[partition : partition + 1])


def _check_partition(partition: int, partitions: int | None, clients: int) -> None:
    if partitions not in (None, clients):
        raise ConfigError(f"--partitions {partitions}, but the data have {clients} clients: pass {clients}")
    if partition >= clients:
        raise ConfigError(f"--partition {partition}, but the data have clients 0 to {clients - 1}")


def _check_kind(experiment: Experiment, quadratic: bool, what: str) -> None:
    """Refuse quadratic potentials for a model of rows, and rows for a quadratic."""
    if quadratic != (experiment.model.name == "quadratic"):
        holds, advice = ("potentials", '"quadratic"') if quadratic else ("rows", "a model of rows, such as softmax,")
        raise ConfigError(
            f'{what} holds {holds}, but the experiment has model.name = "{experiment.model.name}": choose {advice} or '
            "give other data"
        )


def _no_target(target: str | None, what: str) -> None:
    if target is not None:
        raise ConfigError(
            f"--target {target} names a column of a csv or parquet file, but {what} says what is predicted"
        )
