"""What a server and its clients say to each other, as the content of messages, whatever carries them.

    train, evaluate, query.exact   a Request -> an Answer
    query.hello                    -> which partition this is, and what it computes
    query.metric                   m and S -> nothing; the client forgets what it remembered in other coordinates
    query.save, query.restore      a simulation's checkpoint: the client's memory there and back

The bits that a fleet counts are the bytes of a message's arrays: an upload is what `Uplink.to_bytes` writes, under
`fedsample.<compressor>.v1`. Round, epoch, acknowledgement and which chains ask are the header, which is not counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

import fedsample
from fedsample.clients.exact import is_symmetric
from fedsample.clients.worker import Answer
from fedsample.compression import Compressor, Packet
from fedsample.errors import DataError
from fedsample.estimators import Downlink, Ef21P, Turn, Uplink, Upload
from fedsample.exchange import ESTIMATE, EXACT, Request
from fedsample.targets import Metric
from fedsample.targets.metric import Dense, Diagonal, Identity, Kronecker, restore
from fedsample.wire import (
    BITS,
    DENSE,
    TRIANGLE,
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
    triangle,
)

TRAIN, EVALUATE, EXACT_QUERY = "train", "evaluate", "query.exact"
HELLO, METRIC, SAVE, RESTORE = "query.hello", "query.metric", "query.save", "query.restore"

UPLOAD = "upload"


# --- requests --------------------------------------------------------------------------------------------------------


class Outgoing:
    """A request on its way to many clients; arrays are made once and shared by all messages.

    Args:
        request: what is asked. metric: tag of the metric in whose coordinates, see `metric_tag`; empty: in the model's
            own parameters. coins: whether this round tosses coins, so that clients are told how they fell.
    """

    def __init__(self, request: Request, metric: str, *, coins: bool) -> None:
        """Make the arrays."""
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
        """The message for one client.

        Args:
            client: which. estimate: whether it is asked for everything, or for the exact outputs only. missed: the
                increments from the points that it holds to those of the request; None: the points are sent. previous:
                whether it is told the points of the round before, where there are any, or remembers them. reference:
                the same for the reference of variance reduction.
        """
        request = self._request
        applied = 0 if request.applied is None else int(request.applied[client])
        active = tuple(request.active[client].tolist()) if estimate and request.active is not None else None
        same = estimate, None if missed is None else missed.since, previous, reference, applied, active
        if same not in self._parcels:  # most clients are told the same: it is made, named and checked once
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
    """Increments of the clients' points, for who has missed some rounds.

    Attributes:
        since: the round whose points the client holds. array: the packets of the rounds after it, one after the other.
    """

    since: int
    array: Array

    @classmethod
    def of(cls, since: int, packets: Sequence[bytes], downlink: Ef21P, dtype: torch.dtype) -> Missed:
        """From the packets of the rounds since + 1, since + 2, ..., see `Ef21P.pack`."""
        data = b"".join(packets)
        name = str(dtype).removeprefix("torch.")
        return cls(since, Array(name, (len(data) // dtype.itemsize,), packet_stype(downlink.compressor), data))


@dataclass
class Recall:
    """What a client remembers of the points that it was told.

    Attributes:
        round, points: the last round that it took part in, and (C, d) its points; 0, None: none.
        reference_round, reference: since when, and (C, d) where, it reduces the variance of its minibatches.
    """

    round: int = 0
    points: Tensor | None = None
    reference_round: int = 0
    reference: Tensor | None = None


def unpack_request(
    parcel: Parcel, clients: int, chains: int, like: Tensor, recall: Recall, downlink: Downlink
) -> Request:
    """What one client is asked; `active` and `applied` hold its own row at every index.

    Args:
        parcel: from `Outgoing.parcel`. clients: n. chains: C. like: (d,), whose dtype and device the points have.
        recall: what the client remembers; it is not changed. downlink: how points come back.

    Raises:
        DataError: if the message does not fit, or speaks of points that the client does not remember.
    """
    what = "a request"
    head, arrays = Header(parcel, what), parcel.arrays
    outputs, round = frozenset(head.texts("outputs")), head.integer("round")
    if not outputs or not outputs <= {ESTIMATE, *EXACT}:
        raise DataError(f"{what} asks for {sorted(outputs)}, expected some of {[ESTIMATE, *EXACT]}")
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
    """The request with the points of the round before, which the client remembers.

    Raises:
        DataError: if it does not.
    """
    if recall.points is None or recall.round != request.round - 1:
        last = None if recall.points is None else recall.round
        raise DataError(
            f"round {request.round} comes without the points of round {request.round - 1}, and those that this client "
            f"remembers are of round {last!r}: its state was lost; start the run anew, or resume it"
        )
    return replace(request, previous=recall.points)


def _advanced(parcel: Parcel, head: Header, recall: Recall, downlink: Downlink, chains: int, like: Tensor) -> Tensor:
    """The points (C, d) of a request that came as increments."""
    since, round = head.integer("since"), head.integer("round")  # an answer may have got lost: then it knows more
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
    """(C, d) where variance is reduced: the origin, the round's points, what came along, or what is remembered."""
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


