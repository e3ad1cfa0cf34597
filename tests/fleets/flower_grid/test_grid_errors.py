"""Flower's semantics on our Grid: errors of an app, and time that runs out."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from grid_apps import MESSAGE_GONE, RAISED, REPLY_EXPIRED, answered, ask, client, echo, grid_of, said, serve, words

from fedsample.errors import QuorumError
from fedsample.fleets.flower_grid import run_flower


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ZeroDivisionError("division by zero"), "<class 'ZeroDivisionError'>:<'division by zero'>"),
        (SystemExit(3), "<class 'SystemExit'>:<'3'>"),
        (Unprintable(), "Unprintable'>:<'no message'>"),
    ],
)
def test_an_app_that_raises(error: BaseException, reason: str) -> None:
    def fail(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise error
        return echo(message, context)

    with grid_of(client(fail)) as grid:
        good, bad, last = ask(grid)
        assert (said(good)["who"], said(last)["who"]) == (0, 2)
        assert bad.error.code == RAISED
        assert str(bad.error.reason).endswith(reason)
        assert bad.metadata.src_node_id == list(grid.get_node_ids())[1]
        assert [reply.has_error() for reply in ask(grid)] == [False, True, False]
        assert (grid.answered, grid.failed) == (4, 2)


def test_an_app_that_cannot_be_loaded() -> None:
    from flwr.clientapp.client_app import LoadClientAppError

    def fail(message: Message, context: Context) -> Message:
        raise LoadClientAppError("nothing there")

    with grid_of(client(fail), 1) as grid:
        assert ask(grid)[0].error.code == 1


def other_message(message: Message, context: Context) -> Message:
    return Message(words(), reply_to=Message(words(), message.metadata.dst_node_id, "train"))


def renamed(message: Message, context: Context) -> Message:
    message.metadata.__dict__["_message_id"] = "another"
    return Message(words(), reply_to=message)


@pytest.mark.parametrize(
    ("app", "reason"),
    [
        (lambda message, context: None, "returned NoneType, expected a Message"),
        (lambda message, context: "done", "returned str, expected a Message"),
        (lambda message, context: message, "replies to message ''"),
        (other_message, "replies to message ''"),
        (renamed, "replies to message 'another'"),
    ],
)
def test_an_app_that_does_not_reply(app: Any, reason: str) -> None:
    with grid_of(client(app), 2) as grid:
        start = time.monotonic()
        for reply in ask(grid):
            assert reply.error.code == RAISED
            assert reason in str(reply.error.reason)
        assert time.monotonic() - start < 10


@pytest.mark.parametrize("workers", [1, 2])
def test_apps_that_never_return_hold_up_no_other(workers: int) -> None:
    stuck = threading.Event()

    def hang(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] in (0, 2):
            stuck.wait(60)
        return echo(message, context)

    with grid_of(client(hang), 4, workers=workers) as grid:
        for _ in range(2):
            assert [said(reply)["who"] for reply in ask(grid, timeout=0.8)] == [1, 3]
        stuck.set()
        late = next(iter(grid.get_node_ids()))
        (reply,) = grid.send_and_receive([Message(words(), late, "train")], timeout=20)
        assert said(reply)["asked"] == 3  # in its turn: after the two that nobody waits for


def stuck_at(*places: int) -> tuple[ClientApp, threading.Event]:
    """A ClientApp that does not return on some nodes until the event is set."""
    gate = threading.Event()

    def hang(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] in places:
            gate.wait(60)
        return echo(message, context)

    return client(hang), gate


def test_one_that_never_returns_holds_up_no_other_where_only_the_messages_time_ends_it() -> None:
    app, gate = stuck_at(0, 2)
    with grid_of(app, 4) as grid:
        messages = [Message(words(), node, "train", ttl=1.5) for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages))  # as strategies from before flwr.serverapp do
        assert sorted(said(reply)["who"] for reply in replies if reply.has_content()) == [1, 3]
        assert [reply.error.code for reply in replies if reply.has_error()] == [MESSAGE_GONE] * 2
        gate.set()


def test_one_that_never_returns_holds_up_no_other_once_its_expired_message_was_pulled() -> None:
    app, gate = stuck_at(0)
    with grid_of(app, 2) as grid:
        stuck, other = grid.get_node_ids()
        ids = list(grid.push_messages([Message(words(), stuck, "train", ttl=0.2), Message(words(), other, "train")]))
        replies, end = [], time.monotonic() + 10
        while len(replies) < 2 and time.monotonic() < end:
            replies += grid.pull_messages(set(ids) - answered(replies))
        gate.set()
    assert replies[0].error.code == MESSAGE_GONE
    assert said(replies[1])["who"] == 1


def test_a_late_reply_can_still_be_pulled() -> None:
    gate = threading.Event()
    with grid_of(client(lambda message, context: gate.wait(60) and echo(message, context)), 1) as grid:
        (node,) = grid.get_node_ids()
        message = Message(words(), node, "train")
        assert list(grid.send_and_receive([message], timeout=0.05)) == []
        gate.set()
        replies: list[Message] = []
        while not replies:
            replies = list(grid.pull_messages([message.metadata.message_id]))
        assert said(replies[0])["who"] == 0


def test_a_message_whose_time_is_over() -> None:
    gate = threading.Event()
    with grid_of(client(lambda message, context: gate.wait(60) and echo(message, context)), 1) as grid:
        (node,) = grid.get_node_ids()
        (reply,) = grid.send_and_receive([Message(words(), node, "train", ttl=0.2)])  # no timeout: only the ttl ends it
        assert reply.error.code == MESSAGE_GONE
        old = Message(words(), node, "train", ttl=5)
        old.metadata.created_at -= 6
        assert list(grid.push_messages([old])) == []
        gate.set()


def test_a_reply_whose_time_is_over() -> None:
    def brief(message: Message, context: Context) -> Message:
        reply = Message(words(), reply_to=message, ttl=0.01)
        reply.metadata.created_at -= 1
        return reply

    with grid_of(client(brief), 1) as grid:
        (reply,) = ask(grid)
        assert reply.error.code == REPLY_EXPIRED
        assert "The reply message has expired" in str(reply.error.reason)


def test_a_strategy_that_wants_more_nodes_than_there_are() -> None:
    def main(grid: Grid, context: Context) -> None:
        FedAvg(min_available_nodes=5).start(grid, ArrayRecord([np.zeros(2)]), num_rounds=1)

    with pytest.raises(QuorumError, match="waits for 5 nodes, and there are 3: simulate more clients, or lower"):
        run_flower(serve(main), client(), 3)


def test_an_app_that_samples_with_a_function_of_its_own_gets_the_nodes_there_are() -> None:
    def sample_nodes(grid: Grid, min_available_nodes: int) -> list[int]:
        return list(grid.get_node_ids())[:min_available_nodes]

    with grid_of(client(), 3) as grid:
        assert len(sample_nodes(grid, 5)) == 3
