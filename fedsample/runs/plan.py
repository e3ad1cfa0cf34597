"""What a configuration would run and send, without sampling."""

from __future__ import annotations

from collections.abc import Sequence

from fedsample.config import Source, load
from fedsample.runs.checks import check
from fedsample.runs.memory import within_memory


def plan(source: Source = None, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Describe what a configuration would run and send, without sampling."""
    import torch

    from fedsample.estimators import build_links
    from fedsample.numerics.dtypes import DTYPES
    from fedsample.problem import build_problem

    experiment = load(source, overrides)
    check(experiment)
    with within_memory():
        problem = build_problem(experiment)
    links = build_links(experiment, problem.clients)
    dtype, d, chains = DTYPES[experiment.dtype], problem.d, experiment.chains
    packet = links.packet_bits(chains, d, dtype)
    dense = 8 * d * chains * (4 if experiment.dtype == "float32" else 8)
    down = links.downlink.bits(torch.ones(1, dtype=torch.int64), chains, d, dtype)
    rows = problem.clients.rows.tolist()
    return {
        "target": f"{experiment.model.name} on {experiment.data.name or experiment.data.file}, {d} parameters",
        "clients": f"{problem.clients.n}, rows {_shortened(rows)}",
        "sampler": f"{experiment.sampler.name}, {chains} chains, temperature {experiment.temperature:g}",
        "metric": experiment.metric.name,
        "uplink": f"{experiment.uplink.name} + {links.uplink.compressor.name}",
        "step": str(experiment.step_size),
        "rounds": f"{experiment.rounds} ({experiment.warmup} of warm-up), {experiment.draws} draws per chain",
        "uplink per client and round": f"{packet / 8:,.0f} bytes (dense: {dense / 8:,.0f})",
        "downlink per client and round": f"{down / 8:,.0f} bytes (dense: {dense / 8:,.0f})",
        "uplink per client in all": f"{packet / 8e6 * experiment.rounds:,.2f} MB, preparation not counted",
    }


def _shortened(rows: list[int]) -> str:
    if len(rows) <= 16:
        return " ".join(map(str, rows))
    return f"{' '.join(map(str, rows[:12]))} ... (from {min(rows)} to {max(rows)})"
