"""Metrics as messages: m and S for the clients, and the tag by which both sides name them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

from fedsample.errors import DataError
from fedsample.protocol.wire import DENSE, TRIANGLE, Form, Header, Parcel, dense, header, read, same_names, triangle
from fedsample.targets import Metric
from fedsample.targets.metric import Dense, Diagonal, Identity, Kronecker, restore


def pack_metric(metric: Metric) -> Parcel:
    """Pack the mean m, and the part of S that clients need."""
    tensors = {"mean": metric.mean, **metric.wire()}
    arrays = {name: (triangle if name == "root" else dense)(tensor) for name, tensor in tensors.items()}
    return Parcel(header(metric=metric.name), arrays)


def unpack_metric(parcel: Parcel, like: Tensor, blocks: Sequence[Tensor]) -> Metric:
    """Unpack a metric; what only the server needs is left out.

    Args:
        parcel: the message's content.
        like: (d,) gives dtype and device.
        blocks: flat positions of the parameter matrices.

    Raises:
        DataError: if it is of an unknown kind, or an array has another form.
    """
    what = "a metric"
    name, arrays = Header(parcel, what).text("metric"), parcel.arrays
    d, dtype = len(like), like.dtype
    forms = {"mean": Form(DENSE, (d,), dtype)}
    if name == Diagonal.name:
        forms["scales"] = Form(DENSE, (d,), dtype)
    elif name == Dense.name:
        forms["root"] = Form(TRIANGLE, (d, d), dtype)
    elif name == Kronecker.name:
        for b, positions in enumerate(blocks):
            o, i = positions.shape
            shapes = {f"outer{b}": (o, o), f"inner{b}": (i, i), f"scales{b}": (o, i)}
            forms |= {key: Form(DENSE, shape, dtype) for key, shape in shapes.items()}
    elif name != Identity.name:
        raise DataError(f"{what} of kind {name!r} is not known here: install one version of fedsample everywhere")
    same_names(arrays, forms, what)
    tensors = {key: read(arrays[key], form, f"{what}: {key}").to(like.device) for key, form in forms.items()}
    if name == Kronecker.name:
        tensors |= {f"positions{b}": each for b, each in enumerate(blocks)}
    return restore(name, tensors.pop("mean"), tensors)


def metric_tag(parcel: Parcel) -> str:
    """Name a metric by its contents, so that server and client can tell whether theirs is the same."""
    state = hashlib.blake2b(Header(parcel, "a metric").text("metric").encode(), digest_size=16)
    for name, array in sorted(parcel.arrays.items()):
        state.update(f"{name} {array.dtype} {list(array.shape)} ".encode() + array.data)
    return state.hexdigest()
