"""Flower's Grid over any way of carrying a message to a node and its reply back.

    push    message -> id, a copy of its own -> carrier
    reply   carrier -> checked, copied -> kept until pulled, or until the message's time is over
    pull    ids -> replies so far, in the order of the nodes, and Flower's own error replies for what will not come

Replies are returned in the order of the nodes, whatever the order in which they arrive, so sums are reproducible.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from flwr.app import Message, Metadata, RecordDict
from flwr.serverapp import Grid

from fedsample.errors import QuorumError
from fedsample.fleets.flower_grid import adapter

_LOOK = 0.25  # seconds between two checks for nodes gone and messages expired; replies wake the waiting thread
_log = logging.getLogger("flwr")


class Carrier(Protocol):
    """Transport of messages to nodes: in this process, over gRPC, ..."""

    @property
    def fixed(self) -> bool:
        """Whether no further nodes can ever come, so that waiting for more is an error."""

    def nodes(self) -> Sequence[int]:
        """Ids of the nodes that are there now, in a fixed order; any thread may call this."""

    def carry(self, message: Message, deliver: Callable[[Message], None]) -> None:
        """Take a message to node `message.metadata.dst_node_id`, without waiting for the reply.

        The message is the carrier's own: nobody else changes it. `deliver` is called once, in any thread, with a reply
        that the carrier does not change afterwards: the node's own (`message.metadata` says what it must reply to), or
        an error in its place. If a reply never comes, the message expires.
        """

    def hurry(self, seconds: float) -> None:
        """Replies are waited for only `seconds` more: a node that has already taken longer must not delay others."""

    def give_up(self, message_id: str) -> None:
        """Nobody waits for this reply any longer, but it is still accepted until the message expires."""

    def close(self) -> None:
        """End the run."""


class _Sent(NamedTuple):
    """A sent message: its metadata, and its reply's place in the order."""

    metadata: Metadata
    place: tuple[int, int]


class _Wait:
    """A thread's wait for some replies."""

    def __init__(self, ids: set[str]) -> None:
        self.ids, self.done = ids, threading.Event()


