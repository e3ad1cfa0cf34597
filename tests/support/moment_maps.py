r"""Exact second moments of every linear chain, written apart from the package: plain numpy, one matrix a bit.

On quadratic clients U_i(x) = (x - a_i)^T H_i (x - a_i) / 2 a round is affine in its state and in its random bits. With
the state y = (1, x, [v], [w], rest), where `rest` is (w_before, g) for marina, (h_1, ..., h_n) for diana and ef21, and
nothing for dense and direct, a round given whether it is a dense one is

    y+ = (M_0 + sum_b beta_b D_b) y + c xi,    xi ~ N(0, I)

and with mu, Gamma the mean and covariance of the bits,

    E y+ y+^T = (M_0 + sum mu_b D_b) P (M_0 + sum mu_b D_b)^T + sum_bc Gamma_bc D_b P D_c^T + c c^T,    P = E y y^T.

The bit beta_ij says that client i's coordinate j arrived: the mask kept it, the client was asked, the reply was not
lost. With a compressed downlink clients see w instead of x, and a second map of the same form, w_j <- x_j where the
downlink's mask keeps j, follows the first. The leading 1 carries means along. Masks act on coordinates: one coordinate
by itself is a problem with d = 1 whose bit has mean K / d, exact whenever the Hessians are diagonal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rounding import gamma, solved

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
        hessians: (n, d, d). centers: (n, d). sampler: "langevin", "baoab" or "sghmc". uplink: "dense", "direct",
            "marina", "diana" or "ef21".
        step: h. friction: of baoab and sghmc. temperature: T. masks: (d, d) that a mask keeps two coordinates;
            diagonal K / d; None: all kept. clients: (n, n) probabilities that two clients' uploads both arrive; None:
            all do. sync: marina's p. prior, prior_center: Hessian (d, d) and centre (d,) of U_0. first:
            whether it is the round before which momenta are whole. anchored: whether direct's clients subtract their
            gradients at x = 0. downlink: (d, d) as `masks`, of the increments of w; None: clients see x.
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
    first: bool = False
    anchored: bool = False
    downlink: Array | None = None

    # --- the target ---------------------------------------------------------------------------------------------

    @property
    def n(self) -> int:
        return len(self.centers)

    @property
    def d(self) -> int:
        return int(self.centers.shape[1])

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
        names = ["x"] + (["v"] if self.sampler in ("baoab", "sghmc") else []) + (["w"] if self.at == "w" else [])
        if self.uplink == "marina":
            names += ["before", "g"]
        if self.uplink in ("diana", "ef21"):
            names += [f"h{i}" for i in range(self.n)]
        return {name: slice(1 + at * self.d, 1 + (at + 1) * self.d) for at, name in enumerate(names)}

    @property
    def at(self) -> str:
        """The part at which clients differentiate."""
        return "x" if self.downlink is None else "w"

    @property
    def size(self) -> int:
        return 1 + self.d * len(self.layout)

    def part(self, name: str) -> Array:
        """(d, size) the matrix that picks a part of the state."""
        return np.eye(self.size)[self.layout[name]]

    # --- a round ------------------------------------------------------------------------------------------------

    def _gradient(self, hessian: Array, center: Array, at: str = "x") -> Array:
        """(d, size) H (part - a) as a matrix on y."""
        matrix = hessian @ self.part(at)
        matrix[:, 0] -= hessian @ center
        return matrix

    def _client_gradients(self, at: str) -> Array:
        """(n, d, size) every client's."""
        return np.stack([self._gradient(self.hessians[i], self.centers[i], at) for i in range(self.n)])

    def _kernel(self) -> tuple[Array, Array]:
        """(size, size) the sampler without a gradient and (size, d) how a gradient enters; other rows are zero."""
        h, x = self.step, self.part("x").T
        if self.sampler == "langevin":
            return x @ x.T, -h * x
        v = self.part("v").T
        if self.sampler == "sghmc":
            kicked = h * x + v  # what a change of the momenta becomes
            return x @ x.T + (1 - h * self.friction) * kicked @ v.T, -h * kicked
        e = math.exp(-self.friction * h)
        kicked = h / 2 * (1 + e) * x + e * v  # what momenta become: positions and momenta
        return x @ x.T + kicked @ v.T, -(h / 2 if self.first else h) * kicked

    @cached_property
    def noise(self) -> Array:
        """(size, d) how the standard normals enter."""
        entry, h, t = np.zeros((self.size, self.d)), self.step, self.temperature
        if self.sampler == "langevin":
            entry[self.layout["x"]] = math.sqrt(2 * h * t) * np.eye(self.d)
            return entry
        if self.sampler == "sghmc":
            scale = math.sqrt(2 * self.friction * h * t)
            entry[self.layout["x"]], entry[self.layout["v"]] = h * scale * np.eye(self.d), scale * np.eye(self.d)
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
        same = np.eye(self.n)[:, None, :, None]
        pairs = same * masks[None, :, None, :] + (1 - same) * np.outer(keep, keep)[None, :, None, :]
        pairs = (pairs * clients[:, None, :, None]).reshape(self.n * self.d, self.n * self.d)
        mean = np.outer(np.diag(clients), keep).ravel()
        return mean, pairs - np.outer(mean, mean)

    def _estimate(self, coin: bool) -> tuple[Array, Array]:
        """The estimate of the clients' gradients: (d, size) what no bit touches, and (n, d, size) what they send."""
        here = self._client_gradients(self.at)
        nothing = np.zeros_like(here[0])
        if self.uplink in ("dense", "direct"):
            known = np.zeros_like(here)
            if self.anchored:
                known[:, :, 0] = -np.einsum("ijk,ik->ij", self.hessians, self.centers)
            return nothing + known.sum(0), here - known
        if coin:
            return here.sum(0), 0 * here
        if self.uplink == "marina":
            return self.part("g"), here - self._client_gradients("before")
        memories = self._memories()
        return memories.sum(0), here - memories

    def _memories(self) -> Array:
        return np.stack([self.part(f"h{i}") for i in range(self.n)])

    def round(self, coin: bool = False) -> tuple[Array, Array]:
        """M_0 (size, size) and the D_b (n d, size, size) of a round, given that it is dense (marina, ef21)."""
        scale = np.ones((self.n, self.d))
        if self.uplink != "ef21":
            scale = 1 / self.bits()[0].reshape(self.n, self.d)  # (1 / pi) (d / K)
        base, sent = self._estimate(coin)
        free, kick = self._kernel()
        still = free + kick @ (base + self._gradient(*self._prior))
        still[0, 0] = 1.0
        if self.at == "w":
            still += self.part("w").T @ self.part("w")
        bits = np.einsum("rj,ij,ijc->ijrc", kick, scale, sent)
        if self.uplink == "marina":
            still += self.part("before").T @ self.part(self.at) + self.part("g").T @ base
            bits += np.einsum("jr,ij,ijc->ijrc", self.part("g"), scale, sent)
        if self.uplink in (
            "diana",
            "ef21",
        ):  # a coordinate that arrives makes the memory the gradient (alpha d / K = 1)
            kept = self._client_gradients(self.at) if coin else self._memories()
            for i, memory in enumerate(self._memories()):
                still += memory.T @ kept[i]
                bits[i] += np.einsum("jr,jc->jrc", memory, sent[i])
        return still, bits.reshape(-1, self.size, self.size)

    def _sight(self) -> tuple[Array, Array, Array]:
        """What follows a round: I + sum mu_j D_j, the D_j (d, size, size) and the covariance of the downlink's bits."""
        assert self.downlink is not None
        x, w = self.part("x"), self.part("w")
        directions = np.einsum("jr,jc->jrc", w, x - w)
        keep = np.diag(self.downlink)
        average = np.eye(self.size) + np.tensordot(keep, directions, 1)
        return average, directions, self.downlink - np.outer(keep, keep)

    def coins(self, coin: bool | None = None) -> list[tuple[bool, float]]:
        """Whether the round is dense, and the chances: marina's coin, or what is given."""
        if coin is not None or self.uplink != "marina":
            return [(bool(coin), 1.0)]
        return [(True, self.sync), (False, 1 - self.sync)]

    # --- second moments -----------------------------------------------------------------------------------------

    def after(self, moments: Array, coin: bool | None = None) -> Array:
        """E y+ y+^T (size, size) from E y y^T; `coin` conditions on whether the round is dense."""
        result = moments[0, 0] * self.noise @ self.noise.T
        mean, covariance = self.bits()
        for tossed, chance in self.coins(coin):
            still, directions = self.round(tossed)
            average = still + np.tensordot(mean, directions, 1)
            result = result + chance * _step(average, directions, covariance, moments)
        return result if self.downlink is None else _step(*self._sight(), result)

    @cached_property
    def _linear(self) -> tuple[Array, Array]:
        """The map on vec P, split into the part on unknown moments and the constant from P_00 = 1."""
        mean, covariance = self.bits()
        operator = np.zeros((self.size**2, self.size**2))
        for tossed, chance in self.coins():
            still, directions = self.round(tossed)
            average = still + np.tensordot(mean, directions, 1)
            operator += chance * _operator(average, directions, covariance)
        noise = (self.noise @ self.noise.T).ravel()
        if self.downlink is not None:
            sight = _operator(*self._sight())
            operator, noise = sight @ operator, sight @ noise
        constant = operator[:, 0] + noise
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

    def whole_momenta(self, moments: Array | None = None) -> Array:
        """(d,) E v^2 of momenta after their closing half kick, for exact gradients (uplink dense); None: stationary."""
        close = self.part("v") - self.step / 2 * (self.precision @ self.part("x"))
        close[:, 0] += self.step / 2 * (self.precision @ self.mode)
        return np.diag(close @ (self.stationary if moments is None else moments) @ close.T)

    def limit(self, low: float = 1e-6, high: float = 4.0) -> float:
        """The largest stable step, by bisection."""
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if replace(self, step=middle).radius < 1 else (low, middle)
        return low


