"""Our Grid over another carrier: messages that leave the process as bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from grid_apps import NODE_GONE, RAISED, ask, client, echo, said, words

from fedsample.errors import DataError
from fedsample.fleets.flower_grid import CarrierGrid, adapter, answer


class Bytes:
    """Nodes behind a wire: bytes out, bytes back; some never answer, some leave."""

    fixed = False

    def __init__(self, app: ClientApp, clients: int) -> None:
        self.app, self.there, self.gave_up = app, list(range(100, 100 + clients)), []  # type: ignore[var-annotated]
        self.contexts = {node: Context(7, node, {"partition-id": node - 100}, RecordDict(), {}) for node in self.there}

    def nodes(self) -> list[int]:
        return self.there

    def carry(self, message: Message, deliver: Callable[[Message], None]) -> None:
        wire = adapter.packed(message)

        def device() -> None:
            arrived = adapter.unpacked(wire)
            node = arrived.metadata.dst_node_id
            reply, self.contexts[node] = answer(self.app, arrived, self.contexts[node])
            deliver(adapter.unpacked(adapter.packed(reply)))

        if message.metadata.group_id != "lost":
            threading.Thread(target=device).start()

    def hurry(self, seconds: float) -> None: ...

    def give_up(self, message_id: str) -> None:
        self.gave_up.append(message_id)

    def close(self) -> None:
        pass


def test_a_carrier_of_bytes_serves_the_same_grid() -> None:
    nodes = Bytes(client(), 3)
    with adapter.identity(7):
        grid = CarrierGrid(nodes, 7)
        assert [said(reply)["who"] for reply in ask(grid)] == [0, 1, 2]
        assert [said(reply)["asked"] for reply in ask(grid)] == [2, 2, 2]
        failing = ask(grid, "evaluate")
        assert [reply.error.code for reply in failing] == [RAISED] * 3


def test_a_node_that_leaves_and_one_that_is_given_up() -> None:
    nodes = Bytes(client(), 2)
    with adapter.identity(7):
        grid = CarrierGrid(nodes, 7)
        lost = [Message(words(), node, "train", group_id="lost") for node in nodes.there]
        ids = list(grid.push_messages(lost))
        nodes.there = [101]
        (reply,) = grid.pull_messages(ids)
        assert (reply.error.code, reply.metadata.reply_to_message_id) == (NODE_GONE, ids[0])
        assert (reply.metadata.group_id, reply.metadata.message_type) == ("lost", "train")
        assert list(grid.send_and_receive([Message(words(), 101, "train", group_id="lost")], timeout=0.05)) == []
        assert len(nodes.gave_up) == 1


def test_a_node_that_leaves_while_others_are_waited_for() -> None:
    gate = threading.Event()
    nodes = Bytes(client(lambda message, context: gate.wait(20) and echo(message, context)), 2)
    with adapter.identity(7):
        grid = CarrierGrid(nodes, 7)
        messages = [Message(words(), node, "train", group_id="lost" if node == 100 else "") for node in nodes.there]
        leave = threading.Timer(0.05, lambda: nodes.there.remove(100))
        answer_late = threading.Timer(0.6, gate.set)
        leave.start()
        answer_late.start()
        gone, there = grid.send_and_receive(messages)
        assert gone.error.code == NODE_GONE
        assert said(there)["who"] == 1
    for timer in (leave, answer_late):
        timer.join()


def test_bytes_that_are_no_message() -> None:
    with pytest.raises(DataError, match="no message of Flower's"):
        adapter.unpacked(b"\xff\xff nonsense")
