"""A device's data in one run: read, fitted to the agreed schema, standardised, used as a client, and scored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from fedsample.clients.message_handler import MessageHandler
from fedsample.data.device_files import Potential, read_device
from fedsample.data.schema import Schema
from fedsample.data.standardize import Scale, first_sums, second_sums
from fedsample.diagnostics.counts import Evaluator
from fedsample.errors import DataError
from fedsample.models import task_of
from fedsample.problem.remote import device_problem, remote_problem

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.data import FederatedData


class DataSource(NamedTuple):
    """Where a device's rows come from; see `fedsample.data.device_files.read_device`."""

    data: str | None = None
    target: str | None = None
    partition: int | None = None
    partitions: int | None = None


class DeviceData:
    """The data of one device in one run.

    Args:
        experiment: the server's configuration, with this device as `fleet.device`.
        index: the client's index.
        n: number of clients.
        source: where the rows come from.

    Raises:
        ConfigError, DataError: if the rows cannot be read.
    """

    def __init__(self, experiment: Experiment, index: int, n: int, source: DataSource) -> None:
        self.experiment, self.index, self.n = experiment, index, n
        self._own = read_device(experiment, index, task=task_of(experiment.model.name), **source._asdict())
        self._agreed: Schema | None = None
        self._share: FederatedData | Potential | None = None
        self._evaluator: Evaluator | None = None

    @property
    def schema(self) -> str:
        """The schema of the data, as JSON."""
        return self._own.schema.to_json()

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the data and of their column names and labels; it never leaves the device."""
        own = self._own
        arrays = [own.lam, own.a] if isinstance(own, Potential) else list(own.arrays)
        found = hashlib.sha256(self.schema.encode())
        for array in arrays:
            found.update(f"{array.dtype.str}{array.shape}".encode())
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()[:32]

    def fit(self, schema: str) -> None:
        """Convert the rows to the columns, categories and labels that all devices agreed on."""
        self._agreed = Schema.from_json(schema)
        self._share = self._own.fit(self._agreed)

    def first_sums(self) -> Tensor:
        """Return the counts and sums from which the means are made."""
        return first_sums(self._rows())

    def second_sums(self, first: Tensor) -> Tensor:
        """Return the sums of squares about the means."""
        return second_sums(self._rows(), first)

    def finish(self, first: Tensor | None, second: Tensor | None) -> MessageHandler:
        """Standardise the rows, if sums are given, and make the client."""
        if self._share is None or self._agreed is None:
            raise DataError("the scale before the schema: the server has lost track of this device")
        share = self._share
        if first is not None and second is not None:
            share = Scale.of(first, second).apply(self._rows())
        mine = device_problem(self.experiment, share)
        self._evaluator = Evaluator(mine)
        everyone = remote_problem(self.experiment, self._agreed, self.n)
        return MessageHandler(self.experiment, everyone, mine.clients, self.index, self.n)

    def score(self, draws: Tensor) -> Tensor:
        """Add draws (S, d) to the predictions of the held-out rows -> counts that sum over devices."""
        self._judge().see(draws)
        return self._judge().counts()

    def state(self) -> dict[str, Tensor]:
        """The accumulated predictions, as tensors."""
        return self._judge().state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state`; an empty one is that before any draw."""
        self._evaluator = Evaluator(self._judge().problem)
        if state:
            self._evaluator.restore(dict(state))

    def _rows(self) -> FederatedData:
        if self._share is None or isinstance(self._share, Potential):
            raise DataError("sums over rows were asked of a device that holds none")
        return self._share

    def _judge(self) -> Evaluator:
        if self._evaluator is None:
            raise DataError("draws before the data were agreed on: the server has lost track of this device")
        return self._evaluator
