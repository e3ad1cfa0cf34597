"""Flower's semantics on our Grid: nodes that share nothing, and runs that leave nothing behind."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from grid_apps import ask, client, grid_of, said, serve, words

import fedsample
from fedsample.errors import ConfigError
from fedsample.fleets.flower_grid import adapter, run_flower

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
