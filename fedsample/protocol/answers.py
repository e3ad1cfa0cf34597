"""Answers: what one client sends back, an upload for the estimator and exact outputs beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsample.compression import Packet
from fedsample.errors import DataError
from fedsample.estimators import Turn, Uplink, Upload
from fedsample.protocol.exchange import Request
from fedsample.protocol.names import UPLOAD, packet_stype
from fedsample.protocol.quantities import symmetric_arrays
from fedsample.protocol.wire import (
    Array,
    Form,
    Header,
    Parcel,
    check,
    dense,
    header,
    read,
    same_names,
    triangle,
)


@dataclass(frozen=True)
class Answer:
    """The answers of a stack of clients; leading axis n.

    Attributes:
        upload: the estimator's, if an estimate was asked for; else None.
        exact: exact outputs (n, ...) by name.
    """

    upload: Upload | None
    exact: dict[str, Tensor]


def pack_answer(answer: Answer, request: Request, client: int, uplink: Uplink) -> Parcel:
    """Pack the answer of one client.

    Args:
        answer: of a stack of one client.
        request: as `unpack_request` returned it.
        client: the client's index.
        uplink: the estimator.

    Raises:
        DataError: if the upload holds NaN or infinite values.
    """
    is_symmetric = symmetric_arrays(request)
    arrays = {
        name: (triangle if is_symmetric(name) else dense)(tensor[0]) for name, tensor in sorted(answer.exact.items())
    }
    if answer.upload is not None:
        active = None if request.active is None else request.active[client]
        data = uplink.to_bytes(_first(answer.upload), request.sync, active)
        dtype = request.points.dtype
        shape = (len(data) // dtype.itemsize,)
        arrays[UPLOAD] = Array(str(dtype).removeprefix("torch."), shape, packet_stype(uplink.compressor), data)
    return Parcel(header(round=request.round, client=client), arrays)


def unpack_answer(
    parcel: Parcel, client: int, turn: Turn | None, round: int, exact: dict[str, Form], uplink: Uplink
) -> tuple[Upload | None, dict[str, Tensor]]:
    """Unpack a client's upload, if one was asked for, and its exact outputs.

    Args:
        parcel: from `pack_answer`.
        client: index of the client that was asked.
        turn: what it was told, for the estimator; None: no estimate was asked for.
        round: the round of the request.
        exact: the forms of the exact outputs that were asked for.
        uplink: the estimator.

    Raises:
        DataError: if the answer belongs to another request, or anything in it has another form, or is not finite in a
            round of the chain. While a run is prepared, who asked says what that means: the data may not be scaled.
    """
    what = f"the answer of client {client} in round {round}"
    head, arrays = Header(parcel, what), parcel.arrays
    for name, value in (("round", round), ("client", client)):
        if head.integer(name) != value:
            raise DataError(f"{what} says {name} {head.integer(name)}: it belongs to another request")
    same_names(arrays, [*exact, *([] if turn is None else [UPLOAD])], what)
    outputs = {name: read(arrays[name], form, f"{what}: {name}") for name, form in exact.items()}
    for name, each in outputs.items():
        if round > 0 and not bool(torch.isfinite(each).all()):
            raise DataError(
                f"{what}: {name} holds NaN or infinite values: the chain has gone where they overflow, or "
                "that client's rows hold such values; lower step_size, or look at its data"
            )
    if turn is None:
        return None, outputs
    array, dtype = arrays[UPLOAD], turn.point.dtype
    check(
        array, Form(packet_stype(uplink.compressor), (len(array.data) // dtype.itemsize,), dtype), f"{what}: {UPLOAD}"
    )
    return uplink.from_bytes(array.data, turn, turn.point.shape[-1], dtype), outputs


def _first(upload: Upload) -> Upload:
    """Return the upload of the client in a stack of one."""
    packet = upload.packet
    if packet is not None:
        indices, side = (None if part is None else part[0] for part in (packet.indices, packet.side))
        packet = Packet(packet.values[0], indices, side, packet.length)
    return Upload(packet, None if upload.dense is None else upload.dense[0])
