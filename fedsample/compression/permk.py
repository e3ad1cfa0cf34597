r"""PermK: a common random permutation assigns each coordinate to one client.

    C_i(v)_j = n v_j  if coordinate j falls to client i in a common random permutation, else 0
    omega_i = n - 1;   (1/n) sum_i C_i(v_i) = v exactly when all v_i are equal to v.

Szlendak, Tyurin & Richtarik 2021 (arXiv 2110.03300). Every coordinate belongs to exactly one client in a round, so
the noises of different clients are negatively correlated: the variance of the mean is at most
(1/n) sum_i |v_i|^2 - |mean_i v_i|^2, where independent sparsifiers of the same size would leave (n - 1)/n^2 sum_i
|v_i|^2. That needs every client in every round: with one missing, its coordinates are lost, and the rest is not
unbiased for the sum of the others unless absences are corrected for.

Where n does not divide d, n ceil(d / n) slots are permuted of which the last ones hold no coordinate: those travel as
zeros, so that every client sends the same number of values and each coordinate still falls to one client, each with
probability 1/n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsample.compression.base import Independence, PacketKeys
from fedsample.compression.select import Selector
from fedsample.errors import ConfigError


@dataclass(frozen=True)
class PermK(Selector):
    """Client i's share of a common permutation, drawn anew for each chain and round.

    Attributes:
        clients: number of clients n >= 1.
    """

    clients: int

    name: ClassVar[str] = "permk"
    kind: ClassVar[Literal["unbiased", "contractive"]] = "unbiased"
    summary: ClassVar[str] = "ceil(d/n) values of a common permutation's share; indices from the shared key"
    constant: ClassVar[str] = "omega = n - 1"
    formula: ClassVar[str] = "32 d/n"
    independence: ClassVar[Independence] = "partition"
    everyone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise ConfigError(f"compressor permk: clients = {self.clients}; give the number of clients, at least 1")

    def count(self, d: int) -> int:
        """Slots per client, ceil(d / n)."""
        return -(-d // self.clients)

    def omega(self, d: int) -> float:
        """One client's own constant n - 1."""
        return self.clients - 1.0

    def scale(self, d: int) -> float:
        """The factor n that makes it unbiased."""
        return float(self.clients)

    def inclusion(self, d: int) -> float:
        """The probability 1 / n that a coordinate falls to this client."""
        return 1.0 / self.clients

    def support(self, keys: PacketKeys, d: int) -> Tensor:
        """Coordinates (..., K) of this client; d marks a slot without one.

        Raises:
            ConfigError: if the keys do not say which client this is, or it is not one of the n.
        """
        n, k = self.clients, self.count(d)
        if keys.client is None or keys.chain is None:
            raise ConfigError("compressor permk: the keys must name client and chain; make them with LinkKeys")
        client = torch.as_tensor(keys.client, device=keys.own.device)
        if bool(((client < 0) | (client >= n)).any()):
            raise ConfigError(f"compressor permk: client {client.max().item()} of {n}; give the true number of clients")
        chains = keys.common.fold("permk").fold(keys.chain).fold(keys.round)
        shape = keys.own.shape
        if not shape and not chains.shape:  # one client's share of one permutation, as a device asks for
            first = int(client) * k
            return chains.permuted(n * k, first, first + k).clamp_(max=d)
        slots = chains.permutation(n * k).clamp_(max=d)  # (chains, n k)
        shares = slots.view(*chains.shape, n, k).expand(*shape, n, k)
        wanted = client.expand(shape)[..., None, None].expand(*shape, 1, k)
        return shares.gather(-2, wanted).squeeze(-2)

    def select(self, vector: Tensor, keys: PacketKeys) -> Tensor:
        """The client's share; it does not depend on the vector."""
        indices = self.support(keys, vector.shape[-1])
        return indices.expand(*vector.shape[:-1], indices.shape[-1])

    def gather(self, vector: Tensor, indices: Tensor) -> Tensor:
        """Scaled values; zero in slots without a coordinate."""
        d = vector.shape[-1]
        values = vector.gather(-1, indices.clamp(max=d - 1)) * self.scale(d)
        return values.masked_fill_(indices >= d, 0.0)

    def place(self, values: Tensor, indices: Tensor, d: int) -> Tensor:
        """The values at their coordinates; those of slots without a coordinate are dropped."""
        dense = values.new_zeros((*values.shape[:-1], d + 1))
        return dense.scatter_(-1, indices, values)[..., :d].contiguous()

    def accumulate(self, memory: Tensor, values: Tensor, indices: Tensor) -> None:
        """Add in place; values of slots without a coordinate are dropped."""
        d = memory.shape[-1]
        memory.scatter_add_(-1, indices.clamp(max=d - 1), values.masked_fill(indices >= d, 0.0))

    def idealised_bits(self, d: int, dtype: torch.dtype) -> float:
        """Without the slots that hold no coordinate: b d / n."""
        return self.bits(d, dtype) / self.count(d) * d / self.clients