# --- answers ---------------------------------------------------------------------------------------------------------


def pack_answer(answer: Answer, request: Request, client: int, uplink: Uplink) -> Parcel:
    """What one client sends.

    Args:
        answer: of a worker with one client. request: as `unpack_request` gave it. client: its index.

    Raises:
        DataError: if the upload holds NaN or infinite values.
    """
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
    """A client's upload, if it was asked for one, and its exact outputs.

    Args:
        parcel: from `pack_answer`. client: who should have sent it. turn: what it was told; None: no estimate was
            asked of it. round: in which it was asked. exact: the exact outputs that it was asked for.

    Raises:
        DataError: if the answer belongs to another request, or anything in it has another form.
    """
    what = f"the answer of client {client} in round {round}"
    head, arrays = Header(parcel, what), parcel.arrays
    for name, value in (("round", round), ("client", client)):
        if head.integer(name) != value:
            raise DataError(f"{what} says {name} {head.integer(name)}: it belongs to another request")
    same_names(arrays, [*exact, *([] if turn is None else [UPLOAD])], what)
    outputs = {name: read(arrays[name], form, f"{what}: {name}") for name, form in exact.items()}
    if turn is None:
        return None, outputs
    array, dtype = arrays[UPLOAD], turn.point.dtype
    check(
        array, Form(packet_stype(uplink.compressor), (len(array.data) // dtype.itemsize,), dtype), f"{what}: {UPLOAD}"
    )
    return uplink.from_bytes(array.data, turn, turn.point.shape[-1], dtype), outputs


def exact_forms(request: Request, blocks: Sequence[Tensor]) -> dict[str, Form]:
    """The arrays in which exact outputs arrive from one client.

    Args:
        request: what was asked. blocks: the parameter matrices, needed for factors only.
    """
    c, d = request.points.shape
    dtype = request.points.dtype
    forms = {}
    for name in request.outputs - {ESTIMATE}:
        if name == "value":
            forms[name] = Form(DENSE, (c,), torch.float64)
        elif name == "hessian":
            forms[name] = Form(TRIANGLE, (d, d), dtype)
        elif name in ("diagonal", "squared_hvp", "gradient_variance"):
            forms[name] = Form(DENSE, (d,), dtype)
        elif name == "factors":
            for b, positions in enumerate(blocks):
                for side, size in zip(("outer", "inner"), positions.shape, strict=True):
                    forms[f"{side}{b}"] = Form(TRIANGLE, (size, size), dtype)
        else:
            forms[name] = Form(DENSE, (c, d), dtype)
    return forms


def packet_stype(compressor: Compressor) -> str:
    """The serialisation of a compressor's packets."""
    return f"fedsample.{compressor.name}.v1"


def _first(upload: Upload) -> Upload:
    """The upload of the one client in a stack of one."""
    packet = upload.packet
    if packet is not None:
        indices, side = (None if part is None else part[0] for part in (packet.indices, packet.side))
        packet = Packet(packet.values[0], indices, side, packet.length)
    return Upload(packet, None if upload.dense is None else upload.dense[0])


# --- other tensors ---------------------------------------------------------------------------------------------------


def unpack_points(parcel: Parcel, name: str, like: Tensor) -> Tensor:
    """Points (S, d) of any number, with the dtype and device of `like` (d,).

    Raises:
        DataError: if they have another form.
    """
    same_names(parcel.arrays, [name], name)
    rows = next(iter(parcel.arrays[name].shape), 0)
    return read(parcel.arrays[name], Form(DENSE, (rows, len(like)), like.dtype), name).to(like.device)


def unpack_vector(parcel: Parcel, name: str, what: str) -> Tensor:
    """A vector of float64 of any length.

    Raises:
        DataError: if it is missing or has another form.
    """
    if name not in parcel.arrays:
        raise DataError(f"{what}: {name!r} is missing among {sorted(parcel.arrays)}")
    array = parcel.arrays[name]
    return read(array, Form(DENSE, tuple(array.shape)[:1], torch.float64), f"{what}: {name}")


# --- metrics ---------------------------------------------------------------------------------------------------------


def pack_metric(metric: Metric) -> Parcel:
    """The mean m, and what a client needs of S."""
    tensors = {"mean": metric.mean, **metric.wire()}
    arrays = {name: (triangle if name == "root" else dense)(tensor) for name, tensor in tensors.items()}
    return Parcel(header(metric=metric.name), arrays)


def unpack_metric(parcel: Parcel, like: Tensor, blocks: Sequence[Tensor]) -> Metric:
    """The metric that `pack_metric` sent, without what only the server needs.

    Args:
        parcel: the message's content. like: (d,), whose dtype and device it has. blocks: the parameter matrices.

    Raises:
        DataError: if it is of no known kind, or an array has another form.
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
    """Names a metric by its contents, so that server and client know whether they speak of the same one."""
    state = hashlib.blake2b(Header(parcel, "a metric").text("metric").encode(), digest_size=16)
    for name, array in sorted(parcel.arrays.items()):
        state.update(f"{name} {array.dtype} {list(array.shape)} ".encode() + array.data)
    return state.hexdigest()


def terms(uplink: Uplink, seed: int, clients: int, chains: int, d: int, dtype: torch.dtype) -> dict[str, int | str]:
    """What server and clients must agree on before the first round; a client says it when it is greeted."""
    compressor = uplink.compressor
    return {
        "fedsample": fedsample.__version__,
        "uplink": f"{uplink.name}, {compressor.name}, {compressor.count(d)} values",
        "seed": seed,
        "clients": clients,
        "chains": chains,
        "parameters": d,
        "dtype": str(dtype).removeprefix("torch."),
    }


# --- failures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """What a client says when it fails; travels as the reason of a Flower error.

    Attributes:
        client, round: which, and when; -1 where it does not know. stage: what it was doing. detail: its traceback.
    """

    client: int
    round: int
    stage: str
    detail: str

    def reason(self) -> str:
        """As text."""
        return json.dumps({"fedsample": self.__dict__})

    @classmethod
    def of_reason(cls, reason: str | None, client: int, round: int) -> Failure:
        """Back from text; Flower's own errors become a failure in an unknown stage. A client below 0 is not known."""
        try:
            found = json.loads(reason or "")["fedsample"]
            named = client if client >= 0 else int(found["client"])
            return cls(named, round, str(found["stage"]), str(found["detail"]))
        except (ValueError, KeyError, TypeError):
            return cls(client, round, "answer", reason or "no reason given")
