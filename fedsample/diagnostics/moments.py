r"""Predicted stationary variance of a compressed chain, and the largest stable step, from second moments.

Along one coordinate let the target have curvature lambda, the clients' share of it lambda_c = sum_i lambda_i, and let
r = sum_i (H_i^2)_jj measure how the clients' curvature mixes coordinates. With masks of inclusion s = (K / d) pi, where
pi is the probability that a client takes part, the estimated gradient is g = lambda u + w with

    diana    w: variance (1/s - 1) r E(u - phi)^2,  phi <- u where the mask falls, else phi
    marina   w <- 0 with probability p, else w + noise of variance (1/s - 1) r E(u_k - u_{k-1})^2
    dense    w: variance (1/pi - 1) (r E u^2 + zeta),  zeta = sum_i (grad U_i)^2 at the mode

and the sampler is linear in (u, v). Second moments of (u, v) and of phi or w then obey a linear recursion in six
unknowns; its fixed point gives the stationary variance and its spectral radius the stability. It is exact for clients
of equal curvature and diagonal Hessians, where it reduces to the closed forms of the literature; otherwise it is the
mean-field value for the coordinate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Coordinate:
    """A coordinate of the target, a sampler and an uplink.

    Attributes:
        sampler: "langevin" or "baoab". friction: of baoab. uplink: "dense", "marina" or "diana".
        curvature: lambda > 0 of U, prior included. share: lambda_c / n, a client's part of it. mixing: r >= 0.
        inclusion: K / d in (0, 1]. participation: pi in (0, 1]. sync: p of marina. force: zeta >= 0.
    """

    sampler: Literal["langevin", "baoab"]
    uplink: Literal["dense", "marina", "diana"]
    curvature: float
    mixing: float = 0.0
    share: float = 0.0
    friction: float = 1.0
    inclusion: float = 1.0
    participation: float = 1.0
    sync: float = 0.0
    force: float = 0.0

    def bias(self, step_size: float) -> float:
        """Relative excess of the stationary variance over 1 / lambda at temperature 1; infinite where unstable."""
        matrix, constant = self._recursion(step_size)
        if float(np.abs(np.linalg.eigvals(matrix)).max()) >= 1.0:
            return math.inf
        return float(self.curvature * np.linalg.solve(np.eye(len(constant)) - matrix, constant)[0] - 1.0)

    def limit(self) -> float:
        """The largest step at which second moments stay bounded."""
        high = 2.0 / (math.sqrt(self.curvature) if self.sampler == "baoab" else self.curvature)
        return self._largest(lambda h: self._radius(h) < 1.0, high)

    def largest_step(self, tolerance: float) -> float:
        """The largest step at which the bias stays within the tolerance."""
        return self._largest(lambda h: self.bias(h) <= tolerance, self.limit())

    def at(self, curvature: float) -> Coordinate:
        """The same with another curvature."""
        return replace(self, curvature=curvature)

    @staticmethod
    def _largest(holds, high: float) -> float:  # type: ignore[no-untyped-def]
        """Bisection in the logarithm for the end of an interval (0, h] on which `holds`."""
        if holds(high * (1 - 1e-9)):
            return high
        low = high * 1e-8
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low

    def _radius(self, step_size: float) -> float:
        return float(np.abs(np.linalg.eigvals(self._recursion(step_size)[0])).max())

    def _recursion(self, step_size: float) -> tuple[Array, Array]:
        """(6, 6) and (6,): moments [uu, uv, vv, ux, vx, xx] of the next round; x is phi or w."""
        columns = [self._next(row, step_size, 0.0) for row in np.eye(6)]
        return np.stack(columns, axis=1), self._next(np.zeros(6), step_size, 1.0)

    def _next(self, m: Array, h: float, temperature: float) -> Array:
        uu, uv, vv, ux, vx, xx = m
        moved, kick, noise = self._linear(h)
        s = self.participation * (1.0 if self.uplink == "dense" else self.inclusion)
        heat = 1.0 / s - 1.0
        before = np.array([[uu, uv], [uv, vv]])
        if self.uplink == "marina":  # g = lambda u + x
            full = np.array([[uu, uv, ux], [uv, vv, vx], [ux, vx, xx]])
            step = np.hstack([moved, kick[:, None]])
            after = step @ full @ step.T + temperature * np.outer(noise, noise)
            drift = step - np.eye(2, 3)
            motion = float((drift @ full @ drift.T)[0, 0]) + temperature * noise[0] ** 2
            cross = (1 - self.sync) * (step @ full[:, 2])
            fresh = (1 - self.sync) * (xx + heat * self.mixing * motion)
        else:
            if self.uplink == "diana":
                lag = uu - 2 * ux + xx
                variance = heat * self.mixing * lag
            else:
                lag = 0.0
                variance = heat * (self.mixing * uu + temperature * self.force)
            after = moved @ before @ moved.T + variance * np.outer(kick, kick) + temperature * np.outer(noise, noise)
            mean_x = np.array([ux, vx]) * (1 - s) + np.array([uu, uv]) * s
            cross = moved @ mean_x + kick * (self.share * (1 - s) * lag)
            fresh = (1 - s) * xx + s * uu
        return np.array([after[0, 0], after[0, 1], after[1, 1], cross[0], cross[1], fresh])

    def _linear(self, h: float) -> tuple[Array, Array, Array]:
        """The sampler as (u, v) <- moved (u, v) + kick w + noise xi, exact part of the gradient included."""
        if self.sampler == "langevin":
            moved = np.array([[1 - h * self.curvature, 0.0], [0.0, 0.0]])
            return moved, np.array([-h, 0.0]), np.array([math.sqrt(2 * h), 0.0])
        e = math.exp(-self.friction * h)
        s = math.sqrt(1 - e * e)
        kicked = np.array([[1.0, 0.0], [-h * self.curvature, 1.0]])
        drifted = np.array([[1.0, (h / 2) * (1 + e)], [0.0, e]])
        return drifted @ kicked, drifted @ np.array([0.0, -h]), np.array([(h / 2) * s, s])
