r"""Compressors built from others: a selection whose kept values are quantised, and scaling to a contraction.

`Composed(outer, inner)` sends inner's packet of outer's K kept values. With Q the selection, constants at K:

    outer unbiased w1, inner unbiased w2:        unbiased, omega = (1 + w1)(1 + w2) - 1
    outer TopK a1, inner contractive a2:         contractive, alpha = a1 a2
    outer TopK a1, inner unbiased w2 < 1:        contractive, alpha = a1 (1 - w2)

(|v - inner(Qv)|^2 = |v - Qv|^2 + |Qv - inner(Qv)|^2, since TopK keeps entries as they are.) No constant is known of an
unbiased selection around a contraction, and such a pair is refused. `Scaled(inner)` is C / (1 + omega), contractive
with alpha = 1 / (1 + omega), since E|C|^2 <= (1 + omega)|v|^2; Richtarik, Sokolov & Fatkhullin, NeurIPS 2021 (arXiv
2106.05203).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsample.compression.base import Compressor, Packet, PacketKeys, contractive_only
from fedsample.compression.lowrank import LowRank
from fedsample.compression.select import Selector, required_indices
from fedsample.errors import ConfigError, DataError


class Composed(Compressor):
    """A quantiser on the kept values of a selection; see the module's table of constants.

    Args:
        outer: RandK, RandBlock, PermK or TopK.
        inner: Identity, QSGD, Natural, Bfloat16, ScaledSign or a Scaled one.

    Raises:
        ConfigError: if the pair is of another form, or its constant is not known.
    """

    def __init__(self, outer: Compressor, inner: Compressor) -> None:
        pair = f"{outer.name}+{inner.name}"
        core = inner.inner if isinstance(inner, Scaled) else inner
        if not isinstance(outer, Selector) or isinstance(core, Selector | Composed | LowRank):
            raise ConfigError(
                f"compressor {pair}: a composition is a selection (randk, randblock, permk, topk) and then a quantiser "
                "(qsgd, natural, bf16, sign) of the kept values, such as randk+natural"
            )
        if outer.kind == "unbiased" and inner.kind == "contractive":
            raise ConfigError(
                f"compressor {pair}: no constant is known of an unbiased selection around a contraction; use an "
                f"unbiased quantiser such as {outer.name}+natural, or topk+{inner.name}"
            )
        self.outer, self.inner = outer, inner
        self.name, self.kind = pair, outer.kind  # type: ignore[misc]
        self.summary = f"{outer.summary}; the values as {inner.name}: {inner.summary}"  # type: ignore[misc]
        self.constant = f"{outer.constant} and {inner.constant}"  # type: ignore[misc]
        self.formula = f"{outer.formula}, values by {inner.formula}"  # type: ignore[misc]
        self.independence, self.everyone = outer.independence, outer.everyone  # type: ignore[misc]

    def count(self, d: int) -> int:
        """Number of values that `inner` sends of the kept ones."""
        return self.inner.count(self.outer.count(d))

    def omega(self, d: int) -> float:
        """(1 + w1)(1 + w2) - 1."""
        if self.kind == "contractive":
            raise contractive_only(self.name)
        return (1 + self.outer.omega(d)) * (1 + self.inner.omega(self.outer.count(d))) - 1

    def alpha(self, d: int) -> float:
        """a1 a2, or a1 (1 - w2).

        Raises:
            ConfigError: if inner is unbiased with w2 >= 1: then the pair need not contract.
        """
        if self.kind == "unbiased":
            return super().alpha(d)
        k = self.outer.count(d)
        if self.inner.kind == "contractive":
            return self.outer.alpha(d) * self.inner.alpha(k)
        loss = self.inner.omega(k)
        if loss >= 1:
            raise ConfigError(
                f"compressor {self.name}: omega = {loss:g} of {self.inner.name} at K = {k} must be below 1, or "
                f"the pair need not contract; use more levels, or {self.outer.name}+scaled-{self.inner.name}"
            )
        return self.outer.alpha(d) * (1 - loss)

    def typical(self, d: int) -> float:
        """Product of both, if both are unbiased; for topk, inner's loss lengthens the lag of outer."""
        if self.kind == "contractive":
            return 1 / (1 + (1 / self.outer.typical(d) - 1) * self.outer.alpha(d) / self.alpha(d))
        return self.outer.inclusion(d) * self.inner.typical(self.outer.count(d))

    def lags(self, squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Lags of `outer`, lengthened by the loss of `inner`."""
        if self.kind == "unbiased":
            return super().lags(squares)
        d = len(squares)
        result: NDArray[np.float64] = self.outer.lags(squares) * (self.outer.alpha(d) / self.alpha(d))
        return result

    def compress(self, vector: Tensor, keys: PacketKeys) -> Packet:
        """Select with `outer`, compress the kept values with `inner`."""
        d = vector.shape[-1]
        if self.kind == "contractive":
            self.alpha(d)
        indices = self.outer.select(vector, keys)
        packet = self.inner.compress(self.outer.gather(vector, indices), keys.inner())
        return packet._replace(indices=indices, length=d)

    def support(self, keys: PacketKeys, d: int) -> Tensor | None:
        """As for `outer`."""
        return self.outer.support(keys, d)

    def decompress(self, packet: Packet, d: int) -> Tensor:
        """The quantised values at their coordinates, zero elsewhere."""
        return self.outer.place(self._values(packet, d), required_indices(packet), d)

    def add_to(self, memory: Tensor, packet: Packet, scale: float) -> None:
        """Add at the kept coordinates only."""
        self.outer.accumulate(memory, self._values(packet, memory.shape[-1]) * scale, required_indices(packet))

    def _values(self, packet: Packet, d: int) -> Tensor:
        return self.inner.decompress(packet._replace(indices=None), self.outer.count(d))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Packet:
        """Empty packet of `inner`, at the first K coordinates."""
        packet = self.inner.empty((*shape[:-1], self.outer.count(shape[-1])), dtype, device)
        return packet._replace(indices=self.outer.empty_indices(shape, device), length=shape[-1])

    def bits(self, d: int, dtype: torch.dtype) -> int:
        """Bits of `inner` for K values, plus the coordinates of `outer` if they travel."""
        return self.inner.bits(self.outer.count(d), dtype) + 8 * self.outer.index_bytes(d)

    def idealised_bits(self, d: int, dtype: torch.dtype) -> float:
        """Idealised bits of `inner` for K values, plus the coordinates of `outer` if they travel."""
        k = self.outer.count(d)
        identity = torch.empty((), dtype=dtype).element_size() * 8 * k
        coordinates = self.outer.idealised_bits(d, dtype) - identity if self.outer.index_bytes(d) else 0.0
        return self.inner.idealised_bits(k, dtype) + coordinates

    def to_bytes(self, packet: Packet) -> bytes:
        """Bytes of `inner`, then the coordinates of `outer` if they travel."""
        return self.inner.to_bytes(packet._replace(indices=None)) + self.outer.pack_indices(packet)

    def parse(self, data: bytes, d: int, dtype: torch.dtype) -> Packet:
        """Decode the packet of `inner`, and the coordinates if they travel."""
        k = self.outer.count(d)
        size = self.inner.bits(k, dtype) // 8
        if len(data) != size + self.outer.index_bytes(d):
            raise DataError(
                f"a packet of {len(data)} bytes, expected {size + self.outer.index_bytes(d)} of {self.name}"
            )
        packet = self.inner.parse(data[:size], k, dtype)
        return packet._replace(indices=self.outer.parse_indices(data[size:], d), length=d)


class Scaled(Compressor):
    """An unbiased compressor scaled by 1 / (1 + omega), which makes it contractive; the bytes are the same.

    Args:
        inner: an unbiased compressor.

    Raises:
        ConfigError: if it is contractive already.
    """

    kind = "contractive"

    def __init__(self, inner: Compressor) -> None:
        if inner.kind != "unbiased":
            raise ConfigError(
                f"compressor scaled-{inner.name}: {inner.name} is contractive already: leave out `scaled-`"
            )
        self.inner = inner
        self.name = f"scaled-{inner.name}"  # type: ignore[misc]
        self.summary, self.formula = inner.summary, inner.formula  # type: ignore[misc]
        self.constant = f"alpha = 1/(1 + omega), {inner.constant}"  # type: ignore[misc]
        self.independence, self.everyone = inner.independence, inner.everyone  # type: ignore[misc]

    def count(self, d: int) -> int:
        """As for `inner`."""
        return self.inner.count(d)

    def omega(self, d: int) -> float:
        """Raise `ConfigError`: scaled, it is biased."""
        raise contractive_only(self.name)

    def alpha(self, d: int) -> float:
        """1 / (1 + omega)."""
        return 1.0 / (1.0 + self.inner.omega(d))

    def compress(self, vector: Tensor, keys: PacketKeys) -> Packet:
        """Compress with `inner`; the receiver scales."""
        return self.inner.compress(vector, keys)

    def support(self, keys: PacketKeys, d: int) -> Tensor | None:
        """As for `inner`."""
        return self.inner.support(keys, d)

    def decompress(self, packet: Packet, d: int) -> Tensor:
        """The vector of `inner`, times alpha."""
        return self.inner.decompress(packet, d) * self.alpha(d)

    def add_to(self, memory: Tensor, packet: Packet, scale: float) -> None:
        """Add as `inner` does, times alpha."""
        self.inner.add_to(memory, packet, scale * self.alpha(memory.shape[-1]))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Packet:
        """As for `inner`."""
        return self.inner.empty(shape, dtype, device)

    def bits(self, d: int, dtype: torch.dtype) -> int:
        """As for `inner`."""
        return self.inner.bits(d, dtype)

    def idealised_bits(self, d: int, dtype: torch.dtype) -> float:
        """As for `inner`."""
        return self.inner.idealised_bits(d, dtype)

    def to_bytes(self, packet: Packet) -> bytes:
        """As for `inner`."""
        return self.inner.to_bytes(packet)

    def parse(self, data: bytes, d: int, dtype: torch.dtype) -> Packet:
        """As for `inner`."""
        return self.inner.parse(data, d, dtype)
