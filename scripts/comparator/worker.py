"""Runs inside a checkout's copy of fedsample: imports it once, and forks a process for each piece of work.

It is started as `python -P worker.py ROOT` and uses of fedsample only what stays: `fedsample.run` and `python -m
fedsample`. A line of JSON on standard input is a piece of work; a line on standard output says its process, and one how
it ended. Forks make a command start in milliseconds, keep its threads and generators from the next, and can be killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

_THIRD_PARTY = (
    "sklearn.datasets", "scipy.optimize", "rich.progress", "rich.table", "rich.live", "flwr_datasets.partitioner",
    "datasets", "pyarrow.csv", "pyarrow.parquet", "tensorboard.compat.proto.event_pb2", "safetensors.torch",
    "torch.func", "torch.fft", "flwr.simulation", "grpc.aio",
)  # fmt: skip
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_POLL = 0.01  # seconds between two looks for children that have ended


def preload(root: Path) -> dict[str, Any]:
    """Import all of fedsample, and refuse a copy that is not the intended one."""
    import fedsample

    left_out = []
    for module in pkgutil.walk_packages(fedsample.__path__, "fedsample."):
        if module.name.startswith("fedsample.bench.") or module.name.endswith("__main__"):
            continue  # scripts, which run when they are imported
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            left_out.append(f"{module.name}: {error}")
    for name in _THIRD_PARTY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    loaded = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "fedsample"}
    files = {name: Path(str(module.__file__)).resolve() for name, module in loaded.items() if module.__file__}
    if strange := [f"{name} from {file}" for name, file in files.items() if not file.is_relative_to(root.resolve())]:
        raise SystemExit(f"expected fedsample below {root}, got {', '.join(strange[:3])}")
    if threading.active_count() > 1:
        raise SystemExit(f"importing fedsample starts threads, which a fork would lose: {threading.enumerate()}")
    return {"ready": True, "version": fedsample.__version__, "modules": len(files), "left_out": left_out}


def main() -> None:
    """Serve until standard input ends."""
    sys.path.append(str(Path(__file__).parent))  # where `flower_tap` lies: -P leaves it out
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    report.write(json.dumps(preload(Path(sys.argv[1]))) + "\n")
    running: dict[int, int] = {}
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while True:
            if selector.select(_POLL):
                piece = os.read(0, 1 << 20)
                if not piece:
                    break
                *lines, pending = (pending + piece).split(b"\n")
                for line in lines:
                    work = json.loads(line)
                    pid = _fork(work)
                    running[pid] = work["id"]
                    report.write(json.dumps({"id": work["id"], "pid": pid}) + "\n")
            while running:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                report.write(json.dumps({"id": running.pop(pid), "code": os.waitstatus_to_exitcode(status)}) + "\n")
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _fork(work: dict[str, Any]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setpgid(0, 0)  # a signal to it does not reach the others
        _die_with(parent)
        code = _perform(work)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent is gone, however that died."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(70)


def _perform(work: dict[str, Any]) -> int:
    os.chdir(work["folder"])
    silence = os.open(os.devnull, os.O_RDONLY)
    os.dup2(silence, 0)
    for number, name in (1, "out"), (2, "err"):
        handle = os.open(work[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, number)
        os.close(handle)
    os.environ.update(work.get("environment", {}))
    if work["do"] == "command":
        sys.argv = ["fedsample", *work["arguments"]]
        with _captured(work.get("capture")):
            runpy.run_module("fedsample", run_name="__main__", alter_sys=True)
        return 0
    for experiment in work["experiments"]:
        with _captured(experiment.get("capture")):
            outcome = _experiment(experiment)
        Path(experiment["outcome"]).write_text(json.dumps(outcome))
    return 0


def _experiment(work: dict[str, Any]) -> dict[str, Any]:
    """One `fedsample.run`, and how it ended: well, or with which error."""
    import fedsample

    began = time.process_time()
    outcome: dict[str, Any]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            fedsample.run(progress="quiet", **work["arguments"])
            outcome = {"ended": "well"}
        except fedsample.FedSampleError as error:
            outcome = {"ended": "refused", "kinds": _kinds(error), "text": str(error)}
        except Exception as error:
            outcome = {"ended": "crashed", "kinds": _kinds(error), "text": traceback.format_exc()}
    outcome["warnings"] = [str(each.message) for each in heard if each.filename and "fedsample" in each.filename]
    return outcome | {"seconds": time.process_time() - began}  # of the processor, whoever else is busy


def _kinds(error: BaseException) -> list[str]:
    """Names of the error's class and of what it is derived from, without modules, which move."""
    return [kind.__name__ for kind in type(error).__mro__ if kind not in (BaseException, object)]


@contextlib.contextmanager
def _captured(file: str | None) -> Any:
    """Write down every message of Flower's while it lasts, if there is a file for it."""
    if file is None:
        yield
        return
    tap = importlib.import_module("flower_tap")  # beside this file
    with tap.tapped(Path(file)):
        yield


if __name__ == "__main__":
    main()
