"""Flower's semantics on our Grid: messages, contexts, errors, time, isolation; in this process and over bytes.

Also the contract with a version of Flower: `python tests/flower_version.py X.Y.Z` runs this file against another one.
"""

from __future__ import annotations

import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

import fedsample
from fedsample.errors import ConfigError, DataError, QuorumError
from fedsample.fleets.flower_grid import CarrierGrid, InProcess, adapter, answer, run_flower, versions

ABSENT = 10**6  # an id that no node has
RAISED = 2  # Flower's codes
MESSAGE_GONE, REPLY_EXPIRED, NODE_GONE = 3, 4, 5


def words(**values: Any) -> RecordDict:
    return RecordDict({"config": ConfigRecord(values)})


def said(message: Message) -> ConfigRecord:
    record = message.content["config"]
    assert isinstance(record, ConfigRecord)
    return record


def echo(message: Message, context: Context) -> Message:
    """Who was asked, and how often so far."""
    count = context.state.get("count", MetricRecord({"n": 0}))
    assert isinstance(count, MetricRecord)
    context.state["count"] = MetricRecord({"n": int(count["n"]) + 1})  # type: ignore[arg-type]
    reply = words(who=context.node_config["partition-id"], asked=int(count["n"]) + 1)  # type: ignore[arg-type]
    return Message(reply, reply_to=message)


def client(train: Callable[[Message, Context], Any] = echo) -> ClientApp:
    app = ClientApp()
    app.train()(train)
    return app


@contextmanager
def grid_of(app: ClientApp, clients: int = 3, *, workers: int = 1, run_id: int = 7) -> Iterator[CarrierGrid]:
    configs = [{"partition-id": i, "num-partitions": clients} for i in range(clients)]
    with adapter.identity(run_id):
        grid = CarrierGrid(InProcess(app, configs, {"rate": 0.5}, workers), run_id)
        try:
            yield grid
        finally:
            grid.close()


def ask(grid: Grid, kind: str = "train", *, timeout: float | None = 20, **values: Any) -> list[Message]:
    """The replies of all nodes."""
    messages = [Message(words(**values), node, kind) for node in grid.get_node_ids()]
    return list(grid.send_and_receive(messages, timeout=timeout))


def serve(main: Callable[[Grid, Context], None]) -> ServerApp:
    app = ServerApp()
    app.main()(main)
    return app


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


def answered(replies: list[Message]) -> set[str]:
    return {reply.metadata.reply_to_message_id for reply in replies}


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


# --- errors -----------------------------------------------------------------------------------------------------------


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
            assert [said(reply)["who"] for reply in ask(grid, timeout=1.5)] == [1, 3]
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


# --- isolation --------------------------------------------------------------------------------------------------------


def records() -> RecordDict:
    return RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(np.arange(3.0))}),
            "config": ConfigRecord({"list": [1, 2], "text": "a"}),
            "metrics": MetricRecord({"list": [1.0, 2.0]}),
        }
    )


def spoil(content: RecordDict) -> None:
    """Change everything that can be changed in place."""
    arrays, config, metrics = content["arrays"], content["config"], content["metrics"]
    assert isinstance(arrays, ArrayRecord)
    assert isinstance(config, ConfigRecord)
    arrays["w"].data = b"spoilt"
    arrays["w"].shape = (9,)
    arrays["more"] = Array(np.zeros(1))
    config["list"].append(3)  # type: ignore[union-attr, arg-type]
    config["text"] = "b"
    metrics["list"][0] = 9.0  # type: ignore[index]
    content["more"] = MetricRecord({"n": 1})


def test_a_client_that_spoils_its_message_spoils_nobody_elses() -> None:
    def spoiler(message: Message, context: Context) -> Message:
        same = message.content == records()
        spoil(message.content)
        message.metadata.group_id = "spoilt"
        return Message(RecordDict({"same": ConfigRecord({"same": same})}), reply_to=message)

    shared = records()
    with grid_of(client(spoiler)) as grid:
        messages = [Message(shared, node, "train", group_id="1") for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages, timeout=20))
    assert [reply.content["same"]["same"] for reply in replies] == [True] * 3
    assert shared == records()
    assert [message.metadata.group_id for message in messages] == ["1"] * 3


