"""Where chains stand between two rounds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedsample.estimators import ServerState


class State(NamedTuple):
    """Where C chains stand after `round` rounds.

    Attributes:
        round: rounds done.
        params: (C, d) positions z in the metric's coordinates.
        previous: (C, d) the positions at the last request.
        kernel: the sampler's own variables, such as momenta.
        uplink: the estimator's server half.
        applied: (n,) int64, the last round in which each client's upload was applied.
        epoch: of the clients' memories.
        seen: (C, d) what clients see of the positions, which a compressed downlink lets lag.
        reference: (C, d) where clients reduce the variance of their minibatches, if they do.
        resync: whether the next round must be a dense one of all clients, because one has lost its memory.
    """

    round: int
    params: Tensor
    previous: Tensor
    kernel: dict[str, Tensor]
    uplink: ServerState
    applied: Tensor
    epoch: int
    seen: Tensor
    reference: Tensor
    resync: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """The state as flat tensors, for a checkpoint."""
        return {
            "params": self.params,
            "previous": self.previous,
            "seen": self.seen,
            "reference": self.reference,
            "applied": self.applied,
            "counters": torch.tensor([self.round, self.epoch, int(self.resync)]),
            **{f"kernel.{name}": tensor for name, tensor in self.kernel.items()},
            **{f"uplink.{name}": tensor for name, tensor in self.uplink.items()},
        }

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], device: torch.device) -> State:
        """Back from `tensors`."""
        here = {name: tensor.to(device) for name, tensor in tensors.items()}
        counters = tensors["counters"].tolist()
        part = {
            prefix: {name.removeprefix(prefix): t for name, t in here.items() if name.startswith(prefix)}
            for prefix in ("kernel.", "uplink.")
        }
        return cls(
            counters[0],
            here["params"],
            here["previous"],
            part["kernel."],
            part["uplink."],
            here["applied"],
            counters[1],
            here["seen"],
            here["reference"],
            bool(counters[2]),
        )