def _step(average: Array, directions: Array, covariance: Array, moments: Array) -> Array:
    """E M P M^T for M = average + sum of centred bits times their directions."""
    spread = np.einsum("bc,bij,jk,clk->il", covariance, directions, moments, directions, optimize=True)
    return average @ moments @ average.T + spread


def _operator(average: Array, directions: Array, covariance: Array) -> Array:
    """(size^2, size^2) the same as a matrix on vec P."""
    size = len(average)
    mixed = np.einsum("bc,bij,ckl->ikjl", covariance, directions, directions, optimize=True)
    return np.kron(average, average) + mixed.reshape(size**2, size**2)


def doubt(chain: Chain) -> float:
    """How far the chain's stationary means and variances may be off, by the roundings of what they were solved from.

    An entry of the map on second moments is a sum of products over pairs of bits and of states; see `rounding.solved`.
    """
    operator, _ = chain._linear
    roundings = solved(np.eye(len(operator)) - operator, (chain.n * chain.d) ** 2 + 4 * chain.size)
    return 2 * gamma(roundings) * float(np.abs(chain.stationary).max())


def difference(got: Array, want: Array) -> float:
    """Largest |got - want| in units of the moments' own size."""
    scale = np.sqrt(np.outer(np.diag(want), np.diag(want)))
    return float((np.abs(got - want) / scale).max())


