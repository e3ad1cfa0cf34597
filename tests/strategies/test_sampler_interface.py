"""What a sampler may rely on: where it is asked, what it is told, its keys, and that nobody else's state is its own."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

from fedsample.compression import Identity as Whole
from fedsample.errors import DataError
from fedsample.estimators import Dense, Links
from fedsample.fleets.local import LocalFleet
from fedsample.strategies import SAMPLERS, Baoab, Cohort, Driver, Langevin, Sampler, Sghmc, Stability
from fedsample.strategies.noise import Keys, Noise
from fedsample.targets import GaussianPrior, Quadratic
from fedsample.targets.metric import Identity

N, CHAINS, D = 3, 2, 4
PRIOR = 0.7


class Counting(NamedTuple):
    """A state with one variable of its own."""

    params: Tensor
    seen: Tensor


class Ahead(Sampler):
    """Asks one ahead of its positions, moves by one, and draws twice the position."""

    name: ClassVar[str] = "ahead"
    rule: ClassVar[str] = "x <- x + 1"
    reference: ClassVar[str] = "-"
    state: ClassVar[type[Counting]] = Counting

    def begin(self, start: Tensor, keys: Keys) -> Counting:
        return Counting(start + 0.5, torch.zeros_like(start))

    def ask(self, state: Counting) -> Tensor:
        return state.params + 1

    def tell(self, state: Counting, gradient: Tensor, keys: Keys) -> Counting:
        return Counting(state.params + 1, gradient)

    def draw(self, state: Counting) -> Tensor:
        return 2 * state.params

    def noise_scale(self, step_size: float) -> float:
        return 0.0


def driver_of(sampler: Sampler) -> Driver:
    return Driver(
        sampler,
        Links(Dense(Whole())),
        GaussianPrior(PRIOR),
        Identity(torch.full((D,), 0.25, dtype=torch.float64)),
        cohort=Cohort(N, CHAINS, 0),
        stability=Stability(1.0, 1.0, math.inf),
    )


def clients() -> Quadratic:
    generator = torch.Generator().manual_seed(0)
    return Quadratic(torch.rand(N, D, generator=generator, dtype=torch.float64), torch.zeros(N, D, dtype=torch.float64))


COMMON: dict[str, Any] = {"step_size": 0.1, "temperature": 1.0, "seed": 5}


def test_a_sampler_is_told_the_gradient_where_it_asks_and_keeps_its_own_state() -> None:
    driver, quadratic = driver_of(Ahead(**COMMON)), clients()
    fleet = LocalFleet(quadratic, driver.uplink, 5, CHAINS)
    fleet.set_metric(driver.metric)
    state = driver.begin(torch.zeros(CHAINS, D, dtype=torch.float64))
    for round in range(1, 4):
        request = driver.request(state)
        assert torch.equal(request.points, state.params + 1)
        state = driver.update(state, request, fleet.exchange(request))
        assert (state.params == round + 0.5).all()
        asked = request.points + 0.25  # in the model's parameters
        want = quadratic.gradient(asked).sum(0) + PRIOR * asked
        torch.testing.assert_close(state.kernel["seen"], want, rtol=1e-14, atol=0)
        assert torch.equal(driver.draw(state), 2 * state.params + 0.25)


@pytest.mark.parametrize("kind", SAMPLERS.values())
def test_the_state_of_another_sampler_is_refused(kind: type[Sampler]) -> None:
    made = {each: each(**COMMON, **dict.fromkeys(each.options, 1.0)) for each in SAMPLERS.values()}
    state = driver_of(made[kind]).begin(torch.zeros(CHAINS, D))
    for each, sampler in made.items():
        if each is kind:
            assert driver_of(sampler).held(state)[0] is state.params
        else:
            with pytest.raises(DataError, match="another sampler's; start anew, or take that sampler"):
                driver_of(sampler).held(state)


def test_what_a_state_holds_has_a_name_of_its_own() -> None:
    """The momenta of BAOAB lack a half kick: they are no velocities of SGHMC."""
    fields = [kind.state._fields[1:] for kind in (Langevin, Baoab, Sghmc)]
    assert len(set(fields)) == 3


@pytest.mark.parametrize("kind", SAMPLERS.values())
def test_every_sampler_says_what_it_does_on_a_quadratic(kind: type[Sampler]) -> None:
    """`Ahead` does not, and nobody else's theory stands in for it."""
    assert kind.theory(**dict.fromkeys(kind.options, 1.0)).limit(1.0) > 0
    assert not hasattr(Ahead, "theory")


def test_noise_is_the_same_drawn_in_blocks_or_alone() -> None:
    like = torch.zeros(CHAINS, D)
    noise = Noise(5)
    for step in (1, 2, 16, 17, 40):
        assert torch.equal(Keys(5, step, noise).normal("noise", like), Keys(5, step).normal("noise", like))
    for other in (torch.zeros(CHAINS, D + 3), torch.zeros(CHAINS + 1, D), like.double()):  # one source, other shapes
        got = Keys(5, 40, noise).normal("noise", other)
        assert torch.equal(got, Keys(5, 40).normal("noise", other))
    assert torch.equal(Keys(5, 0, noise).normal("noise", like), Keys(5, 0).normal("noise", like))


def test_draws_of_steps_purposes_chains_and_seeds_differ() -> None:
    like = torch.zeros(3, 5, dtype=torch.float64)
    drawn = [Keys(5, 1).normal("noise", like), Keys(5, 2).normal("noise", like), Keys(6, 1).normal("noise", like)]
    drawn += [Keys(5, 1).normal("other", like), Keys(5, 0).normal("noise", like)]
    rows = torch.cat(drawn)
    assert len(torch.unique(rows, dim=0)) == len(rows)
    uniform = torch.stack([Keys(5, step).uniform("accept", like) for step in (1, 2, 3)])
    assert uniform.shape == (3, 3)
    assert len(uniform.unique()) == 9
    assert ((uniform >= 0) & (uniform < 1)).all()
