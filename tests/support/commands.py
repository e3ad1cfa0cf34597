"""Real processes of the `fedsample` command, for the system tests, started in milliseconds.

A server process imports torch and the rest once and forks; each fork runs `fedsample.cli.main.main` with its own
folder, environment and output files, and can be killed like any other process. Where to die can also be said exactly:
`die_at` kills the process with SIGKILL at its k-th call of a function, between two system calls if need be, and
`wait_at` makes it wait there.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRACEBACK = "Traceback (most recent call last)"
# All that a command may come to import: torch's symbolic shapes and dynamo alone take more than a second.
_PRELOAD = """
fedsample.cli.main fedsample.runs.session fedsample.runs.api fedsample.runs.checks fedsample.runs.memory
fedsample.runs.step_check fedsample.targets.module fedsample.models.dense fedsample.models.lenet fedsample.models.resnet
fedsample.fleets.grpc.server.host fedsample.fleets.grpc.device.process
torch._dynamo torch.fx.experimental.symbolic_shapes torch.utils._device safetensors.torch
scipy.optimize sklearn.datasets flwr_datasets.partitioner datasets pyarrow.csv pyarrow.parquet
tensorboard.compat.proto.event_pb2 tensorboard.plugins.custom_scalar.summary tensorboard.plugins.hparams.summary_v2
rich.progress rich.table rich.markdown rich._emoji_codes typer.rich_utils
""".split()
_PRELOAD.append(__name__)

# Calls after which the disk has changed; a process that dies at one of them leaves what a power cut would.
STEPS = ("os.replace", "os.rename", "os.fsync", "os.ftruncate", "shutil.rmtree", "pathlib.Path.unlink")


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code (-9: killed by signal 9) and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error message; fails where there are several, or a traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert TRACEBACK not in self.err, self.err
        return self.err[self.err.index("error: ") :].removeprefix("error: ").rstrip("\n")


class Command:
    """A running command."""

    def __init__(self, process: Any, out: Path, err: Path) -> None:
        self._process, self._out, self._err = process, out, err

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def running(self) -> bool:
        return bool(self._process.is_alive())

    def send(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> bool:
        """`kill -9`; False where it had ended before."""
        self._process.kill()
        self._process.join(60)
        return self._process.exitcode == -signal.SIGKILL

    def wait(self, timeout: float = 120) -> Done:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise AssertionError(f"still running after {timeout} s: {self._err.read_text()}")
        return Done(self._process.exitcode, self._out.read_text(), self._err.read_text())

    def until(self, ready: Callable[[], bool], timeout: float = 60) -> bool:
        """Wait for a state of its files; False where it ended before."""
        end = time.monotonic() + timeout
        while not ready():
            if not self.running:
                return ready()
            assert time.monotonic() < end, f"not ready after {timeout} s: {self._err.read_text()}"
            time.sleep(0.001)
        return True

    def says(self, text: str) -> bool:
        return text in self._err.read_text()


_counter = iter(range(1 << 30))


def start(
    folder: Path,
    *arguments: str | Path,
    environment: Mapping[str, str] | None = None,
    die_at: tuple[Sequence[str], int] | None = None,
    wait_at: str = "",
    file_limit: int | None = None,
    constants: Mapping[str, object] | None = None,
) -> Command:
    """Start `fedsample ARGUMENTS` in a folder.

    Args:
        folder: where it runs. arguments: of the command. environment: variables beside the usual ones.
        die_at: dotted functions and k >= 1; the process kills itself at the k-th call of any of them.
        wait_at: a dotted function, and `:k` for its k-th call, in which it waits for a signal.
        file_limit: bytes that a file may have (RLIMIT_FSIZE), as on a disk that is full there.
        constants: values for dotted names, set before it starts.
    """
    number = next(_counter)
    out, err = folder / f".{number}.out", folder / f".{number}.err"
    for file in out, err:
        file.write_text("")
    words = [str(argument) for argument in arguments]
    traps = [(die_at[0], die_at[1], _die)] if die_at else []
    if wait_at:
        name, _, k = wait_at.partition(":")
        traps.append(([name], int(k or 1), _wait))
    changes = dict(environment or {}), dict(constants or {})
    return Command(fork(_run, folder, words, out, err, *changes, traps, file_limit), out, err)


def fork(target: Callable[..., None], *arguments: object) -> Any:
    """Call a function of a module in a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    process = context.Process(target=target, args=arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        process.start()
    return process


def call(folder: Path, *arguments: str | Path, **options: Any) -> Done:
    """Run a command to its end."""
    return start(folder, *arguments, **options).wait()


def _run(
    folder: Path,
    arguments: list[str],
    out: Path,
    err: Path,
    environment: dict[str, str],
    constants: dict[str, object],
    traps: list[tuple[Sequence[str], int, Callable[[], None]]],
    file_limit: int | None,
) -> None:
    os.chdir(folder)
    for number, path in (1, out), (2, err):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    for name in [name for name in os.environ if name.startswith("FEDSAMPLE_")]:
        del os.environ[name]
    os.environ.update({"COLUMNS": "120", "NO_COLOR": "1", **environment})
    warnings.simplefilter("error")
    for name, value in constants.items():
        owner, last = _owner(name)
        setattr(owner, last, value)
    for names, k, act in traps:
        _arm(names, k, act)
    if file_limit is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = ["fedsample", *arguments]
    from fedsample.cli.main import main

    main()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _wait() -> None:
    while True:  # not signal.pause(): a signal just before it would be slept through
        time.sleep(0.01)


def _arm(names: Sequence[str], k: int, act: Callable[[], None]) -> None:
    """Do something before the k-th call of the named functions."""
    count = 0

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == k:
                act()
            return function(*args, **options)

        return counted

    for name in names:
        owner, last = _owner(name)
        setattr(owner, last, wrap(getattr(owner, last)))


def _owner(name: str) -> tuple[Any, str]:
    """The module or class that a dotted name lies in, and its last part."""
    place, _, last = name.rpartition(".")
    try:
        return importlib.import_module(place), last
    except ModuleNotFoundError:
        module, _, kind = place.rpartition(".")
        return getattr(importlib.import_module(module), kind), last


def sets(**values: object) -> list[str]:
    """--set arguments; a double underscore stands between section and key."""
    words = ((name.replace("__", "."), value) for name, value in values.items())
    return [part for name, value in words for part in ("--set", f"{name}={value}")]


def last_checkpoint(run: Path) -> int:
    """Round of the newest checkpoint on the disk; -1: none."""
    found = [int(p.name[6:]) for p in (run / "checkpoint").glob("round-*") if re.fullmatch(r"round-\d+", p.name)]
    return max(found, default=-1)
