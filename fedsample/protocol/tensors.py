"""Tensors that are neither estimates nor exact outputs: draws to be scored, vectors to be summed."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsample.errors import DataError
from fedsample.protocol.wire import DENSE, Form, Parcel, read, same_names


def unpack_points(parcel: Parcel, name: str, like: Tensor) -> Tensor:
    """Unpack points (S, d), any number S, with the dtype and device of `like` (d,).

    Raises:
        DataError: if they have another form.
    """
    same_names(parcel.arrays, [name], name)
    rows = next(iter(parcel.arrays[name].shape), 0)
    return read(parcel.arrays[name], Form(DENSE, (rows, len(like)), like.dtype), name).to(like.device)


def unpack_vector(parcel: Parcel, name: str, what: str) -> Tensor:
    """Unpack a float64 vector of any length.

    Raises:
        DataError: if it is missing or has another form.
    """
    if name not in parcel.arrays:
        raise DataError(f"{what}: {name!r} is missing among {sorted(parcel.arrays)}")
    array = parcel.arrays[name]
    return read(array, Form(DENSE, tuple(array.shape)[:1], torch.float64), f"{what}: {name}")
