"""Built-in datasets: five small, real tables that scikit-learn ships, so that the main job needs no download.

| name | scale here | source |
|---|---|---|
| digits | pixels / 16 | optical recognition of handwritten digits, 8 x 8 (Alpaydin & Kaynak 1998, UCI) |
| breast_cancer | standardised | Wisconsin diagnostic (Wolberg, Street & Mangasarian 1995, UCI) |
| wine | standardised | wine recognition (Aeberhard & Forina 1991, UCI) |
| iris | standardised | Fisher (1936), Annals of Eugenics 7 |
| diabetes | standardised, target too | Efron, Hastie, Johnstone & Tibshirani (2004), Annals of Statistics 32 |

Test rows are the first `test_rows` entries of `numpy.random.default_rng(0).permutation(rows)`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedsample.data.base import Task
from fedsample.data.table import Table, nearest
from fedsample.errors import DataError


class DatasetFact(NamedTuple):
    """Facts about a built-in dataset, known without loading it; `classes` is None for regression."""

    name: str
    rows: int
    features: int
    classes: int | None
    task: Task
    test_rows: int


_FACTS = (
    DatasetFact("digits", 1797, 64, 10, "classification", 360),  # a fifth, rounded up, as in digits_reference
    DatasetFact("breast_cancer", 569, 30, 2, "classification", 113),
    DatasetFact("wine", 178, 13, 3, "classification", 35),
    DatasetFact("iris", 150, 4, 3, "classification", 30),
    DatasetFact("diabetes", 442, 10, None, "regression", 88),
)


def datasets() -> tuple[DatasetFact, ...]:
    """List the built-in datasets, for `fedsample list datasets`, without loading them."""
    return _FACTS


def read_builtin(name: str | None) -> Table:
    """Load a built-in dataset by name.

    Raises:
        DataError: if there is no such set (names the nearest and lists all), or scikit-learn is not installed.
    """
    facts = {fact.name: fact for fact in _FACTS}
    if name is None or name not in facts:
        raise DataError(
            f"there is no built-in dataset {name!r}.{nearest(name or '', facts)} Expected one of {', '.join(facts)}; "
            'for your own data set data.kind = "npz", "csv" or "parquet" and data.file'
        )
    try:
        import sklearn.datasets
    except ModuleNotFoundError as error:
        raise DataError(
            f"the built-in dataset {name!r} comes with scikit-learn, which is not installed here: pip install "
            "scikit-learn, or give this machine a file of its own"
        ) from error

    fact = facts[name]
    bunch = getattr(sklearn.datasets, f"load_{name}")()
    x = np.asarray(bunch.data, dtype=np.float64)
    return Table(
        name=name,
        x=x / 16.0 if name == "digits" else x,
        y=np.asarray(bunch.target, dtype=np.float64 if fact.task == "regression" else np.int64),
        feature_names=tuple(str(feature) for feature in bunch.feature_names),
        task=fact.task,
        test_rows=fact.test_rows,
        standardize=name != "digits",
    )