def tolerance(before: Array, want: Array, chains: list[Chain], begun: float = 0.0) -> float:
    """How far two ways to the moments after some rounds may part, in units of `difference`.

    Args:
        before: the moments that they start from.
        want: those after the rounds.
        chains: the law of each round.
        begun: how far apart they start, in the same units.

    A round adds products of no more than (|M_0| + sum |D_b|) |y| (see `moment_maps`): against the size of its result
    that is `ratio`, squared in moments. Sums run over the thousands of ways that bits may fall, or over pairs of bits
    and states in the map.
    """
    size, roundings = np.sqrt(np.abs(np.diag(before))), 4096.0
    for chain in chains:
        still, directions = chain.round()
        size = (np.abs(still) + np.abs(directions).sum(0)) @ size + np.abs(chain.noise).sum(1)
        roundings += (chain.n * chain.d) ** 2 + chain.size**2 + 40
    ratio = float((size / np.sqrt(np.diag(want))).max())
    bound = (2 * gamma(roundings) + begun) * ratio**2
    assert bound < 1e-7, bound
    return bound


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
    see: float | None = None,
    **rest: Any,
) -> Chain:
    """One coordinate of diagonal clients: `keep` = K / d, `arrive` the chance that an upload arrives, or a cohort;
    `see` the downlink's K / d, None: clients see the iterate."""
    lam, a = np.asarray(curvatures, dtype=float), np.asarray(centers, dtype=float)
    n = len(lam)
    clients = independent_pairs(n, arrive) if cohort is None else subset_pairs(n, cohort)
    rest |= {"masks": np.array([[keep]]), "clients": clients, "downlink": None if see is None else np.array([[see]])}
    return Chain(lam[:, None, None], a[:, None], sampler, uplink, step, **rest)


R4 = ([0.5, 1.0, 1.5, 2.0], [-1.0, 0.5, 2.0, -0.5])  # the reference clients: mean 0.4, variance 0.2
