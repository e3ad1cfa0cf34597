"""Requests, answers and metrics as Flower records, byte for byte.

What is counted as traffic travels as arrays: raw little-endian values behind an `stype` of our own, so that the bits a
fleet counts are the bytes that Flower carries. Round, epoch, acknowledgement and which chains ask are the header, a
`ConfigRecord`, which is not counted. Nothing is pickled, and whatever arrives is checked against what must arrive.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedsample.clients.exact import is_symmetric
from fedsample.clients.worker import Answer
from fedsample.errors import DataError
from fedsample.estimators import Turn, Uplink, Upload
from fedsample.exchange import ESTIMATE, EXACT, Request
from fedsample.targets import Metric
from fedsample.targets.metric import Dense, Diagonal, Identity, Kronecker

TRAIN, EVALUATE, EXACT_QUERY = "train", "evaluate", "query.exact"  # the same answer, for whoever asks
HELLO, METRIC, SAVE, RESTORE = "query.hello", "query.metric", "query.save", "query.restore"

DENSE, TRIANGLE, BITS = "fedsample.dense.v1", "fedsample.triangle.v1", "fedsample.bits.v1"
HEADER, ARRAYS, UPLOAD = "fedsample.header", "fedsample.arrays", "upload"
_VERSION = 1
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_NUMPY = {torch.float32: np.dtype("<f4"), torch.float64: np.dtype("<f8"), torch.int64: np.dtype("<i8")}


# --- arrays ------------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """What an array must be on arrival: its serialisation, shape and dtype."""

    stype: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def dense(tensor: Tensor) -> Array:
    """Every value of a float32, float64 or int64 tensor."""
    return Array(_NAMES[tensor.dtype], tuple(tensor.shape), DENSE, _bytes(tensor))


def triangle(matrix: Tensor) -> Array:
    """The upper triangle, row by row, of an exactly symmetric (d, d) matrix."""
    rows, columns = torch.triu_indices(*matrix.shape).unbind()
    return Array(_NAMES[matrix.dtype], tuple(matrix.shape), TRIANGLE, _bytes(matrix.cpu()[rows, columns]))


def bits(mask: Tensor) -> Array:
    """A mask (C,) at one bit an entry; the last byte is filled with zeros, which are not counted."""
    return Array("bool", tuple(mask.shape), BITS, np.packbits(mask.cpu().numpy()).tobytes())


def read(array: Array, form: Form, what: str) -> Tensor:
    """The tensor of an array that has arrived, on the CPU.

    Raises:
        DataError: if its serialisation, shape, dtype or length is not that of the form.
    """
    name = "bool" if form.stype == BITS else _NAMES[form.dtype]
    got, want = (array.stype, tuple(array.shape), array.dtype), (form.stype, form.shape, name)
    if got != want:
        raise DataError(f"{what} arrived as {_described(*got)}, expected {_described(*want)}: both ends must run one version")
    count = math.prod(form.shape)
    size = -(-count // 8)
    if form.stype != BITS:
        if form.stype == TRIANGLE:
            count = form.shape[0] * (form.shape[0] + 1) // 2
        size = count * _NUMPY[form.dtype].itemsize
    if len(array.data) != size:
        raise DataError(f"{what} holds {len(array.data)} bytes, expected {size} for {_described(*want)}")
    if form.stype == BITS:
        octets = np.frombuffer(array.data, dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(octets, count=count).astype(bool)).view(form.shape)
    form_le = _NUMPY[form.dtype]
    values = torch.from_numpy(np.frombuffer(array.data, dtype=form_le).astype(form_le.newbyteorder("="), copy=True))
    if form.stype == DENSE:
        return values.view(form.shape)
    matrix = values.new_empty(form.shape)
    rows, columns = torch.triu_indices(*form.shape).unbind()
    matrix[rows, columns] = values
    matrix[columns, rows] = values
    return matrix


def wire_bits(records: RecordDict) -> int:
    """Bits of a message that count as traffic: its arrays."""
    arrays = [array for record in records.array_records.values() for array in record.values()]
    return sum(math.prod(array.shape) if array.stype == BITS else 8 * len(array.data) for array in arrays)


def pack_tensors(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Named tensors, each dense."""
    return ArrayRecord({name: dense(tensor) for name, tensor in tensors.items()})


