"""Scalar functions of the parameters by which the convergence of the chains is judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedsample.random import SERVER, key
from fedsample.targets import GeneralizedLinear, Posterior

_PROJECTIONS = 32
_ENTRIES = 1 << 24  # entries of the largest array of predictions
_CACHED = 1 << 19  # the same on a CPU: within the cache it takes two thirds of the time


@dataclass(frozen=True)
class Functionals:
    """The functions that convergence is judged by: draws (S, d) -> (S, F) float64.

    Predictions at fixed held-out rows (centred logits and the true class's probability, or the mean), the test
    negative log-likelihood, U, |theta|^2, and 32 fixed projections of the parameters (of what the data can inform:
    softmax weights are centred over classes and constant features left out). Where there are at most 32 parameters,
    each is monitored by itself.

    Attributes:
        posterior: the posterior, with potential U.
        likelihood: law of a target given the model's outputs; None for quadratics.
        classes: number of classes K; 1 where a number is predicted.
        chunk: number of draws to predict with at once.
        points: rows (M, ...) and targets (M,) whose predictions are monitored; None: there are none.
        outputs: theta (S, d), x (M, ...) -> the model's outputs (S, K, M).
        probabilities: outputs -> class probabilities (S, K', M).
        test_nll: draws (S, d) -> negative log-likelihood (S,) of the held-out rows; None: there are none.
    """

    posterior: Posterior
    likelihood: str | None
    classes: int
    chunk: int
    points: tuple[Tensor, Tensor] | None
    outputs: Callable[[Tensor, Tensor], Tensor]
    probabilities: Callable[[Tensor], Tensor]
    test_nll: Callable[[Tensor], Tensor] | None

    def __call__(self, draws: Tensor) -> Tensor:
        """(S, d) -> (S, F) float64, on the CPU."""
        parts = [self._energies(draws), self._projections(draws)]
        if self.points is not None:
            parts.append(torch.cat([self._predictions(part, *self.points) for part in draws.split(self.chunk)]))
        return torch.cat([part.to(torch.float64).cpu() for part in parts], dim=-1)

    def _energies(self, draws: Tensor) -> Tensor:
        clients = self.posterior.clients
        at_once = _CACHED if clients.device.type == "cpu" else _ENTRIES
        size = max(1, at_once // max(1, int(clients.rows.sum()) * self.classes + clients.d))
        potential = torch.cat([self.posterior.potential(part) for part in draws.split(size)])
        return torch.stack([potential, draws.to(torch.float64).square().sum(-1)], dim=-1)

    def _projections(self, draws: Tensor) -> Tensor:
        return draws if draws.shape[-1] <= _PROJECTIONS else draws @ self._directions

    @cached_property
    def _directions(self) -> Tensor:
        """(d, 32) fixed directions, in the clients' dtype and on their device."""
        clients = self.posterior.clients
        directions = key(0, client=SERVER, chain=torch.arange(_PROJECTIONS), purpose="projections").normal(clients.d)
        directions = self._informed(directions) / math.sqrt(clients.d)
        return directions.to(clients.dtype).to(clients.device).T.contiguous()

    def _informed(self, directions: Tensor) -> Tensor:
        """Remove from directions (F, d) the components that a softmax likelihood does not depend on."""
        clients = self.posterior.clients
        if not isinstance(clients, GeneralizedLinear) or self.likelihood != "categorical":
            return directions
        matrix = clients.matrix(directions)  # (F, k, q)
        matrix = matrix - matrix.mean(-2, keepdim=True)
        design = clients.design
        if len(design):
            varies = (design.amax(0) > design.amin(0)).to(matrix.dtype).cpu()
            if clients.intercept:
                varies[-1] = 1.0
            matrix = matrix * varies
        return clients.flat(matrix)

    def _predictions(self, draws: Tensor, x: Tensor, y: Tensor) -> Tensor:
        outputs = self.outputs(draws, x)  # (S, K, M)
        parts = []
        if self.likelihood == "gaussian":
            parts.append(outputs.flatten(1))
        else:
            labels = y.to(torch.int64).expand(len(draws), 1, -1)
            parts.append(self.probabilities(outputs).gather(-2, labels).squeeze(-2))
            centred = outputs if outputs.shape[-2] == 1 else outputs - outputs.mean(-2, keepdim=True)
            parts.append(centred.flatten(1))
        if self.test_nll is not None:
            parts.append(self.test_nll(draws).unsqueeze(-1))
        return torch.cat([part.to(torch.float64) for part in parts], dim=-1)
