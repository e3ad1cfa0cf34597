"""Problems whose rows are on devices: the server's, without rows, and each device's, with its own rows.

The server's problem has what the clients agreed on: parameters, layout, prior, and the functionals that need no rows. A
device's problem equals the simulation's client (`Clients.client`) bit for bit, and scores the rows that it holds out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedsample.data.base import FederatedData
from fedsample.data.device_files import Potential
from fedsample.data.schema import Schema
from fedsample.errors import ConfigError
from fedsample.problem import Problem, quadratic_problem, rows_problem

if TYPE_CHECKING:
    from fedsample.config import Experiment


def remote_problem(experiment: Experiment, agreed: Schema, clients: int) -> Problem:
    """Build the server's problem: `clients` clients without rows.

    Args:
        experiment: the configuration; the model and the prior are used, the data are not.
        agreed: what the clients agreed on (`data.device_files.agreed_schema`).
        clients: number of clients n, at least 1.

    Raises:
        ConfigError: if there are no clients, or the model does not fit the schema.
        DataError: if the schema is a single client's own, not a merged one.
    """
    if clients < 1:
        raise ConfigError(f"a federation of {clients} clients, expected at least 1: wait for devices to register")
    if (agreed.kind == "quadratic") != (experiment.model.name == "quadratic"):
        raise ConfigError(
            f'the clients hold {agreed.kind}, but the experiment has model.name = "{experiment.model.name}": a '
            'quadratic goes with "quadratic", rows with any other model'
        )
    if agreed.kind == "quadratic":
        zeros = np.zeros((clients, *agreed.shape))
        return quadratic_problem(experiment, zeros, zeros)
    x, y = np.zeros((0, *agreed.row_shape)), np.zeros(0, dtype=np.float64 if agreed.classes is None else np.int64)
    data = FederatedData(
        name="the devices' data",
        x=x,
        y=y,
        offsets=np.zeros(clients + 1, dtype=np.int64),
        x_test=x,
        y_test=y,
        classes=agreed.classes,
        feature_names=agreed.feature_names if agreed.features else (),
        class_names=agreed.class_names,
    )
    return rows_problem(experiment, data)


def device_problem(experiment: Experiment, share: FederatedData | Potential) -> Problem:
    """Build a device's problem: one client, and the rows that it holds out.

    Args:
        experiment: the server's configuration.
        share: this device's data in the agreed form, standardised if that was agreed.

    Raises:
        ConfigError: if the model does not fit the data, or there is more than one client.
    """
    if isinstance(share, Potential):
        return quadratic_problem(experiment, share.lam, share.a)
    if share.clients != 1:
        raise ConfigError(f"got the rows of {share.clients} clients, expected those of this device alone")
    return rows_problem(experiment, share)