def test_a_server_that_spoils_what_it_sent_or_got_spoils_no_client() -> None:
    gate, kept = threading.Event(), []

    def keeper(message: Message, context: Context) -> Message:
        gate.wait(20)
        same = message.content == records() and (not kept or kept[0] == records())
        remembered = context.state.get("arrays")
        reply = records()
        kept[:] = [reply]
        context.state["arrays"] = reply["arrays"]
        reply["same"] = ConfigRecord({"same": same and remembered in (None, records()["arrays"])})
        message = Message(reply.copy(), reply_to=message)
        del reply["same"]
        return message

    with grid_of(client(keeper), 1) as grid:
        (node,) = grid.get_node_ids()
        for _ in range(2):
            message = Message(records(), node, "train")
            ids = list(grid.push_messages([message]))
            spoil(message.content)
            gate.set()
            replies: list[Message] = []
            while not replies:
                replies = list(grid.pull_messages(ids))
            assert replies[0].content["same"]["same"] is True
            spoil(replies[0].content)


def test_a_client_that_spoils_its_reply_later_changes_nothing() -> None:
    kept: list[RecordDict] = []

    def keeper(message: Message, context: Context) -> Message:
        kept.append(records())
        return Message(kept[-1], reply_to=message)

    with grid_of(client(keeper), 1) as grid:
        (reply,) = ask(grid)
        spoil(kept[0])
        assert reply.content == records()


def test_bytes_of_arrays_are_shared_and_cannot_change() -> None:
    content = records()
    twin = adapter.copied_records(content)
    assert twin["arrays"]["w"].data is content["arrays"]["w"].data  # type: ignore[union-attr]
    content["arrays"]["w"].data = bytearray(b"can change")  # type: ignore[union-attr, assignment]
    assert isinstance(adapter.copied_records(content)["arrays"]["w"].data, bytes)  # type: ignore[union-attr]


# --- runs -------------------------------------------------------------------------------------------------------------


def current() -> tuple[Any, ...]:
    from flwr.supercore.task_identity import TaskIdentity

    return TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id


def test_what_the_server_app_raises_is_raised_and_the_identity_put_back() -> None:
    class Mine(Exception):
        pass

    def main(grid: Grid, context: Context) -> None:
        assert current()[0] == context.run_id
        raise Mine("boom")

    before = current()
    with adapter.identity(3):
        with pytest.raises(Mine, match="boom"):
            run_flower(serve(main), client(), 1)
        assert current() == (3, 1, 1)
    assert current() == before


