"""A function of tensors as a CUDA graph: recorded once for each shape of its inputs, then replayed.

A gradient of a small model is hundreds of kernels that each take less time than their launch. A graph launches them
all at once; it is the same kernels on the same memory, so the same bits as the function itself. The function must do
everything on the device, without waiting for it, and depend on nothing but its inputs and tensors that stay.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fedsample.errors import CompileError

Function = Callable[..., Tensor]

_MOST = 32  # shapes that are recorded; of further ones the function is called, since a record costs some of its calls
_WARM_UP = 2  # calls before a record, in which libraries make their handles and choose their algorithms


class Recorder(Protocol):
    """What makes graphs: CUDA, or a stand-in for it in a test."""

    def check(self, function: Function, inputs: tuple[Tensor, ...]) -> None:
        """Refuse a function that waits for the device."""
        ...

    def record(self, function: Function, inputs: tuple[Tensor, ...]) -> tuple[Callable[[], None], Tensor]:
        """A call that writes function(*inputs), for what the inputs then hold, into the tensor beside it."""
        ...


class CudaRecorder:
    """Records on a stream of its own; all its graphs share one memory, as no two are replayed at a time.

    Args:
        device: where.

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
        """Call it with waiting forbidden: a record that fails half-way may leave PyTorch's allocator in disorder.

        For the time of the call waiting is forbidden in all threads, so this is for before there are others.

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
        """Warm up and record.

        Raises:
            CompileError: if CUDA refuses.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            try:
                # `torch.cuda.graph` does not give the stream back where the record fails; this outer context does.
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
    inputs: tuple[Tensor, ...]  # the graph reads them where they lie
    replay: Callable[[], None]
    result: Tensor


class Replayed:
    """The function, recorded for each shape that it meets.

    Args:
        function: tensors to a tensor.
        example: inputs for a first record, which tells whether there can be one.
        recorder: what makes graphs.

    Raises:
        CompileError: if there can be none.
    """

    def __init__(self, function: Function, example: tuple[Tensor, ...], recorder: Recorder) -> None:
        self._function, self._recorder = function, recorder
        self._records: dict[tuple[tuple[torch.Size, torch.dtype], ...], _Record] = {}
        self._lock = threading.Lock()  # a record has one set of inputs, and the monitor's thread may ask too
        recorder.check(function, example)
        self(*example)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's value, in a tensor of the caller's own."""
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
