"""Uplink estimators: how the sum of the clients' gradients reaches the server, and which combinations are sound."""

from __future__ import annotations

from fedsample.compression import Compressor
from fedsample.errors import ConfigError, UnsoundError
from fedsample.estimators.base import Memory, Oracle, ServerState, Turn, Uplink, Upload
from fedsample.estimators.dense import Dense
from fedsample.estimators.diana import Diana
from fedsample.estimators.marina import Marina

__all__ = [
    "Dense",
    "Diana",
    "Marina",
    "Memory",
    "Oracle",
    "ServerState",
    "Turn",
    "Uplink",
    "Upload",
    "build",
    "check",
    "table",
]

_UPLINKS: dict[str, type[Uplink]] = {"dense": Dense, "marina": Marina, "diana": Diana}


def build(name: str, compressor: Compressor, p: float | None = None) -> Uplink:
    """The uplink of a configuration.

    Raises:
        ConfigError: if the name is not known, or `p` is given to an uplink that tosses no coin.
        UnsoundError: if the compressor does not fit the uplink.
    """
    if name not in _UPLINKS:
        raise ConfigError(f"uplink {name!r} is not known; choose one of {', '.join(_UPLINKS)}")
    check(name, compressor)
    if name == "marina":
        return Marina(compressor, p)
    if p is not None:
        raise ConfigError(f"uplink.p = {p} is marina's synchronisation probability; {name} has none: leave it out")
    return _UPLINKS[name](compressor)


def check(name: str, compressor: Compressor) -> None:
    """Refuse an uplink around a compressor with which it targets another law.

    Raises:
        UnsoundError: with the reason and the nearest sound choice.
    """
    if name == "dense" and compressor.name != "identity":
        raise UnsoundError(
            f"uplink dense around {compressor.name}: compressing gradients without a memory heats the chain in "
            "proportion to the clients' disagreement; use uplink diana with this compressor, or compressor identity"
        )
    if name in ("marina", "diana") and compressor.kind != "unbiased":
        raise UnsoundError(
            f"uplink {name} around {compressor.name}: it needs an unbiased compressor, or its error never contracts; "
            "use randk or randblock"
        )


def table() -> list[dict[str, str]]:
    """The rows of `fedsample list estimators`: what each sends, and what it is sound with."""
    sound = {
        "dense": ("identity", "any; noise of order step under sampling", "none"),
        "marina": ("unbiased", "any of known probability; dense rounds wait for everyone", "2 in the step"),
        "diana": ("unbiased", "any of known probability", "2 in the step"),
    }
    return [
        {
            "name": name,
            "compressor": sound[name][0],
            "participation": sound[name][1],
            "compression bias": sound[name][2],
            "wire": each.summary,
            "reference": each.reference,
        }
        for name, each in _UPLINKS.items()
    ]
