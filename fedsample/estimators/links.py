"""The links of an experiment: uplink and downlink, each around its compressor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsample import compression
from fedsample.compression import Compressor
from fedsample.estimators import soundness
from fedsample.estimators.base import Uplink
from fedsample.estimators.downlink import DenseDownlink, Downlink, Ef21P

if TYPE_CHECKING:
    from fedsample.config import DownlinkConfig, Experiment, UplinkConfig
    from fedsample.targets import Clients


@dataclass(frozen=True)
class Links:
    """Both links of an experiment: built once, used by all that compress, decompress or count bits.

    Attributes:
        uplink: the gradient estimator.
        downlink: what clients see of the iterate.
    """

    uplink: Uplink
    downlink: Downlink = field(default_factory=DenseDownlink)

    def packet_bits(self, chains: int, d: int, dtype: torch.dtype) -> float:
        """Expected bits per client and round of the uplink, synchronising rounds included."""
        p = self.uplink.sync_probability(2, d)
        return (1 - p) * self.uplink.bits(chains, 0, d, dtype) + p * self.uplink.bits(chains, chains, d, dtype)


def build_links(experiment: Experiment, clients: Clients) -> Links:
    """Build both links for these clients and their parameter matrices.

    Raises:
        UnsoundError: if one does not fit its compressor or the participation.
        ConfigError: if a setting is out of range.
    """
    blocks = clients.blocks() if "lowrank" in experiment.uplink.compressor + experiment.downlink.compressor else None
    uplink = build_uplink(experiment, clients.n, blocks)
    downlink = build_downlink(experiment, clients.n, blocks, clients.device)
    for compressor in (uplink.compressor, *([downlink.compressor] if isinstance(downlink, Ef21P) else [])):
        compressor.inclusion(clients.d)  # refuses settings that do not fit d
    return Links(uplink, downlink)


def build_uplink(experiment: Experiment, clients: int | None = None, blocks: Sequence[Tensor] | None = None) -> Uplink:
    """Build the uplink; before the data are read, leave out `clients` and `blocks` to check soundness only.

    Raises:
        UnsoundError: if it does not fit its compressor or the participation.
    """
    section, fleet = experiment.uplink, experiment.fleet
    present = fleet.participation == 1.0 and isinstance(fleet.participation, float)
    if isinstance(fleet.participation, int):  # the number of clients may be known from the data only
        present = clients is None or fleet.participation == clients
    return soundness.build(
        section.name,
        _compressor(section, clients or experiment.data.clients, blocks),
        section.p,
        anchored=section.variance_reduction != "none",
        everyone=present and fleet.loss == 0 and fleet.dropout == 0,
    )


def build_downlink(
    experiment: Experiment,
    clients: int | None = None,
    blocks: Sequence[Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> Downlink:
    """Build the downlink; arguments as for `build_uplink`.

    Raises:
        UnsoundError: if it does not fit its compressor.
    """
    section = experiment.downlink
    inner = _compressor(section, clients or experiment.data.clients, blocks)
    return soundness.build_downlink(section.name, inner, experiment.seed, experiment.chains, device)


def refresh_of(experiment: Experiment) -> int | None:
    """Rounds after which the reference of variance reduction moves; 0: never; None: no variance reduction."""
    section = experiment.uplink
    if experiment.batch_size is None or section.variance_reduction == "none":
        return None
    return section.refresh if section.variance_reduction == "svrg" else 0


def _compressor(section: UplinkConfig | DownlinkConfig, clients: int, blocks: Sequence[Tensor] | None) -> Compressor:
    if blocks is None:  # soundness does not depend on the matrices: any one does, with rank 1
        rank, blocks = 1, [torch.arange(1).unsqueeze(0)]
    else:
        rank = section.rank
    return compression.build(
        section.compressor, section.k, levels=section.levels, rank=rank, clients=clients, blocks=blocks
    )
