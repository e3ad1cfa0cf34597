"""The server's half of sampling: samplers, the driver of a round, client sampling, schedules and stability.

`strategies.flower` offers the same as a Flower strategy; it is imported only where Flower is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __name__ != "fedsample.strategies":
    raise ImportError(f"import this package as fedsample.strategies, not as {__name__}: it would exist twice")

from fedsample.strategies.baoab import Baoab
from fedsample.strategies.base import Sampler
from fedsample.strategies.cohort import Cohort
from fedsample.strategies.divergence import Stability
from fedsample.strategies.driver import Driver
from fedsample.strategies.langevin import Langevin
from fedsample.strategies.sghmc import Sghmc
from fedsample.strategies.state import State
from fedsample.theory.base import StepTheory

if TYPE_CHECKING:
    from fedsample.config.sections import SamplerConfig

__all__ = [
    "SAMPLERS",
    "Baoab",
    "Cohort",
    "Driver",
    "Langevin",
    "Sampler",
    "Sghmc",
    "Stability",
    "State",
    "options_of",
    "table",
    "theory_of",
]

SAMPLERS: dict[str, type[Sampler]] = {"langevin": Langevin, "baoab": Baoab, "sghmc": Sghmc}


def options_of(section: SamplerConfig) -> dict[str, Any]:
    """The settings of its own that the sampler of a section takes."""
    return {name: getattr(section, name) for name in SAMPLERS[section.name].options}


def theory_of(section: SamplerConfig) -> StepTheory:
    """What the sampler of a section does on a quadratic."""
    return SAMPLERS[section.name].theory(**options_of(section))


def table() -> list[dict[str, str]]:
    """The rows of `fedsample list samplers`."""
    return [{"name": name, "update": each.rule, "reference": each.reference} for name, each in SAMPLERS.items()]
