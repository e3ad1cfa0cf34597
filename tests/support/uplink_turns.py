"""Clients on springs, and turns of an uplink on them."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsample.compression import LinkKeys
from fedsample.estimators import Memory, Turn, Uplink, Upload
from fedsample.random import key

CPU, FLOAT64 = torch.device("cpu"), torch.float64
N, C, D = 5, 2, 7


class Springs:
    """Gradients lam_i (x - a_i) of N quadratic clients; counts its evaluations, and adds keyed noise if not full."""

    def __init__(self, n: int = N, *, full: bool = True, round: int = 0, dtype: torch.dtype = FLOAT64) -> None:
        draws = key(1, purpose="springs").normal(2 * n * D, dtype).view(2, n, 1, D)
        self.curvature, self.center = draws[0].abs() + 0.5, 2 * draws[1]
        self.full, self.round, self.evaluations = full, round, 0
        self.rows = slice(None)

    def gradient(self, point: Tensor, *, full: bool = False) -> Tensor:
        self.evaluations += 1
        exact = self.curvature * (point.unsqueeze(0) - self.center)  # (n, C, d)
        if self.full or full:
            return exact
        clients, chains = torch.arange(len(exact)).unsqueeze(-1), torch.arange(point.shape[0])
        return exact + 10 * key(2, self.round, clients, chains, "minibatch").normal(D, point.dtype)


def points(round: int, chains: int = C, dtype: torch.dtype = FLOAT64) -> Tensor:
    """(C, d) a path that moves a little each round."""
    return 2 + 0.05 * key(3, round, chain=torch.arange(chains), purpose="points").normal(D, dtype)


def turn(
    round: int,
    *,
    n: int = N,
    sync: list[bool] | None = None,
    active: Tensor | None = None,
    applied: Tensor | int = 0,
    epoch: int = 0,
    previous: bool = True,
    dtype: torch.dtype = FLOAT64,
) -> Turn:
    return Turn(
        round=round,
        point=points(round, dtype=dtype),
        previous=points(round - 1, dtype=dtype) if previous and round > 1 else None,
        sync=None if sync is None else torch.tensor(sync),
        active=active,
        applied=applied,
        epoch=epoch,
        keys=LinkKeys(0, torch.arange(n), C, "uplink").at(round),
    )


def fresh(uplink: Uplink, n: int = N, dtype: torch.dtype = FLOAT64) -> Memory:
    return uplink.memory((n, C, D), dtype, CPU)


def never(n: int = N) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def row(upload: Upload, i: int) -> Upload:
    """Client i's upload out of a stack."""
    packet = upload.packet
    if packet is not None:
        packet = packet._replace(values=packet.values[i], indices=None if packet.indices is None else packet.indices[i])
    return Upload(packet, None if upload.dense is None else upload.dense[i])
