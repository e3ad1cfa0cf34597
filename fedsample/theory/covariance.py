r"""Predicted stationary covariance of a compressed chain: all d x d second moments, for any clients' Hessians.

Let x = (u, v) be the chain about the mode of a quadratic target with Hessian H = H_0 + sum_i H_i, and x <- T x + kick g
its mean step, in which the error of the estimated gradient enters as g. Masks that keep coordinates independently make
that error uncorrelated between coordinates, with variances N (d,), and mean zero given the past. Then

    Cov x = T (Cov x) T^T + noise noise^T + kick diag(N) kick^T (+ the effect of marina's persisting error)
    direct   N_j = (1/s - 1) [ sum_i (H_i E uu^T H_i)_jj + zeta_j ]
    marina   N_j = (1/s - 1)   sum_i (H_i D H_i)_jj,       D = E (u_k - u_{k-1})(u_k - u_{k-1})^T
    diana    N_j = (1/s - 1)   sum_i (H_i D H_i)_jj / (1 + 2 (1 - s) (H_i R)_jj),
             D = E (u_k - u_{k-a})(u_k - u_{k-a})^T over a geometric age a,    R = sum_b (1 - s)^b (T^b kick)_u

where diana's denominator is the correlation of a mask's error with the memory that the same mask renews. T is a
function of H, so all of these are elementwise in the eigenbasis of H; N couples that basis to the coordinates in which
masks act, and is found by fixed-point iteration. The clients enter through D -> sum_i diag(H_i D H_i) alone, which the
server measures as the mean of sum_i (H_i y)_j^2 over probes y ~ N(0, D), and through (H_i R)_jj, for which it takes the
mean client's times a measured concentration: the moments are exact for clients of equal Hessian, whatever that is, and
where one client alone holds a coordinate; otherwise all is exact but the denominator. Masks of exactly K coordinates
are correlated by -1 / (d - 1) of their variance, which is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsample.theory.base import StepTheory

Array = NDArray[np.float64]
Spread = Callable[[Array], Array]  # D (d, d) -> sum_i diag(H_i D H_i) (d,)

UPLINKS = ("dense", "direct", "marina", "diana")
_MAX_ITERATIONS, _TOLERANCE = 200, 1e-5


@dataclass(frozen=True)
class Covariance:
    """A quadratic target, a sampler and an uplink, with full participation and an uncompressed downlink.

    Attributes:
        hessian: (d, d) Hessian of U.
        clients_hessian: (d, d), the clients' part of `hessian`.
        clients: number of clients n >= 1.
        sampler: what it says of itself on a quadratic.
        uplink: one of `UPLINKS`.
        inclusion: inclusion probability s = K / d of the compressor, in (0, 1].
        sync: probability p of a dense round (marina).
        force: (d,) zeta = sum_i (grad U_i)^2 at the mode (direct).
        concentration: (d,) curvature of the clients that cause a coordinate's noise, over the mean client's (diana).
        noise: mean squares (d,) of a vector -> variances (d,) that compressing it adds; None: (1 / s - 1) times the
            mean squares, as for masks.
    """

    hessian: Array
    clients_hessian: Array
    clients: int
    sampler: StepTheory
    uplink: str
    inclusion: float = 1.0
    sync: float = 0.0
    force: Array | float = 0.0
    concentration: Array | float = 1.0
    noise: Callable[[Array], Array] | None = None

    @cached_property
    def _spectrum(self) -> tuple[Array, Array | None]:
        """Eigenvalues and eigenvectors of H; None for the vectors where H is a multiple of the identity."""
        scale = float(np.trace(self.hessian)) / len(self.hessian)
        if np.abs(self.hessian - scale * np.eye(len(self.hessian))).max() <= 1e-3 * scale:
            return np.full(len(self.hessian), scale), None
        values, vectors = np.linalg.eigh(self.hessian)
        return np.maximum(values, values[-1] * 1e-12), vectors

    @cached_property
    def target(self) -> Array:
        """Variances (d,) of the target's coordinates."""
        return self.coordinates(1 / self._spectrum[0])

    @property
    def curvatures(self) -> Array:
        """Eigenvalues (d,) of H, ascending."""
        return self._spectrum[0]

    @property
    def isotropic(self) -> bool:
        """Whether H is a multiple of the identity, and with it every covariance under exact gradients."""
        return self._spectrum[1] is None

    @property
    def identity(self) -> Array:
        """Identity matrix (d, d)."""
        return np.eye(len(self.hessian))

    def coordinates(self, diagonal: Array) -> Array:
        """Variances (d,) of the coordinates, from uncorrelated variances (d,) along the eigenvectors of H."""
        vectors = self._spectrum[1]
        if vectors is None:
            return diagonal
        result: Array = np.square(vectors) @ diagonal
        return result

    def _matrix(self, diagonal: Array) -> Array:
        vectors = self._spectrum[1]
        result: Array = np.diag(diagonal) if vectors is None else (vectors * diagonal) @ vectors.T
        return result

    def stable(self, step_size: float) -> bool:
        """Whether the mean of the chain is stable; `heating` says whether its second moments are."""
        return bool(np.abs(_modes(self, step_size).rates).max() < 1.0)

    def calm(self, step_size: float) -> Array:
        """Variances (d,) along the eigenvectors of H, stiffest last, under exact gradients."""
        return _modes(self, step_size).thermal(lambda rate: np.ones_like(rate))

    def lag(self, step_size: float) -> Array:
        """Covariance (d, d), under exact gradients, of the displacement that is compressed: D; E uu^T for direct."""
        return self._matrix(self.lagging(step_size))

    def lagging(self, step_size: float) -> Array:
        """Variances (d,) of the same displacement along the eigenvectors of H."""
        return self._lag(_modes(self, step_size))

    def root_of(self, variances: Array) -> Array:
        """Matrix B (d, d) with B B^T the covariance of these variances (d,) along the eigenvectors of H.

        Probes B s with random signs s have the right square along each eigenvector in every draw, not only on average;
        where one eigenvector dominates the Hessians, that removes most of the estimate's noise.
        """
        vectors, roots = self._spectrum[1], np.sqrt(np.maximum(variances, 0.0))
        result: Array = np.diag(roots) if vectors is None else vectors * roots
        return result

    def _lag(self, modes: _Modes) -> Array:
        now = modes.thermal(lambda rate: np.ones_like(rate))
        if self.uplink == "direct":
            return now
        return 2 * now - 2 * modes.thermal(self._aged)

    def _aged(self, rate: NDArray[Any]) -> NDArray[Any]:
        """Mean factor by which a mode decays over the age of the point that is subtracted."""
        if self.uplink != "diana":
            return rate
        return self.inclusion * rate / (1 - (1 - self.inclusion) * rate)

    def heating(self, step_size: float, spread: Spread) -> tuple[Array, Array]:
        """Variances that compression adds, of the coordinates (d,) and along the eigenvectors of H (d,).

        Args:
            step_size: h.
            spread: D (d, d) -> sum_i diag(H_i D H_i) (d,); `measured` makes one from probes.

        Returns:
            Both arrays; infinite if the chain is unstable.
        """
        d, modes = len(self.hessian), _modes(self, step_size)
        infinite = np.full(d, math.inf)
        if not np.abs(modes.rates).max() < 1.0:
            return infinite, infinite
        if self.uplink == "dense" or self.inclusion >= 1.0:
            return np.zeros(d), np.zeros(d)
        moved, lagged = self._responses(modes)
        base, noisy = self._matrix(self._lag(modes)), self._noisy
        own = 1.0 + 2 * (1 - self.inclusion) * self._renewed(modes) if self.uplink == "diana" else 1.0
        if np.min(own) <= 0:  # the memory amplifies its own error faster than it forgets it
            return infinite, infinite
        force = self.force if self.uplink == "direct" else 0.0
        noise = noisy(spread(base) + force) / own
        for _ in range(_MAX_ITERATIONS):
            with np.errstate(over="ignore"):
                renewed = noisy(spread(base + self._respond(lagged, noise)) + force) / own
            change = float(np.abs(renewed - noise).sum())
            if not change < 1e6 * float(np.abs(noise).sum() + 1e-300):
                return infinite, infinite
            noise = renewed
            if change <= _TOLERANCE * float(noise.sum()):
                added = self._respond(moved, noise)
                vectors = self._spectrum[1]
                if vectors is None:  # all curvatures are equal: one mean serves all eigenvectors
                    return np.diag(added).copy(), np.full(d, float(np.trace(added)) / d)
                return np.diag(added).copy(), np.einsum("jk,jk->k", vectors, added @ vectors)
        return infinite, infinite

    def _noisy(self, squares: Array) -> Array:
        return (1 / self.inclusion - 1) * squares if self.noise is None else self.noise(squares)

    def _renewed(self, modes: _Modes) -> Array:
        """(H_i R)_jj (d,) of the clients that cause the noise of coordinate j."""
        through = self._matrix(modes.sum(lambda rate: 1 / (1 - (1 - self.inclusion) * rate)))
        result: Array = self.concentration * np.einsum("jk,kj->j", self.clients_hessian, through) / self.clients
        return result

    def _responses(self, modes: _Modes) -> tuple[Array, Array]:
        """Responses, in the eigenbasis, of E uu^T and of the compressed covariance to noise of unit variance."""
        lasting = 0.0 if self.uplink != "marina" else 1 - self.sync
        scale = lasting / (1 - lasting) if self.uplink == "marina" else 1.0
        one = modes.pairs(lambda rate: np.ones_like(rate), lasting) * scale
        if self.uplink == "direct":
            return one, one
        aged = modes.pairs(self._aged, lasting) * scale
        if self.uplink == "marina":  # the error that moves this point is the one that moved the previous point
            before = modes.sum(lambda rate: lasting / (1 - lasting * rate))
            aged = aged + scale * np.multiply.outer(modes.sum(lambda rate: np.ones_like(rate)), before)
        return one, 2 * one - aged - aged.T

    def _respond(self, response: Array, noise: Array) -> Array:
        """Response (d, d), in coordinates, to noise of these variances (d,)."""
        vectors = self._spectrum[1]
        if vectors is None:
            return np.diag(response[0, 0] * noise)
        result: Array = vectors @ (response * ((vectors.T * noise) @ vectors)) @ vectors.T
        return result


