"""The code for GPUs, as far as a machine without one can take it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from blocks import ROOT

from fedsample.cli import bench_runner

pytestmark = pytest.mark.timeout(600)

SUPPORT = ROOT / "tests" / "support"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_on_a_pretended_gpu() -> None:
    """Arrays are where they are used, what is recorded does not wait, and rounds are the CPU's; see the script."""
    path = os.pathsep.join([str(SUPPORT), str(SUPPORT.parent / "targets"), os.environ.get("PYTHONPATH", "")])
    environment = {**ENVIRONMENT, "PYTHONPATH": path.rstrip(os.pathsep)}
    script = SUPPORT / "pretended_gpu.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == [
        "gradients GeneralizedLinear",
        "gradients ModuleClients",
        "rounds langevin-marina logistic cuda-graph",
        "rounds underdamped-diana logistic cuda-graph",
        "rounds qlsd-plus-plus mlp cuda-graph",
    ]


def test_the_script_for_a_bare_gpu_machine_needs_torch_and_numpy_alone() -> None:
    """Here without a GPU: everything but the CUDA graphs, which have lines that say why."""
    script = bench_runner.scripts() / "gpu.py"
    options = ["gpu.py", "--device", "cpu", "--quick", "--json"]
    code = (
        f"import runpy, sys; sys.path[:0] = [{str(SUPPORT)!r}, {str(script.parent)!r}]; import slim; "
        f"slim.hide(['torch', 'numpy']); sys.argv = {options!r}; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)["rows"]
    assert {row["part"] for row in rows} == {"a", "b", "c"}
    assert [row["why"][:32] for row in rows if "why" in row] == ["CUDA graphs need clients on a GP"] * 3
    assert all(row["agree"] for row in rows if "agree" in row)
    assert sum("ms" in row for row in rows) == 4 + 2 + 1
