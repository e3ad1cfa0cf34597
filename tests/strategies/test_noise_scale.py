"""How much noise a round adds to positions, as each sampler states it and as the curves use it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fedsample
from fedsample.monitor import load_draws, read_jsonl
from fedsample.strategies import SAMPLERS, Sampler
from fedsample.strategies.noise import Keys

SHAPE = (64, 512)  # chains and coordinates: a measured root mean square is off by 0.4 %
TEMPERATURE, FRICTION = 0.7, 1.5


class Silent(Keys):
    """No noise."""

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        return torch.zeros_like(like)


def langevin_noise(step_size: float) -> float:
    """What the curves once took for every sampler's."""
    return math.sqrt(2 * step_size * TEMPERATURE)


def sampler_of(name: str, step_size: float) -> Sampler:
    own = {"friction": FRICTION} if "friction" in SAMPLERS[name].options else {}
    return SAMPLERS[name](step_size=step_size, temperature=TEMPERATURE, seed=1, **own)


def measured(sampler: Sampler) -> float:
    """Root mean square of what three rounds' noise adds to positions on U(x) = |x - 1|^2, a round at a time."""
    start = torch.zeros(SHAPE, dtype=torch.float64)
    state, added = sampler.begin(start, Keys(1, 0)), list[Tensor]()
    for step in (1, 2, 3):
        gradient = 2 * (sampler.ask(state) - 1)
        still = sampler.draw(sampler.tell(state, gradient, Silent(1, step)))
        state = sampler.tell(state, gradient, Keys(1, step))
        added.append(sampler.draw(state) - still)
    return float(torch.stack(added).square().mean().sqrt())


@pytest.mark.parametrize("step_size", [0.01, 0.1, 0.6])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_noise_that_a_sampler_states_is_what_a_round_adds(name: str, step_size: float) -> None:
    sampler = sampler_of(name, step_size)
    error = 1 / math.sqrt(2 * 3 * math.prod(SHAPE))  # relative, of a root mean square of normals
    assert abs(measured(sampler) / sampler.noise_scale(step_size) - 1) < 5 * error
    if name != "langevin":  # the mutant: Langevin's noise for every sampler
        assert abs(measured(sampler) / langevin_noise(step_size) - 1) > 100 * error


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_curves_measure_moves_by_the_samplers_own_noise(name: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    np.savez(tmp_path / "quadratic.npz", lam=draw.uniform(0.2, 3, (5, 4)), a=draw.normal(size=(5, 4)))
    run = fedsample.run(
        {
            "sampler": {"name": name, **({"friction": FRICTION} if "friction" in SAMPLERS[name].options else {})},
            "data": {"kind": "quadratic", "file": str(tmp_path / "quadratic.npz")},
            "metric": {"name": "identity"},
            "temperature": TEMPERATURE,
            "dtype": "float64",
            "step_size": 0.05,
            "rounds": 20,
            "warmup": 0,
            "thin": 1,
            "monitor": {"every": 1, "tensorboard": False},
        },
        out=tmp_path / "run",
        progress="quiet",
    )
    moves = load_draws(run.path).diff(dim=1).norm(dim=-1).mean(0)  # (19,), from round 2 on
    logged = torch.tensor([row["mcmc/move_to_noise"] for row in read_jsonl(run.path / "metrics.jsonl")][1:])
    noise = sampler_of(name, 0.05).noise_scale(0.05)
    torch.testing.assert_close(moves / (noise * math.sqrt(4)), logged.to(moves.dtype), rtol=1e-6, atol=0)
