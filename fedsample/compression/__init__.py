"""Compressors: what a vector loses on the wire, by how much, and what it costs."""

from __future__ import annotations

from fedsample.compression.base import Compressor, LinkKeys, Packet, PacketKeys, values_from_bytes, values_to_bytes
from fedsample.compression.identity import Identity
from fedsample.compression.sparsify import RandBlock, RandK
from fedsample.errors import ConfigError

__all__ = [
    "Compressor",
    "Identity",
    "LinkKeys",
    "Packet",
    "PacketKeys",
    "RandBlock",
    "RandK",
    "build",
    "table",
    "values_from_bytes",
    "values_to_bytes",
]

_SPARSIFIERS: dict[str, type[RandK] | type[RandBlock]] = {"randk": RandK, "randblock": RandBlock}


def build(name: str, k: int | float) -> Compressor:
    """The compressor of a configuration; `k` counts coordinates (int) or is a fraction of them (float).

    Raises:
        ConfigError: if the name is not known.
    """
    if name == "identity":
        return Identity()
    if name not in _SPARSIFIERS:
        raise ConfigError(f"compressor {name!r} is not known; choose one of identity, {', '.join(_SPARSIFIERS)}")
    return _SPARSIFIERS[name](k)


def table() -> list[dict[str, str]]:
    """The rows of `fedsample list compressors`."""
    constants = {"identity": "omega = 0", "randk": "omega = d/K - 1", "randblock": "omega = d/K - 1"}
    bits = {"identity": "32 d", "randk": "32 K", "randblock": "32 K"}
    return [
        {
            "name": each.name,
            "kind": each.kind,
            "constant": constants[each.name],
            "bits (float32)": bits[each.name],
            "wire": each.summary,
        }
        for each in (Identity, RandK, RandBlock)
    ]
