"""Load a dataset: read it, make its schema, hold out test rows, partition over clients, standardise."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedsample.data.base import FederatedData, Task
from fedsample.data.builtin import read_builtin
from fedsample.data.columns import read_columns
from fedsample.data.labels import encode
from fedsample.data.npz import read_npz
from fedsample.data.schema import Schema, Target
from fedsample.data.schema_apply import fit
from fedsample.data.schema_merge import merge, table_schema
from fedsample.data.split import Split, split
from fedsample.data.standardize import standardize
from fedsample.data.table import Table, source_path
from fedsample.errors import ConfigError

if TYPE_CHECKING:
    from fedsample.config import DataConfig


def load(config: DataConfig, seed: int, task: Task | None = None) -> FederatedData:
    """Load a dataset and partition its training rows over the clients.

    Test rows are the first entries of `numpy.random.default_rng(0).permutation(rows)`, whatever the seed, so that runs
    with different seeds are scored on the same rows; or, with `data.holdout = "keyed"`, each client's own (`split`).
    Standardising subtracts the training rows' mean from every feature and divides by their standard deviation (a
    constant feature becomes zero in the training rows, up to rounding); in regression the target is treated the same
    way, and `target_mean` and `target_scale` undo it. The sums are taken over clients (`standardize`). A client keeps
    its rows in the order of the source.

    | kind | test rows by default | standardised by default |
    |---|---|---|
    | builtin | 360 of digits, a fifth (rounded down) of the others | all but digits, whose pixels are divided by 16 |
    | npz | X_test of the file, else none | no: used exactly as it is |
    | csv, parquet | a fifth, rounded down | yes |

    A file that names its clients (`client` of an npz, `data.client_column`) is split by those names, in sorted order:
    `data.partition` is then "natural" or its default, and `data.clients` is not used.

    Args:
        config: the section [data] of an experiment.
        seed: the experiment's seed, >= 0; it decides the partition, and which rows are held out by key.
        task: what the model predicts (`fedsample.models.task_of`); None: the data decide, see `labels.target_of`.

    Raises:
        DataError: if the source cannot be read or lacks what is needed.
        ConfigError: if options contradict each other or the source.
    """
    table = read_table(config)
    schema = merge([table_schema(table, task, config.standardize)], config.features, config.labels, [table.name])
    data = fit(table, schema, split_of(config, table, schema, seed))
    return standardize(data) if schema.standardize else data


def split_of(config: DataConfig, table: Table, schema: Schema, seed: int) -> Split:
    """Split a table as `load` does: each row's client, and the held-out rows; `schema` is the merged one."""
    return split(config, table, encode(table.y, schema.target or Target("number"), table.name), seed)


def read_table(config: DataConfig) -> Table:
    """Read the table that the section [data] names, as stored in its source.

    Raises:
        DataError: if the source cannot be read.
        ConfigError: if it is a file of quadratics, without rows.
    """
    if config.kind == "builtin":
        return read_builtin(config.name)
    if config.kind == "npz":
        table = read_npz(source_path(config.file, config.kind))
        return replace(table, name=config.name or table.name)
    if config.kind in ("csv", "parquet"):
        table = read_columns(source_path(config.file, config.kind), config.kind, config.target, config.client_column)
        return replace(table, name=config.name or table.name)
    raise ConfigError(f"data.kind = {config.kind!r} holds no rows: read it with load_quadratic")