class CarrierGrid(Grid):
    """A ServerApp's view of the nodes behind a carrier.

    Args:
        carrier: transports messages.
        run_id: the run's id, carried by messages.

    Attributes:
        answered: number of replies with content so far.
        failed: number of error replies so far.
    """

    def __init__(self, carrier: Carrier, run_id: int) -> None:
        self.carrier = carrier
        self.answered, self.failed = 0, 0
        self._run = adapter.empty_run(run_id)
        self._count = itertools.count(1)
        self._lock = threading.Lock()
        self._sent: dict[str, _Sent] = {}
        self._replies: dict[str, Message] = {}
        self._waits: list[_Wait] = []
        self._closed = False

    # --- the run -------------------------------------------------------------------------------------------------

    @property
    def run(self) -> adapter.Run:
        """The run as Flower describes one."""
        return adapter.Run(**vars(self._run))

    def set_run(self, run: adapter.Run) -> None:
        """Send in the name of another run.

        Raises:
            TypeError: if it is not a `Run`.
        """
        if not isinstance(run, adapter.Run):
            raise TypeError(f"`run` must be an instance of Run, got {type(run).__name__}")
        self._run = run

    def close(self) -> None:
        """End the run: nothing more is sent, and threads that still wait for nodes are told so."""
        self._closed = True
        self.carrier.close()

    # --- nodes and messages --------------------------------------------------------------------------------------

    def get_node_ids(self) -> Iterable[int]:
        """List the nodes that are connected.

        Raises:
            QuorumError: if the strategy would wait for more nodes than there will ever be.
        """
        self._check_open()
        nodes = list(self.carrier.nodes())
        if self.carrier.fixed and (wanted := adapter.awaited_nodes()) > len(nodes):
            raise QuorumError(
                f"the strategy waits for {wanted} nodes, and there are {len(nodes)}: simulate more clients, or lower "
                "its min_available_nodes, min_train_nodes and min_evaluate_nodes (2 each by default)"
            )
        return nodes

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message; Flower prefers `Message(...)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return the ids of those that could be sent. Changing a message afterwards has no effect.

        Raises:
            ValueError: if one is a reply, or its time to live is not positive.
        """
        self._check_open()
        places = {node: place for place, node in enumerate(self.carrier.nodes())}
        leaving: list[tuple[tuple[int, int], Message]] = []
        ids = []
        for message in messages:
            number = next(self._count)
            message_id = f"{self._run.run_id:x}-{number}"
            copy = adapter.outgoing(message, self._run.run_id, message_id)
            metadata = copy.metadata
            if metadata.dst_node_id not in places:
                _log.error("Invalid destination node ID for Message: %s", metadata.dst_node_id)
                continue
            if metadata.created_at + metadata.ttl <= time.time():
                _log.error("Message TTL has expired: %s", metadata)
                continue
            place = places[metadata.dst_node_id], number
            leaving.append((place, copy))
            ids.append(message_id)
            with self._lock:
                self._sent[message_id] = _Sent(metadata, place)
        for _, message in sorted(leaving, key=lambda each: each[0]):  # so that clients are served in a fixed order
            adapter.mark_delivered(message, time.time())
            self.carrier.carry(message, self._deliver)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return replies so far, in the order of the nodes, each once; and errors for those that will not come."""
        now, nodes = time.time(), set(self.carrier.nodes())
        found: list[tuple[tuple[int, int], Message]] = []
        with self._lock:
            for message_id in set(message_ids):
                sent = self._sent.get(message_id)
                reply = self._settle(message_id, sent, now, nodes)
                if reply is not None:
                    self._sent.pop(message_id, None)
                    self._replies.pop(message_id, None)
                    found.append(((0, 0) if sent is None else sent.place, reply))
        replies = [reply for _, reply in sorted(found, key=lambda each: each[0])]
        for reply in replies:
            if adapter.is_expired(reply):
                self.carrier.give_up(reply.metadata.reply_to_message_id)
            adapter.mark_delivered(reply, now)
            self.answered, self.failed = self.answered + reply.has_content(), self.failed + reply.has_error()
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages, wait for their replies and pull them; after `timeout` seconds, without those still missing."""
        pending = set(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        with self._lock:
            places = {each: self._sent[each].place for each in pending}
            wait = _Wait(pending - self._replies.keys())
            self._waits.append(wait)
        try:
            while pending and not self._wait(wait, deadline):
                replies += self._pulled(pending)  # before they expire, whoever else is still waited for
                with self._lock:
                    wait.ids &= pending
                if deadline is not None and deadline <= time.monotonic():
                    break
                self.carrier.hurry(self._left(wait, deadline))
        finally:
            with self._lock:
                self._waits.remove(wait)
        replies += self._pulled(pending)
        for message_id in pending:
            _log.warning("No reply to message %s within %g s", message_id, timeout)
            self.carrier.give_up(message_id)
        return sorted(replies, key=lambda reply: places[reply.metadata.reply_to_message_id])

    # --- replies -------------------------------------------------------------------------------------------------

    def _deliver(self, reply: Message) -> None:
        """Keep a reply until it is pulled; one that comes after its message expired is dropped."""
        message_id = reply.metadata.reply_to_message_id
        with self._lock:
            if message_id not in self._sent or message_id in self._replies:
                return
            self._replies[message_id] = reply
            for wait in self._waits:
                wait.ids.discard(message_id)
                if not wait.ids:
                    wait.done.set()

    def _settle(self, message_id: str, sent: _Sent | None, now: float, nodes: set[int]) -> Message | None:
        """The reply to a message, the node's or an error in its place; None: it may still come."""
        run_id = self._run.run_id
        if sent is None or sent.metadata.created_at + sent.metadata.ttl < now:
            return adapter.unavailable("message", run_id, message_id)
        reply = self._replies.get(message_id)
        if reply is not None:
            if reply.metadata.created_at + reply.metadata.ttl < now:
                return adapter.unavailable("reply", run_id, message_id, sent.metadata)
            return reply
        return (
            None
            if sent.metadata.dst_node_id in nodes
            else adapter.unavailable("node", run_id, message_id, sent.metadata)
        )

    def _wait(self, wait: _Wait, deadline: float | None) -> bool:
        """Wait a while; return whether all replies are there."""
        return not wait.ids or wait.done.wait(min(_LOOK, max(self._left(wait, deadline) / 4, 0.01)))

    def _left(self, wait: _Wait, deadline: float | None) -> float:
        """Seconds until the deadline, or until the first message expires: old apps have no other timeout."""
        with self._lock:
            out = [self._sent[each].metadata for each in wait.ids & self._sent.keys()]
        expiry = min((of.created_at + of.ttl for of in out), default=math.inf) - time.time()
        return expiry if deadline is None else min(expiry, deadline - time.monotonic())

    def _pulled(self, pending: set[str]) -> list[Message]:
        """Pull the replies that are there, and errors for those that will not come; they are no longer pending."""
        replies = list(self.pull_messages(pending)) if pending else []
        pending -= {reply.metadata.reply_to_message_id for reply in replies}
        return replies

    def _check_open(self) -> None:
        if self._closed:
            raise adapter.RunNotRunningException("this run is over")
