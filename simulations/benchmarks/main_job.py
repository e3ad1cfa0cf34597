"""The main job as a user runs it: time to the first round, total time, and the cost of recording.

    python simulations/benchmarks/main_job.py [--repeats 2] [--set section.key=value ...]

Each run is a fresh process of `fedsample simulate`. Recording is measured by running the same chain with everything
written down as by default (logs, curves, draws, checkpoints) and with as little as possible (one log line, no curves,
one checkpoint, one draw), alternating; the ratio compares seconds per round, the fastest of the repeats of each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

QUIET = (
    "monitor.every=1000000",
    "monitor.tensorboard=false",
    "monitor.checkpoint_seconds=1000000.0",
)


def run(overrides: list[str]) -> dict[str, Any]:
    """Run one fresh process; return its summary, with wall-clock seconds to the first round and in total."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "fedsample", "simulate", "--quiet", "--json", "--out", str(out)]
        start = time.time()
        result = subprocess.run(
            [*command, *(f"--set={each}" for each in overrides)], capture_output=True, text=True, check=True
        )
        total = time.time() - start
        first = (out / "geometry.json").stat().st_mtime - start  # written just before round 1
    return {**json.loads(result.stdout), "to_first_round": first, "total": total}


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    full, bare = [], []
    for _ in range(options.repeats):
        full.append(run(options.overrides))
        bare.append(run([*options.overrides, *QUIET, "thin=7000"]))
    best, least = (min(runs, key=lambda each: each["seconds_per_round"]) for runs in (full, bare))
    shown = (
        "accuracy",
        "nll",
        "ece",
        "rhat_max",
        "ess_bulk_min",
        "uplink_ratio",
        "predicted_variance_bias",
        "step_size",
    )
    print(
        json.dumps(
            {
                **{name: best[name] for name in shown},
                "seconds_to_first_round": round(min(each["to_first_round"] for each in full), 2),
                "seconds_in_all": round(min(each["total"] for each in full), 2),
                "ms_a_round": round(1e3 * best["seconds_per_round"], 3),
                "ms_a_round_unrecorded": round(1e3 * least["seconds_per_round"], 3),
                "recording": round(best["seconds_per_round"] / least["seconds_per_round"] - 1, 4),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
