"""A device's part of a run of a Flower app: an unchanged ClientApp, and contexts that outlive its process.

After each message the app's contexts and the reply are on disk, in one file that is replaced atomically. So a
repeated message is not handled twice, whether the connection broke or the process died.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from fedsample.clients.message_handler import Trace
from fedsample.errors import ConfigError, DataError, RunDirectoryError
from fedsample.fleets.flower_grid import adapter, answer
from fedsample.fleets.flower_grid.adapter import Value
from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.device.connection import LIMIT
from fedsample.fleets.grpc.device.replica import Standing
from fedsample.fleets.grpc.flower_app.carrier import FLOWER, message_in, parcel_of
from fedsample.fleets.grpc.framing.frames import Assembler, Damaged, Message, pieces
from fedsample.monitor.atomic_files import write_atomic
from fedsample.protocol.wire import DENSE, Array, Parcel

FILE = "contexts.bin"
_CONTEXT = "context."


class FlowerNode:
    """A device in one run of a Flower app.

    Args:
        folder: this run's, of this device alone.
        run: the run's id, 16 bytes.
        index: the client's index.
        n: number of clients.
        app: the ClientApp.
        run_config: the server's run configuration.

    Raises:
        RunDirectoryError: if the content of the folder cannot be read.
    """

    def __init__(
        self, folder: Path, run: bytes, index: int, n: int, app: ClientApp, run_config: Mapping[str, Value]
    ) -> None:
        """Continue from what the last process left in the folder."""
        self.run, self.index, self.n = run, index, n
        self.trace = Trace(index, stage="Flower app")
        self.round = 0
        self._file, self._app, self._run_config = folder / FILE, app, run_config
        self._answer: Message | None = None
        self._contexts: dict[int, Context] = {}
        self._restore()

    @property
    def standing(self) -> Standing:
        """Report no snapshots and no schema: none are needed."""
        return Standing(0 if self._answer is None else self._answer.name.term, True, [], "")

    def answer(self, message: Message) -> Message | None:
        """Return the answer to a request; None: it is older than the last.

        Raises:
            DataError: if the request is not for this device, or no Flower message.
            RunDirectoryError: if contexts and reply cannot be written; then the message counts as not handled.
        """
        name = message.name
        if (name.run, name.client, message.kind) != (self.run, self.index, FLOWER):
            raise DataError(
                f"a request {message.kind!r} to client {name.client} of run {name.run.hex()}, expected {FLOWER!r} to "
                f"client {self.index} of run {self.run.hex()}"
            )
        if self._answer is not None:
            last = self._answer.name
            if name == last:
                return self._answer
            if (name.term, name.sequence) <= (last.term, last.sequence):
                return None
        self.trace = Trace(self.index, name.round, "Flower app")
        asked = adapter.unpacked(message_in(message.parcel))
        run_id = asked.metadata.run_id
        reply, context = answer(self._app, asked, self._context(run_id, asked.metadata.dst_node_id))
        self.trace.stage = "memory"
        contexts, answered = self._contexts | {run_id: context}, Message(name, FLOWER, parcel_of(adapter.packed(reply)))
        self._save(answered, contexts)
        self._contexts, self._answer, self.round = contexts, answered, name.round
        return answered

    def _context(self, run_id: int, node: int) -> Context:
        """Return this node's context in a run, empty at first."""
        found = self._contexts.get(run_id)
        if found is not None:
            return found
        config: dict[str, Value] = {adapter.PARTITION_ID_KEY: self.index, adapter.NUM_PARTITIONS_KEY: self.n}
        return Context(run_id, node, config, RecordDict(), dict(self._run_config))

    # --- the disk -----------------------------------------------------------------------------------------------------

    def _save(self, answered: Message, contexts: Mapping[int, Context]) -> None:
        """Store the answer and all contexts as one message in pieces, each with its checksum, behind their lengths."""
        arrays = dict(answered.parcel.arrays)
        for run_id, context in contexts.items():
            data = adapter.packed_context(context)
            arrays[f"{_CONTEXT}{run_id:x}"] = Array("uint8", (len(data),), DENSE, data)
        whole = Message(answered.name, FLOWER, Parcel(answered.parcel.header, arrays))
        parts = [piece.SerializeToString() for piece in pieces(whole)]
        write_atomic(self._file, b"".join(len(part).to_bytes(4, "little") + part for part in parts))

    def _restore(self) -> None:
        try:
            data = memoryview(self._file.read_bytes())
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunDirectoryError(f"{self._file} cannot be read ({error.strerror}): check the disk") from error
        try:
            kept = _whole(data)
            self._answer = Message(kept.name, FLOWER, parcel_of(message_in(kept.parcel)))
            for key, array in kept.parcel.arrays.items():
                if key.startswith(_CONTEXT):
                    self._contexts[int(key.removeprefix(_CONTEXT), 16)] = adapter.unpacked_context(bytes(array.data))
        except (Damaged, DataError, ValueError) as error:
            raise RunDirectoryError(
                f"{self._file} is damaged ({error}): restore it from a copy, or delete it, and this device goes on "
                "with an empty context"
            ) from error
        self.round = self._answer.name.round


def _whole(data: memoryview) -> Message:
    """Read the message in a file.

    Raises:
        Damaged: if a part is missing or wrong.
    """
    assembler, at, found = Assembler(LIMIT), 0, None
    while at < len(data) and found is None:
        size = int.from_bytes(data[at : at + 4], "little")
        try:
            piece = pb.Piece.FromString(bytes(data[at + 4 : at + 4 + size]))
        except Exception as error:  # protobuf's own exception, not one of Python's
            raise Damaged(f"no piece at byte {at}: {error}") from None
        if assembler.expected is None:
            assembler.begin(piece)
        found, at = assembler.add(piece), at + 4 + size
    if found is None or at != len(data):
        raise Damaged(f"{len(data)} bytes, expected one whole message")
    return found


def run_config_in(config: str) -> dict[str, Value] | None:
    """Read the run configuration of a Flower app from a server's invitation; None: it invites to something else.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        content = tomllib.loads(config)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the server's configuration is no valid TOML ({error}): install one fedsample") from error
    if not isinstance(content.get("flower"), dict):
        return None
    return adapter.flat(content.get("config", {}), "the server's run configuration")
