"""The server's half of sampling: samplers, the driver of a round, client sampling, schedules and stability.

`strategies.flower` offers the same as a Flower strategy; it is imported only where Flower is used.
"""

if __name__ != "fedsample.strategies":
    raise ImportError(f"import this package as fedsample.strategies, not as {__name__}: it would exist twice")

from fedsample.strategies.baoab import Baoab
from fedsample.strategies.base import Sampler
from fedsample.strategies.cohort import Cohort
from fedsample.strategies.divergence import Stability
from fedsample.strategies.driver import Driver
from fedsample.strategies.langevin import Langevin
from fedsample.strategies.state import State

__all__ = ["SAMPLERS", "Baoab", "Cohort", "Driver", "Langevin", "Sampler", "Stability", "State", "table"]

SAMPLERS: dict[str, type[Sampler]] = {"langevin": Langevin, "baoab": Baoab}


def table() -> list[dict[str, str]]:
    """The rows of `fedsample list samplers`."""
    return [{"name": name, "update": each.rule, "reference": each.reference} for name, each in SAMPLERS.items()]