class _Modes:
    """The response (T^t kick)_u along every eigenvector of H, as a sum of powers of its rates."""

    def __init__(self, curvatures: Array, sampler: StepTheory, step_size: float, same: bool) -> None:
        moved, kick, noise = sampler.linear(step_size)
        m = 2 if sampler.momenta else 1
        self.same = same
        lam = curvatures[:1] if same else curvatures
        step = moved[:m, :m] + kick[:m, None] * np.eye(m)[0] * lam[:, None, None]  # (d, m, m)
        self.count = len(curvatures)
        values, vectors = np.linalg.eig(step + 1e-12 * np.diag(np.arange(m)))  # a double rate has one eigenvector
        inverse = np.linalg.inv(vectors)
        self.rates = values.astype(complex)  # (d, m)
        self.kicks = vectors[:, 0] * (inverse @ kick[:m])  # (d, m) of (T^t kick)_u = sum_a kicks_a rates_a^t
        self.noises = vectors[:, 0] * (inverse @ noise[:m])

    def _full(self, values: Array) -> Array:
        return np.repeat(values, self.count) if self.same else values

    def sum(self, weight: Callable[[NDArray[Any]], NDArray[Any]]) -> Array:
        """Weighted sum (d,) of the kicks over the modes of each eigenvector."""
        return self._full((self.kicks * weight(self.rates)).sum(-1).real)

    def thermal(self, weight: Callable[[NDArray[Any]], NDArray[Any]]) -> Array:
        """E u u' (d,) under the thermal noise, with u' weighted mode by mode."""
        left = self.noises * weight(self.rates)
        pairs = left[:, :, None] * self.noises[:, None, :] / (1 - self.rates[:, :, None] * self.rates[:, None, :])
        return self._full(pairs.sum((1, 2)).real)

    def pairs(self, weight: Callable[[NDArray[Any]], NDArray[Any]], lasting: float) -> Array:
        """E u u' under unit noise that persists with probability `lasting`: (d, d); (1, 1) for equal curvatures."""
        size, m = self.rates.shape
        result = np.zeros((size, size))
        late = lasting * self.rates / (1 - lasting * self.rates)
        for a in range(m):
            for b in range(m):
                left, right = self.kicks[:, a] * weight(self.rates[:, a]), self.kicks[:, b]
                both = 1 + late[:, a, None] + late[None, :, b]
                rates = np.multiply.outer(self.rates[:, a], self.rates[:, b])
                result += (np.multiply.outer(left, right) * both / (1 - rates)).real
        return result


