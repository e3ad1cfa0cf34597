"""A chain of the package and its map written apart, side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
from moment_maps import Chain, coordinate, doubt
from rounding import gamma, solved

from fedsample.strategies import SAMPLERS as KINDS
from fedsample.theory.base import StepTheory
from fedsample.theory.moments import Coordinate

SAMPLERS, UPLINKS = ("langevin", "baoab", "sghmc"), ("dense", "direct", "marina", "diana", "ef21")


def theory(sampler: str, friction: float = 1.0) -> StepTheory:
    """What a sampler of this name says of itself on a quadratic."""
    kind = KINDS[sampler]
    return kind.theory(**({"friction": friction} if "friction" in kind.options else {}))


def pair(
    clients: tuple[list[float], list[float]],
    sampler: str,
    uplink: str,
    step: float,
    *,
    keep: float = 0.25,
    arrive: float = 1.0,
    sync: float = 0.3,
    prior: float = 0.0,
    friction: float = 0.7,
    see: float | None = None,
) -> tuple[Chain, Coordinate]:
    """The same coordinate as an exact map and as the package describes it."""
    lam, a = np.array(clients[0]), np.array(clients[1])
    rest: dict[str, Any] = {"sync": sync, "friction": friction, "prior": np.array([[prior]])}
    exact = coordinate(lam, a, sampler, uplink, step, keep=keep, arrive=arrive, see=see, **rest)
    described = Coordinate(
        theory(sampler, friction),
        uplink,  # type: ignore[arg-type]
        curvature=float(exact.precision[0, 0]),
        mixing=float((lam**2).sum()),
        share=float(lam.mean()),
        clients=len(lam),
        inclusion=1.0 if uplink == "dense" else keep,
        participation=arrive,
        sync=sync,
        force=float(((lam * (exact.mode[0] - a)) ** 2).sum()),
        downlink=1.0 if see is None else see,
    )
    return exact, described


def excess(exact: Chain) -> float:
    """Relative excess of the exact stationary variance over the truth."""
    return float(exact.spread()[0] * exact.precision[0, 0] - 1)


def doubt_of(described: Coordinate, step: float) -> float:
    """How far the package's bias may be off, by the roundings of the recursion that it solves; see `doubt`."""
    matrix, constant = described.matrix(step), described.constant(step)
    moments = np.linalg.solve(np.eye(len(constant)) - matrix, constant)
    roundings = solved(np.eye(len(constant)) - matrix, 60)  # an entry: some products of nine factors at most
    return 2 * gamma(roundings) * described.curvature * float(np.abs(moments).max())


def run_warnings(exact: Chain, described: Coordinate, step: float) -> float:
    """Of a bias by the map and one by the package together; both are infinite where they say so."""
    if not exact.radius < 1:
        return 0.0
    return doubt(exact) * float(exact.precision[0, 0]) + doubt_of(described, step)


def seen(bound: float, size: float = 1.0) -> Any:
    """A bound that is as good as none is a defect of the test."""
    assert bound <= 1e-5 * size, f"{bound:.3g} on {size:.3g}"
    return bound
