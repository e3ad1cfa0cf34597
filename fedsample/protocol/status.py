"""What clients report about themselves: their setup when greeted, and failures."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from fedsample.estimators import Uplink
from fedsample.version import __version__


def terms(uplink: Uplink, seed: int, clients: int, chains: int, d: int, dtype: torch.dtype) -> dict[str, int | str]:
    """List what server and clients must agree on before the first round; a client reports it when greeted."""
    compressor = uplink.compressor
    return {
        "fedsample": __version__,
        "uplink": f"{uplink.name}, {compressor.name}, {compressor.count(d)} values",
        "seed": seed,
        "clients": clients,
        "chains": chains,
        "parameters": d,
        "dtype": str(dtype).removeprefix("torch."),
    }


@dataclass(frozen=True)
class Failure:
    """A client's failure; it is sent as the reason of a Flower error.

    Attributes:
        client: its index; -1: not known.
        round: the round; -1: not known.
        stage: what it was doing.
        detail: its traceback.
    """

    client: int
    round: int
    stage: str
    detail: str

    def reason(self) -> str:
        """Convert to text."""
        return json.dumps({"fedsample": self.__dict__})

    @classmethod
    def of_reason(cls, reason: str | None, client: int, round: int) -> Failure:
        """Read from text; Flower's own errors become a failure in an unknown stage. A negative client is not known."""
        try:
            found = json.loads(reason or "")["fedsample"]
            named = client if client >= 0 else int(found["client"])
            return cls(named, round, str(found["stage"]), str(found["detail"]))
        except (ValueError, KeyError, TypeError):
            return cls(client, round, "answer", reason or "no reason given")
