"""A thread that computes for a device: in order, and no process waits for what does not return."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from fedsample.fleets.compute_thread import ComputingThread, Stopped

LEFT = """
import threading, time
from fedsample.fleets.compute_thread import ComputingThread
began, thread = threading.Event(), ComputingThread("compute")
thread.submit(lambda: (began.set(), time.sleep(100)))
began.wait()
thread.leave(0.1)
print("left")
"""


def test_calls_come_in_order_and_errors_reach_who_asked() -> None:
    thread, seen = ComputingThread("compute"), []
    futures = [thread.submit(seen.append, number) for number in range(20)]
    failed = thread.submit(int, "x")
    thread.shutdown()
    assert seen == list(range(20))
    assert all(each.done() for each in futures)
    with pytest.raises(ValueError, match="invalid literal"):
        failed.result()
    with pytest.raises(RuntimeError, match="shut down"):
        thread.submit(int)


def test_what_computes_for_good_is_stopped_and_the_rest_never_begins() -> None:
    thread, began, seen = ComputingThread("compute"), threading.Event(), []

    def spin() -> None:
        while True:
            began.set()
            time.sleep(0.001)

    spinning, after = thread.submit(spin), thread.submit(seen.append, 1)
    assert began.wait(10)
    thread.leave(10)
    assert isinstance(spinning.exception(0), Stopped)
    assert after.cancelled()
    assert not seen


def test_a_process_ends_though_a_call_does_not_return() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")
