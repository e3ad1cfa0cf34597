"""A device's half of a run: what it answers again, what it ignores, and how it goes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsample.clients.device_data import DataSource, DeviceData
from fedsample.config import Experiment, load
from fedsample.errors import DataError
from fedsample.fleets.grpc.device.replica import Replica
from fedsample.fleets.grpc.framing.frames import Message, Name
from fedsample.protocol import EXACT_QUERY, TRAIN, Outgoing
from fedsample.protocol.exchange import ESTIMATE, Request
from fedsample.protocol.names import FIT, REWIND, SCALE, SCORE, SNAPSHOT
from fedsample.protocol.wire import Header, Parcel, header, pack_tensors

RUN = b"0123456789abcdef"
D = 3 * 2 + 3


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(20, 2))
    np.savez(tmp_path / "own.npz", X=x, y=np.arange(20) % 3, X_test=x[:5], y_test=np.arange(5) % 3)
    return tmp_path / "own.npz"


def experiment(**more: Any) -> Experiment:
    values = {"uplink": {"name": "diana", "compressor": "randk", "k": 2}, "metric": {"name": "identity"}}
    return load({"chains": 2, "data": {"clients": 1}, **values, **more}, environment={})


class Server:
    """Asks one device, as the desk does."""

    def __init__(self, folder: Path, data: Path, experiment: Experiment, term: int = 1) -> None:
        self.held = DeviceData(experiment, 0, 1, DataSource(str(data)))
        self.resident = Replica(folder, RUN, experiment, 0, 1, self.held)
        self.term, self.sequence = term, 0

    def message(self, kind: str, parcel: Parcel, round: int = 0) -> Message:
        self.sequence += 1
        return Message(Name(RUN, self.term, round, 0, bytes(16), self.sequence), kind, parcel)

    def ask(self, kind: str, parcel: Parcel | None = None, round: int = 0) -> Parcel:
        answer = self.resident.answer(self.message(kind, parcel or Parcel(header()), round))
        assert answer is not None
        return answer.parcel

    def prepare(self) -> None:
        self.ask(FIT, Parcel(header(schema=self.held.schema)))
        self.ask(SCALE)

    def train(self, round: int) -> Message:
        points = torch.full((2, D), 0.1 * round)
        applied = torch.tensor([round - 1])
        request = Request(round=round, points=points, outputs=frozenset({ESTIMATE}), applied=applied)
        return self.message(TRAIN, Outgoing(request, "", coins=False).parcel(0), round)

    def upload(self, round: int) -> bytes:
        answer = self.resident.answer(self.train(round))
        assert answer is not None
        return bytes(answer.parcel.arrays["upload"].data)

    def score(self, round: int) -> bytes:
        draws = pack_tensors({"draws": torch.linspace(-1, 1, D).expand(2, -1) * round})
        return bytes(self.ask(SCORE, Parcel(header(), draws), round).arrays["counts"].data)

    def snapshot(self, round: int, mark: int = 5) -> None:
        self.ask(SNAPSHOT, Parcel(header(mark=mark)), round)

    def rewind(self, round: int, mark: int = 5) -> bool:
        self.term, self.sequence = self.term + 1, 0
        reply = self.ask(REWIND, Parcel(header(live=False, mark=mark)), round)
        return bool(Header(reply, "a rewind").value("held"))


@pytest.fixture
def server(tmp_path: Path, data: Path) -> Server:
    made = Server(tmp_path / "disk", data, experiment())
    made.prepare()
    return made


# --- names ------------------------------------------------------------------------------------------------------------


def test_the_same_name_gets_the_same_answer_and_nothing_is_computed(server: Server) -> None:
    first = server.upload(1)
    request = server.train(2)
    answer = server.resident.answer(request)
    assert server.resident.answer(request) is answer
    again = server.resident.answer(request._replace(parcel=Parcel({})))  # the name decides, not the content
    assert again is answer
    assert answer is not None
    assert bytes(answer.parcel.arrays["upload"].data) != first
    assert answer.name == request.name


@pytest.mark.parametrize(
    "older",
    [{"digest": b"x" * 16}, {"sequence": 4}, {"sequence": 0}, {"term": 0}, {"term": 0, "sequence": 99}, {"round": 7}],
)
def test_what_was_asked_before_is_not_answered(server: Server, older: dict[str, Any]) -> None:
    server.upload(1)
    server.upload(2)
    request = server.train(3)
    answer = server.resident.answer(request)
    state = server.resident._device.state()  # type: ignore[union-attr]
    assert server.resident.answer(request._replace(name=request.name._replace(**older))) is None
    assert server.resident.answer(request) is answer
    after = server.resident._device.state()  # type: ignore[union-attr]
    assert all(torch.equal(state[name], after[name]) for name in state)


def test_a_higher_term_begins_to_count_anew(server: Server) -> None:
    server.upload(1)
    old = server.train(2)
    server.term, server.sequence = 4, 0
    assert server.ask(SNAPSHOT, Parcel(header(mark=1)), 1) is not None
    assert server.resident.answer(old) is None
    assert server.resident.standing[:3] == (4, True, [1])


@pytest.mark.parametrize("other", [{"run": b"x" * 16}, {"client": 1}])
def test_a_request_for_another_device_is_an_error(server: Server, other: dict[str, Any]) -> None:
    request = server.train(1)
    with pytest.raises(DataError, match=r"but this is client 0 of run 3031"):
        server.resident.answer(request._replace(name=request.name._replace(**other)))


def test_a_failure_is_forgotten_and_the_request_may_come_again(server: Server) -> None:
    want = server.upload(1)
    server.rewind(0)
    request = server.train(1)
    damaged = Parcel(request.parcel.header, {"points": request.parcel.arrays["points"]._replace(dtype="float64")})
    with pytest.raises(DataError, match="float64"):
        server.resident.answer(request._replace(parcel=damaged))
    answer = server.resident.answer(request)
    assert answer is not None
    assert bytes(answer.parcel.arrays["upload"].data) == want


def test_questions_before_the_data_are_agreed_on(tmp_path: Path, data: Path) -> None:
    server = Server(tmp_path / "disk", data, experiment())
    assert server.resident.standing[:3] == (0, False, [])
    with pytest.raises(DataError, match=r"query.exact before the data were agreed on"):
        server.ask(EXACT_QUERY)
    with pytest.raises(DataError, match="the scale before the schema"):
        server.ask(SCALE)
    server.prepare()
    assert server.resident.standing[:3] == (1, True, [])


# --- going back -------------------------------------------------------------------------------------------------------


def test_back_to_a_snapshot_the_same_follows(server: Server, tmp_path: Path, data: Path) -> None:
    for round in (1, 2, 3):
        server.upload(round)
    server.score(3)
    server.snapshot(3)
    want = [server.upload(4), server.score(4), server.upload(5), server.score(5)]
    server.snapshot(5)
    assert server.resident.standing.snapshots == [5, 3]
    assert server.rewind(3)
    assert server.resident.standing.snapshots == [3]
    assert [server.upload(4), server.score(4), server.upload(5), server.score(5)] == want
    # another process, from the disk alone
    other = Server(tmp_path / "disk", data, experiment(), term=9)
    other.prepare()
    assert other.rewind(3)
    assert [other.upload(4), other.score(4), other.upload(5), other.score(5)] == want


def test_without_the_snapshot_it_begins_with_nothing_and_says_so(server: Server) -> None:
    fresh = [server.upload(1), server.upload(2)]
    server.score(2)
    server.snapshot(2)
    server.upload(3)
    assert not server.rewind(1)
    assert server.resident.standing.snapshots == []
    assert [server.upload(1), server.upload(2)] == fresh
    counts = server.score(2)
    assert not server.rewind(7)
    assert server.score(2) == counts  # no draw is left from before


def test_a_damaged_snapshot_is_none(server: Server, tmp_path: Path) -> None:
    server.upload(1)
    server.snapshot(1)
    file = tmp_path / "disk" / "round-00000001" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert not server.rewind(1)


def test_a_damaged_snapshot_is_not_offered_and_the_one_before_it_is(server: Server, tmp_path: Path, data: Path) -> None:
    server.snapshot(0)
    server.upload(1)
    server.snapshot(1)
    want = server.upload(2)
    server.snapshot(2)
    file = tmp_path / "disk" / "round-00000002" / "tensors.safetensors"
    file.write_bytes(b"")
    again = Server(tmp_path / "disk", data, experiment(), term=2)
    again.prepare()
    assert again.resident.standing.snapshots == [1, 0]
    assert again.rewind(1)
    assert again.upload(2) == want
    again.snapshot(2)
    assert again.resident.standing.snapshots == [2, 1, 0]


def test_three_snapshots_are_kept_as_the_server_is_one_behind(server: Server) -> None:
    for round in range(5):
        server.snapshot(round)
    assert server.resident.standing.snapshots == [4, 3, 2]


def test_a_snapshot_of_a_path_that_the_run_has_left_is_none(server: Server, tmp_path: Path, data: Path) -> None:
    server.upload(1)
    server.snapshot(1, mark=5)
    assert not server.rewind(1, mark=6)
    assert server.resident.standing.snapshots == []
    server.upload(2)
    server.snapshot(1, mark=7)
    server.snapshot(1, mark=8)  # asked again, because someone else has died
    want = server.upload(3)
    assert not server.rewind(1, mark=7)
    server.upload(2)
    server.snapshot(1, mark=8)
    assert server.rewind(1, mark=8)
    assert server.upload(3) == want


def test_a_rewind_of_who_is_still_here_changes_nothing(server: Server) -> None:
    twin = [server.upload(1), server.upload(2)]
    server.rewind(0)
    assert server.upload(1) == twin[0]
    server.term, server.sequence = server.term + 1, 0
    reply = server.ask(REWIND, Parcel(header(live=True)), 1)
    assert Header(reply, "a rewind").value("held") is True
    assert server.upload(2) == twin[1]


@pytest.mark.parametrize("snapshots", [[], [0]])  # from where they were first counted, in the preparation
def test_other_data_are_refused_once_the_device_has_taken_part(
    snapshots: list[int], server: Server, tmp_path: Path, data: Path
) -> None:
    for round in snapshots:
        server.snapshot(round)
    with np.load(data) as arrays:
        np.savez(tmp_path / "other.npz", **{**arrays, "y": 1 - arrays["y"] % 2})
    with pytest.raises(DataError, match="the data of client 0 are not those that the run began with"):
        Server(tmp_path / "disk", tmp_path / "other.npz", experiment())
    assert Server(tmp_path / "new disk", tmp_path / "other.npz", experiment()).resident.standing.snapshots == []
    assert Server(tmp_path / "disk", data, experiment()).resident.standing.snapshots == snapshots


def test_told_again_a_device_is_as_at_the_start(server: Server) -> None:
    want = [server.upload(1), server.upload(2)]
    server.prepare()
    assert [server.upload(1), server.upload(2)] == want
