"""Messages as data: a header of plain values and named arrays of raw little-endian bytes, nothing pickled.

A `Parcel` is the content of a message on any transport, Flower's records or a gRPC stream. Arrays that arrive are
compared with the form that they must have, and refused with a `DataError` if theirs is another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsample.errors import DataError

DENSE, TRIANGLE, BITS = "fedsample.dense.v1", "fedsample.triangle.v1", "fedsample.bits.v1"
VERSION = 1

Value = bool | int | float | str | bytes
Field = Value | list[bool] | list[int] | list[float] | list[str]

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
_NAMES = {each: str(each).removeprefix("torch.") for each in (torch.float32, torch.float64, torch.bool, *_INTEGERS)}
_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype("<f4"),
    torch.float64: np.dtype("<f8"),
    **{each: np.dtype(f"<i{each.itemsize}") for each in _INTEGERS},
}


class Array(NamedTuple):
    """A serialised tensor.

    Attributes:
        dtype: such as "float32".
        shape: of the tensor.
        stype: how `data` encodes the tensor.
        data: raw bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    stype: str
    data: bytes


@dataclass(frozen=True)
class Parcel:
    """The content of a message.

    Attributes:
        header: plain values by name; made by `header`, read by `Header`.
        arrays: by name.
    """

    header: Mapping[str, Field]
    arrays: Mapping[str, Array] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        """Bits of the arrays, which count as traffic."""
        return sum(math.prod(each.shape) if each.stype == BITS else 8 * len(each.data) for each in self.arrays.values())


class Form(NamedTuple):
    """The form that an array must have on arrival: serialisation, shape and dtype."""

    stype: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bits(self) -> int:
        """Bits that count as traffic."""
        return self.entries if self.stype == BITS else 8 * self.entries * _NUMPY[self.dtype].itemsize

    @property
    def entries(self) -> int:
        """Number of values that are sent."""
        if self.stype != TRIANGLE:
            return math.prod(self.shape)
        *many, side, _ = self.shape
        return math.prod(many) * (side * (side + 1) // 2)

    def __str__(self) -> str:
        """Describe the form, for error messages."""
        return f"{self.stype} {_NAMES[self.dtype]} {list(self.shape)}"


def dense(tensor: Tensor) -> Array:
    """Serialise every value of a tensor of floats or signed integers."""
    return Array(_NAMES[tensor.dtype], tuple(tensor.shape), DENSE, _bytes(tensor))


def triangle(matrix: Tensor) -> Array:
    """Serialise the upper triangles, row by row, of exactly symmetric (..., d, d) matrices."""
    rows, columns = torch.triu_indices(*matrix.shape[-2:], device=matrix.device).unbind()
    return Array(_NAMES[matrix.dtype], tuple(matrix.shape), TRIANGLE, _bytes(matrix[..., rows, columns]))


def bits(mask: Tensor) -> Array:
    """Serialise a mask (C,) at one bit per entry; the last byte is padded with zeros, which are not counted."""
    return Array(_NAMES[mask.dtype], tuple(mask.shape), BITS, np.packbits(mask.cpu().numpy()).tobytes())


def read(array: Array, form: Form, what: str) -> Tensor:
    """Read an array that has arrived, on the CPU; the tensor owns its memory or uses the buffer of the message.

    Raises:
        DataError: if its serialisation, shape, dtype or length is not that of the form.
    """
    check(array, form, what)
    size = -(-form.bits // 8)
    if len(array.data) != size:
        raise DataError(f"{what} holds {len(array.data)} bytes, expected {size} for {form}")
    if form.stype == BITS:
        octets = np.frombuffer(array.data, dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(octets, count=form.entries).astype(bool)).view(form.shape)
    values = np.frombuffer(array.data, dtype=_NUMPY[form.dtype])
    if not (values.flags.writeable and values.flags.aligned and values.dtype.isnative):  # bytes may be shared
        values = values.astype(values.dtype.newbyteorder("="))
    found = torch.from_numpy(values)
    if form.stype != TRIANGLE:
        return found.view(form.shape)
    matrix = found.new_empty(form.shape)
    rows, columns = torch.triu_indices(*form.shape[-2:]).unbind()
    triangles = found.view(*form.shape[:-2], len(rows))
    matrix[..., rows, columns] = triangles
    matrix[..., columns, rows] = triangles
    return matrix


def check(array: Array, form: Form, what: str) -> None:
    """Refuse an array whose declared form is not the expected one.

    Raises:
        DataError: with the declared and the expected form.
    """
    if (array.stype, tuple(array.shape), array.dtype) != (form.stype, form.shape, _NAMES[form.dtype]):
        raise DataError(
            f"{what} arrived as {array.stype} {array.dtype} {list(array.shape)}, expected {form}: server and "
            "clients must run one configuration and one version of fedsample"
        )


def pack_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Serialise named tensors, each in full."""
    return {name: dense(tensor) for name, tensor in tensors.items()}


def unpack_tensors(record: Mapping[str, Array], like: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Read what `pack_tensors` made, with the names, shapes, dtypes and devices of `like`.

    Raises:
        DataError: if anything differs.
    """
    same_names(record, like, what)
    return {
        name: read(record[name], Form(DENSE, tuple(tensor.shape), tensor.dtype), f"{what}: {name}").to(tensor.device)
        for name, tensor in like.items()
    }


def same_names(record: Mapping[str, Array], expected: Iterable[str], what: str) -> None:
    """Refuse arrays with other names than expected.

    Raises:
        DataError: with the names that were found and those that were expected.
    """
    if set(record) != set(expected):
        raise DataError(f"{what} holds the arrays {sorted(record)}, expected {sorted(expected)}")


def header(**fields: Any) -> dict[str, Field]:
    """Make a header of this protocol version; fields that are None are left out."""
    return {"version": VERSION, **{name: value for name, value in fields.items() if value is not None}}


class Header:
    """Reads the header of a message that has arrived, field by field.

    Args:
        parcel: the message's content.
        what: names the message in error messages.

    Raises:
        DataError: if it is of another version, or a field has the wrong type.
    """

    def __init__(self, parcel: Parcel, what: str) -> None:
        self._what, self._record = what, parcel.header
        version = self.integer("version")
        if version != VERSION:
            raise DataError(f"{what} is of format {version}, expected {VERSION}: install one fedsample everywhere")

    def value(self, name: str) -> object:
        """Return the field's value; None: left out."""
        return self._record.get(name)

    def integer(self, name: str) -> int:
        """Read an integer."""
        value = self._record.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(name, value, "an integer")
        return value

    def text(self, name: str) -> str:
        """Read a string."""
        value = self._record.get(name)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def texts(self, name: str) -> list[str]:
        """Read a list of strings."""
        value = self._record.get(name)
        if not isinstance(value, list):
            raise self._wrong(name, value, "a list of strings")
        items = [item for item in value if isinstance(item, str)]
        if len(items) != len(value):
            raise self._wrong(name, value, "a list of strings")
        return items

    def flags(self, name: str, count: int) -> Tensor | None:
        """Read a mask (count,) bool; None: left out."""
        value = self._record.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or not all(isinstance(item, bool) for item in value):
            raise self._wrong(name, value, f"{count} truth values")
        return torch.tensor(value)

    def _wrong(self, name: str, value: object, expected: str) -> DataError:
        return DataError(f"{self._what}: field {name!r} is {value!r}, expected {expected}")


def _bytes(tensor: Tensor) -> bytes:
    data: bytes = tensor.detach().cpu().contiguous().numpy().astype(_NUMPY[tensor.dtype], copy=False).tobytes()
    return data
