"""The posterior of an experiment in the model's own parameters, for use without sampling."""

from __future__ import annotations

from torch import Tensor

from fedsample.numerics.tree_sum import tree_sum
from fedsample.targets.base import Clients, GaussianPrior


class Posterior:
    """U = U_0 + sum_i U_i over flat parameters theta (..., d), in the order of the module's `named_parameters`.

    Attributes:
        clients: the likelihood, as potentials U_i of n clients.
        prior: the Gaussian prior, U_0.
    """

    def __init__(self, clients: Clients, prior: GaussianPrior) -> None:
        self.clients, self.prior = clients, prior

    @property
    def d(self) -> int:
        """Number of parameters."""
        return self.clients.d

    def _points(self, theta: Tensor) -> Tensor:
        return theta.to(self.clients.dtype).to(self.clients.device).reshape(-1, self.d)

    def client_potential(self, theta: Tensor) -> Tensor:
        """Negative log-likelihoods up to constants: (..., d) -> (n, ...) float64."""
        return self.clients.potential(self._points(theta)).reshape(self.clients.n, *theta.shape[:-1])

    def client_gradient(self, theta: Tensor) -> Tensor:
        """Their gradients: (..., d) -> (n, ..., d)."""
        return self.clients.gradient(self._points(theta)).reshape(self.clients.n, *theta.shape)

    def client_hvp(self, theta: Tensor, vector: Tensor) -> Tensor:
        """Their Hessians times vectors of the shape of theta: (..., d) -> (n, ..., d)."""
        return self.clients.hvp(self._points(theta), self._points(vector)).reshape(self.clients.n, *theta.shape)

    def client_hessian(self, theta: Tensor) -> Tensor:
        """Their Hessians (for networks, Fisher information): (..., d) -> (n, ..., d, d)."""
        shape = (self.clients.n, *theta.shape, self.d)
        return self.clients.hessian(self._points(theta)).reshape(shape)

    def prior_potential(self, theta: Tensor) -> Tensor:
        """Negative log-prior up to a constant: (..., d) -> (...) float64."""
        return self.prior.potential(theta)

    def potential(self, theta: Tensor) -> Tensor:
        """U: (..., d) -> (...) float64."""
        return tree_sum(self.client_potential(theta)) + self.prior_potential(theta).to(self.clients.device)

    def gradient(self, theta: Tensor) -> Tensor:
        """Gradient of U: (..., d) -> (..., d)."""
        points = self._points(theta).reshape(theta.shape)
        return tree_sum(self.client_gradient(theta)) + self.prior.gradient(points)
