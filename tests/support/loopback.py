"""A Flower Grid in this process that carries messages to real ClientApps, as Flower's runtimes would.

Every message and every context goes through Flower's own wire format and comes out as other objects, nodes have random
ids, and replies come back in reverse order. What Flower keeps to itself (serialisation, identities) is used here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedsample.protocol.flower_records import parcel_of


def _bits(records: RecordDict) -> int:
    return parcel_of(records, "a message").bits if records else 0


def copied(records: RecordDict) -> RecordDict:
    """What arrives when these are sent."""
    return recorddict_from_proto(recorddict_to_proto(records))


@dataclass
class LoopbackGrid(Grid):
    """One node a client.

    Attributes:
        app: what every node runs. clients: how many nodes. run_config: of the run. fresh: called before each message,
            so that it can be handled as by a new process. deaf: which messages, to which client, get no answer.
            log: type, bits down and bits up of every message that was answered.
    """

    app: ClientApp
    clients: int
    run_config: dict[str, bool | float | int | str] = field(default_factory=dict)
    fresh: Callable[[], None] = lambda: None
    deaf: Callable[[Message, int], bool] = lambda message, client: False
    log: list[tuple[str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        nodes = [(7919 * (i + 3)) ** 3 % 1_000_003 for i in range(self.clients)]  # in no order
        self.nodes = dict(zip(nodes, range(self.clients), strict=True))
        self.contexts = {
            node: Context(1, node, {"partition-id": i, "num-partitions": self.clients}, RecordDict(), self.run_config)
            for node, i in self.nodes.items()
        }

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = [reply for message in messages if (reply := self._deliver(message)) is not None]
        return replies[::-1]

    def _deliver(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        if self.deaf(message, self.nodes[node]):
            return None
        self.fresh()
        context = self.contexts[node]
        down = _bits(message.content)
        message.content = copied(message.content)
        context.state = copied(context.state)
        reply = self.app(message, context)
        up = 0
        if reply.has_content():
            up = _bits(reply.content)
            reply.content = copied(reply.content)
        self.log.append((message.metadata.message_type, down, up))
        return reply

    # --- what nothing here asks for ------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError
