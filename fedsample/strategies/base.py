"""The sampler interface: what it wants to know of U, and what it makes of the reply.

A sampler knows neither clients nor messages nor Flower. `strategies.driver.Driver` asks the clients on its behalf; all
randomness comes from keys, so that the same state, reply and keys give the same next state, on a server or on a client
that replicates it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from fedsample.strategies.noise import Keys
from fedsample.strategies.schedule import Constant, Schedule
from fedsample.theory.base import StepTheory


class Ask(NamedTuple):
    """What a sampler wants to know of U next.

    Attributes:
        points: (C, d) in the metric's coordinates.
        outputs: "gradient", which the uplink may estimate, and names of exact quantities.
    """

    points: Tensor
    outputs: frozenset[str] = frozenset({"gradient"})


class Told(NamedTuple):
    """What a sampler makes of a reply.

    Attributes:
        state: its next state.
        info: (C,) numbers for the curves, by name.
    """

    state: Any
    info: Mapping[str, Tensor] = {}


class Traits(NamedTuple):
    """What a sampler asks of the rest of the system.

    Attributes:
        exact: whether it needs exact sums over all clients: no estimate, and nobody absent.
        noise: "carried" where a step's only randomness is N(0, s^2 T) added to the gradient, so that a link could
            supply it; else "own".
    """

    exact: bool = False
    noise: Literal["own", "carried"] = "own"


class Sampler(ABC):
    """Advance C chains by steps of an equation, given what it asks of U.

    A state is a NamedTuple of tensors, the positions (C, d) first; it is stored and restored by its fields.

    Args:
        step_size: h > 0, or a schedule.
        temperature: T >= 0.
        seed: the experiment's seed.
    """

    name: ClassVar[str]
    rule: ClassVar[str]
    reference: ClassVar[str]
    traits: ClassVar[Traits] = Traits()
    state: ClassVar[type[Any]]  # made from its fields
    options: ClassVar[tuple[str, ...]] = ()  # settings of its own, by their names in [sampler]

    def __init__(self, *, step_size: float | Schedule, temperature: float, seed: int) -> None:
        self.schedule = step_size if isinstance(step_size, Schedule) else Constant(step_size)
        self.temperature, self.seed = temperature, seed

    @property
    def step_size(self) -> float:
        """Step size h of step 1."""
        return self.schedule.initial

    def step_at(self, step: int) -> float:
        """Step size h of step 1, 2, ..."""
        return self.schedule.at(step)

    @classmethod
    @abstractmethod
    def theory(cls, **options: Any) -> StepTheory:
        """What it does on a quadratic, with these settings of its own."""

    @abstractmethod
    def begin(self, start: Tensor, keys: Keys) -> Any:
        """Create the state before step 1, at positions (C, d) in the metric's coordinates."""

    def ask(self, state: Any) -> Ask:
        """Say what is needed for the next step; by default the gradient at the positions."""
        return Ask(state[0])

    @abstractmethod
    def tell(self, state: Any, reply: Mapping[str, Tensor], keys: Keys) -> Told:
        """Take a step.

        Args:
            state: the state before it.
            reply: what was asked for, by name: sums over all clients and the prior.
            keys: randomness of this step.
        """

    def draw(self, state: Any) -> Tensor:
        """The chains' positions (C, d) in the metric's coordinates; by default the state's first field."""
        positions: Tensor = state[0]
        return positions

    @abstractmethod
    def noise_scale(self, step_size: float) -> float:
        """Standard deviation of the noise that one step adds to a coordinate of the positions."""
