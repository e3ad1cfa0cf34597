"""What a server and a device show of themselves, and what they say when something is in the way."""

from __future__ import annotations

import io
import socket
from pathlib import Path

import pytest
from rich.console import Console

from fedsample.errors import DataError, FedSampleError, Interrupted, QuorumError
from fedsample.fleets.grpc import display
from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.device.connection import Watching
from fedsample.fleets.grpc.device.process import DeviceOptions, _source
from fedsample.fleets.grpc.display import FleetProgress, device_display, device_table, fleet_table, span
from fedsample.fleets.grpc.security.address import Address, check_free
from fedsample.fleets.grpc.server.client_record import ClientRecord
from fedsample.fleets.grpc.server.host import _farewell
from fedsample.fleets.grpc.server.stream import Stream


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (display, __import__("fedsample.monitor.progress", fromlist=["time"])):
        monkeypatch.setattr(module, "time", made)
    return made


def console(width: int = 120, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal)


def written(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def seat(client: int, here: bool, **more: object) -> ClientRecord:
    return ClientRecord(client, Stream(b"x") if here else None, accepted=here, connections=1, since=95.0, **more)  # type: ignore[arg-type]


def test_the_table_says_since_when_a_device_is_away_and_keeps_a_row_a_line(clock: Clock) -> None:
    out = console(width=80)
    out.print(fleet_table([seat(0, True), seat(1, False, error="no room " * 40)]))
    lines = [line for line in written(out).splitlines() if line.strip()]
    assert len(lines) == 5  # head, rule, two devices, an error
    assert "away 5 s" in lines[3]
    assert lines[4].startswith("last error of 1: no room")
    assert max(map(len, lines)) <= 80


def test_under_the_table_stands_what_is_done_and_then_who_is_missing(clock: Clock) -> None:
    progress = FleetProgress(100, console=console(terminal=True))
    progress.watch([seat(0, True), seat(1, False)])
    try:
        with progress.stage("finding the mode"):
            assert progress._line() == "finding the mode ...; missing: client 1 (away, 5 s)"
        assert progress._line() == "preparing ... waiting for client 1 (away, 5 s)"
        progress.update(7, 0, 0)
        assert progress._line().startswith("round 7/100    7%  up 0 kB")
        clock.now += 3
        assert progress._line() == "round 7/100    7%  waiting for client 1 (away, 8 s)"
    finally:
        progress.close()


def test_reminders_come_more_and_more_seldom_until_a_round_is_done(clock: Clock) -> None:
    out = console()
    progress = FleetProgress(100, console=out)
    for _ in range(20):
        progress.remind("waiting")
        clock.now += 10
    assert written(out).count("waiting") == 5  # after 0, 10, 30, 70, 150 seconds
    progress.update(1, 0, 0)
    progress.remind("waiting")
    assert written(out).count("waiting") == 6


def test_a_note_within_a_stage_has_a_line_of_its_own(clock: Clock) -> None:
    out = console()
    with FleetProgress(10, console=out) as progress, progress.stage("waiting for 2 devices"):
        progress.note("client 1 cannot take part")
    lines = ["waiting for 2 devices ... ", "client 1 cannot take part", "waiting for 2 devices ... done in 0.0 s", ""]
    assert written(out).split("\n") == lines


def test_a_run_that_went_back_has_the_pace_of_the_rounds_since(clock: Clock) -> None:
    out = console()
    with FleetProgress(1000, console=out) as progress:
        progress.update(500, 0, 0)
        clock.now += 50
        progress.update(400, 0, 0)
        clock.now += 10
        progress.update(420, 0, 0)
    assert "round 420/1000   42%  2 rounds/s" in written(out)


def test_a_device_shows_why_it_waits_and_how_long(clock: Clock) -> None:
    watching = Watching("localhost:9092", 0, 3, "waiting to connect again", error="refused", erred=88.0, until=103.0)
    watching.farewell = "the server was stopped, and can go on"
    out = console()
    out.print(device_table(watching))
    assert "0 of 3" in written(out)
    assert "waiting to connect again, in 3 s (the server was stopped, and can go on)" in written(out)
    assert "last error, 12 s ago: refused" in written(out)


def test_without_a_terminal_a_device_says_each_thing_once() -> None:
    watching, out = Watching("localhost:9092"), console()
    with device_display(watching, out, quiet=False):
        for _ in range(3):
            watching.to("connecting")
            watching.fail("cannot connect: Connection refused")
            watching.to("waiting to connect again")
        for _ in range(3):
            watching.to("connected")
            watching.to("computing")
    assert written(out) == "waiting to connect again (cannot connect: Connection refused)\nconnected\n"


def test_devices_are_told_what_concerns_them() -> None:
    assert _farewell(None) == "the run has ended"
    assert _farewell(Interrupted("by whom")) == "the server was stopped, and can go on"
    assert _farewell(DataError("client 1 has no column\nmore")) == "the server stopped: client 1 has no column"
    assert "secret" not in _farewell(QuorumError("secret"))


def test_an_occupied_port_is_refused_in_plain_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(FedSampleError, match=f"127.0.0.1:{port}.*another process listens there"):
            check_free(Address("127.0.0.1", port))
    check_free(Address("127.0.0.1", port))
    with pytest.raises(FedSampleError, match="none of this machine's addresses"):
        check_free(Address("192.0.2.1", 9092))


@pytest.mark.parametrize(
    ("given", "taken", "noted"),
    [((None, None), (1, 3), False), ((1, 3), (1, 3), False), ((0, 3), (0, 3), True), ((1, None), (1, None), False)],
)
def test_a_share_of_a_built_in_set_is_the_clients_own(
    given: tuple[int | None, int | None], taken: tuple[int | None, int | None], noted: bool
) -> None:
    said: list[str] = []
    watching = Watching(say=said.append)
    presence = DeviceOptions("localhost:1", None, 1, Path("state"), "cpu", "digits", None, *given, None, True)
    source = _source(presence, pb.Welcome(client=1, clients=3), watching)
    assert (source.partition, source.partitions) == taken
    assert bool(said) == noted
    own = presence._replace(data="mine.csv")
    assert _source(own, pb.Welcome(client=1, clients=3), watching)[2:] == given


def test_spans_can_be_read() -> None:
    assert [span(each) for each in (4.4, 99.0, 300.0, 9000.0)] == ["4 s", "99 s", "5 min", "2.5 h"]
