"""What is refused before anything runs: combinations that would not sample the posterior."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsample.config import Experiment
from fedsample.errors import ConfigError, UnsoundError
from fedsample.estimators.links import build_downlink, build_uplink

if TYPE_CHECKING:
    pass


def check(experiment: Experiment) -> None:
    """Refuse what would not sample the posterior.

    Raises:
        UnsoundError: with the reason and the nearest sound choice.
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
    """Whether rounds go on without devices that are slow."""
    quorum = experiment.fleet.quorum
    return not (isinstance(quorum, float) and quorum == 1.0)


def _check_devices(experiment: Experiment) -> None:
    """Refuse what real devices cannot do, and rounds without some of them where that changes the law."""
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
