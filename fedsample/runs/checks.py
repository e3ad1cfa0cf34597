"""Checks before anything runs: settings that would not sample the posterior are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsample.config import Experiment
from fedsample.errors import ConfigError, UnsoundError
from fedsample.estimators.links import build_downlink, build_uplink

if TYPE_CHECKING:
    pass


def check(experiment: Experiment) -> None:
    """Refuse settings that would not sample the posterior, or that the fleet cannot carry out.

    Raises:
        UnsoundError: the posterior would not be sampled; with the reason and the nearest sound choice.
        ConfigError: faults are simulated in a fleet whose faults are real.
    """
    build_uplink(experiment)
    build_downlink(experiment)
    section = experiment.fleet
    if section.name == "grpc":
        _check_devices(experiment)
    if section.name == "flower" and (section.loss or section.dropout):
        raise ConfigError(
            'fleet.loss and fleet.dropout simulate faults in fleet "local"; Flower\'s are real: set both to 0'
        )


def allows_stragglers(experiment: Experiment) -> bool:
    """Whether rounds go on without slow devices."""
    quorum = experiment.fleet.quorum
    return not (isinstance(quorum, float) and quorum == 1.0)


def _check_devices(experiment: Experiment) -> None:
    """Refuse simulated faults on real devices, and a quorum that would change the posterior."""
    section, uplink = experiment.fleet, experiment.uplink.name
    if section.dropout or (section.loss and not allows_stragglers(experiment)):
        raise ConfigError(
            'fleet.loss and fleet.dropout simulate faults in fleet "local"; those of devices are real: set both to 0 '
            "(with a quorum, fleet.loss states how likely an answer is late)"
        )
    if allows_stragglers(experiment) and uplink not in ("diana", "ef21") and not section.loss:
        raise UnsoundError(
            f"fleet.quorum = {section.quorum}: without knowing how likely a device is late, {uplink} samples another "
            'posterior, because nothing stands in for who is missing; take uplink.name = "diana", whose memories do, '
            "or state that probability as fleet.loss"
        )
