"""Compiles `fused.cpp`, which reads each row of a linear or logistic client once, and calls it.

PyTorch's products read the design twice, once for the outputs and once for the gradient; for a model with one output
that is all the time there is. The source is compiled where it runs, for its CPU, in a fraction of a second, into a
directory that is deleted once the code is loaded: nothing is left behind, and nothing found on disk is ever trusted.

The compiler is the variable CXX, or the first found of g++, clang++ and c++. FEDSAMPLE_CXXFLAGS stands in place of
`-O3 -march=native`, what the code is made for: `-O3 -march=x86-64-v3` gives machines of unlike CPUs one code, and so
one rounding; empty, the compiler's own choice. What the code means (the standard, how it is called) stays.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fedsample.errors import CompileError

_SOURCE = Path(__file__).with_name("fused.cpp")
_MEANING = ("-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
_MACHINE = "-O3 -march=native"
_NAMES = {torch.float32: "gradients_float32", torch.float64: "gradients_float64"}
_SHARE = 1 << 20  # entries read by a thread, from which it is worth starting one


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled code, made at the first call of a process.

    Raises:
        CompileError: if there is no C++ compiler, or it fails, as for a flag that it does not know; with its own words.
    """
    compiler = _compiler()
    with tempfile.TemporaryDirectory(prefix="fedsample-") as folder:
        made = Path(folder) / "fused.so"
        command = [*compiler, *_MEANING, *_machine(), str(_SOURCE), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode != 0:
                raise CompileError(f"{compiler[0]} fails: {done.stderr.strip()[:500] or f'exit {done.returncode}'}")
            loaded = ctypes.CDLL(str(made))
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CompileError(f"{compiler[0]} cannot be used: {error}") from error
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name in _NAMES.values():
        function = getattr(loaded, name)
        function.argtypes = [*[pointer] * 6, number, number, number, ctypes.c_int, ctypes.c_double, number]
        function.restype = None
    return loaded


def _compiler() -> list[str]:
    chosen = os.environ.get("CXX")
    if chosen:
        return shlex.split(chosen)
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise CompileError("no C++ compiler was found; install g++ or clang++, or name one in the variable CXX")


def _machine() -> list[str]:
    """Flags that say for which machine, and how far, the code is optimised."""
    given = os.environ.get("FEDSAMPLE_CXXFLAGS", _MACHINE)
    try:
        return shlex.split(given)
    except ValueError as error:
        raise CompileError(f"FEDSAMPLE_CXXFLAGS = {given!r} cannot be read as a shell would: {error}") from error


class FusedGradient:
    """Gradients of all or some clients of one design.

    Args:
        design: (N, q) contiguous, on a CPU.
        targets: (N,) of its dtype.
        offsets: (n + 1,) int64.
        logistic: otherwise linear.
        weight: 1 / sigma^2 of the linear likelihood.

    Raises:
        CompileError: as `library` does.
    """

    def __init__(self, design: Tensor, targets: Tensor, offsets: Tensor, logistic: bool, weight: float) -> None:
        self._function = getattr(library(), _NAMES[design.dtype])
        self._arrays = (design, targets.contiguous(), offsets.contiguous())  # kept alive: C sees addresses only
        self._logistic, self._weight = int(logistic), weight
        self._everyone = torch.arange(len(offsets) - 1)

    def __call__(self, points: Tensor, clients: Tensor | None = None) -> Tensor:
        """(C, q) -> (n, C, q), or (m, C, q) for the m clients whose indices are given."""
        design, targets, offsets = self._arrays
        who = self._everyone if clients is None else clients.contiguous()
        points = points.contiguous()
        chains, q = points.shape
        result = torch.empty(len(who), chains, q, dtype=design.dtype)
        work = design.numel() * len(who) // max(1, len(self._everyone))
        threads = max(1, min(torch.get_num_threads(), work // _SHARE, len(who)))
        self._function(
            design.data_ptr(), targets.data_ptr(), points.data_ptr(), result.data_ptr(), offsets.data_ptr(),
            who.data_ptr(), len(who), chains, q, self._logistic, self._weight, threads,
        )  # fmt: skip
        return result
