r"""Low rank: parameter matrices by one power iteration (PowerSGD).

For each matrix M (m, n) with a keyed Gaussian start G (n, r), drawn anew for each vector,

    P = orthonormal basis of M G,     Q = M^T P,     C(M) = P Q^T = P P^T M.

Vogels, Karimireddy & Jaggi, NeurIPS 2019 (arXiv 1905.13727), without their warm start. Contractive with
alpha = r / min(m, n) in expectation over G: with A = M^T M and Pi_G the projection on the range of G,
|P^T M|^2 = tr((G^T A G)^-1 G^T A^2 G) >= tr((G^T G)^-1 G^T A G) = tr(Pi_G A), since A Pi_G A <= A^2, and
E Pi_G = (r / n) I; on the row space of M, of rank k <= min(m, n), the same holds with r / k. A truncated singular value
decomposition has the same worst case and costs far more.

A matrix that r (m + n) numbers would not shorten (every vector, such as a bias) travels whole. Products of matrices
round differently alone and within a batch: equal to about the last bit, not bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsample.compression.base import (
    Compressor,
    Independence,
    Packet,
    PacketKeys,
    contractive_only,
    float_bits,
    values_from_bytes,
    values_to_bytes,
)
from fedsample.errors import ConfigError


class LowRank(Compressor):
    """Rank-r factors of each parameter matrix.

    Args:
        rank: r >= 1, at most min(m, n) of the largest matrix.
        blocks: the matrices as flat positions, int64 (m, n) each, together all d; as `Clients.blocks()` gives them.

    Raises:
        ConfigError: if the rank fits no matrix, or the blocks do not cover 0, ..., d - 1 once each.
    """

    name: ClassVar[str] = "lowrank"
    kind: ClassVar[Literal["unbiased", "contractive"]] = "contractive"
    summary: ClassVar[str] = "factors P (m, r) and Q (n, r) of each matrix; small ones whole"
    constant: ClassVar[str] = "alpha = min r/min(m, n)"
    formula: ClassVar[str] = "32 r (m + n) per matrix"
    independence: ClassVar[Independence] = "independent"

    def __init__(self, rank: int, blocks: Sequence[Tensor]) -> None:
        largest = max((min(block.shape) for block in blocks), default=0)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= largest:
            shapes = ", ".join(str(tuple(block.shape)) for block in blocks) or "none"
            raise ConfigError(
                f"compressor lowrank: rank = {rank!r} of matrices {shapes}; choose an integer in 1..{max(largest, 1)}, "
                "the smaller side of the largest matrix"
            )
        self.rank = rank
        self.blocks = tuple(blocks)
        flat = torch.cat([block.flatten() for block in blocks])
        self._d = len(flat)
        if not torch.equal(torch.sort(flat).values, torch.arange(self._d, device=flat.device)):
            raise ConfigError("compressor lowrank: the blocks must hold each position once; see Clients.blocks()")

    def _factored(self, block: Tensor) -> bool:
        m, n = block.shape
        return self.rank <= min(m, n) and self.rank * (m + n) < m * n

    def _sizes(self) -> list[int]:
        return [
            self.rank * (block.shape[0] + block.shape[1]) if self._factored(block) else block.numel()
            for block in self.blocks
        ]

    def count(self, d: int) -> int:
        """Number of values that travel: r (m + n) for each factored matrix, m n for the others.

        Raises:
            ConfigError: if the matrices do not hold d parameters together.
        """
        if d != self._d:
            raise ConfigError(
                f"compressor lowrank: its matrices hold {self._d} parameters, the vector {d}; give the model's blocks"
            )
        return sum(self._sizes())

    def omega(self, d: int) -> float:
        """Raise `ConfigError`: it is biased."""
        raise contractive_only(self.name)

    def alpha(self, d: int) -> float:
        """Smallest r / min(m, n) of the factored matrices, in expectation over the start; 1 if there are none."""
        self.count(d)
        return min((self.rank / min(block.shape) for block in self.blocks if self._factored(block)), default=1.0)

    def compress(self, vector: Tensor, keys: PacketKeys) -> Packet:
        """P and Q of each matrix, row by row, one after the other."""
        self.count(vector.shape[-1])
        lead = vector.shape[:-1]
        parts = []
        for number, block in enumerate(self.blocks):
            values = vector[..., block.flatten().to(vector.device)]
            if not self._factored(block):
                parts.append(values)
                continue
            matrix = values.view(*lead, *block.shape)
            start = keys.own.fold("lowrank").fold(number).normal(block.shape[1] * self.rank, vector.dtype)
            image = matrix @ start.view(*start.shape[:-1], block.shape[1], self.rank)
            basis = _orthonormal(image)
            parts += [basis.flatten(-2), (matrix.mT @ basis).flatten(-2)]
        return Packet(torch.cat(parts, dim=-1), None)

    def decompress(self, packet: Packet, d: int) -> Tensor:
        """P Q^T in the positions of each matrix, summed over the rank in order."""
        lead = packet.values.shape[:-1]
        out = packet.values.new_empty((*lead, d))
        for block, values in zip(self.blocks, torch.split(packet.values, self._sizes(), dim=-1), strict=True):
            if self._factored(block):
                m, n = block.shape
                basis = values[..., : m * self.rank].reshape(*lead, m, self.rank)
                factor = values[..., m * self.rank :].reshape(*lead, n, self.rank)
                matrix = basis[..., :, None, 0] * factor[..., None, :, 0]
                for r in range(1, self.rank):
                    matrix = matrix + basis[..., :, None, r] * factor[..., None, :, r]
                values = matrix.flatten(-2)
            out[..., block.flatten().to(out.device)] = values
        return out

    def bits(self, d: int, dtype: torch.dtype) -> int:
        """All factors, uncompressed."""
        return float_bits(dtype) * self.count(d)

    def to_bytes(self, packet: Packet) -> bytes:
        """The factors."""
        return values_to_bytes(packet.values)

    def parse(self, data: bytes, d: int, dtype: torch.dtype) -> Packet:
        """The factors."""
        return Packet(values_from_bytes(data, self.count(d), dtype), None)


def _orthonormal(image: Tensor) -> Tensor:
    """An orthonormal basis (..., m, r) of the columns, completed where they are dependent; NaN stays NaN."""
    finite = torch.isfinite(image).all(-1, keepdim=True).all(-2, keepdim=True)
    basis = torch.linalg.qr(torch.where(finite, image, 0.0).double()).Q.to(image.dtype)
    return torch.where(finite, basis, torch.nan)
