"""A `Carrier` of a Flower app's messages to devices over gRPC streams, and of their replies.

Every node has a queue and a thread that sends its messages one by one, so that all devices work at the same time. One
more thread watches connections: a device is asked again when it is back, and counts as gone once it has been away for
longer than `patience`.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence

from flwr.app import Message

from fedsample.errors import ClientError, DataError
from fedsample.fleets.flower_grid import adapter, node_id
from fedsample.fleets.grpc.device.connection import LIMIT
from fedsample.fleets.grpc.framing import frames
from fedsample.fleets.grpc.server.hub import Hub
from fedsample.fleets.grpc.server.streams import last_line
from fedsample.protocol.wire import DENSE, Array, Header, Parcel, header

FLOWER = "flower.message"
_LOOK = 0.1  # seconds between two checks for devices that came or went

Job = tuple[Message, Callable[[Message], None]]


class Devices:
    """A carrier to the devices of a hub, which have all been accepted.

    Args:
        hub: their streams.
        patience: seconds after which an absent device counts as gone: messages to it are answered with Flower's error
            5, and it is not among the nodes until it is back.
        say: called with messages about devices that come and go.
    """

    def __init__(self, hub: Hub, patience: float, say: Callable[[str], None] = lambda text: None) -> None:
        self._hub, self._patience, self._say = hub, patience, say
        self._nodes = [node_id(client) for client in range(hub.invitation.clients)]
        self._places = {node: client for client, node in enumerate(self._nodes)}
        self._lines: list[queue.SimpleQueue[Job | None]] = [queue.SimpleQueue() for _ in self._nodes]
        self._count = itertools.count(1)
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(client,), name=f"node-{client}", daemon=True)
            for client in range(len(self._nodes))
        ]
        self._watcher = threading.Thread(target=self._watch, name="nodes", daemon=True)
        for thread in [*self._threads, self._watcher]:
            thread.start()

    @property
    def fixed(self) -> bool:
        """Whether no further nodes can ever come: all are here."""
        return len(self.nodes()) == len(self._nodes)

    def nodes(self) -> Sequence[int]:
        """Ids of the nodes whose devices are connected, or not away for long; in client order."""
        return [node for client, node in enumerate(self._nodes) if not self._gone(client)]

    def carry(self, message: Message, deliver: Callable[[Message], None]) -> None:
        """Put a message in its node's queue."""
        self._lines[self._places[message.metadata.dst_node_id]].put((message, deliver))

    def hurry(self, seconds: float) -> None:
        """Do nothing: no node delays another here."""

    def give_up(self, message_id: str) -> None:
        """Do nothing: as in Flower, the reply can be pulled until the message expires."""

    def close(self) -> None:
        """Stop asking; may be called twice. The hub stays open."""
        self._closed.set()
        for line in self._lines:
            line.put(None)
        while any(thread.is_alive() for thread in self._threads):
            for client, thread in enumerate(self._threads):
                if thread.is_alive():
                    self._hub.excuse(client)
                    thread.join(0.02)
        self._watcher.join()

    # --- threads ------------------------------------------------------------------------------------------------------

    def _gone(self, client: int) -> bool:
        record = self._hub.records[client]
        return record.stream is None and time.monotonic() - record.since > self._patience

    def _watch(self) -> None:
        """Accept devices that are back, and mark those that are gone."""
        away: set[int] = set()
        while not self._closed.is_set():
            try:
                self._greet(self._hub.newcomers.get(timeout=_LOOK))
            except queue.Empty:
                pass
            for record in self._hub.records:
                if (record.stream is None) != (record.client in away):
                    away ^= {record.client}
                    self._say(f"client {record.client} is {'away' if record.client in away else 'back'}")
                if self._gone(record.client):
                    self._hub.excuse(record.client)

    def _greet(self, client: int) -> None:
        """Accept a newcomer; it needs no setup, as its ClientApp's memory is on its own disk."""
        record = self._hub.records[client]
        if record.stream is not None and record.stream.ready and not record.accepted:
            self._hub.accept(client, record.stream)

    def _work(self, client: int) -> None:
        """Carry one message after the other."""
        while (job := self._lines[client].get()) is not None and not self._closed.is_set():
            message, deliver = job
            reply = self._asked(client, message)
            if reply is not None and not self._closed.is_set():
                deliver(reply)

    def _asked(self, client: int, message: Message) -> Message | None:
        """The reply to a message, the device's or an error in its place; None: the message has expired."""
        metadata = message.metadata
        left = metadata.created_at + metadata.ttl - time.time()
        if left <= 0:
            return None
        if not self._gone(client):
            try:
                data = self._answer(client, adapter.packed(message), left)
                if data is not None:
                    return _checked(message, data)
            except ClientError as error:
                return adapter.no_reply(message, f"client {client} failed: {last_line(error.detail)}")
            except DataError as error:
                return adapter.no_reply(message, f"client {client} sent no reply that can be read: {error}")
        if metadata.created_at + metadata.ttl <= time.time():
            return None
        return adapter.unavailable("node", metadata.run_id, metadata.message_id, metadata)

    def _answer(self, client: int, data: bytes, seconds: float) -> bytes | None:
        """Ask a device; None: no answer in that time, or it is gone.

        Raises:
            ClientError: if it failed.
            DataError: if it sent something else.
        """
        parcel, number = parcel_of(data), next(self._count)
        digest = frames.Digests().of(FLOWER, parcel)
        name = frames.Name(self._hub.invitation.run, self._hub.term, number, client, digest, number)
        request = frames.Message(name, FLOWER, parcel)
        found = [
            message_in(answer.parcel)
            for _, answer in self._hub.ask({client: request}, LIMIT, deadline=seconds, enough=0)
        ]
        return found[0] if found else None


def _checked(message: Message, data: bytes) -> Message:
    """Return a device's reply, or an error in its place if it replies to something else."""
    reply = adapter.unpacked(data)
    fault = adapter.mismatch(message, reply)
    return reply if fault is None else adapter.no_reply(message, fault)


def parcel_of(data: bytes) -> Parcel:
    """Wrap Flower's bytes as one array."""
    return Parcel(header(), {"message": Array("uint8", (len(data),), DENSE, data)})


def message_in(parcel: Parcel) -> bytes:
    """Unwrap `parcel_of`.

    Raises:
        DataError: if there is no such array, or another version wrote it.
    """
    Header(parcel, "a Flower message")
    found = parcel.arrays.get("message")
    if found is None:
        raise DataError(f"arrays {sorted(parcel.arrays)}, expected 'message': install one fedsample everywhere")
    return bytes(found.data)