def _modes(chain: Covariance, step_size: float) -> _Modes:
    values, vectors = chain._spectrum
    return _Modes(values, chain.sampler, step_size, vectors is None)


def measured(
    squares: Array, probed: Array, clients_hessian: Array, full: Array | None = None, saturation: float = 1.0
) -> Spread:
    """Extrapolate D -> sum_i diag(H_i D H_i) from its value `squares` (d,) at D = `probed` (d, d).

    From one covariance to another it changes as it does for the clients' mean Hessian, which is exact for equal
    clients. Where Hessians vary, gradients at two points differ by the Hessian's mean along the way, which varies less:
    between two independent points, D = `full`, squared differences of gradients are `saturation` of what the Hessian at
    one of them says. In between the loss is proportional to D, which for a Gaussian law is exact up to second Hermite
    order.
    """

    def mean_client(lag: Array) -> Array:
        result: Array = np.einsum("jk,jk->j", clients_hessian @ lag, clients_hessian)
        return result

    def floored(values: Array) -> Array:
        return np.maximum(values, max(float(values.max()) * 1e-12, 1e-300))

    ratio = squares / floored(mean_client(probed))
    if full is None:
        return lambda lag: ratio * mean_client(lag)
    whole = floored(mean_client(full))

    def spread(lag: Array) -> Array:
        plain = mean_client(lag)
        result: Array = ratio * plain * (1 - (1 - saturation) * np.minimum(plain / whole, 1.0))
        return result

    return spread