def unpack_tensors(record: ArrayRecord, like: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """What `pack_tensors` made, with the names, shapes and dtypes of `like`.

    Raises:
        DataError: if anything differs.
    """
    _same_names(record, like, what)
    return {
        name: read(record[name], Form(DENSE, tuple(tensor.shape), tensor.dtype), f"{what} {name}").to(tensor.device)
        for name, tensor in like.items()
    }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().astype(_NUMPY[tensor.dtype], copy=False).tobytes()


def _described(stype: str, shape: tuple[int, ...], dtype: str) -> str:
    return f"{stype} {dtype} {list(shape)}"


# --- headers -----------------------------------------------------------------------------------------------------------


def header(**values: Any) -> ConfigRecord:
    """A header of our version; None is left out."""
    return ConfigRecord({"version": _VERSION, **{name: value for name, value in values.items() if value is not None}})


class Header:
    """A header that has arrived, read key by key.

    Args:
        records: the message's content. what: for error messages.

    Raises:
        DataError: if there is none, or it is of another version.
    """

    def __init__(self, records: RecordDict, what: str) -> None:
        self._what = what
        record = records.get(HEADER)
        if not isinstance(record, ConfigRecord):
            raise DataError(f"{what} has no record {HEADER!r}: it was not made by fedsample")
        self._record = record
        if self.integer("version") != _VERSION:
            raise DataError(f"{what} is of format {record['version']}, expected {_VERSION}: install one version on all sides")

    def integer(self, name: str) -> int:
        """An integer."""
        value = self._record.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(name, value, "an integer")
        return value

    def text(self, name: str) -> str:
        """A string."""
        value = self._record.get(name)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings."""
        value = self._record.get(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, value, "a list of strings")
        return [str(item) for item in value]

    def flags(self, name: str, count: int) -> Tensor | None:
        """(count,) bool; None if left out."""
        value = self._record.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or not all(isinstance(item, bool) for item in value):
            raise self._wrong(name, value, f"{count} truth values")
        return torch.tensor(value)

    def _wrong(self, name: str, value: object, expected: str) -> DataError:
        return DataError(f"{self._what}: {name} is {value!r}, expected {expected}")


def _arrays(records: RecordDict, what: str) -> ArrayRecord:
    record = records.get(ARRAYS)
    if not isinstance(record, ArrayRecord):
        raise DataError(f"{what} has no record {ARRAYS!r}: it was not made by fedsample")
    return record


def _same_names(record: ArrayRecord, expected: Iterable[str], what: str) -> None:
    if set(record) != set(expected):
        raise DataError(f"{what} holds the arrays {sorted(record)}, expected {sorted(expected)}")


# --- requests ----------------------------------------------------------------------------------------------------------


class Outgoing:
    """A request on its way to many clients; its arrays are made once and shared by all messages.

    Args:
        request: what is asked. coins: whether this round tosses coins, so that clients are told how they fell.
        previous: whether clients must be told the points of the round before.
    """

    def __init__(self, request: Request, *, coins: bool, previous: bool) -> None:
        self._request = request
        arrays = {"points": dense(request.points)}
        if request.vector is not None:
            arrays["vector"] = dense(request.vector)
        self._exact_only = ArrayRecord(arrays)
        if previous and request.previous is not None:
            arrays["previous"] = dense(request.previous)
        if coins:
            none = torch.zeros(len(request.points), dtype=torch.bool)
            arrays["sync"] = bits(none if request.sync is None else request.sync)
        self._whole = ArrayRecord(arrays)

    def records(self, client: int, *, estimate: bool) -> RecordDict:
        """The message for one client, which is asked for its estimate or for exact outputs only."""
        request = self._request
        outputs = sorted(request.outputs if estimate else request.outputs - {ESTIMATE})
        values = header(
            round=request.round,
            outputs=outputs,
            epoch=request.epoch,
            applied=0 if request.applied is None else int(request.applied[client]),
            active=None if request.active is None or not estimate else request.active[client].tolist(),
        )
        return RecordDict({HEADER: values, ARRAYS: self._whole if estimate else self._exact_only})


def unpack_request(records: RecordDict, clients: int, chains: int, like: Tensor) -> Request:
    """What one client is asked; `active` and `applied` hold its own row at every index.

    Args:
        records: from `Outgoing.records`. clients: n. chains: C. like: (d,), of whose dtype and device points are.

    Raises:
        DataError: if the message does not fit.
    """
    what = "a request"
    head, arrays = Header(records, what), _arrays(records, what)
    outputs = frozenset(head.texts("outputs"))
    if not outputs or not outputs <= {ESTIMATE, *EXACT}:
        raise DataError(f"{what} asks for {sorted(outputs)}, expected some of {[ESTIMATE, *EXACT]}")
    optional = {"vector", "previous", "sync"} & set(arrays)
    _same_names(arrays, {"points", *optional}, what)
    points = Form(DENSE, (chains, len(like)), like.dtype)
    found = {
        name: read(array, Form(BITS, (chains,), torch.bool) if name == "sync" else points, f"{what}: {name}").to(like.device)
        for name, array in arrays.items()
        if name != "sync" and outputs & {ESTIMATE}
    } if ESTIMATE in outputs else {}
    return Request(
        round=head.integer("round"),
        points=found["points"],
        outputs=outputs,
    )
