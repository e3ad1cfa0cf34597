"""State of the chains between two rounds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedsample.estimators import ServerState


class State(NamedTuple):
    """State of C chains after `round` rounds.

    Attributes:
        round: number of rounds done.
        params: (C, d) positions z in the metric's coordinates.
        previous: (C, d) the positions at the last request.
        kernel: the sampler's own variables, such as momenta.
        uplink: the estimator's server state.
        applied: (n,) int64, the last round in which each client's upload was applied.
        epoch: number of times that the clients' memories were started anew.
        seen: (C, d) the positions as clients see them; they lag behind `params` over a compressed downlink.
        reference: (C, d) reference point of the minibatches' variance reduction, if there is any.
        resync: whether the next round must be dense, with all clients, because one has lost its memory.
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
        """Flatten the state into named tensors, for a checkpoint."""
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
        """Restore a state from what `tensors` returned."""
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
