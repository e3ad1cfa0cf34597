"""How a simulation computes its clients' gradients: engines, chosen by a table over shapes or by timing them.

    batched     all clients in one worker; one product with all rows, then one per client
    stacked     the same, in runs of clients that stay in the cache between the two products
    compiled    the same, by C++ compiled for this machine: each row is read once (linear and logistic models)
    cuda-graph  on a GPU, all kernels of a gradient in one launch: what stacked does for regressions, of all rows; for
                networks what batched does, minibatches too
    by-client   one worker per client, as on devices: the same bits as there

They agree to the rounding of their sums, with the same draws, masks and coins. The chosen engine is stored in the
run's config.toml, and a resumed run reads it there.
"""

from __future__ import annotations

import time
import warnings
from typing import Literal

import torch

from fedsample.errors import CompileError
from fedsample.targets import Clients, GeneralizedLinear, ModuleClients

Engine = Literal["batched", "stacked", "compiled", "cuda-graph", "by-client"]

_UNSURE = ("compiled", "cuda-graph")  # engines whose availability depends on the machine
_CACHE = 1 << 20  # bytes of design matrix above which a second product no longer finds it in a second-level cache
_REPEATS = 7
_SECONDS = 0.2  # seconds for timing each engine


def choose_engine(
    clients: Clients,
    wanted: Engine | Literal["auto"],
    *,
    chains: int,
    batch_size: int | None = None,
    tune: bool = False,
    strict: bool = False,
) -> Engine:
    """Choose the engine.

    Args:
        clients: the clients whose gradients are computed.
        wanted: an engine's name, or "auto".
        chains: C, the number of chains.
        batch_size: rows per gradient; None: all.
        tune: with "auto", choose by timing; the choice may differ from time to time.
        strict: take a named engine untried, because a resumed run began with it; `LocalFleet` reports it if it is not
            possible. Otherwise the next engine of the table takes its place, with a warning.
    """
    if wanted != "auto":
        chosen: Engine = wanted
    else:
        chosen = by_stopwatch(clients, chains) if tune and batch_size is None else by_shape(clients, batch_size)
    if chosen not in _UNSURE or (strict and wanted != "auto"):
        return chosen
    try:
        clients.on(chosen)
    except (CompileError, torch.OutOfMemoryError) as error:
        instead = by_shape(clients, batch_size, without=chosen)
        warnings.warn(f'fleet.engine = "{chosen}" is not possible, "{instead}" is used: {error}', stacklevel=2)
        return choose_engine(clients, instead, chains=chains, batch_size=batch_size)
    return chosen


def by_shape(clients: Clients, batch_size: int | None, *, without: str = "") -> Engine:
    """Look the engine up in the table, by kind and size of clients; the same on every machine with such a device."""
    regression = isinstance(clients, GeneralizedLinear) and batch_size is None
    if (regression or isinstance(clients, ModuleClients)) and clients.device.type == "cuda" and without != "cuda-graph":
        return "cuda-graph"
    if not isinstance(clients, GeneralizedLinear) or batch_size is not None:
        return "batched"
    even = clients.n > 1 and len(set(clients.rows.tolist())) == 1  # then one product computes many gradients
    return "stacked" if even or clients.design.numel() * clients.dtype.itemsize > _CACHE else "batched"


def by_stopwatch(clients: Clients, chains: int) -> Engine:
    """Time the engines and choose the fastest."""
    points = torch.zeros(chains, clients.d, dtype=clients.dtype, device=clients.device)
    times: dict[Engine, float] = {}
    names: tuple[Engine, ...] = ("batched", "stacked", "compiled", "cuda-graph")
    for name in names:
        try:
            path = clients.on(name)
            path.gradient(points)  # the first call fills caches
        except (CompileError, torch.OutOfMemoryError):
            continue
        began, best = time.perf_counter(), float("inf")
        for _ in range(_REPEATS):
            start = time.perf_counter()
            path.gradient(points)
            if clients.device.type == "cuda":
                torch.cuda.synchronize(clients.device)
            best = min(best, time.perf_counter() - start)
            if time.perf_counter() - began > _SECONDS:
                break
        times[name] = best
    return min(times, key=times.__getitem__) if times else by_shape(clients, None)
