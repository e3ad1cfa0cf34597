"""The last table of a run: everything that a person asks."""

from __future__ import annotations

import math
from typing import Any

from recorded import console, written

from fedsample.monitor import summary_table

SUMMARY = {
    "rounds": 8000,
    "draws": 1400,
    "chains": 4,
    "clients": 10,
    "params": 650,
    "seconds": 20.14,
    "seconds_per_round": 0.0025,
    "accuracy": 0.9583,
    "nll": 0.2012,
    "brier": 0.0587,
    "ece": 0.0312,
    "adaptive_ece": 0.0298,
    "rhat_max": 1.0142,
    "ess_bulk_min": 521.4,
    "ess_tail_min": 613.2,
    "predicted_variance_bias": 0.0123,
    "uplink_bytes_per_client": 4_200_000,
    "downlink_bytes_per_client": 83_200_000,
    "uplink_ratio": 19.8,
}


def report(summary: dict[str, Any], path: str = "runs/one") -> str:
    out = console(width=100)
    out.print(summary_table(summary, path))
    return written(out)


def test_the_table_says_everything_a_person_asks() -> None:
    text = report(SUMMARY)
    for words in (
        "4 chains of 1,400 draws: 8,000 rounds, 10 clients, 650 parameters",
        "held-out accuracy       │ 0.9583",
        "held-out NLL            │ 0.2012 nats",
        "0.0312",
        "worst R-hat             │ 1.0142",
        "smallest bulk ESS       │ 521",
        "smallest tail ESS       │ 613",
        "Brier score             │ 0.0587",
        "adaptive ECE            │ 0.0298",
        "+1.23%",
        "uplink per client       │ 4.200 MB",
        "downlink per client     │ 83.200 MB",
        "19.8 times fewer bytes",
        "20.1 s",
        "2.500 ms",
        "runs/one",
        "fedsample monitor runs/one",
    ):
        assert words in text
    assert "RMSE" not in text


def test_a_regression_shows_its_own_scores() -> None:
    summary = {key: value for key, value in SUMMARY.items() if key not in ("accuracy", "ece")} | {"rmse": 53.25}
    text = report(summary)
    assert "held-out RMSE" in text
    assert "53.25" in text
    assert "accuracy" not in text


def test_what_is_missing_says_why() -> None:
    text = report(SUMMARY | {"chains": 1, "rhat_max": None, "accuracy": None, "predicted_variance_bias": math.nan})
    assert "worst R-hat             │ - (needs two chains)" in text
    assert "held-out accuracy       │ - (no held-out data)" in text
    assert "predicted variance bias │ - (not predicted for minibatches, drop-outs, temperature 0" in text
    assert "1 chain of 1,400 draws: 8,000 rounds" in text
    text = report(SUMMARY | {"adaptive_ece": None, "brier": None, "ess_tail_min": None})
    assert "adaptive ECE            │ - (needs all held-out rows in one process)" in text
    assert "Brier score             │ - (no held-out data)" in text
    assert "smallest tail ESS       │ - (nothing moved)" in text


def test_the_command_can_be_pasted_whatever_the_directory_is_called() -> None:
    assert "fedsample monitor 'my [bold]runs'" in report(SUMMARY, "my [bold]runs")
