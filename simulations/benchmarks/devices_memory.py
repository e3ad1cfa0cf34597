"""Growth of the server's memory with the number of devices, whose dense answers have 10 MB each.

    python simulations/benchmarks/devices_memory.py [--devices 2 4 8 16] [--parameters 2500000] [--json]

For each number a fresh server process: its largest replica size after some rounds, less that before the first one, in
multiples of one answer. All devices share one other process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from devices import Ours


def replica(what: str) -> int:
    """Resident bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(what)))


def one(count: int, d: int, rounds: int = 4) -> dict[str, Any]:
    """Measure one row in this process."""
    import numpy as np

    from fedsample.fleets.grpc.security import cert_folders

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cert_folders.init(folder / "certs", ["localhost"], count)
        file = folder / "potentials.npz"
        np.savez(file, lam=np.ones(count), a=np.zeros((count, d)))
        ours = Ours(folder / "certs", count, d, file)
        command = [sys.executable, str(Path(__file__).with_name("devices.py")), "--pool", str(count), "0"]
        pool = subprocess.Popen([*command, str(ours.hub.port), name], env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            ours.begin()
            Path("/proc/self/clear_refs").write_text("5")  # the largest size is counted from here
            before = replica("VmRSS")
            for _ in range(rounds):
                ours.round()
            grown = replica("VmHWM") - before
        finally:
            pool.kill()
            pool.wait()
            ours.hub.stop("measured", finished=True)
    return {
        "devices": count,
        "answer_MB": 4 * d / 1e6,
        "grown_MB": round(grown / 1e6),
        "answers": round(grown / d / 4, 1),
    }


def measure(devices: list[int], d: int) -> list[dict[str, Any]]:
    """Measure one row per number of devices."""
    rows = []
    for count in devices:
        command = [sys.executable, __file__, "--one", str(count), "--parameters", str(d)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--parameters", type=int, default=2_500_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.parameters)))
        return
    rows = measure(options.devices, options.parameters)
    print(json.dumps(rows, indent=1) if options.json else "\n".join(map(str, rows)))


if __name__ == "__main__":
    main()
