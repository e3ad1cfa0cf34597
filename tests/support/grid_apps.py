"""Small Flower apps on our Grid, and how to ask them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsample.fleets.flower_grid import CarrierGrid, InProcess, adapter

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


def answered(replies: list[Message]) -> set[str]:
    return {reply.metadata.reply_to_message_id for reply in replies}
