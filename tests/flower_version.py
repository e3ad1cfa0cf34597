"""Do the tests of Flower's contract hold with another version of it?

    python tests/flower_version.py 1.42.0 [pytest arguments]

Makes a virtual environment in a temporary folder that sees everything installed here but has its own flwr, and runs the
tests of `fedsample.fleets.flower_grid` in it, without the check of the version range. Exits with pytest's code.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from fedsample.fleets.flower_grid.versions import UNCHECKED

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "fleets" / "flower_grid"
CONTRACT = [*sorted(FOLDER.glob("test_grid_*.py")), FOLDER / "test_app_folder.py"]


def main() -> int:
    """Install, run, tell."""
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    version, arguments = sys.argv[1], sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        there = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        seen = [path for path in [str(ROOT), sysconfig.get_path("purelib"), *sys.path] if Path(path).is_dir()]
        (Path(there.strip()) / "here.pth").write_text("\n".join(dict.fromkeys(seen)))
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"flwr=={version}"], check=True)
        subprocess.run([python, "-c", "import flwr; print('flwr', flwr.__version__)"], check=True)
        environment = os.environ | {UNCHECKED: "1", "OMP_NUM_THREADS": "1"}
        tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CONTRACT, *arguments]
        return subprocess.run(tests, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
