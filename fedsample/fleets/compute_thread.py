"""A thread that computes for one device and that can be abandoned: the process ends even if a call does not return.

`concurrent.futures` joins its threads when the interpreter ends, so Ctrl-C on a device would wait for a model, or
for a ClientApp, that computes for hours.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_Job = tuple[Future[Any], Callable[[], Any]]


class Stopped(BaseException):
    """Raised in the computing thread when its result is no longer wanted: nothing of it may be kept."""


class ComputingThread(Executor):
    """An executor with one thread, which does not keep the process from ending; it starts with the first call."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._lock = threading.Lock()
        self._closed = self._busy = False

    def submit(self, function: Callable[..., _Result], /, *arguments: Any, **options: Any) -> Future[_Result]:
        """Call a function in the thread, after the calls submitted before.

        Raises:
            RuntimeError: after `shutdown`.
        """
        future: Future[_Result] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("this thread was shut down")
            if self._thread.ident is None:
                self._thread.start()
            self._jobs.put((future, lambda: function(*arguments, **options)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls; with `cancel_futures` drop those not begun, with `wait` wait for the others."""
        with self._lock:
            self._closed = True
        while cancel_futures and not self._jobs.empty():
            job = self._jobs.get()
            if job is not None:
                job[0].cancel()
        self._jobs.put(None)
        if wait and self._thread.ident is not None:
            self._thread.join()

    def leave(self, seconds: float) -> None:
        """Shut down and stop the running call; wait up to `seconds`, then abandon the thread."""
        self.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + seconds
        with self._lock:  # from here on no call begins
            if self._busy:
                ident = ctypes.c_ulong(self._thread.ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Stopped))
        if self._thread.ident is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        """Run the calls one after the other."""
        try:
            while (job := self._jobs.get()) is not None:
                self._call(*job)
        except Stopped:  # the call had just ended when it was raised
            return

    def _call(self, future: Future[Any], call: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        with self._lock:
            self._busy = True
        try:
            result = call()
        except BaseException as error:  # raised again to the caller who waits for the result
            future.set_exception(error)
        else:
            future.set_result(result)
        finally:
            with self._lock:
                self._busy = False
