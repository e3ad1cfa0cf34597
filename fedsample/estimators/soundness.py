"""Which estimator is sound with which compressor and participation: a table, and one function that checks it.

A combination outside the table samples another law or none; it is refused with the reason and the nearest sound choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fedsample.compression import Compressor
from fedsample.errors import ConfigError, UnsoundError
from fedsample.estimators.base import Uplink
from fedsample.estimators.dense import Dense
from fedsample.estimators.diana import Diana
from fedsample.estimators.direct import Direct
from fedsample.estimators.downlink import DenseDownlink, Downlink, Ef21P
from fedsample.estimators.ef21 import Ef21
from fedsample.estimators.marina import Marina

Need = Literal["identity", "unbiased", "contractive"]


@dataclass(frozen=True)
class Rule:
    """One row of the table: what a link is sound with.

    Attributes:
        link: the estimator's class.
        needs: the kind of compressor that it needs.
        why: what happens with another kind.
        instead: the nearest sound choice.
        participation: what it demands of the clients' participation.
        bias: order in the step of what compression adds to the variance.
        instead_of_contractive: the nearest sound choice for a contractive compressor, if it differs; empty: `instead`.
    """

    link: type[Uplink] | type[Downlink]
    needs: Need
    why: str
    instead: str
    participation: str
    bias: str
    instead_of_contractive: str = ""


RULES: dict[str, Rule] = {
    "dense": Rule(
        Dense,
        "identity",
        "it sends the gradient as it is, and a compressor without a memory heats the chain in proportion to the "
        "clients' disagreement",
        "use uplink diana with this compressor (direct, if that heating is wanted), or compressor identity",
        "any of known probability; sampling adds noise of order 1",
        "none",
        "use uplink ef21 with this compressor, or compressor identity",
    ),
    "direct": Rule(
        Direct,
        "unbiased",
        "the mean of the estimate would be another gradient, and the chain would sample another posterior",
        "use randk or qsgd, or uplink ef21 with this compressor",
        "any of known probability; of unknown probability it targets another posterior",
        "1, growing with the clients' disagreement (without it where variance_reduction is 'mode')",
    ),
    "marina": Rule(
        Marina,
        "unbiased",
        "its error would never contract between dense rounds",
        "use randk or randblock, or uplink ef21 with this compressor",
        "any of known probability; dense rounds wait for everyone",
        "2",
    ),
    "diana": Rule(
        Diana,
        "unbiased",
        "the memories would follow another gradient",
        "use randk or randblock, or uplink ef21 with this compressor",
        "any of known probability; absences that last heat more",
        "2",
    ),
    "ef21": Rule(
        Ef21,
        "contractive",
        "error feedback around an unbiased compressor of large omega diverges",
        "use topk, or the contractive version of this one: scaled-{name}",
        "any: absent clients keep their memories; round 1 waits for everyone",
        "1",
    ),
    "ef21-p": Rule(
        Ef21P,
        "contractive",
        "what clients see would drift away from the iterate",
        "use topk, or the contractive version of this one: scaled-{name}",
        "any: who comes back gets what was missed",
        "1",
    ),
}
UPLINKS = ("dense", "direct", "marina", "diana", "ef21")


def check(name: str, compressor: Compressor, *, everyone: bool = True) -> None:
    """Refuse a link around a compressor, or under a participation, with which it is unsound.

    Args:
        name: a name in `RULES`.
        compressor: the compressor that the link uses.
        everyone: whether all clients take part in every round.

    Raises:
        UnsoundError: with the reason and the nearest sound choice.
    """
    rule = RULES[name]
    side = "downlink" if issubclass(rule.link, Downlink) else "uplink"
    exact = compressor.name == "identity"
    fits = exact or (rule.needs != "identity" and compressor.kind == rule.needs)
    if compressor.everyone and (side == "downlink" or not everyone):
        other = {"identity": "identity", "unbiased": "randk", "contractive": "topk"}[rule.needs]
        present = "fleet.participation = 1.0 without loss and drop-outs, or " if fits and side == "uplink" else ""
        raise UnsoundError(
            f"{side} {name} around {compressor.name}: its packets are shares of one whole, so every client must be "
            f"heard in every round; use {present}compressor {other}"
        )
    if not fits:
        instead = rule.instead_of_contractive if compressor.kind == "contractive" else rule.instead
        articles = {"identity": "no", "unbiased": "an unbiased", "contractive": "a contractive"}
        kinds = f"it needs {articles[rule.needs]} compressor, not {articles[compressor.kind]} one: "
        raise UnsoundError(
            f"{side} {name} around {compressor.name}: {kinds}{rule.why}; "
            f"{(instead or rule.instead).format(name=compressor.name)}"
        )


def build(
    name: str, compressor: Compressor, p: float | None = None, *, anchored: bool = False, everyone: bool = True
) -> Uplink:
    """Build an uplink by name.

    Args:
        name: a name in `UPLINKS`.
        compressor: the compressor that the uplink uses.
        p: marina's synchronisation probability; None: its default, and for all other uplinks.
        anchored: whether direct subtracts the gradient at the mode.
        everyone: whether all clients take part in every round.

    Raises:
        ConfigError: if the name is not known, or `p` is given to an uplink other than marina.
        UnsoundError: if the compressor or the participation does not fit the uplink.
    """
    if name not in UPLINKS:
        raise ConfigError(f"uplink {name!r} is not known; choose one of {', '.join(UPLINKS)}")
    check(name, compressor, everyone=everyone)
    if name == "marina":
        return Marina(compressor, p)
    if p is not None:
        raise ConfigError(f"uplink.p = {p} is marina's synchronisation probability; {name} has none: leave it out")
    if name == "direct":
        return Direct(compressor, anchored)
    plain: dict[str, type[Uplink]] = {"dense": Dense, "diana": Diana, "ef21": Ef21}
    return plain[name](compressor)


def build_downlink(
    name: str, compressor: Compressor, seed: int, chains: int, device: torch.device | str = "cpu"
) -> Downlink:
    """Build a downlink by name.

    Raises:
        ConfigError: if the name is not known.
        UnsoundError: if the compressor does not fit.
    """
    if name == "dense":
        if compressor.name != "identity":
            raise UnsoundError(
                f"downlink dense around {compressor.name}: it sends the iterate as it is; use downlink ef21-p with "
                + (f"scaled-{compressor.name}" if compressor.kind == "unbiased" else "this compressor")
                + ", or compressor identity"
            )
        return DenseDownlink()
    if name != "ef21-p":
        raise ConfigError(f"downlink {name!r} is not known; choose dense or ef21-p")
    check(name, compressor)
    return Ef21P(compressor, seed, chains, device)


def table() -> list[dict[str, str]]:
    """Return the rows of `fedsample list estimators`: what each sends, and what it is sound with."""
    return [
        {
            "name": name,
            "link": "downlink" if issubclass(rule.link, Downlink) else "uplink",
            "compressor": rule.needs,
            "participation": rule.participation,
            "order of its bias": rule.bias,
            "wire": rule.link.summary,
            "reference": rule.link.reference,
        }
        for name, rule in RULES.items()
    ]
