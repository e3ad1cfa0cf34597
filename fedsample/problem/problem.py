"""The problem of an experiment: clients, prior, model and data, with predictions and their scores.

`problem.build` makes one from a configuration.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedsample.errors import ConfigError
from fedsample.problem.functionals import Functionals
from fedsample.targets import Clients, GaussianPrior, GeneralizedLinear, Posterior, Quadratic

if TYPE_CHECKING:
    from torch import nn

    from fedsample.data import FederatedData

_POINTS = 32  # rows whose predictions are monitored as functionals
_CHUNK = 1 << 24  # entries of the largest array of predictions


@dataclass(frozen=True)
class Problem:
    """The posterior that an experiment samples, and the data and model behind it.

    Attributes:
        clients: the likelihood, in the model's parameters.
        prior: the prior U_0.
        start_mean: (d,) mean of the normal law from which an optimiser starts.
        start_scale: (d,) standard deviation of that law.
        layout: name, shape and offset of each parameter.
        data: the rows; None for quadratics.
        module: the model; None for quadratics.
        likelihood: law of a target given the model's outputs; None for quadratics.
        noise_scale: standard deviation of a Gaussian likelihood.
        client_names: names of the clients in the data.
    """

    clients: Clients
    prior: GaussianPrior
    start_mean: Tensor
    start_scale: Tensor
    layout: list[tuple[str, tuple[int, ...], int]]
    data: FederatedData | None = None
    module: nn.Module | None = None
    likelihood: str | None = None
    noise_scale: float = 1.0
    client_names: tuple[str, ...] = ()

    @property
    def posterior(self) -> Posterior:
        """U_0 + sum_i U_i in the model's own parameters."""
        return Posterior(self.clients, self.prior)

    @property
    def d(self) -> int:
        """Number of parameters."""
        return self.clients.d

    @property
    def fingerprint(self) -> str:
        """Hash of the data and their distribution over clients; a resumed run must find the same."""
        if isinstance(self.clients, Quadratic):
            arrays = [self.clients.curvature.cpu().numpy(), self.clients.center.cpu().numpy()]
        elif self.data is not None:
            arrays = [self.data.x, self.data.y, self.data.offsets, self.data.x_test, self.data.y_test]
        else:
            arrays = []
        found = hashlib.sha256()
        if self.data is not None and self.rowless:  # then the arrays hold nothing to hash
            found.update(repr((self.data.feature_names, self.data.class_names)).encode())
        for array in arrays:
            found.update(f"{array.dtype.str}{array.shape}".encode())
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()[:32]

    @property
    def rowless(self) -> bool:
        """Whether it has no rows, as on a server whose devices hold the data."""
        return self.data is not None and len(self.data.x) + len(self.data.x_test) == 0

    @cached_property
    def test(self) -> tuple[Tensor, Tensor] | None:
        """Held-out rows (M, ...) and targets (M,), on the clients' device; None where there are none."""
        if self.data is None or len(self.data.x_test) == 0:
            return None
        return self._rows(self.data.x_test), torch.from_numpy(np.ascontiguousarray(self.data.y_test)).to(
            self.clients.device
        )

    @cached_property
    def points(self) -> tuple[Tensor, Tensor] | None:
        """Rows whose predictions are monitored: the first 32 held-out ones; without any, 32 training rows."""
        if self.data is None or self.rowless:
            return None
        if self.test is not None:
            return self.test[0][:_POINTS], self.test[1][:_POINTS]
        chosen = np.linspace(0, len(self.data.x) - 1, min(_POINTS, len(self.data.x)), dtype=np.int64)
        return self._rows(self.data.x[chosen]), torch.from_numpy(self.data.y[chosen]).to(self.clients.device)

    def _rows(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.clients.dtype).to(self.clients.device)

    def outputs(self, theta: Tensor, x: Tensor) -> Tensor:
        """The model's outputs: theta (S, d), x (M, ...) -> (S, K, M); a softmax over a short last axis is slow."""
        module = self.module
        if module is None:
            raise ConfigError("a quadratic target predicts nothing: it has no rows")
        if isinstance(self.clients, GeneralizedLinear):
            return self.clients.predict(theta, x)
        from fedsample.targets.module import skeleton

        module = skeleton(module)

        def one(flat: Tensor) -> Tensor:
            named = {name: flat[at : at + math.prod(shape)].view(shape) for name, shape, at in self.layout}
            result: Tensor = torch.func.functional_call(module, named, (x,))
            return result.T

        return torch.stack([one(each) for each in theta])

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Class probabilities (S, K', M) of outputs (S, K, M); a logit becomes two classes."""
        if self.likelihood == "bernoulli":
            one = torch.sigmoid(outputs)
            return torch.cat([1 - one, one], dim=-2)
        return torch.softmax(outputs, dim=-2)

    def functionals(self, draws: Tensor) -> Tensor:
        """Compute the functions that convergence is judged by: draws (S, d) -> (S, F) float64; see `Functionals`."""
        return self._functionals(draws)

    @cached_property
    def _functionals(self) -> Functionals:
        return Functionals(
            self.posterior,
            self.likelihood,
            self._classes,
            self._chunk,
            self.points,
            self.outputs,
            self.probabilities,
            None if self.test is None else self.test_nll,
        )

    def test_nll(self, draws: Tensor) -> Tensor:
        """Mean negative log-likelihood of the held-out rows under each draw: (S, d) -> (S,) float64."""
        if self.test is None:
            raise ConfigError("there are no held-out rows")
        x, y = self.test
        outputs = self.outputs(draws, x)  # (S, K, M)
        if self.likelihood == "gaussian":
            losses = 0.5 * ((y - outputs.squeeze(-2)) / self.noise_scale).square()
            losses = losses + 0.5 * math.log(2 * math.pi * self.noise_scale**2)
        elif self.likelihood == "bernoulli":
            losses = -torch.nn.functional.logsigmoid(outputs.squeeze(-2) * (2 * y - 1).to(outputs.dtype))
        else:
            labels = y.to(torch.int64).expand(len(draws), 1, -1)
            losses = torch.logsumexp(outputs, dim=-2) - outputs.gather(-2, labels).squeeze(-2)
        return losses.mean(-1, dtype=torch.float64)

    def predict_test(self, draws: Tensor) -> Tensor:
        """Predict held-out rows from draws (S, d): class probabilities (M, K) summed over draws, or means (S, M)."""
        if self.test is None:
            raise ConfigError("there are no held-out rows")
        x, chunks = self.test[0], draws.split(self._chunk)
        if self.likelihood == "gaussian":
            return torch.cat([self.outputs(chunk, x).squeeze(-2) for chunk in chunks]).to(torch.float64)
        sums = [self.probabilities(self.outputs(chunk, x)).sum(0, dtype=torch.float64) for chunk in chunks]
        return torch.stack(sums).sum(0).T.contiguous()

    @property
    def _chunk(self) -> int:
        """Number of draws to predict with at once."""
        rows = 1 if self.points is None else len(self.points[0]) if self.test is None else len(self.test[0])
        return max(1, _CHUNK // max(1, rows * self._classes))

    @property
    def _classes(self) -> int:
        return 1 if self.data is None or self.data.classes is None else self.data.classes
