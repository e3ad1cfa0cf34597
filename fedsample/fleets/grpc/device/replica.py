"""A device's part of one run: its memory, its last answer, and its snapshots.

A repeated request gets the answer that it had; one older than the last is not answered. State is written to disk only
when the server asks for a snapshot; after a crash the device returns to the last snapshot that all have, and replays.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from fedsample import protocol
from fedsample.clients.message_handler import MessageHandler, Trace
from fedsample.errors import DataError, RunDirectoryError
from fedsample.fleets.grpc.framing.frames import Message
from fedsample.fleets.grpc.framing.headers import Name
from fedsample.monitor.atomic_files import disk_error, write_atomic
from fedsample.monitor.checkpoint import KEPT, Checkpoint, CheckpointStore
from fedsample.protocol.names import FIT, REWIND, SCALE, SCORE, SNAPSHOT, SPREAD
from fedsample.protocol.wire import Header, Parcel, header, pack_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedsample.clients.device_data import DeviceData
    from fedsample.config import Experiment


class Standing(NamedTuple):
    """A device's position in a run; see `Ready` in the protocol."""

    term: int
    live: bool
    snapshots: list[int]
    schema: str


class Replica:
    """A device in one run.

    Args:
        folder: this run's, for snapshots.
        run: the run's id, 16 bytes.
        experiment: the configuration.
        index: the client's index.
        n: number of clients.
        data: the device's own data.

    Raises:
        DataError: if the data differ from those with which this device has taken part before.
        RunDirectoryError: if the folder cannot be read.
    """

    def __init__(self, folder: Path, run: bytes, experiment: Experiment, index: int, n: int, data: DeviceData) -> None:
        self.run, self.experiment, self.index, self.n, self.data = run, experiment, index, n, data
        self.trace = Trace(index)
        self.round = 0
        # One more than the server, which writes last: if either side finds one damaged, both still share another.
        self._store = CheckpointStore(folder, digest=run.hex(), kept=KEPT + 1)
        self._fingerprint_file = folder / "data"
        self._device: MessageHandler | None = None
        self._term = 0
        self._sequence = 0
        self._answer: Message | None = None
        self._whole = self._check_data()

    @property
    def standing(self) -> Standing:
        """What the server must know to continue with this device."""
        snapshots = [round for round in self._store.rounds() if round in self._whole]
        return Standing(self._term, self._device is not None, snapshots, self.data.schema)

    def answer(self, message: Message) -> Message | None:
        """Return the answer to a request; None: it is older than the latest request.

        Raises:
            DataError: if the request is not for this device or does not fit; other errors come from the model.
        """
        name = message.name
        if name.run != self.run or name.client != self.index:
            raise DataError(
                f"a request to client {name.client} of run {name.run.hex()}, but this is client {self.index} of run "
                f"{self.run.hex()}"
            )
        if name.term > self._term:
            self._term, self._sequence, self._answer = name.term, 0, None
        if self._answer is not None and name == self._answer.name:
            return self._answer
        if name.term < self._term or name.sequence <= self._sequence:
            return None
        self.trace = Trace(self.index, name.round)
        answer = Message(name, message.kind, self._handle(name, message.kind, message.parcel))
        self._sequence, self._answer, self.round = name.sequence, answer, name.round
        return answer

    def _handle(self, name: Name, kind: str, parcel: Parcel) -> Parcel:
        if kind == FIT:
            return self._fit(parcel)
        if kind == SPREAD:
            self.trace.stage = "standardisation"
            return Parcel(header(), pack_tensors({"sums": self.data.second_sums(_sums(parcel, "first"))}))
        if kind == SCALE:
            self.trace.stage = "standardisation"
            whole = "first" in parcel.arrays
            pair = (_sums(parcel, "first"), _sums(parcel, "second")) if whole else (None, None)
            self._device = self.data.finish(*pair)
            return self._device.handle(protocol.HELLO, Parcel(header()), self.trace)
        if self._device is None:
            raise DataError(f"{kind} before the data were agreed on: the server has lost track of this device")
        if kind == SNAPSHOT:
            return self._snapshot(name.round, Header(parcel, "a snapshot").integer("mark"), self._device)
        if kind == REWIND:
            return self._rewind(name.round, Header(parcel, "a rewind"), self._device)
        if kind == SCORE:
            self.trace.stage = "score"
            draws = protocol.unpack_points(parcel, "draws", self._device.origin)
            return Parcel(header(), pack_tensors({"counts": self.data.score(draws)}))
        return self._device.handle(kind, parcel, self.trace)

    def _fit(self, parcel: Parcel) -> Parcel:
        self.trace.stage = "data"
        head = Header(parcel, "a schema")
        self.data.fit(head.text("schema"))
        self._pin()
        sums = {"sums": self.data.first_sums()} if head.value("sums") is True else {}
        return Parcel(header(), pack_tensors(sums))

    def _snapshot(self, round: int, mark: int, device: MessageHandler) -> Parcel:
        self.trace.stage = "snapshot"
        if round in self._store.rounds():
            self._store.rewind(round - 1)  # of a path that the run has abandoned
        tensors = {f"device.{name}": tensor for name, tensor in device.state().items()}
        tensors |= {f"score.{name}": tensor for name, tensor in self.data.state().items()}
        self._store.save(round, tensors, {"data": self.data.fingerprint, "mark": mark})
        self._whole.add(round)
        return Parcel(header())

    def _rewind(self, round: int, head: Header, device: MessageHandler) -> Parcel:
        """Return to a snapshot; a device that has none starts anew, and says so."""
        self.trace.stage = "rewind"
        if head.value("live") is True:
            return Parcel(header(held=True))
        kept, mark = self._kept(round), head.integer("mark")
        if kept is not None and kept.meta.get("mark") != mark:
            kept = None
        self._store.rewind(round if kept is not None else round - 1)
        tensors = {} if kept is None else kept.tensors
        device.restore(_below(tensors, "device."))
        self.data.restore(_below(tensors, "score."))
        return Parcel(header(held=kept is not None))

    def _kept(self, round: int) -> Checkpoint | None:
        """Read a snapshot; None: it is missing or damaged."""
        try:
            return self._store.at(round)
        except RunDirectoryError:
            return None

    def _check_data(self) -> set[int]:
        """Check the data of the snapshots -> the rounds of those that are whole; damaged ones are ignored."""
        whole = {
            kept.round: kept.meta.get("data") for kept in map(self._kept, self._store.rounds()) if kept is not None
        }
        for made_with in [*whole.values(), *self._pinned()]:
            if made_with != self.data.fingerprint:
                raise DataError(
                    f"the data of client {self.index} are not those that the run began with: restore them, or start a "
                    "new run on the server"
                )
        return set(whole)

    def _pin(self) -> None:
        """Store which data this device takes part with, before there is any snapshot."""
        if not self._fingerprint_file.exists():
            try:
                self._fingerprint_file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise disk_error(self._fingerprint_file, 0, error) from error
            write_atomic(self._fingerprint_file, self.data.fingerprint.encode())

    def _pinned(self) -> list[str]:
        """Read the stored fingerprint of the data with which this device began, if there is one."""
        try:
            return [self._fingerprint_file.read_text()]
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise RunDirectoryError(f"{self._fingerprint_file} cannot be read ({error}): check the disk") from error


def _sums(parcel: Parcel, name: str) -> Tensor:
    return protocol.unpack_vector(parcel, name, "sums over clients")


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
