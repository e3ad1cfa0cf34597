"""Requests: built once by the server for many clients, and read by each client from its message.

Points are sent in full, or as the increments that the client has missed; what it remembers is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fedsample.errors import DataError
from fedsample.estimators import Downlink, Ef21P
from fedsample.protocol.exchange import ESTIMATE, Request
from fedsample.protocol.names import packet_stype
from fedsample.protocol.quantities import unsound_outputs
from fedsample.protocol.wire import (
    BITS,
    DENSE,
    Array,
    Field,
    Form,
    Header,
    Parcel,
    bits,
    check,
    dense,
    header,
    read,
    same_names,
)


class Outgoing:
    """A request to many clients; arrays are made once and shared by all messages.

    Args:
        request: the request.
        metric: tag of the metric of the coordinates, see `metric_tag`; empty: the model's own parameters.
        coins: whether this round tosses coins, so that clients are told the outcome.

    Raises:
        ValueError: if nobody can answer it.
    """

    def __init__(self, request: Request, metric: str, *, coins: bool) -> None:
        if fault := unsound_outputs(request.outputs):
            raise ValueError(f"a request {fault}")
        self._request, self._metric = request, metric
        self._arrays: dict[str, Array] = {}
        self._parcels: dict[tuple[object, ...], Parcel] = {}
        if request.vector is not None:
            self._arrays["vector"] = dense(request.vector)
        if coins:
            none = torch.zeros(len(request.points), dtype=torch.bool)
            self._arrays["sync"] = bits(none if request.sync is None else request.sync)

    def parcel(
        self, client: int, *, estimate: bool = True, missed: Missed | None = None, previous: bool = True,
        reference: bool = True,
    ) -> Parcel:  # fmt: skip
        """Make the message for one client.

        Args:
            client: the client's index.
            estimate: whether an estimate is asked for too, or exact outputs only.
            missed: increments from the points that it holds to those of the request; None: the points are sent in full.
            previous: whether to send the points of the round before, if the request has any; False: it remembers them.
            reference: the same for the reference of variance reduction.
        """
        request = self._request
        applied = 0 if request.applied is None else int(request.applied[client])
        active = tuple(request.active[client].tolist()) if estimate and request.active is not None else None
        same = estimate, None if missed is None else missed.since, previous, reference, applied, active
        if same not in self._parcels:  # most clients get the same message: it is made, named and checked once
            arrays = self._chosen(estimate, missed, previous, reference)
            self._parcels[same] = Parcel(self._header(estimate, missed, applied, active), arrays)
        return self._parcels[same]

    def _chosen(self, estimate: bool, missed: Missed | None, previous: bool, reference: bool) -> dict[str, Array]:
        request = self._request
        names = ["points"] if missed is None else []
        names += ["vector"] if request.vector is not None else []
        if estimate:
            names += ["sync"] if "sync" in self._arrays else []
            names += ["previous"] if previous and request.previous is not None else []
            moved = request.reference is not None and 0 < request.reference_round < request.round
            names += ["reference"] if reference and moved else []
        arrays = {name: self._array(name) for name in names}
        return arrays if missed is None else {**arrays, "increments": missed.array}

    def _header(
        self, estimate: bool, missed: Missed | None, applied: int, active: tuple[bool, ...] | None
    ) -> dict[str, Field]:
        request = self._request
        return header(
            round=request.round,
            metric=self._metric,
            outputs=sorted(request.outputs if estimate else request.outputs - {ESTIMATE}),
            epoch=request.epoch,
            applied=applied,
            active=None if active is None else list(active),
            track=ESTIMATE in request.outputs,
            since=None if missed is None else missed.since,
            reference=request.reference_round if estimate and request.reference is not None else None,
        )

    def _array(self, name: str) -> Array:
        if name not in self._arrays:
            self._arrays[name] = dense(getattr(self._request, name))
        return self._arrays[name]


class Missed(NamedTuple):
    """Increments of the points, for a client that has missed some rounds.

    Attributes:
        since: the round whose points the client holds.
        array: the packets of the rounds after it, concatenated.
    """

    since: int
    array: Array

    @classmethod
    def of(cls, since: int, packets: Sequence[bytes], downlink: Ef21P, dtype: torch.dtype) -> Missed:
        """Make it from the packets of the rounds since + 1, since + 2, ..., see `Ef21P.pack`."""
        data = b"".join(packets)
        name = str(dtype).removeprefix("torch.")
        return cls(since, Array(name, (len(data) // dtype.itemsize,), packet_stype(downlink.compressor), data))


@dataclass
class Recall:
    """What a client remembers of the points that it was sent.

    Attributes:
        round: the last round that it took part in; 0: none.
        points: (C, d) the points of that round; None: none.
        reference_round: the round since which `reference` is used.
        reference: (C, d) the point of variance reduction; None: none.
    """

    round: int = 0
    points: Tensor | None = None
    reference_round: int = 0
    reference: Tensor | None = None


def unpack_request(
    parcel: Parcel, clients: int, chains: int, like: Tensor, recall: Recall, downlink: Downlink
) -> Request:
    """Unpack the request to one client; `active` and `applied` hold its own row at every index.

    Args:
        parcel: from `Outgoing.parcel`.
        clients: n, the number of clients.
        chains: C, the number of chains.
        like: (d,) gives dtype and device of the points.
        recall: what the client remembers; not changed.
        downlink: how increments of the points are decoded.

    Raises:
        DataError: if the message does not fit, or refers to points that the client does not remember.
    """
    what = "a request"
    head, arrays = Header(parcel, what), parcel.arrays
    outputs, round = frozenset(head.texts("outputs")), head.integer("round")
    if fault := unsound_outputs(outputs):
        raise DataError(f"{what} {fault}")
    where = "increments" if "increments" in arrays else "points"
    same_names(arrays, {where, *({"vector", "previous", "sync", "reference"} & set(arrays))}, what)
    rows = chains if ESTIMATE in outputs or where == "increments" else next(iter(arrays["points"].shape), 0)
    form, mask = Form(DENSE, (rows, len(like)), like.dtype), Form(BITS, (chains,), torch.bool)
    found = {
        name: read(array, mask if name == "sync" else form, f"{what}: {name}").to(like.device)
        for name, array in arrays.items()
        if name != "increments"
    }
    points = _advanced(parcel, head, recall, downlink, chains, like) if where == "increments" else found["points"]
    sync, active = found.get("sync"), head.flags("active", chains)
    since = head.value("reference")
    reference = None if since is None else _reference(found, head.integer("reference"), round, points, recall)
    return Request(
        round=round,
        points=points,
        outputs=outputs,
        previous=found.get("previous"),
        sync=sync if sync is not None and bool(sync.any()) else None,
        active=None if active is None else active.to(like.device).expand(clients, chains),
        applied=torch.tensor([head.integer("applied")], device=like.device).expand(clients),
        epoch=head.integer("epoch"),
        vector=found.get("vector"),
        reference=reference,
        reference_round=0 if since is None else head.integer("reference"),
    )


def with_previous(request: Request, recall: Recall) -> Request:
    """Fill in the points of the round before, which the client remembers.

    Raises:
        DataError: if it does not remember them.
    """
    if recall.points is None or recall.round != request.round - 1:
        last = None if recall.points is None else recall.round
        raise DataError(
            f"round {request.round} comes without the points of round {request.round - 1}, and those that this client "
            f"remembers are of round {last!r}: its state was lost; start the run anew, or resume it"
        )
    return replace(request, previous=recall.points)


def _advanced(parcel: Parcel, head: Header, recall: Recall, downlink: Downlink, chains: int, like: Tensor) -> Tensor:
    """Decode the points (C, d) of a request that came as increments."""
    since, round = head.integer("since"), head.integer("round")  # a client may know more: its answer got lost
    if recall.points is None or not since <= recall.round < round or not isinstance(downlink, Ef21P):
        held = "none" if recall.points is None else f"those of round {recall.round}"
        raise DataError(
            f"round {round} comes as increments to the points of round {since}, and this client holds {held}: its "
            "state was lost; start the run anew, or resume it"
        )
    array = parcel.arrays["increments"]
    form = Form(packet_stype(downlink.compressor), (len(array.data) // like.dtype.itemsize,), like.dtype)
    check(array, form, "a request: increments")
    size = chains * downlink.compressor.bits(len(like), like.dtype) // 8
    if round <= since or len(array.data) != size * (round - since):
        raise DataError(
            f"a request with {len(array.data)} bytes of increments for rounds {since + 1} to {round}, expected "
            f"{max(0, size * (round - since))}"
        )
    points = recall.points
    for step in range(recall.round - since, round - since):
        points = downlink.advance(points, array.data[step * size : (step + 1) * size], since + step + 1)
    return points


def _reference(found: dict[str, Tensor], since: int, round: int, points: Tensor, recall: Recall) -> Tensor:
    """The point (C, d) of variance reduction: the origin, the round's points, sent along, or remembered."""
    if since == 0:
        return torch.zeros_like(points)
    if since == round:
        return points
    if "reference" in found:
        return found["reference"]
    if recall.reference is None or recall.reference_round != since:
        held = "none" if recall.reference is None else f"that of round {recall.reference_round}"
        raise DataError(
            f"round {round} reduces variance about the points of round {since}, and this client holds {held}: its "
            "state was lost; start the run anew, or resume it"
        )
    return recall.reference
