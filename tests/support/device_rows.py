"""Devices that hold their own rows: files for them, what they read, and the federation they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsample.config import Experiment, load
from fedsample.data import FederatedData, device_files
from fedsample.data.device_files import DeviceRows, Potential, agreed_schema
from fedsample.data.schema import Schema
from fedsample.data.standardize import Scale, first_sums, second_sums
from fedsample.models import task_of
from fedsample.numerics.tree_sum import TreeSum

SIZES = (11, 4, 17)


def experiment(**settings: Any) -> Experiment:
    return load(settings, environment={})


def total(terms: list[torch.Tensor]) -> torch.Tensor:
    tree = TreeSum()
    for term in terms:
        tree.add(term)
    return tree.total()


def read_device(settings: Experiment, index: int, **source: Any) -> DeviceRows:
    """What a device holds, for the experiment's model."""
    return device_files.read_device(settings, index, task=task_of(settings.model.name), **source)


def federate(settings: Experiment, holdings: list[DeviceRows]) -> tuple[Schema, list[FederatedData | Potential]]:
    """What server and devices do together, every message of it."""
    agreed = agreed_schema(settings, [Schema.from_json(holding.schema.to_json()) for holding in holdings])
    agreed = Schema.from_json(agreed.to_json())
    shares: list[Any] = [holding.fit(agreed) for holding in holdings]
    if agreed.standardize:
        first = total([first_sums(share) for share in shares])
        second = total([second_sums(share, first) for share in shares])
        shares = [Scale.of(first, second).apply(share) for share in shares]
    return agreed, shares


def write(folder: Path, kind: str, target: str) -> tuple[str, list[str], list[dict[str, list[Any]]]]:
    """A file with a client column, and one file per client: other column orders, not all categories and labels."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    def save(columns: dict[str, list[Any]], path: Path) -> str:
        table = pyarrow.table(columns)
        if kind == "csv":
            pyarrow.csv.write_csv(table, path)
        else:
            pyarrow.parquet.write_table(table, path)
        return str(path)

    rng = np.random.default_rng(5)
    parts: list[dict[str, list[Any]]] = []
    for client, size in enumerate(SIZES):
        colours = ("red", "blue") if client == 1 else ("red", "green", "blue")
        kinds = ("no", "yes") if client == 0 else ("maybe", "no", "yes")
        parts.append(
            {
                "age": rng.integers(20, 80, size).tolist() if client == 1 else (rng.normal(size=size) * 9).tolist(),
                "colour": [colours[i % len(colours)] for i in range(size)],
                "wage": (rng.normal(size=size) * 1e4 + 1e6).tolist(),
                "kind": [kinds[i % len(kinds)] for i in range(size)],
                "price": rng.normal(loc=50.0, size=size).tolist(),
            }
        )
    for part in parts:
        del part["price" if target == "kind" else "kind"]
    owners = rng.permutation(np.repeat(range(3), SIZES)).tolist()  # rows of different clients lie mixed
    queues = [iter(zip(*part.values(), strict=True)) for part in parts]
    rows = [next(queues[owner]) for owner in owners]
    pooled = {name: [row[at] for row in rows] for at, name in enumerate(parts[0])}
    pooled["who"] = [f"c{owner}" for owner in owners]
    files = []
    for client, part in enumerate(parts):
        names = list(part)[::-1] if client else list(part)
        files.append(save({name: part[name] for name in names}, folder / f"own{client}.{kind}"))
    return save(pooled, folder / f"all.{kind}"), files, parts
