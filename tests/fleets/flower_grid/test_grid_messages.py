"""Flower's semantics on our Grid: messages that are sent, pushed and pulled, and the contexts of nodes.

The files `test_grid_*` are also the contract with a version of Flower: `python tests/flower_version.py X.Y.Z` runs them
against another one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from flwr.app import Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from grid_apps import MESSAGE_GONE, RAISED, answered, ask, client, echo, grid_of, said, serve, words

from fedsample.fleets.flower_grid import CarrierGrid, InProcess, adapter, run_flower

ABSENT = 10**6  # an id that no node has


# --- messages ---------------------------------------------------------------------------------------------------------


def test_types_actions_and_metadata() -> None:
    app, seen = ClientApp(), []

    def note(name: str) -> Callable[[Message, Context], Message]:
        def function(message: Message, context: Context) -> Message:
            seen.append((name, message.metadata))
            return Message(words(done=name), reply_to=message)

        return function

    for name, decorator in {
        "train": app.train(),
        "train.custom": app.train("custom"),
        "evaluate": app.evaluate(),
        "query.ping": app.query("ping"),
    }.items():
        decorator(note(name))
    with grid_of(app, 1) as grid:
        (node,) = grid.get_node_ids()
        for kind in ("train", "train.custom", "evaluate", "query.ping"):
            (reply,) = grid.send_and_receive([Message(words(), node, kind, group_id="round 3", ttl=50)])
            got = seen[-1][1]
            assert (seen[-1][0], said(reply)["done"]) == (kind, kind)
            assert (got.run_id, got.src_node_id, got.dst_node_id) == (7, 1, node)
            assert (got.message_type, got.group_id, got.ttl, got.reply_to_message_id) == (kind, "round 3", 50, "")
            assert got.delivered_at
            back = reply.metadata
            assert (back.run_id, back.src_node_id, back.dst_node_id) == (7, node, 1)
            assert (back.message_type, back.group_id) == (kind, "round 3")
            assert back.reply_to_message_id == got.message_id
            assert 0 < back.ttl <= 50
        assert len({metadata.message_id for _, metadata in seen}) == 4
        (missing,) = grid.send_and_receive([Message(words(), node, "query.pong")])
        assert missing.error.code == RAISED
        assert "No query function registered with name 'pong'" in str(missing.error.reason)


def test_mods_wrap_from_the_outside_in() -> None:
    trail: list[str] = []

    def mod(name: str) -> Callable[..., Message]:
        def run(message: Message, context: Context, following: Callable[..., Message]) -> Message:
            trail.append(f"{name} in")
            reply = following(message, context)
            trail.append(f"{name} out")
            return reply

        return run

    app = ClientApp(mods=[mod("app")])
    app.train(mods=[mod("function")])(echo)
    with grid_of(app, 1) as grid:
        ask(grid)
    assert trail == ["app in", "function in", "function out", "app out"]


def test_a_lifespan_surrounds_each_message() -> None:
    trail: list[str] = []
    app = client(lambda message, context: trail.append("message") or echo(message, context))

    @app.lifespan()
    def span(context: Context) -> Iterator[None]:
        trail.append("begin")
        yield
        trail.append("end")

    with grid_of(app, 1) as grid:
        ask(grid)
    assert trail == ["begin", "message", "end"]


def test_push_and_pull_by_hand() -> None:
    gate = threading.Event()

    def wait(message: Message, context: Context) -> Message:
        gate.wait(20)
        return echo(message, context)

    with grid_of(client(wait)) as grid:
        messages = [Message(words(), node, "train") for node in grid.get_node_ids()]
        ids = list(grid.push_messages(messages))
        assert ids == [message.metadata.message_id for message in messages]
        assert list(grid.pull_messages(ids)) == []
        gate.set()
        replies: list[Message] = []
        while len(replies) < 3:
            replies += grid.pull_messages(set(ids) - answered(replies))
        assert answered(replies) == set(ids)
        again = list(grid.pull_messages(ids[:1]))
        assert [reply.error.code for reply in again] == [MESSAGE_GONE]
        assert again[0].metadata.reply_to_message_id == ids[0]
        assert "may have expired due to its TTL" in str(again[0].error.reason)
        assert [reply.error.code for reply in grid.pull_messages(["no such id"])] == [MESSAGE_GONE]
        assert not grid._replies  # nothing is kept that nobody can ask for


@pytest.mark.parametrize("workers", [1, 3])
def test_replies_come_in_the_order_of_nodes_whoever_is_first(workers: int) -> None:
    later, turns = [threading.Event() for _ in range(4)], []

    def backwards(message: Message, context: Context) -> Message:
        place = int(context.node_config["partition-id"])
        if workers > 1 and place < 3:
            later[place + 1].wait(20)
        turns.append(place)
        later[place].set()
        return echo(message, context)

    with grid_of(client(backwards), 4, workers=4 if workers > 1 else 1) as grid:
        nodes = list(grid.get_node_ids())
        mixed = [nodes[place] for place in (2, 0, 3, 1)]
        replies = grid.send_and_receive([Message(words(), node, "train") for node in mixed], timeout=20)
        assert [said(reply)["who"] for reply in replies] == [0, 1, 2, 3]
    assert turns == ([0, 1, 2, 3] if workers == 1 else [3, 2, 1, 0])


def test_node_ids_are_large_distinct_and_the_same_in_every_run() -> None:
    with grid_of(client(), 100) as grid, grid_of(client(), 100) as other:
        ids = list(grid.get_node_ids())
        assert ids == list(other.get_node_ids())
        assert len(set(ids)) == 100
        assert sum(each > 2**48 for each in ids) > 95
        assert not {0, 1} & set(ids)


def test_an_unknown_node_gets_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with grid_of(client(), 1) as grid:
        (node,) = grid.get_node_ids()
        ids = list(grid.push_messages([Message(words(), ABSENT, "train"), Message(words(), node, "train")]))
        assert len(ids) == 1
        assert list(grid.send_and_receive([Message(words(), ABSENT, "train")], timeout=20)) == []


def test_what_is_no_message_to_send_is_refused() -> None:
    with grid_of(client(), 1) as grid:
        (reply,) = ask(grid)
        with pytest.raises(ValueError, match="Invalid message"):
            list(grid.push_messages([reply]))


def test_the_run_and_old_ways_to_make_a_message() -> None:
    with grid_of(client(), 2) as grid:
        assert grid.run.run_id == 7
        node = list(grid.get_node_ids())[1]
        message = grid.create_message(words(), "train", node, "3", ttl=9)
        (reply,) = grid.send_and_receive([message])
        assert (said(reply)["who"], reply.metadata.group_id) == (1, "3")
        assert [each.node_id for each in grid.get_nodes()] == list(grid.get_node_ids())
        with pytest.raises(TypeError, match="must be an instance of Run"):
            grid.set_run(3)  # type: ignore[arg-type]


# --- contexts ---------------------------------------------------------------------------------------------------------


def test_contexts_are_kept_by_node_and_run() -> None:
    configs = [{"partition-id": i, "num-partitions": 2} for i in range(2)]
    nodes = InProcess(client(), configs, {})
    with adapter.identity(1):
        for run_id in (1, 2):
            grid = CarrierGrid(nodes, run_id)
            first = next(iter(grid.get_node_ids()))
            assert [said(reply)["asked"] for reply in ask(grid)] == [1, 1]
            (reply,) = grid.send_and_receive([Message(words(), first, "train")])
            assert said(reply)["asked"] == 2
        nodes.close()


def test_a_failure_leaves_no_trace_in_the_context() -> None:
    def fail(message: Message, context: Context) -> Message | None:
        context.state["junk"] = MetricRecord({"n": 1})
        context.run_config["junk"] = 1
        if said(message)["fail"] == "raise":
            raise ValueError("boom")
        return Message(words(kept=sorted(context.state)), reply_to=message) if said(message)["fail"] == "no" else None

    with grid_of(client(fail), 1) as grid:
        assert ask(grid, fail="raise")[0].has_error()
        assert ask(grid, fail="silent")[0].has_error()
        (node,) = grid.get_node_ids()
        kept = grid.carrier.context(node, 7)  # type: ignore[attr-defined]
        assert (len(kept.state), kept.run_config) == (0, {"rate": 0.5})
        assert said(ask(grid, fail="no")[0])["kept"] == ["junk"]


def test_configurations_of_runs_and_nodes() -> None:
    seen: list[Context] = []
    app = client(lambda message, context: seen.append(context) or echo(message, context))
    server: list[Context] = []

    def main(grid: Grid, context: Context) -> None:
        server.append(context)
        ask(grid)
        context.state["kept"] = MetricRecord({"x": 1.5})

    run = run_flower(serve(main), app, 2, {"a": {"b": 3}, "name": "x"}, [{"site": "north"}, {"site": "south"}])
    want = {"a.b": 3, "name": "x"}
    assert [context.run_config for context in (*server, *seen)] == [want] * 3
    assert [context.node_config for context in seen] == [
        {"site": site, "partition-id": i, "num-partitions": 2} for i, site in enumerate(("north", "south"))
    ]
    assert len({context.run_id for context in (*server, *seen)}) == 1
    assert run.context.state["kept"] == MetricRecord({"x": 1.5})
    assert [context.state["count"] for context in run.clients] == [MetricRecord({"n": 1})] * 2
    assert (run.answered, run.failed) == (2, 0)
