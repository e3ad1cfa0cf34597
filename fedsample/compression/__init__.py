"""Compressors: lossy encodings of vectors, with their error constants and exact sizes on the wire."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedsample.compression.base import (
    Compressor,
    Independence,
    LinkKeys,
    Packet,
    PacketKeys,
    values_from_bytes,
    values_to_bytes,
)
from fedsample.compression.compose import Composed, Scaled
from fedsample.compression.identity import Identity
from fedsample.compression.lowrank import LowRank
from fedsample.compression.permk import PermK
from fedsample.compression.qsgd import QSGD
from fedsample.compression.rounding import Bfloat16, Natural
from fedsample.compression.select import Selector
from fedsample.compression.sign import ScaledSign
from fedsample.compression.sparsify import RandBlock, RandK
from fedsample.compression.topk import TopK
from fedsample.errors import ConfigError

__all__ = [
    "QSGD",
    "Bfloat16",
    "Composed",
    "Compressor",
    "Identity",
    "Independence",
    "LinkKeys",
    "LowRank",
    "Natural",
    "Packet",
    "PacketKeys",
    "PermK",
    "RandBlock",
    "RandK",
    "Scaled",
    "ScaledSign",
    "Selector",
    "TopK",
    "build",
    "table",
    "values_from_bytes",
    "values_to_bytes",
]

_SPARSIFIERS: dict[str, type[RandK] | type[RandBlock] | type[TopK]] = {
    "randk": RandK,
    "randblock": RandBlock,
    "topk": TopK,
}
_WITHOUT_SETTINGS: dict[str, type[Identity] | type[Natural] | type[ScaledSign] | type[Bfloat16]] = {
    "identity": Identity,
    "natural": Natural,
    "sign": ScaledSign,
    "bf16": Bfloat16,
}
_CLASSES: tuple[type[Compressor], ...] = (
    Identity,
    RandK,
    RandBlock,
    TopK,
    QSGD,
    Natural,
    ScaledSign,
    PermK,
    LowRank,
    Bfloat16,
)


def build(
    name: str,
    k: int | float | None = None,
    *,
    levels: int = 127,
    rank: int = 1,
    clients: int | None = None,
    blocks: Sequence[Tensor] | None = None,
) -> Compressor:
    """Build a compressor from its configured name and settings.

    Args:
        name: a name in `table`; `outer+inner` composes a selection and a quantiser (randk+natural, topk+bf16);
            `scaled-` before an unbiased one makes it contractive (scaled-randk, scaled-randk+qsgd, topk+scaled-qsgd).
        k: number of coordinates (int), or a fraction of them (float), for randk, randblock and topk.
        levels: s, for qsgd.
        rank: r, for lowrank.
        clients: number of clients n, for permk.
        blocks: the parameter matrices as flat positions, for lowrank.

    Raises:
        ConfigError: if the name is not known, what it needs is missing or out of range, or a composition has no known
            constant.
    """
    if name.startswith("scaled-"):
        return Scaled(build(name.removeprefix("scaled-"), k, levels=levels, rank=rank, clients=clients, blocks=blocks))
    if "+" in name:
        outer, inner = (
            build(part, k, levels=levels, rank=rank, clients=clients, blocks=blocks) for part in name.split("+", 1)
        )
        return Composed(outer, inner)
    if name in _WITHOUT_SETTINGS:
        return _WITHOUT_SETTINGS[name]()
    if name in _SPARSIFIERS:
        if k is None:
            raise ConfigError(f"compressor {name} needs k: an integer number of coordinates, or a fraction in (0, 1]")
        return _SPARSIFIERS[name](k)
    if name == "qsgd":
        return QSGD(levels)
    if name == "permk":
        if clients is None:
            raise ConfigError("compressor permk needs the number of clients: build('permk', clients=n)")
        return PermK(clients)
    if name == "lowrank":
        if blocks is None:
            raise ConfigError("compressor lowrank needs the parameter matrices: build('lowrank', blocks=...)")
        return LowRank(rank, blocks)
    known = ", ".join(each.name for each in _CLASSES)
    raise ConfigError(
        f"compressor {name!r} is not known; choose one of {known}; a selection and a quantiser compose "
        "(randk+natural), and scaled- makes an unbiased one contractive (scaled-randk)"
    )


def table() -> list[dict[str, str]]:
    """Return the rows of `fedsample list compressors`."""
    rows = [
        {
            "name": each.name,
            "kind": each.kind,
            "constant": each.constant,
            "bits (float32)": each.formula,
            "clients": each.independence,
            "wire": each.summary,
        }
        for each in _CLASSES
    ]
    unbiased = "omega = (1 + w1)(1 + w2) - 1, or alpha = a1 a2 of topk"
    pair = ("A+B", "as A", unbiased, "B's of A's K values", "as A", "a selection A, its values by the quantiser B")
    scaled = (
        "scaled-A",
        "contractive",
        "alpha = 1/(1 + omega)",
        "A's",
        "as A",
        "an unbiased A, shrunk by the receiver",
    )
    return rows + [dict(zip(rows[0], each, strict=True)) for each in (pair, scaled)]
