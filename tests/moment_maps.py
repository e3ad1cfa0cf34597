r"""Exact second moments of every linear chain, written apart from the package: plain numpy, one matrix a bit.

On quadratic clients U_i(x) = (x - a_i)^T H_i (x - a_i) / 2 a round is affine in its state and in its random bits. With
the state y = (1, x, [v], rest), where `rest` is (x_before, g) for marina, (h_1, ..., h_n) for diana and nothing for
dense, a round given marina's coin is

    y+ = (M_0 + sum_b beta_b D_b) y + c xi,    xi ~ N(0, I)

and with mu, Gamma the mean and covariance of the bits,

    E y+ y+^T = (M_0 + sum mu_b D_b) P (M_0 + sum mu_b D_b)^T + sum_bc Gamma_bc D_b P D_c^T + c c^T,    P = E y y^T.

The bit beta_ij says that client i's coordinate j arrived: the mask kept it, the client was asked, the reply was not
lost. The leading 1 carries means along. Masks act on coordinates: one coordinate by itself is a problem with d = 1
whose bit has mean K / d, exact whenever the Hessians are diagonal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def subset_pairs(size: int, k: int) -> Array:
    """(size, size) probabilities that two positions both lie in a uniform k-subset."""
    off = k * (k - 1) / (size * (size - 1)) if size > 1 else 1.0
    return np.full((size, size), off) + (k / size - off) * np.eye(size)


def block_pairs(order: list[int], k: int) -> Array:
    """The same for k cyclically successive entries of `order`, from a uniform start."""
    size = len(order)
    pairs = np.zeros((size, size))
    for start in range(size):
        block = [order[(start + step) % size] for step in range(k)]
        pairs[np.ix_(block, block)] += 1 / size
    return pairs


def independent_pairs(size: int, q: float) -> Array:
    """The same for independent coins."""
    return np.full((size, size), q * q) + (q - q * q) * np.eye(size)


@dataclass(frozen=True)
class Chain:
    """A sampler, an uplink and quadratic clients.

    Attributes:
        hessians: (n, d, d). centers: (n, d). sampler: "langevin" or "baoab". uplink: "dense", "marina" or "diana".
        step: h. friction: of baoab. temperature: T. masks: (d, d) probabilities that a mask keeps two coordinates;
            diagonal K / d; None: all kept. clients: (n, n) probabilities that two clients' uploads both arrive; None:
            all do. sync: marina's p. prior, prior_center: Hessian (d, d) and centre (d,) of U_0.
    """

    hessians: Array
    centers: Array
    sampler: str
    uplink: str
    step: float
    friction: float = 1.0
    temperature: float = 1.0
    masks: Array | None = None
    clients: Array | None = None
    sync: float = 0.0
    prior: Array | None = None
    prior_center: Array | None = None
    first: bool = False  # the round before which momenta are whole
    one_mask: bool = field(default=False, kw_only=True)  # the mutant in which all clients share their masks

    # --- the target ---------------------------------------------------------------------------------------------

    @property
    def n(self) -> int:
        return len(self.centers)

    @property
    def d(self) -> int:
        return self.centers.shape[1]

    @cached_property
    def _prior(self) -> tuple[Array, Array]:
        hessian = np.zeros((self.d, self.d)) if self.prior is None else self.prior
        center = np.zeros(self.d) if self.prior_center is None else self.prior_center
        return hessian, center

    @cached_property
    def precision(self) -> Array:
        """(d, d) Hessian of U."""
        return self.hessians.sum(0) + self._prior[0]

    @cached_property
    def mode(self) -> Array:
        """(d,) the target's mean."""
        hessian, center = self._prior
        force = np.einsum("ijk,ik->j", self.hessians, self.centers) + hessian @ center
        return np.linalg.solve(self.precision, force)

    # --- the state ----------------------------------------------------------------------------------------------

    @cached_property
    def layout(self) -> dict[str, slice]:
        """Where each part of y = (1, x, ...) lies."""
        names = ["x"] + (["v"] if self.sampler == "baoab" else [])
        names += {"dense": [], "marina": ["before", "g"], "diana": [f"h{i}" for i in range(self.n)]}[self.uplink]
        return {name: slice(1 + at * self.d, 1 + (at + 1) * self.d) for at, name in enumerate(names)}

    @property
    def size(self) -> int:
        return 1 + self.d * len(self.layout)

    def part(self, name: str) -> Array:
        """(d, size) the matrix that picks a part of the state."""
        return np.eye(self.size)[self.layout[name]]

    # --- a round ------------------------------------------------------------------------------------------------

    def _gradient(self, i: int, at: str) -> Array:
        """(d, size) grad U_i at a part of the state, as a matrix on y."""
        matrix = self.hessians[i] @ self.part(at)
        matrix[:, 0] -= self.hessians[i] @ self.centers[i]
        return matrix

    def _kernel(self, gradient: Array) -> Array:
        """(size, size) the sampler's rows from the gradient of U as a matrix on y; the other rows are zero."""
        h, x, rows = self.step, self.part("x"), np.zeros((self.size, self.size))
        if self.sampler == "langevin":
            rows[self.layout["x"]] = x - h * gradient
            return rows
        e = math.exp(-self.friction * h)
        kicked = self.part("v") - (h / 2 if self.first else h) * gradient
        rows[self.layout["x"]] = x + h / 2 * (1 + e) * kicked
        rows[self.layout["v"]] = e * kicked
        return rows

    @cached_property
    def noise(self) -> Array:
        """(size, d) how the standard normals enter."""
        entry, h, t = np.zeros((self.size, self.d)), self.step, self.temperature
        if self.sampler == "langevin":
            entry[self.layout["x"]] = math.sqrt(2 * h * t) * np.eye(self.d)
            return entry
        scale = math.sqrt(t * (1 - math.exp(-2 * self.friction * h)))
        entry[self.layout["x"]] = h / 2 * scale * np.eye(self.d)
        entry[self.layout["v"]] = scale * np.eye(self.d)
        return entry

    def bits(self) -> tuple[Array, Array]:
        """Mean (n d,) and covariance (n d, n d) of the bits."""
        masks = np.ones((self.d, self.d)) if self.masks is None else self.masks
        clients = np.ones((self.n, self.n)) if self.clients is None else self.clients
        if self.uplink == "dense":
            masks = np.ones((self.d, self.d))
        keep = np.diag(masks)
        same = np.eye(self.n)[:, None, :, None] if not self.one_mask else np.ones((self.n, 1, self.n, 1))
        pairs = same * masks[None, :, None, :] + (1 - same) * np.outer(keep, keep)[None, :, None, :]
        pairs = (pairs * clients[:, None, :, None]).reshape(self.n * self.d, self.n * self.d)
        mean = np.outer(np.diag(clients), keep).ravel()
        return mean, pairs - np.outer(mean, mean)

    def round(self, coin: bool = False) -> tuple[Array, Array]:
        """M_0 (size, size) and the D_b (n d, size, size) of a round, given marina's coin."""
        n, d, layout = self.n, self.d, self.layout
        scale = 1 / self.bits()[0].reshape(n, d)  # (1 / pi) (d / K)
        hessian, center = self._prior
        fixed = hessian @ self.part("x")  # the gradient of U that no bit touches
        fixed[:, 0] -= hessian @ center
        still, carry = np.zeros((self.size, self.size)), np.zeros((n, d, self.size, self.size))
        sent = np.zeros((n, d, self.size))  # what client i compresses
        still[0, 0] = 1.0
        for i in range(n):
            if self.uplink == "dense":
                sent[i] = self._gradient(i, "x")
            elif self.uplink == "diana":
                memory = self.part(f"h{i}")
                sent[i] = self._gradient(i, "x") - memory
                fixed = fixed + memory
                still[layout[f"h{i}"]] = memory
                for j in range(d):
                    carry[i, j, layout[f"h{i}"]][j] = sent[i, j]  # alpha (d / K) = 1: the memory becomes the gradient
            elif coin:
                fixed = fixed + self._gradient(i, "x")
            else:
                sent[i] = self._gradient(i, "x") - self._gradient(i, "before")
        if self.uplink == "marina":
            still[layout["before"]] = self.part("x")
            prior = hessian @ self.part("x")
            prior[:, 0] -= hessian @ center
            if not coin:
                fixed = fixed + self.part("g")
            still[layout["g"]] = fixed - prior  # the estimate knows nothing of the prior
            for i in range(n):
                for j in range(d):
                    carry[i, j, layout["g"]][j] = scale[i, j] * sent[i, j]
        free = np.zeros((self.size, self.size))
        for name in ("x", "v"):
            if name in layout:
                free[layout[name]] = self._kernel(fixed)[layout[name]]
        no_kick = self._kernel(np.zeros((d, self.size)))
        directions = np.zeros((n, d, self.size, self.size))
        for i in range(n):
            for j in range(d):
                gradient = np.zeros((d, self.size))
                gradient[j] = scale[i, j] * sent[i, j]
                directions[i, j] = self._kernel(gradient) - no_kick + carry[i, j]
        return still + free, directions.reshape(n * d, self.size, self.size)

    # --- second moments -----------------------------------------------------------------------------------------

    def after(self, moments: Array, coin: bool | None = None) -> Array:
        """E y+ y+^T (size, size) from E y y^T; `coin` conditions on marina's."""
        chances = {None: [(True, self.sync), (False, 1 - self.sync)], True: [(True, 1.0)], False: [(False, 1.0)]}[coin]
        result = moments[0, 0] * self.noise @ self.noise.T
        mean, covariance = self.bits()
        for tossed, chance in chances if self.uplink == "marina" else [(False, 1.0)]:
            still, directions = self.round(tossed)
            average = still + np.tensordot(mean, directions, 1)
            moved = average @ moments @ average.T
            spread = np.einsum("bc,bij,jk,clk->il", covariance, directions, moments, directions, optimize=True)
            result = result + chance * (moved + spread)
        return result

    @cached_property
    def _linear(self) -> tuple[Array, Array]:
        """The map on vec P, split into the part on unknown moments and the constant from P_00 = 1."""
        mean, covariance = self.bits()
        operator = np.kron(np.eye(self.size)[:, :1], np.eye(self.size)[:, :1]) * 0.0
        operator = np.zeros((self.size**2, self.size**2))
        for tossed, chance in [(True, self.sync), (False, 1 - self.sync)] if self.uplink == "marina" else [(False, 1.0)]:
            still, directions = self.round(tossed)
            average = still + np.tensordot(mean, directions, 1)
            operator += chance * np.kron(average, average)
            mixed = np.einsum("bc,bij,ckl->ikjl", covariance, directions, directions, optimize=True)
            operator += chance * mixed.reshape(self.size**2, self.size**2)
        constant = operator[:, 0] + (self.noise @ self.noise.T).ravel()
        return operator[1:, 1:], constant[1:]

    @cached_property
    def radius(self) -> float:
        """The spectral radius of the second-moment map: stable iff below one."""
        return float(np.abs(np.linalg.eigvals(self._linear[0])).max())

    @cached_property
    def stationary(self) -> Array:
        """(size, size) the fixed point E y y^T."""
        if not self.radius < 1:
            raise ValueError(f"the chain is unstable: radius {self.radius:.6f}")
        operator, constant = self._linear
        unknown = np.linalg.solve(np.eye(len(constant)) - operator, constant)
        return np.concatenate([[1.0], unknown]).reshape(self.size, self.size)

    def mean(self, name: str = "x") -> Array:
        """(d,) stationary mean of a part."""
        return self.stationary[0, self.layout[name]]

    def spread(self, name: str = "x") -> Array:
        """(d,) stationary variance of a part."""
        where = self.layout[name]
        return np.diag(self.stationary[where, where]) - self.mean(name) ** 2

    def whole_momenta(self) -> Array:
        """(d,) stationary E v^2 of the momenta after their closing half kick, for exact gradients (uplink dense)."""
        close = self.part("v") - self.step / 2 * (self.precision @ self.part("x"))
        close[:, 0] += self.step / 2 * (self.precision @ self.mode)
        return np.diag(close @ self.stationary @ close.T)

    def limit(self, low: float = 1e-6, high: float = 4.0) -> float:
        """The largest stable step, by bisection."""
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if replace(self, step=middle).radius < 1 else (low, middle)
        return low


def coordinate(
    curvatures: list[float] | Array,
    centers: list[float] | Array,
    sampler: str,
    uplink: str,
    step: float,
    *,
    keep: float = 1.0,
    arrive: float = 1.0,
    cohort: int | None = None,
    **rest: float | bool,
) -> Chain:
    """One coordinate of diagonal clients: `keep` = K / d, `arrive` the probability that an upload arrives, or a cohort."""
    lam, a = np.asarray(curvatures, dtype=float), np.asarray(centers, dtype=float)
    n = len(lam)
    clients = independent_pairs(n, arrive) if cohort is None else subset_pairs(n, cohort)
    masks = np.array([[keep]])
    return Chain(lam[:, None, None], a[:, None], sampler, uplink, step, masks=masks, clients=clients, **rest)  # type: ignore[arg-type]


R4 = ([0.5, 1.0, 1.5, 2.0], [-1.0, 0.5, 2.0, -0.5])  # the reference clients: mean 0.4, variance 0.2
