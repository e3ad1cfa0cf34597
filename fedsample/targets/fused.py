"""Compile and call `fused.cpp`, which reads each row of a linear or logistic client once per gradient.

PyTorch's products read the design twice, once for the outputs and once for the gradient; for a model with one output
that takes nearly all the time. The source is compiled where it runs, for its CPU, in a fraction of a second, into a
directory that is deleted once the code is loaded: nothing is left behind, and nothing found on disk is ever trusted.

The compiler is the one that the environment variable CXX names, or the first found of g++, clang++ and c++. The
variable FEDSAMPLE_CXXFLAGS replaces `-O3 -march=native`: with `-O3 -march=x86-64-v3` machines with different CPUs run
the same code, and so round alike; empty, the compiler's defaults apply. Flags for the language standard and the calling
convention are fixed.
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
_FIXED_FLAGS = ("-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
_OPTIMISATION_FLAGS = "-O3 -march=native"
_NAMES = {torch.float32: "gradients_float32", torch.float64: "gradients_float64"}
_SHARE = 1 << 20  # entries per thread from which starting one pays


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Compile and load the code, once per process.

    Raises:
        CompileError: if there is no C++ compiler, or it fails, as for an unknown flag; quotes the compiler's message.
    """
    compiler = _compiler()
    with tempfile.TemporaryDirectory(prefix="fedsample-") as folder:
        made = Path(folder) / "fused.so"
        command = [*compiler, *_FIXED_FLAGS, *_optimisation_flags(), str(_SOURCE), "-o", str(made)]
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


def _optimisation_flags() -> list[str]:
    """Optimisation flags, from FEDSAMPLE_CXXFLAGS if it is set."""
    given = os.environ.get("FEDSAMPLE_CXXFLAGS", _OPTIMISATION_FLAGS)
    try:
        return shlex.split(given)
    except ValueError as error:
        raise CompileError(f"FEDSAMPLE_CXXFLAGS = {given!r} cannot be read as a shell would: {error}") from error


class FusedGradient:
    """Computes gradients of all or some clients of one design matrix.

    Args:
        design: (N, q) contiguous, on a CPU.
        targets: (N,) of the design's dtype.
        offsets: (n + 1,) int64; client i owns rows offsets[i] : offsets[i + 1].
        logistic: whether the model is logistic; otherwise linear.
        weight: 1 / sigma^2 of the linear likelihood.

    Raises:
        CompileError: as `library` does.
    """

    def __init__(self, design: Tensor, targets: Tensor, offsets: Tensor, logistic: bool, weight: float) -> None:
        self._function = getattr(library(), _NAMES[design.dtype])
        self._arrays = (design, targets.contiguous(), offsets.contiguous())  # kept alive: C gets addresses only
        self._logistic, self._weight = int(logistic), weight
        self._everyone = torch.arange(len(offsets) - 1)

    def __call__(self, points: Tensor, clients: Tensor | None = None) -> Tensor:
        """Gradients at (C, q) -> (n, C, q), or (m, C, q) for the m clients whose indices are given."""
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
