"""The table at the end of a run: convergence, cost, and where the files lie."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

# key of summary.json, what a person calls it, and how it is written
_QUALITY = [
    ("accuracy", "held-out accuracy", "{:.4f}"),
    ("rmse", "held-out RMSE", "{:.4g}"),
    ("nll", "held-out NLL", "{:.4f} nats"),
    ("brier", "Brier score", "{:.4f}"),
    ("ece", "calibration error (ECE)", "{:.4f}"),
    ("adaptive_ece", "adaptive ECE", "{:.4f}"),
]
_CHAINS = [
    ("rhat_max", "worst R-hat", "{:.4f}"),
    ("ess_bulk_min", "smallest bulk ESS", "{:,.0f}"),
    ("ess_tail_min", "smallest tail ESS", "{:,.0f}"),
    ("predicted_variance_bias", "predicted variance bias", "{:+.2%}"),
]
_STEP = [
    ("step_size", "step", "{:.4g}"),
    ("largest_stable_step", "largest stable step", "{:.4g}"),
    ("relaxation_rounds", "relaxation time", "{:,.0f} rounds"),
    ("predicted_mean_heating", "mean heating", "{:+.2%}"),
    ("predicted_worst_heating", "largest heating", "{:+.2%}"),
]
_COST = [
    ("uplink_bytes_per_client", "uplink per client", "{:.3f} MB"),
    ("downlink_bytes_per_client", "downlink per client", "{:.3f} MB"),
    ("uplink_ratio", "uplink saved", "{:.1f} times fewer bytes than sending every gradient"),
    ("seconds", "time", "{:.1f} s"),
    ("seconds_per_round", "time per round", "{:.3f} ms"),
]
_SIZE = [("rounds", "round"), ("clients", "client"), ("params", "parameter")]
_UNITS = {"uplink_bytes_per_client": 1e-6, "downlink_bytes_per_client": 1e-6, "seconds_per_round": 1e3}


def summary_table(summary: Mapping[str, Any], path: str | Path) -> Table:
    """Format a run's `summary.json` as a table.

    Args:
        summary: the content of `summary.json`; absent rows are left out, null values are shown as "-" with a reason.
        path: the run directory.

    Returns:
        A table for `rich.console.Console.print`.
    """
    from rich.table import Table
    from rich.text import Text

    chains = f"{_count(summary, 'chains', 'chain')} of {_count(summary, 'draws', 'draw')}"
    size = ", ".join(_count(summary, key, name) for key, name in _SIZE)
    table = Table(title=f"{chains}: {size}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for rows in (_QUALITY, _CHAINS, _STEP, _COST):
        shown = [row for row in rows if row[0] in summary]
        for key, name, form in shown:
            table.add_row(name, Text(_written(key, form, summary)))
        if shown:
            table.add_section()
    checked = summary.get("step_check")
    if isinstance(checked, Mapping):
        table.add_row("half the step", Text(f"{checked['verdict']}: {checked['why']}"))
        table.add_section()
    for warning in summary.get("warnings") or []:
        table.add_row(Text("warning", style="bold"), Text(str(warning)))
        table.add_section()
    table.add_row("run directory", Text(str(path)))
    table.add_row("curves", Text(f"fedsample monitor {shlex.quote(str(path))}"))
    return table


def _written(key: str, form: str, summary: Mapping[str, Any]) -> str:
    value = summary[key]
    if isinstance(value, (int, float)) and math.isfinite(value):
        return form.format(value * _UNITS.get(key, 1))
    reason = _reason(key, summary)
    return f"- ({reason})" if reason else "-"


def _reason(key: str, summary: Mapping[str, Any]) -> str:
    """Say why a value is missing, if the summary tells."""
    chains, draws = summary.get("chains"), summary.get("draws")
    if key == "rhat_max" and chains == 1:
        return "needs two chains"
    if key in ("rhat_max", "ess_bulk_min", "ess_tail_min"):
        return "needs four draws per chain" if isinstance(draws, int) and draws < 4 else "nothing moved"
    if key == "predicted_variance_bias":
        return "not predicted for minibatches, drop-outs, temperature 0 or an unstable step"
    if key == "adaptive_ece" and summary.get("ece") is not None:
        return "needs all held-out rows in one process"
    if key in ("accuracy", "brier", "ece", "adaptive_ece", "rmse", "nll"):
        return "no draws" if draws == 0 else "no held-out data"
    return ""


def _count(summary: Mapping[str, Any], key: str, name: str) -> str:
    value = summary.get(key)
    return f"{value:,} {name}{'' if value == 1 else 's'}" if isinstance(value, int) else f"? {name}s"
