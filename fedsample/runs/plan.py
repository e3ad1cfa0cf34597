"""What a configuration would run, and what it would send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedsample.config import Source, load
from fedsample.estimators.links import links
from fedsample.runs.checks import check

if TYPE_CHECKING:
    pass
from fedsample.runs.api import _within_memory


def plan(source: Source = None, overrides: Sequence[str] = ()) -> dict[str, str]:
    """What a configuration would run, and what it would send, without sampling."""
    import torch

    from fedsample.numerics.dtypes import DTYPES
    from fedsample.problem import build_problem

    experiment = load(source, overrides)
    check(experiment)
    with _within_memory():
        problem = build_problem(experiment)
    uplink, downlink = links(experiment, problem)
    dtype, d, chains = DTYPES[experiment.dtype], problem.d, experiment.chains
    p = uplink.sync_probability(2, d)
    packet = (1 - p) * uplink.bits(chains, 0, d, dtype) + p * uplink.bits(chains, chains, d, dtype)
    dense = 8 * d * chains * (4 if experiment.dtype == "float32" else 8)
    down = downlink.bits(torch.ones(1, dtype=torch.int64), chains, d, dtype)
    rows = problem.clients.rows.tolist()
    return {
        "target": f"{experiment.model.name} on {experiment.data.name or experiment.data.file}, {d} parameters",
        "clients": f"{problem.clients.n}, rows {_shortened(rows)}",
        "sampler": f"{experiment.sampler.name}, {chains} chains, temperature {experiment.temperature:g}",
        "metric": experiment.metric.name,
        "uplink": f"{experiment.uplink.name} + {uplink.compressor.name}",
        "step": str(experiment.step_size),
        "rounds": f"{experiment.rounds} ({experiment.warmup} of warm-up), {experiment.draws} draws a chain",
        "uplink a client and round": f"{packet / 8:,.0f} bytes (dense: {dense / 8:,.0f})",
        "downlink a client and round": f"{down / 8:,.0f} bytes (dense: {dense / 8:,.0f})",
        "uplink a client in all": f"{packet / 8e6 * experiment.rounds:,.2f} MB, preparation not counted",
    }


def _shortened(rows: list[int]) -> str:
    if len(rows) <= 16:
        return " ".join(map(str, rows))
    return f"{' '.join(map(str, rows[:12]))} ... (from {min(rows)} to {max(rows)})"
