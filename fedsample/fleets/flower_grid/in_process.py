"""Nodes in this process: ClientApps that run in a few threads, each node with its own context.

Messages are passed as objects, never as bytes: a copy whose arrays share their immutable bytes. So no client sees what
another, or the server, does to its records.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsample.fleets.compute_thread import Stopped
from fedsample.fleets.flower_grid import global_rng
from fedsample.fleets.flower_grid.adapter import Value
from fedsample.fleets.flower_grid.run_client_app import answer

_GRACE = 0.5  # seconds that ClientApps have to end when their run does
_log = logging.getLogger("flwr")


class _Job(NamedTuple):
    """A message for a node, and the callback for its reply."""

    message: Message
    deliver: Callable[[Message], None]


class _Node:
    """A client: its configuration, its contexts by run, and its queue of messages."""

    def __init__(self, config: Mapping[str, Value]) -> None:
        self.config = config
        self.contexts: dict[int, Context] = {}
        self.jobs: deque[_Job] = deque()
        self.busy = False  # is being served, or queued for a thread


class InProcess:
    """A carrier to ClientApps in this process.

    A node handles its messages one by one, in order. With one worker so do all nodes, and what the app draws from
    global generators comes in the same order in every run. A ClientApp that does not return keeps its thread and its
    node busy; when half of its time is over, another thread takes its place for the other nodes.

    Args:
        app: what every node runs.
        node_configs: the node configuration in each node's context, with `partition-id` and `num-partitions`; in
            client order.
        run_config: the run configuration in every context.
        workers: number of threads, >= 1.
    """

    fixed = True

    def __init__(
        self,
        app: ClientApp,
        node_configs: Sequence[Mapping[str, Value]],
        run_config: Mapping[str, Value],
        workers: int = 1,
    ) -> None:
        self._app, self._run_config, self._workers = app, run_config, workers
        self._nodes = {node_id(place): _Node(config) for place, config in enumerate(node_configs)}
        self._order = list(self._nodes)
        self._lock = threading.Lock()
        self._line: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # nodes with queued messages; None: end
        self._threads = 0
        self._working: dict[str, tuple[int, float]] = {}  # messages that occupy a thread: their nodes, and since when
        self._busy: dict[threading.Thread, tuple[int, str]] = {}  # threads that run a ClientApp: its node and message
        self._closed = False

    def nodes(self) -> Sequence[int]:
        """Ids of all nodes, in the order of clients."""
        return self._order

    def context(self, node: int, run_id: int) -> Context:
        """A node's context in a run."""
        found = self._nodes[node]
        if run_id not in found.contexts:
            found.contexts[run_id] = Context(run_id, node, dict(found.config), RecordDict(), dict(self._run_config))
        return found.contexts[run_id]

    def carry(self, message: Message, deliver: Callable[[Message], None]) -> None:
        """Put a message in its node's queue."""
        place = message.metadata.dst_node_id
        node = self._nodes[place]
        global_rng.enter(message.metadata.message_id)  # not where it begins: one swap per round is enough
        with self._lock:
            node.jobs.append(_Job(message, deliver))
            if node.busy:
                return
            node.busy = True
            if self._threads < self._workers:
                self._start_thread()
        self._line.put(place)

    def hurry(self, seconds: float) -> None:
        """Start another thread for each busy with one message for `seconds`, as half of its time is over then."""
        now = time.monotonic()
        with self._lock:
            slow = [message_id for message_id, (_, since) in self._working.items() if now - since >= seconds]
        for message_id in slow:
            self._replace(message_id, "takes long; the others do not wait for it")

    def give_up(self, message_id: str) -> None:
        """Start another thread for the one that is busy with this message, if any."""
        global_rng.leave(message_id)
        self._replace(message_id, "has not returned; going on without it")

    def _replace(self, message_id: str, why: str) -> None:
        with self._lock:
            place, _ = self._working.pop(message_id, (None, 0.0))
            if place is None or self._closed:
                return
            _log.warning("ClientApp of partition %s %s", self._nodes[place].config["partition-id"], why)
            self._start_thread()

    def close(self) -> None:
        """End the threads; queued messages are dropped, and a ClientApp that has not returned is stopped.

        One that kept computing would crash the process at its end: Python finalises under running threads.
        """
        with self._lock:
            self._closed = True
            dropped = [job.message.metadata.message_id for node in self._nodes.values() for job in node.jobs]
            for node in self._nodes.values():
                node.jobs.clear()
            for _ in range(self._threads):
                self._line.put(None)
            busy = dict(self._busy)
        for message_id in [*dropped, *(each for _, each in busy.values())]:
            global_rng.leave(message_id)
        for thread in busy:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Stopped))
        deadline = time.monotonic() + _GRACE
        for thread, (place, _) in busy.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                partition = self._nodes[place].config["partition-id"]
                _log.warning("The run is over, and the ClientApp of partition %s has not returned", partition)

    # --- threads -------------------------------------------------------------------------------------------------

    def _start_thread(self) -> None:
        """Start a thread; a daemon, so that an app that does not return cannot keep the process from ending."""
        self._threads += 1
        threading.Thread(target=self._work, name=f"client-{self._threads}", daemon=True).start()

    def _work(self) -> None:
        """Handle messages of the queued nodes, one at a time."""
        try:
            while (place := self._line.get()) is not None and self._handle_next(place):
                pass
        except Stopped:
            return

    def _handle_next(self, place: int) -> bool:
        """Handle a node's next message; return whether this thread is still needed."""
        node, thread = self._nodes[place], threading.current_thread()
        with self._lock:
            if self._closed or not node.jobs:
                node.busy = False
                return True
            job = node.jobs.popleft()
            message_id, run_id = job.message.metadata.message_id, job.message.metadata.run_id
            self._busy[thread], self._working[message_id] = (place, message_id), (place, time.monotonic())
        try:
            global_rng.enter(message_id)  # again, in case `give_up` has already left it
            reply, node.contexts[run_id] = answer(self._app, job.message, self.context(place, run_id))
        finally:
            global_rng.leave(message_id)
        job.deliver(reply)
        with self._lock:
            del self._busy[thread]
            replaced = self._working.pop(message_id, None) is None
            self._threads -= replaced
            more = node.busy = bool(node.jobs)
        if more:
            self._line.put(place)
        return not replaced


def node_id(place: int) -> int:
    """A node's id: 64 pseudo-random bits, as in Flower, but the same in every run."""
    return int.from_bytes(hashlib.blake2b(f"fedsample node {place}".encode(), digest_size=8).digest(), "little")
