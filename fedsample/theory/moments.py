r"""Predicted stationary variance of a compressed chain, and the largest stable step, from second moments.

Along one coordinate let the target have curvature lambda = lambda_0 + lambda_c, of which the clients hold
lambda_c = sum_i lambda_i, and let r = sum_i (H_i^2)_jj measure how the clients' curvature mixes coordinates. Clients
see the iterate u as w, and compress with inclusion K / d (other unbiased compressors: 1 / (1 + omega)); pi is the
probability that a client takes part, and s = (K / d) pi. The estimated gradient is lambda_0 u + lambda_c w + noise:

    dense    noise of variance (1/pi - 1) (r E w^2 + zeta),   zeta = sum_i (grad U_i)^2 at the mode
    direct   the same with 1/s in place of 1/pi
    diana    noise of variance (1/s - 1) r E(w - phi)^2,      phi <- w where the mask falls, else phi
    marina   noise <- 0 with probability p, else noise + fresh of variance (1/s - 1) r E(w_k - w_{k-1})^2
    ef21     not noise but lag: lambda_0 u + sum_i lambda_i phi_i,   phi_i <- w where the mask of client i falls

and with an `ef21-p` downlink w <- u where its mask falls, else w. The sampler is linear in (u, v), so the second
moments of (u, v, w, phi, phi', noise) obey a linear recursion; its fixed point gives the stationary variance and its
spectral radius the stability. It is exact for clients of equal curvature and diagonal Hessians, where it reduces to the
closed forms of the literature; otherwise it is the mean-field value for the coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from fedsample.theory.base import Array, StepTheory

_U, _V, _W, _A, _B, _X = range(6)  # position, momentum, what clients see, memories of two clients, marina's error
_UPPER = np.triu_indices(6)


@dataclass(frozen=True)
class Coordinate:
    """One coordinate of the target, with a sampler, an uplink and a downlink.

    Attributes:
        sampler: what it says of itself on a quadratic.
        uplink: the gradient estimator.
        curvature: lambda > 0 of U, prior included.
        mixing: r >= 0, how much the clients' curvature mixes coordinates.
        share: lambda_c / n, the mean curvature per client; 0: the clients hold all of lambda.
        clients: number of clients n >= 1.
        inclusion: inclusion probability K / d of the uplink's compressor, in (0, 1].
        participation: probability pi that a client takes part, in (0, 1].
        sync: probability p of a dense round (marina).
        force: zeta >= 0, the sum of squared client gradients at the mode.
        downlink: inclusion probability of the downlink's compressor; 1 if it does not compress.
        concentration: curvature of the clients that cause the noise, over the mean client's share (diana).
    """

    sampler: StepTheory
    uplink: Literal["dense", "direct", "marina", "diana", "ef21"]
    curvature: float
    mixing: float = 0.0
    share: float = 0.0
    clients: int = 1
    inclusion: float = 1.0
    participation: float = 1.0
    sync: float = 0.0
    force: float = 0.0
    downlink: float = 1.0
    concentration: float = 1.0

    def bias(self, step_size: float) -> float:
        """Relative excess of the stationary variance over 1 / lambda at temperature 1; infinite where unstable."""
        matrix = self.matrix(step_size)
        if _radius(matrix) >= 1.0:
            return math.inf
        constant = self.constant(step_size)
        return float(self.curvature * np.linalg.solve(np.eye(len(constant)) - matrix, constant)[0] - 1.0)

    def limit(self) -> float:
        """The largest step at which second moments stay bounded."""
        return _largest(lambda h: _radius(self.matrix(h)) < 1.0, self.sampler.limit(self.curvature))

    def relaxation(self, step_size: float) -> float:
        """Rounds in which the mean's distance from the mode falls to 1 / e of itself, under exact gradients."""
        moved, kick, _ = self.sampler.linear(step_size)
        moved = moved.copy()
        moved[:, 0] += self.curvature * kick
        rate = _radius(moved)
        return -1 / math.log(rate) if 0 < rate < 1 else math.inf if rate >= 1 else 0.0

    def exact(self) -> Coordinate:
        """The same coordinate with uncompressed gradients of all clients at the iterate itself."""
        return replace(self, uplink="dense", participation=1.0, downlink=1.0)

    @property
    def _clients_curvature(self) -> float:
        """lambda_c; all of lambda where no share is given."""
        return min(self.curvature, self.share * self.clients) if self.share else self.curvature

    @cached_property
    def _kept(self) -> list[int]:
        """Which of the 21 second moments the recursion uses; E u^2 is the first."""
        used = {_U, _V, _W, *((_A,) if self.uplink == "diana" else (_A, _B) if self.uplink == "ef21" else ())}
        used |= {_X} if self.uplink == "marina" else set()
        return [k for k, (i, j) in enumerate(zip(*_UPPER, strict=True)) if i in used and j in used]

    def matrix(self, step_size: float) -> Array:
        """(m, m) matrix of the linear recursion of the second moments in use, E u^2 first."""
        basis = _symmetric(np.eye(len(_UPPER[0]))[self._kept])
        return self._next(basis, step_size, 0.0)[:, *_UPPER][:, self._kept].T

    def constant(self, step_size: float) -> Array:
        """(m,) second moments that a round adds at temperature 1."""
        return self._next(np.zeros((6, 6)), step_size, 1.0)[_UPPER][self._kept]

    def _next(self, m: Array, h: float, temperature: float) -> Array:
        """E[z z^T] (..., 6, 6) after a round from that before it, with z = (u, v, w, phi, phi', x)."""
        m = m.copy()
        own, theirs = self.curvature - self._clients_curvature, self._clients_curvature
        moved, kick, noise = self.sampler.linear(h)
        s = self.participation * (1.0 if self.uplink == "dense" else self.inclusion)
        heat = 1.0 / s - 1.0
        # variance of the gradient's fresh noise (...,); its covariance with each variable (..., 6)
        fresh, cross = np.zeros(m.shape[:-2]), np.zeros(m.shape[:-1])
        if self.uplink in ("dense", "direct"):
            fresh = heat * (self.mixing * m[..., _W, _W] + temperature * self.force)
        elif self.uplink == "diana":
            lag = m[..., _W, _W] - 2 * m[..., _W, _A] + m[..., _A, _A]
            fresh = heat * self.mixing * lag
            cross[..., _A] = self.concentration * self.share * (1 - s) * lag
            _refresh(m, _A, _W, s)
        elif self.uplink == "ef21":
            both = (1 - s) ** 2 * m[..., _A, _B] + s * (1 - s) * (m[..., _W, _A] + m[..., _W, _B])
            m[..., _A, _B] = m[..., _B, _A] = both + s * s * m[..., _W, _W]
            for memory in (_A, _B):
                _refresh(m, memory, _W, s, apart=_A + _B - memory)
        gradient = np.zeros(6)
        gradient[_U] = own
        pairs = m
        if self.uplink == "ef21":  # the clients' mean memory in place of w: less one client's scatter
            gradient[_A] = theirs
            single = min(1.0, self.mixing / theirs**2) if theirs > 0 else 1.0
            pairs = m.copy()
            pairs[..., _A, _A] = single * m[..., _A, _A] + (1 - single) * m[..., _A, _B]
        else:
            gradient[_W] = theirs
        if self.uplink == "marina":
            gradient[_X] = 1.0
        step = np.eye(6)
        step[:_W] = 0.0
        step[:_W, :_W] = moved
        step[:_W] += np.outer(kick, gradient)
        after = step @ pairs @ step.T
        if self.uplink == "ef21":  # rows of single memories see the other positions through one client
            after[..., _A, _A] = m[..., _A, _A]
            after[..., _A, _B] = after[..., _B, _A] = m[..., _A, _B]
            mean = m[..., :, _A].copy()
            mean[..., _A] = mean[..., _B] = pairs[..., _A, _A]
            seen = (step[:_W] @ mean[..., None])[..., 0]
            for memory in (_A, _B):
                after[..., :_W, memory] = after[..., memory, :_W] = seen
        after[..., :_W, :_W] += fresh[..., None, None] * np.outer(kick, kick) + temperature * np.outer(noise, noise)
        shared = kick[:, None] * cross[..., None, :]
        after[..., :_W, :] += shared
        after[..., :, :_W] += np.swapaxes(shared, -1, -2)
        before = after[..., _W, _W].copy()
        gap = after[..., _U, _U] - 2 * after[..., _U, _W] + before
        _refresh(after, _W, _U, self.downlink)
        if self.uplink == "marina":
            after[..., _X, :] *= 1 - self.sync
            after[..., :, _X] *= 1 - self.sync
            after[..., _X, _X] = (1 - self.sync) * (m[..., _X, _X] + heat * self.mixing * self.downlink * gap)
        return after


def _symmetric(upper: Array) -> Array:
    m = np.zeros((*upper.shape[:-1], 6, 6))
    m[..., *_UPPER] = upper
    return m + np.swapaxes(np.triu(m, 1), -1, -2)


def _refresh(m: Array, stale: int, source: int, probability: float, apart: int = -1) -> None:
    """Replace `stale` by `source` in the moments, with an independent probability; keep its one with `apart`."""
    mixed = (1 - probability) * m[..., stale, :] + probability * m[..., source, :]
    square = (1 - probability) * m[..., stale, stale] + probability * m[..., source, source]
    keep = m[..., stale, apart].copy() if apart >= 0 else 0.0
    m[..., stale, :], m[..., :, stale] = mixed, mixed
    m[..., stale, stale] = square
    if apart >= 0:
        m[..., stale, apart] = m[..., apart, stale] = keep


def _radius(matrix: Array) -> float:
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def _largest(holds: Callable[[float], bool], high: float) -> float:
    """Find the end of the interval (0, h] on which `holds`, by bisection in the logarithm."""
    if holds(high * (1 - 1e-9)):
        return high
    low = high * 1e-8
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
