r"""How far two orders of the same arithmetic may drive two chains apart in some rounds; and clients computed alone.

Two engines differ in the order of sums inside a client's gradient. There are two ways to compare their chains:

    exactly      `alone` computes each client's gradient by itself whatever the engine, so that all engines must give
                 the same bits, decisions by value (TopK, QSGD) included
    to rounding  `draws_bound`: each gradient is off by e (`RunningError`), each update by u of its sizes, and the chain
                 carries that on

With J the derivative of the draws with respect to all K entries that were rounded, the chain moves by at most
|sum_k J_k e_k| <= sqrt(K) |J e|_2 (Cauchy & Schwarz). With independent signs s_k the chain that is given s_k e_k moves
by sum_k J_k s_k e_k, whose mean square is |J e|_2^2: so a few chains with random signs measure it, coordinate by
coordinate, through whatever masks and memories the chain has. The e are scaled up for that by a power of two that keeps
the response linear and far above the roundings themselves. This needs a chain without decisions by value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rounding import gamma
from running_error import RunningError
from torch import Tensor

from fedsample.random import Key
from fedsample.strategies import SAMPLERS, Driver
from fedsample.targets import GeneralizedLinear, MetricClients, ModuleClients, Quadratic
from fedsample.targets.metric import Dense

UPDATE = 16  # roundings of what a round does besides gradients: a sum over clients, memories, step and noise
SCALE = 2.0**12  # of the errors of float64 in a response: far above the chain's own roundings, and linear still
RESPONSES = 3  # chains with random signs
SHORT = 3.0  # six squares, of two chains, have a mean a ninth of the expected in one coordinate of 300; and then all of
# sqrt(K) would have to be exhausted too


def alone(patch: pytest.MonkeyPatch) -> None:
    """Whatever the engine, each client's gradient is computed by itself, as on its device: the same bits for all."""
    for kind in (GeneralizedLinear, ModuleClients, Quadratic):
        patch.setattr(kind, "gradient", _each_alone(kind.gradient))
    scale = Dense.scale

    def each_scaled(self: Dense, z: Tensor) -> Tensor:
        return torch.stack([scale(self, each) for each in z]) if z.ndim == 3 and len(z) else scale(self, z)

    patch.setattr(Dense, "scale", each_scaled)


def _each_alone(gradient: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def each(
        self: Any,
        theta: Tensor,
        *,
        clients: Tensor | None = None,
        keys: Key | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        who = list(range(self.n)) if clients is None else clients.tolist()
        if self.n == 1 or not who:
            return gradient(self, theta, clients=clients, keys=keys, batch_size=batch_size)
        found = []
        for at, i in enumerate(who):
            own = None if keys is None else Key(keys.tensor()[at : at + 1])
            found.append(gradient(self.client(i), theta, keys=own, batch_size=batch_size))
        return torch.cat(found)

    return each


def draws_bound(patch: pytest.MonkeyPatch, run: Callable[[], Tensor]) -> Tensor:
    """How far two orders of arithmetic may drive the draws of `run` apart, entry by entry; see the module.

    Args:
        patch: undone here. run: builds a chain and returns its draws (rounds, C, d).
    """
    with patch.context() as inner:
        errors: list[Tensor] = []
        _analysed(inner, errors)
        plain = run()
    squares, count = torch.zeros(plain.shape, dtype=torch.float64), 0
    for seed in range(RESPONSES):
        with patch.context() as inner:
            noise = _Noise(inner, seed, SCALE, errors)
            squares += ((run() - plain).to(torch.float64) / SCALE).square()
            count = noise.count
    # a coordinate's response is pooled with the other chains', whose signs are independent
    root = (squares / RESPONSES).mean(1, keepdim=True).sqrt().expand(plain.shape)
    return 2 * SHORT * math.sqrt(count) * root  # each of the two chains makes its own roundings


def _analysed(patch: pytest.MonkeyPatch, errors: list[Tensor]) -> None:
    """Every gradient leaves a bound of its rounding errors; what is computed stays as it is."""
    gradient = MetricClients.gradient

    def watched(self: MetricClients, theta: Tensor, **given: Any) -> Tensor:
        with RunningError() as analysis:
            found = gradient(self, theta, **given)
        errors.append(analysis.error(found))
        return found

    patch.setattr(MetricClients, "gradient", watched)


class _Noise:
    """Every gradient of clients, and every update, is off by its error with a random sign, times `scale`.

    Attributes:
        count: K, the entries that were moved.
    """

    def __init__(self, patch: pytest.MonkeyPatch, seed: int, scale: float, errors: list[Tensor]) -> None:
        self.generator, self.scale, self.count = torch.Generator().manual_seed(seed), scale, 0
        gradient, move, of_call = MetricClients.gradient, self.move, iter(errors)

        def rounded(self: MetricClients, theta: Tensor, **given: Any) -> Tensor:
            return move(gradient(self, theta, **given), next(of_call))

        patch.setattr(MetricClients, "gradient", rounded)
        for kind in SAMPLERS.values():
            patch.setattr(kind, "tell", self._updated(kind.tell))
        patch.setattr(Driver, "gradient", self._estimated(Driver.gradient))

    def move(self, value: Tensor, error: Tensor) -> Tensor:
        signs = torch.randint(0, 2, value.shape, generator=self.generator) * 2.0 - 1.0
        self.count += value.numel()
        return value + (self.scale * error * signs).to(value.dtype)

    def _estimated(self, gradient: Callable[..., Any]) -> Callable[..., Any]:
        """The estimate is a sum of what the server remembers and what arrived."""

        def moved(sampler: Any, state: Any, request: Any, aggregate: Any) -> Any:
            estimate, uplink = gradient(sampler, state, request, aggregate)
            size = estimate.abs() + aggregate.total.abs() + sum((x.abs() for x in state.uplink.values()), 0.0)
            unit = gamma(UPDATE, estimate.dtype)
            kept = {name: self.move(each, unit * (each.abs() + size)) for name, each in uplink.items()}
            return self.move(estimate, unit * size), kept

        return moved

    def _updated(self, tell: Callable[..., Any]) -> Callable[..., Any]:
        """The next position is a sum of the last one, the drift and the noise: each no larger than these."""

        def moved(sampler: Any, state: Any, gradient: Tensor, keys: Any) -> Any:
            held = tell(sampler, state, gradient, keys)
            params, *rest = held
            unit = gamma(UPDATE, params.dtype)
            drift = sampler.step_size * gradient.abs()
            size = params.abs() + state[0].abs() + drift + keys.normal("noise", params).abs()
            others = (self.move(each, unit * (each.abs() + size)) for each in rest)
            return type(held)(self.move(params, unit * size), *others)

        return moved
