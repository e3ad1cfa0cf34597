"""Stock Flower apps with real devices, in one process: contexts that outlive a device, and Flower's errors."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from typer.testing import CliRunner

from fedsample.cli import main
from fedsample.errors import ConfigError, QuorumError, RunDirectoryError
from fedsample.fleets.flower_grid import AppFolder, FlowerRun, adapter, node_id
from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.device import process
from fedsample.fleets.grpc.device.connection import Connection, Watching
from fedsample.fleets.grpc.device.process import DeviceOptions
from fedsample.fleets.grpc.flower_app.carrier import FLOWER, message_in, parcel_of
from fedsample.fleets.grpc.flower_app.host import serve_app
from fedsample.fleets.grpc.flower_app.node import FILE, FlowerNode, run_config_in
from fedsample.fleets.grpc.framing import frames
from fedsample.fleets.grpc.security.address import Address
from fedsample.fleets.grpc.server.host import Host
from fedsample.fleets.grpc.server.hub import Hub

pytestmark = pytest.mark.slow

RAISED, NODE_GONE = 2, 5  # Flower's codes


def until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def counting(message: Message, context: Context) -> Message:
    seen = context.state.get("seen", MetricRecord({"n": 0}))
    context.state["seen"] = MetricRecord({"n": int(seen["n"]) + 1})  # type: ignore[call-overload]
    return Message(RecordDict({"seen": context.state["seen"]}), reply_to=message)


def client_app(train: Callable[[Message, Context], Any] = counting) -> ClientApp:
    app = ClientApp()
    app.train()(train)
    return app


def seen(reply: Message) -> int:
    record = reply.content["seen"]
    assert isinstance(record, MetricRecord)
    return int(record["n"])  # type: ignore[arg-type]


def served(
    main: Callable[[Grid, Context], None], app: ClientApp, folder: Path, clients: int, patience: float = 60
) -> tuple[FlowerRun, list[str]]:
    """A ServerApp over devices in a thread; as attributes of `main` it has the hub, and how to make a device leave."""
    server, said = ServerApp(), []
    server.main()(main)
    loop = asyncio.new_event_loop()
    attending: list[asyncio.Task[str]] = []

    async def attend(port: int) -> None:
        def device(index: int) -> Connection:
            def found(welcome: pb.Welcome) -> FlowerNode:
                place = folder / f"{index}"
                place.mkdir(exist_ok=True)
                config = run_config_in(welcome.config)
                assert config is not None
                return FlowerNode(place, welcome.run, welcome.client, welcome.clients, app, config)

            return Connection(f"127.0.0.1:{port}", None, index, found)

        fleet = [device(index) for index in range(clients)]
        attending.extend(asyncio.create_task(each.attend()) for each in fleet)
        main.__dict__["leave"] = lambda index: loop.call_soon_threadsafe(attending[index].cancel)
        await asyncio.gather(*attending, return_exceptions=True)
        for each in fleet:
            each.close()

    thread: list[threading.Thread] = []

    def opened(hub: Hub) -> None:
        main.__dict__["hub"] = hub
        thread.append(threading.Thread(target=lambda: loop.run_until_complete(attend(hub.port))))
        thread[0].start()

    host = Host(Address("127.0.0.1", 0), None, opened)
    about = AppFolder(folder, "", "", {}, None, "test")
    try:
        return serve_app(about, server, clients, {"rate": 0.5}, host, patience=patience, say=said.append), said
    finally:
        thread[0].join()
        loop.close()


def ask(grid: Grid, timeout: float | None = 20, ttl: float | None = None) -> list[Message]:
    messages = [Message(RecordDict(), node, "train", ttl=ttl) for node in grid.get_node_ids()]
    return list(grid.send_and_receive(messages, timeout=timeout))


def test_devices_work_at_the_same_time(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def together(message: Message, context: Context) -> Message:
        both.wait(10)
        return counting(message, context)

    def main(grid: Grid, context: Context) -> None:
        assert list(grid.get_node_ids()) == [node_id(0), node_id(1)]  # as in one process
        assert [seen(reply) for reply in ask(grid)] == [1, 1]

    run, _ = served(main, client_app(together), tmp_path, 2)
    assert (run.answered, run.failed) == (2, 0)


def test_a_device_that_stays_away_is_gone(tmp_path: Path) -> None:
    left, codes = threading.Event(), []

    def leaving(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            main.__dict__["leave"](1)
            left.set()
        return counting(message, context)

    def main(grid: Grid, context: Context) -> None:
        replies = ask(grid)
        codes.extend(reply.error.code for reply in replies if reply.has_error())
        assert len(replies) == 2
        assert list(grid.get_node_ids()) == [node_id(0)]
        until(lambda: main.__dict__["hub"].records[1].asked is None, seconds=5)  # it is not asked that again
        assert [seen(reply) for reply in ask(grid)] == [2]

    run, said = served(main, client_app(leaving), tmp_path, 2, patience=0.3)
    assert left.is_set()
    assert codes == [NODE_GONE]
    assert (run.answered, run.failed) == (2, 1)
    assert "client 1 is away" in said


def test_a_slow_device_is_left_out_in_time_and_its_reply_can_be_pulled_later(tmp_path: Path) -> None:
    go = threading.Event()

    def slow(message: Message, context: Context) -> Message:
        assert go.wait(20)
        return counting(message, context)

    def main(grid: Grid, context: Context) -> None:
        ids = list(grid.push_messages([Message(RecordDict(), node, "train") for node in grid.get_node_ids()]))
        assert list(grid.pull_messages(ids)) == []
        assert ask(grid, timeout=0.1) == []
        go.set()
        replies: list[Message] = []
        end = time.monotonic() + 20
        while not replies and time.monotonic() < end:
            replies.extend(grid.pull_messages(ids))
            time.sleep(0.01)
        assert [seen(reply) for reply in replies] == [1]
        assert [seen(reply) for reply in ask(grid)] == [3]

    served(main, client_app(slow), tmp_path, 1)


def test_messages_of_many_pieces(tmp_path: Path) -> None:
    def echo(message: Message, context: Context) -> Message:
        context.state["kept"] = message.content["arrays"]
        return Message(message.content, reply_to=message)

    def main(grid: Grid, context: Context) -> None:
        sent = ArrayRecord([np.arange(700_000, dtype=np.float32), np.zeros(0), np.arange(3)])
        messages = [Message(RecordDict({"arrays": sent}), node, "train") for node in grid.get_node_ids()]
        for reply in grid.send_and_receive(messages, timeout=30):
            got = reply.content["arrays"]
            assert isinstance(got, ArrayRecord)
            for one, other in zip(got.to_numpy_ndarrays(), sent.to_numpy_ndarrays(), strict=True):
                np.testing.assert_array_equal(one, other, strict=True)

    run, _ = served(main, client_app(echo), tmp_path, 2)
    assert (run.answered, run.failed) == (2, 0)


def test_a_device_that_cannot_remember_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise RunDirectoryError("no room on the disk")

    def main(grid: Grid, context: Context) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("fedsample.fleets.grpc.flower_app.node.write_atomic", full)
            (reply,) = ask(grid)
        assert reply.error.code == RAISED
        assert "client 0 failed" in reply.error.reason
        assert "no room on the disk" in reply.error.reason
        assert [seen(reply) for reply in ask(grid)] == [1]

    served(main, client_app(), tmp_path, 1)


def test_a_strategy_that_wants_more_devices_than_there_are_is_told(tmp_path: Path) -> None:
    def main(grid: Grid, context: Context) -> None:
        FedAvg(min_available_nodes=3).start(grid, ArrayRecord([np.zeros(1)]), 1)

    with pytest.raises(QuorumError, match="waits for 3 nodes, and there are 2"):
        served(main, client_app(), tmp_path, 2)


def test_what_a_server_app_raises_ends_the_run_on_all_sides(tmp_path: Path) -> None:
    def main(grid: Grid, context: Context) -> None:
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        served(main, client_app(), tmp_path, 2)


def test_options_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    run = CliRunner().invoke
    server, client = ["server", "--insecure"], ["client", "127.0.0.1:1", "--insecure", "--client", "0"]
    for line, text in (
        ([*server, "--app", "x"], "--clients N go together"),
        ([*server, "--patience", "3"], "--clients N go together"),
        ([*server, "--app", "x", "--clients", "2", "--out", "y"], "--out: not with --app"),
        ([*client, "--app", "a:b", "--data", "d"], "--data: not with --app"),
    ):
        done = run(main.app, line)
        assert done.exit_code == 2
        assert text in " ".join(done.output.replace("│", " ").split())
    for line, text in (
        ([*server, "--app", str(tmp_path), "--clients", "2"], "no pyproject.toml"),
        ([*client, "--app", str(tmp_path)], "no pyproject.toml"),
        ([*client, "--app", "averages_that_are_not_here:app"], "cannot be imported"),
    ):
        with pytest.raises(ConfigError, match=text):
            run(main.app, line, catch_exceptions=False)


def test_each_side_says_when_the_other_runs_something_else(tmp_path: Path) -> None:
    apps, samples = '[flower]\nname = "x"\n[config]\n', "rounds = 3\n"
    named = DeviceOptions("", None, 0, tmp_path, "cpu", "digits", None, None, None, None, True)
    with pytest.raises(ConfigError, match="add --app"):
        process._sampling(named, Watching(""), lambda welcome: tmp_path)(pb.Welcome(config=apps))
    (tmp_path / "stock.py").write_text("from flwr.clientapp import ClientApp\napp = ClientApp()\n")
    with contextlib.chdir(tmp_path), contextlib.ExitStack() as stack:
        enter = process._app("stock:app", lambda welcome: tmp_path, stack)
        with pytest.raises(ConfigError, match="drop --app"):
            enter(pb.Welcome(config=samples))
        assert isinstance(enter(pb.Welcome(config=apps)), FlowerNode)


# --- a device's half --------------------------------------------------------------------------------------------------

RUN = bytes(range(16))


def request(number: int, run_id: int = 7) -> frames.Message:
    with adapter.identity(run_id):
        message = adapter.outgoing(Message(RecordDict({"c": ConfigRecord({"x": number})}), 5, "train"), run_id, "m")
    parcel = parcel_of(adapter.packed(message))
    return frames.Message(frames.Name(RUN, 1, number, 0, bytes(16), number), FLOWER, parcel)


def node(folder: Path, app: ClientApp) -> FlowerNode:
    return FlowerNode(folder, RUN, 0, 2, app, {"rate": 0.5})


def count(answer: frames.Message | None) -> int:
    assert answer is not None
    return seen(adapter.unpacked(message_in(answer.parcel)))


def test_a_request_that_comes_again_gets_the_answer_that_it_had(tmp_path: Path) -> None:
    device = node(tmp_path, client_app())
    first, second, other = request(1), request(2), request(3, run_id=8)
    assert count(device.answer(first)) == count(device.answer(first)) == 1
    assert count(device.answer(second)) == 2
    assert device.answer(first) is None
    assert count(device.answer(other)) == 1  # another run has another context
    again = node(tmp_path, client_app())
    assert (again.standing.term, again.round) == (1, 3)
    assert count(again.answer(other)) == 1
    assert count(again.answer(request(4))) == 3


def test_a_disk_that_is_full_leaves_the_message_unhandled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = node(tmp_path, client_app())
    assert count(device.answer(request(1))) == 1

    def full(*arguments: object) -> None:
        raise RunDirectoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr("fedsample.fleets.grpc.flower_app.node.write_atomic", full)
        with pytest.raises(RunDirectoryError):
            device.answer(request(2))
    assert count(device.answer(request(2))) == 2


def test_damaged_contexts_are_refused(tmp_path: Path) -> None:
    node(tmp_path, client_app()).answer(request(1))
    whole = (tmp_path / FILE).read_bytes()
    for damaged in (whole[:-1], whole[:2], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], whole + b"\0\0\0\0", b""):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(RunDirectoryError, match="damaged"):
            node(tmp_path, client_app())
