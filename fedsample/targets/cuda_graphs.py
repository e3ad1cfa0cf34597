"""Replay a function of tensors as a CUDA graph, recorded once per shape of its inputs.

A gradient of a small model is hundreds of kernels that each take less time than their launch. A graph launches them
all at once; it runs the same kernels, so its results equal the function's bit for bit. The function must do everything
on the device, never wait for it, and depend only on its inputs and on tensors that stay allocated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fedsample.errors import CompileError

Function = Callable[..., Tensor]

_MOST = 32  # shapes that are recorded; others call the function, since recording costs several calls
_WARM_UP = 2  # calls before recording, in which libraries create handles and choose algorithms


class Recorder(Protocol):
    """Interface that records graphs: CUDA, or a stand-in for it in a test."""

    def check(self, function: Function, inputs: tuple[Tensor, ...]) -> None:
        """Refuse a function that waits for the device."""
        ...

    def record(self, function: Function, inputs: tuple[Tensor, ...]) -> tuple[Callable[[], None], Tensor]:
        """Record function(*inputs): a call that recomputes it from the inputs' current values, and its result."""
        ...


class CudaRecorder:
    """Records CUDA graphs on its own stream; they share one memory pool, as no two are replayed at a time.

    Args:
        device: the GPU to record on.

    Raises:
        CompileError: if it is not a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise CompileError(f"CUDA graphs need clients on a GPU, these are on {device}; set fleet.device to cuda")
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def check(self, function: Function, inputs: tuple[Tensor, ...]) -> None:
        """Refuse a function that waits for the device, since a recording that fails may corrupt PyTorch's allocator.

        Calls the function with synchronisation forbidden, in all threads, so use it before other threads start.

        Raises:
            CompileError: if it waits.
        """
        function(*inputs)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            function(*inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CompileError(f"these clients cannot be recorded as a CUDA graph: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def record(self, function: Function, inputs: tuple[Tensor, ...]) -> tuple[Callable[[], None], Tensor]:
        """Warm up, then record.

        Raises:
            CompileError: if CUDA refuses.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            try:
                # If recording fails, `torch.cuda.graph` does not restore the stream; this outer context does.
                with torch.cuda.stream(self._stream):
                    for _ in range(_WARM_UP):
                        function(*inputs)
                    # thread_local: another thread, such as the monitor's, may allocate memory meanwhile.
                    with torch.cuda.graph(
                        graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                    ):
                        result = function(*inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise CompileError(f"these clients cannot be recorded as a CUDA graph: {error}") from error
            torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay, result


class _Record(NamedTuple):
    inputs: tuple[Tensor, ...]  # the graph reads them at these addresses
    replay: Callable[[], None]
    result: Tensor


class Replayed:
    """A function that is recorded per input shape on first use, then replayed.

    Args:
        function: maps tensors to a tensor.
        example: inputs of the first recording, which shows whether the function can be recorded.
        recorder: records the graphs.

    Raises:
        CompileError: if it cannot be recorded.
    """

    def __init__(self, function: Function, example: tuple[Tensor, ...], recorder: Recorder) -> None:
        self._function, self._recorder = function, recorder
        self._records: dict[tuple[tuple[torch.Size, torch.dtype], ...], _Record] = {}
        self._lock = threading.Lock()  # a recording has one set of inputs, and the monitor's thread may call too
        recorder.check(function, example)
        self(*example)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute the function's value, in a tensor that the caller owns."""
        shapes = tuple((each.shape, each.dtype) for each in inputs)
        with self._lock:
            record = self._records.get(shapes)
            if record is None and len(self._records) < _MOST:
                kept = tuple(each.detach().clone(memory_format=torch.contiguous_format) for each in inputs)
                record = self._records[shapes] = _Record(kept, *self._recorder.record(self._function, kept))
            if record is not None:
                for mine, given in zip(record.inputs, inputs, strict=True):
                    mine.copy_(given)
                record.replay()
                return record.result.clone()
        return self._function(*inputs)
