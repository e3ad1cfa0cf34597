"""Two checkouts installed side by side, and processes that run inside each."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

WORKER = Path(__file__).with_name("worker.py")
REPOSITORY = Path(__file__).parents[2]
_READY = 120.0  # seconds to import everything
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # both checkouts compute at once: threads that spin would starve each other
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "120",
    "NO_COLOR": "1",
}


class UsageError(Exception):
    """What the caller named cannot be compared; the text says why."""


class Installed(NamedTuple):
    """A checkout, ready to run.

    Attributes:
        label: "old" or "new".
        said: what the caller named.
        python: its interpreter.
        root: the folder that holds its copy of fedsample.
        source: the checkout, or an export of the revision.
    """

    label: str
    said: str
    python: Path
    root: Path
    source: Path


def install(old: str, new: str, folder: Path) -> tuple[Installed, Installed]:
    """Both copies, each in a folder of its own.

    With the dependencies of this interpreter where both ask for the same, else each in a virtual environment.

    Raises:
        UsageError: if one is no checkout and no revision, or cannot be installed.
    """
    sources = [_source(said, folder / f"{label}-source") for label, said in (("old", old), ("new", new))]
    alike = _demands(sources[0]) == _demands(sources[1])
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(_install, label, said, source, folder / label, alike)
            for label, said, source in zip(("old", "new"), (old, new), sources, strict=True)
        ]
        one, other = (job.result() for job in jobs)
    return one, other


def _source(said: str, export: Path) -> Path:
    """The checkout that was named; a revision of this repository is exported."""
    path = Path(said)
    if path.is_dir():
        if not (path / "fedsample" / "__init__.py").exists():
            raise UsageError(f"{said} is a folder without a package fedsample: name a checkout, or a git revision")
        return path.resolve()
    done = subprocess.run(["git", "-C", REPOSITORY, "archive", said], capture_output=True, check=False)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()
        raise UsageError(f"{said} is neither a folder nor a git revision of this repository: {reason}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(export, filter="data")
    return export


def _demands(source: Path) -> tuple[object, ...]:
    """What a checkout asks of its environment."""
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    constraints = source / "constraints.txt"
    text = constraints.read_text(encoding="utf-8") if constraints.exists() else ""
    return sorted(project["dependencies"]), project["optional-dependencies"].get("ray"), text


def _install(label: str, said: str, source: Path, folder: Path, alike: bool) -> Installed:
    if alike:
        python, root = Path(sys.executable), folder
        arguments = ["--no-deps", "--target", str(folder), str(source)]
    else:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = folder / "bin" / "python"
        root = next((folder / "lib").iterdir()) / "site-packages"
        arguments = ["-c", str(source / "constraints.txt"), f"{source}[ray]"]
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{said} cannot be installed: {done.stderr.strip()[-1000:]}")
    return Installed(label, said, python, root, source)


class Ended(NamedTuple):
    """How a process ended: its exit code (-9: killed by signal 9), and what it wrote on both streams."""

    code: int
    out: str
    err: str


class Job:
    """A process that a worker has forked."""

    def __init__(self, out: Path, err: Path) -> None:
        """Of a process that writes into these files."""
        self._out, self._err = out, err
        self.pid = 0
        self.started, self.over = threading.Event(), threading.Event()
        self.code = 0

    def signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        self.started.wait(60)
        if not self.over.is_set():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """`kill -9`, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self.over.wait(60)

    def wait(self, seconds: float) -> Ended:
        """Until it has ended; one that takes longer is killed, and its code is -9."""
        if not self.over.wait(seconds):
            self.kill()
            return Ended(-9, _text(self._out), f"still running after {seconds:g} s. {_text(self._err)}")
        return Ended(self.code, _text(self._out), _text(self._err))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


class Worker:
    """A process inside a checkout's copy, which forks one for each piece of work; a context manager.

    Attributes:
        installed: the copy.
        folder: where its work lies.
        version: of fedsample, as it says itself.
    """

    def __init__(self, installed: Installed, folder: Path) -> None:
        """Start it; `ready` waits for it."""
        self.installed, self.folder = installed, folder
        folder.mkdir(parents=True)
        self.version = ""
        self._modules, self._left_out = 0, list[str]()
        self._jobs: dict[int, Job] = {}
        self._lock = threading.Lock()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDSAMPLE_")}
        environment |= _ENVIRONMENT | {"PYTHONPATH": str(installed.root)}
        environment |= {"XDG_STATE_HOME": str(folder / "state-home"), "FLWR_HOME": str(folder / "flower-home")}
        self._log = folder / "worker.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [installed.python, "-P", WORKER, installed.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, cwd=folder, env=environment, text=True,
            )  # fmt: skip
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._ready = threading.Event()
        self._thread.start()

    def ready(self) -> None:
        """Wait until it has imported everything.

        Raises:
            UsageError: if it cannot, or imports another copy.
        """
        if not self._ready.wait(_READY) or not self.version:
            raise UsageError(f"{self.installed.said} cannot be imported: {self._log.read_text()[-2000:]}")

    def describe(self) -> str:
        """What it imported, in words."""
        left_out = f", without {', '.join(self._left_out)}" if self._left_out else ""
        return f"fedsample {self.version}, {self._modules} modules{left_out}"

    def command(self, *arguments: str | Path, name: str, capture: Path | None = None, **environment: str) -> Job:
        """Start `python -m fedsample ARGUMENTS`."""
        words = [str(argument) for argument in arguments]
        return self._start(
            "command", name, environment, arguments=words, capture=None if capture is None else str(capture)
        )

    def experiments(self, experiments: Sequence[Mapping[str, Any]], name: str) -> Job:
        """Start a process that runs experiments one after the other; each says in its own file how it ended."""
        return self._start("experiments", name, {}, experiments=list(experiments))

    def _start(self, do: str, name: str, environment: Mapping[str, str], **more: Any) -> Job:
        with self._lock:
            number = len(self._jobs)
            out, err = (self.folder / f"{number:03d}-{name}.{kind}" for kind in ("out", "err"))
            job = self._jobs[number] = Job(out, err)
            work = {"id": number, "do": do, "folder": str(self.folder), "out": str(out), "err": str(err)}
            if self._process.stdin is None:
                raise RuntimeError("the worker has no standard input")
            self._process.stdin.write(json.dumps(work | {"environment": dict(environment)} | more) + "\n")
            self._process.stdin.flush()
        return job

    def _listen(self) -> None:
        for line in self._process.stdout or ():
            said = json.loads(line)
            if said.get("ready"):
                self.version, self._modules, self._left_out = said["version"], said["modules"], said["left_out"]
                self._ready.set()
            elif "pid" in said:
                self._jobs[said["id"]].pid = said["pid"]
                self._jobs[said["id"]].started.set()
            else:
                self._jobs[said["id"]].code = said["code"]
                self._jobs[said["id"]].over.set()
        for job in self._jobs.values():  # the worker is gone, and its children with it
            if not job.over.is_set():
                job.code = -9
                job.started.set()
                job.over.set()
        self._ready.set()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it, and what it has forked."""
        for job in self._jobs.values():
            job.kill() if job.pid and not job.over.is_set() else None
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
