"""Messages of a Flower app to devices at the ends of gRPC streams, and their replies back: a `Carrier`.

Every node has a line and a thread that asks its messages one by one, so that all devices work at the same time. One
more thread watches who comes and goes: a device is asked again when it is back, and is gone once it has been away for
longer than anyone has patience for.
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
_LOOK = 0.1  # seconds between two looks at who is here

Job = tuple[Message, Callable[[Message], None]]


class Devices:
    """A carrier to the devices of a hub, which have all been accepted.

    Args:
        hub: their streams.
        patience: seconds after which a device that is away is gone: what it was sent is answered with Flower's error 5
            in its place, and it is no node until it is back.
        say: told who comes and goes.
    """

    def __init__(self, hub: Hub, patience: float, say: Callable[[str], None] = lambda text: None) -> None:
        """Devices may be asked from now on."""
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
        """Whether all are here: more will never come."""
        return len(self.nodes()) == len(self._nodes)

    def nodes(self) -> Sequence[int]:
        """Ids of the nodes whose devices are here, or not away for long; the order of clients."""
        return [node for client, node in enumerate(self._nodes) if not self._gone(client)]

    def carry(self, message: Message, deliver: Callable[[Message], None]) -> None:
        """Put a message in its node's line."""
        self._lines[self._places[message.metadata.dst_node_id]].put((message, deliver))

    def hurry(self, seconds: float) -> None:
        """No node holds up another here."""

    def give_up(self, message_id: str) -> None:
        """As in Flower, the node goes on: its reply can be pulled until the message's time is over."""

    def close(self) -> None:
        """Ask nobody any longer; harmless a second time. The hub stays open."""
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
        """Accept whoever is back, and give up who is gone."""
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
        """A newcomer needs no telling: what its ClientApp remembers lies on its own disk."""
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
        """The reply to a message, in whoever's name; None: its time is over."""
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
        """What a device answers; None: nothing in that time, or it is gone.

        Raises:
            ClientError: if it failed. DataError: if it sent something else.
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
    """A device's reply, or an error in its place if it replies to something else."""
    reply = adapter.unpacked(data)
    fault = adapter.mismatch(message, reply)
    return reply if fault is None else adapter.no_reply(message, fault)


def parcel_of(data: bytes) -> Parcel:
    """Flower's bytes as one array."""
    return Parcel(header(), {"message": Array("uint8", (len(data),), DENSE, data)})


def message_in(parcel: Parcel) -> bytes:
    """Back from `parcel_of`.

    Raises:
        DataError: if there is no such array, or another version wrote it.
    """
    Header(parcel, "a Flower message")
    found = parcel.arrays.get("message")
    if found is None:
        raise DataError(f"arrays {sorted(parcel.arrays)}, expected 'message': install one fedsample everywhere")
    return bytes(found.data)