def test_runs_side_by_side_do_not_mix() -> None:
    meet, found = threading.Barrier(4), {}

    def run(number: int) -> None:
        def main(grid: Grid, context: Context) -> None:
            runs = set()
            for _ in range(20):
                meet.wait(30)
                messages = [Message(words(), node, "train") for node in grid.get_node_ids()]
                replies = list(grid.send_and_receive(messages, timeout=20))
                runs |= {reply.metadata.run_id for reply in replies}
            found[number] = (runs == {context.run_id}, [said(reply)["asked"] for reply in replies])

        run_flower(serve(main), client(), number)

    before = current()
    threads = [threading.Thread(target=run, args=(number,)) for number in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {number: (True, [20] * number) for number in (1, 2, 3, 4)}
    assert current() == before


def test_a_run_within_a_run() -> None:
    inner: list[int] = []

    def nested(grid: Grid, context: Context) -> None:
        inner.append(len(ask(grid)))

    def main(grid: Grid, context: Context) -> None:
        run_flower(serve(nested), client(), 2)
        assert {reply.metadata.run_id for reply in ask(grid)} == {context.run_id}

    run_flower(serve(main), client(), 3)
    assert inner == [2]


def test_flowers_runtime_keeps_its_identity() -> None:
    with adapter.identity(None):
        before = current()
        with adapter.identity(5):
            assert current() == before
        with pytest.raises(ConfigError, match="a Flower simulation is running in this process"), adapter.identity(None):
            pass


def test_a_run_that_is_over_says_so_to_threads_that_go_on() -> None:
    with grid_of(client()) as grid:
        pass
    with pytest.raises(adapter.RunNotRunningException):
        grid.get_node_ids()


def test_more_workers_give_the_same_result() -> None:
    def train(message: Message, context: Context) -> Message:
        weights = message.content["arrays"].to_numpy_ndarrays()[0]  # type: ignore[union-attr]
        place = int(context.node_config["partition-id"])
        content = {
            "arrays": ArrayRecord([weights * 0.9 + place / 3]),
            "metrics": MetricRecord({"num-examples": place + 1}),
        }
        return Message(RecordDict(content), reply_to=message)

    def trained(workers: int) -> bytes:
        result: list[ArrayRecord] = []

        def main(grid: Grid, context: Context) -> None:
            strategy = FedAvg(fraction_evaluate=0.0)
            result.append(strategy.start(grid, ArrayRecord([np.ones(5, np.float32)]), num_rounds=5).arrays)

        run_flower(serve(main), client(train), 7, workers=workers)
        return result[0].to_numpy_ndarrays()[0].tobytes()

    assert trained(1) == trained(1) == trained(4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((client(), client(), 2), "server_app is of type ClientApp, expected a flwr ServerApp"),
        ((ServerApp(), None, 2), "client_app is of type NoneType"),
        ((ServerApp(), client(), 0), "num_clients = 0"),
        ((ServerApp(), client(), True), "num_clients = True"),
        ((ServerApp(), client(), 2, {"a": [1]}), "run_config: The value for key a"),
        ((ServerApp(), client(), 2, {}, [{}]), "node_config holds 1 configurations, expected 2"),
        ((ServerApp(), client(), 2, {}, {"partition-id": 1}), "node_config of client 0 sets partition-id to 1"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        fedsample.run_flower(*arguments)


# --- apps from before flwr.serverapp ----------------------------------------------------------------------------------


def legacy(clients: int, wanted: int, **options: Any) -> Any:
    from flwr.client import NumPyClient
    from flwr.server import ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg as Old

    class Numpy(NumPyClient):
        def __init__(self, place: int) -> None:
            self.place = place

        def get_parameters(self, config: Any) -> Any:
            return [np.zeros(3)]

        def fit(self, parameters: Any, config: Any) -> Any:
            return [parameters[0] + self.place], self.place, {}

        def evaluate(self, parameters: Any, config: Any) -> Any:
            return float(parameters[0].sum()), 1, {}

    kept: dict[str, Any] = {"fit": None}

    class Keeping(Old):
        def aggregate_fit(self, *arguments: Any) -> Any:
            kept["fit"], metrics = super().aggregate_fit(*arguments)
            return kept["fit"], metrics

    def parts(context: Context) -> ServerAppComponents:
        strategy = Keeping(**{"min_available_clients": wanted, "min_fit_clients": wanted} | options)
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))

    app = ClientApp(client_fn=lambda context: Numpy(int(context.node_config["partition-id"])).to_client())
    run_flower(ServerApp(server_fn=parts), app, clients)
    return kept["fit"]


def test_an_app_of_old_runs() -> None:
    from flwr.common import parameters_to_ndarrays

    (weights,) = parameters_to_ndarrays(legacy(4, 4))
    np.testing.assert_allclose(weights, 2 * (0 + 1 + 4 + 9) / 6)


def test_an_old_strategy_that_wants_more_nodes_than_there_are() -> None:
    with pytest.raises(QuorumError, match="waits for 5 nodes, and there are 3"):
        legacy(3, 5)


def test_an_old_strategy_that_samples_by_position() -> None:
    from flwr.server.client_manager import SimpleClientManager
    from flwr.server.compat.app_utils import start_update_client_manager_thread

    with grid_of(client()) as grid:
        manager = SimpleClientManager()
        thread, stop, ready = start_update_client_manager_thread(grid, manager)
        ready.wait(10)
        stop.set()
        with pytest.raises(QuorumError, match="waits for 5 nodes, and there are 3"):
            manager.sample(5)
        with pytest.raises(QuorumError, match="waits for 4 nodes, and there are 3"):
            manager.sample(2, 4)
        assert (len(manager.sample(2, 3)), len(manager.sample(3))) == (2, 3)
        thread.join(10)


def test_an_old_strategy_that_waits_for_fewer_nodes_than_it_samples_goes_on_without() -> None:
    assert legacy(3, 2, min_fit_clients=5) is None


# --- another carrier --------------------------------------------------------------------------------------------------


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


# --- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.40.9", "1.43.0", "2.0", "0.9", "strange"])
def test_versions_that_are_not_known_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(versions.UNCHECKED, raising=False)
    with pytest.raises(ConfigError, match=r"1\.41 up to, not including, 1\.43; pip install 'flwr>=1\.41,<1\.43'"):
        versions.check(version)
    monkeypatch.setenv(versions.UNCHECKED, "1")
    versions.check(version)


def test_known_versions_are_those_of_the_package() -> None:
    for version in ("1.41.0", "1.42.3"):
        versions.check(version)
    file = Path(__file__).parents[3] / "pyproject.toml"
    needs = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
    oldest, newest = (".".join(map(str, each)) for each in (versions.OLDEST, versions.NEWEST))
    assert f"flwr>={oldest},<{newest}" in needs
