"""Parcels as Flower's records, and back: a header record, and an array record with `stype`s of our own."""

from __future__ import annotations

from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedsample.errors import DataError
from fedsample.protocol.wire import Array, Parcel

HEADER, ARRAYS = "fedsample.header", "fedsample.arrays"  # the two records of a message


def records_of(parcel: Parcel, prefix: str = "") -> RecordDict:
    """Convert a parcel to the content of a Flower message; record names begin with `prefix`."""
    records = RecordDict({f"{prefix}{HEADER}": ConfigRecord({**parcel.header})})
    if parcel.arrays:
        arrays = {name: FlowerArray(*array) for name, array in parcel.arrays.items()}
        records[f"{prefix}{ARRAYS}"] = ArrayRecord(arrays)
    return records


def parcel_of(records: RecordDict, what: str, prefix: str = "") -> Parcel:
    """Convert records that `records_of` made back to a parcel.

    Raises:
        DataError: if there is none; `what` names the message in the error.
    """
    head, arrays = records.get(f"{prefix}{HEADER}"), records.get(f"{prefix}{ARRAYS}", ArrayRecord())
    if not isinstance(head, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        name = ARRAYS if isinstance(head, ConfigRecord) else HEADER
        raise DataError(f"{what} has no record {name!r} of the right kind: it was not made by fedsample")
    found = {name: Array(each.dtype, tuple(each.shape), each.stype, each.data) for name, each in arrays.items()}
    return Parcel(dict(head.items()), found)  # type: ignore[arg-type]
