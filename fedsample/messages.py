"""What a server and its clients say to each other under Flower, as the content of messages.

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
from dataclasses import dataclass

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

import fedsample
from fedsample.clients.exact import is_symmetric
from fedsample.clients.worker import Answer
from fedsample.compression import Packet
from fedsample.errors import DataError
from fedsample.estimators import Turn, Uplink, Upload
from fedsample.exchange import ESTIMATE, EXACT, Request
from fedsample.targets import Metric
from fedsample.targets.metric import Dense, Diagonal, Identity, Kronecker, restore
from fedsample.wire import (
    ARRAYS,
    BITS,
    DENSE,
    HEADER,
    TRIANGLE,
    Form,
    Header,
    arrays_of,
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
    """A request on its way to many clients; its arrays are made once and shared by all messages.

    Args:
        request: what is asked. metric: tag of the metric in whose coordinates, see `metric_tag`; empty: in the model's
            own parameters. coins: whether this round tosses coins, so that clients are told how they fell.
    """

    def __init__(self, request: Request, metric: str, *, coins: bool) -> None:
        """Make the arrays."""
        self._request, self._metric = request, metric
        arrays = {"points": dense(request.points)}
        if request.vector is not None:
            arrays["vector"] = dense(request.vector)
        self._exact = ArrayRecord(dict(arrays))
        if coins:
            none = torch.zeros(len(request.points), dtype=torch.bool)
            arrays["sync"] = bits(none if request.sync is None else request.sync)
        self._estimate = ArrayRecord(dict(arrays))
        if request.previous is not None:
            arrays["previous"] = dense(request.previous)
        self._whole = ArrayRecord(arrays)

    def records(self, client: int, *, estimate: bool = True, previous: bool = True) -> RecordDict:
        """The message for one client.

        Args:
            client: which. estimate: whether it is asked for everything, or for the exact outputs only. previous:
                whether it is told the points of the round before, where there are any, or remembers them.
        """
        request = self._request
        arrays = (self._whole if previous else self._estimate) if estimate else self._exact
        fields = header(
            round=request.round,
            metric=self._metric,
            outputs=sorted(request.outputs if estimate else request.outputs - {ESTIMATE}),
            epoch=request.epoch,
            applied=0 if request.applied is None else int(request.applied[client]),
            active=request.active[client].tolist() if estimate and request.active is not None else None,
        )
        return RecordDict({HEADER: fields, ARRAYS: arrays})


def unpack_request(records: RecordDict, clients: int, chains: int, like: Tensor) -> Request:
    """What one client is asked; `active` and `applied` hold its own row at every index.

    Args:
        records: from `Outgoing.records`. clients: n. chains: C. like: (d,), whose dtype and device the points have.

    Raises:
        DataError: if the message does not fit.
    """
    what = "a request"
    head, arrays = Header(records, what), arrays_of(records, what)
    outputs = frozenset(head.texts("outputs"))
    if not outputs or not outputs <= {ESTIMATE, *EXACT}:
        raise DataError(f"{what} asks for {sorted(outputs)}, expected some of {[ESTIMATE, *EXACT]}")
    same_names(arrays, {"points", *({"vector", "previous", "sync"} & set(arrays))}, what)
    rows = chains if ESTIMATE in outputs else next(iter(arrays["points"].shape), 0)
    form, mask = Form(DENSE, (rows, len(like)), like.dtype), Form(BITS, (chains,), torch.bool)
    found = {
        name: read(array, mask if name == "sync" else form, f"{what}: {name}").to(like.device)
        for name, array in arrays.items()
    }
    sync, active = found.get("sync"), head.flags("active", chains)
    return Request(
        round=head.integer("round"),
        points=found["points"],
        outputs=outputs,
        previous=found.get("previous"),
        sync=sync if sync is not None and bool(sync.any()) else None,
        active=None if active is None else active.to(like.device).expand(clients, chains),
        applied=torch.tensor([head.integer("applied")], device=like.device).expand(clients),
        epoch=head.integer("epoch"),
        vector=found.get("vector"),
    )


# --- answers ---------------------------------------------------------------------------------------------------------


def pack_answer(answer: Answer, request: Request, client: int, uplink: Uplink) -> RecordDict:
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
        arrays[UPLOAD] = Array(str(dtype).removeprefix("torch."), shape, upload_stype(uplink), data)
    return RecordDict({HEADER: header(round=request.round, client=client), ARRAYS: ArrayRecord(arrays)})


def unpack_answer(
    records: RecordDict, client: int, turn: Turn | None, round: int, exact: dict[str, Form], uplink: Uplink
) -> tuple[Upload | None, dict[str, Tensor]]:
    """A client's upload, if it was asked for one, and its exact outputs.

    Args:
        records: from `pack_answer`. client: who should have sent it. turn: what it was told; None: no estimate was
            asked of it. round: in which it was asked. exact: the exact outputs that it was asked for.

    Raises:
        DataError: if the answer belongs to another request, or anything in it has another form.
    """
    what = f"the answer of client {client} in round {round}"
    head, arrays = Header(records, what), arrays_of(records, what)
    for name, value in (("round", round), ("client", client)):
        if head.integer(name) != value:
            raise DataError(f"{what} says {name} {head.integer(name)}: it belongs to another request")
    same_names(arrays, [*exact, *([] if turn is None else [UPLOAD])], what)
    outputs = {name: read(arrays[name], form, f"{what}: {name}") for name, form in exact.items()}
    if turn is None:
        return None, outputs
    array, dtype = arrays[UPLOAD], turn.point.dtype
    check(array, Form(upload_stype(uplink), (len(array.data) // dtype.itemsize,), dtype), f"{what}: {UPLOAD}")
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


def upload_stype(uplink: Uplink) -> str:
    """The serialisation of an uplink's uploads."""
    return f"fedsample.{uplink.compressor.name}.v1"


def _first(upload: Upload) -> Upload:
    """The upload of the one client in a stack of one."""
    packet = upload.packet
    if packet is not None:
        indices, side = (None if part is None else part[0] for part in (packet.indices, packet.side))
        packet = Packet(packet.values[0], indices, side, packet.length)
    return Upload(packet, None if upload.dense is None else upload.dense[0])


# --- metrics ---------------------------------------------------------------------------------------------------------


def pack_metric(metric: Metric) -> RecordDict:
    """The mean m, and what a client needs of S."""
    tensors = {"mean": metric.mean, **metric.wire()}
    arrays = {name: (triangle if name == "root" else dense)(tensor) for name, tensor in tensors.items()}
    return RecordDict({HEADER: header(metric=metric.name), ARRAYS: ArrayRecord(arrays)})


def unpack_metric(records: RecordDict, like: Tensor, blocks: Sequence[Tensor]) -> Metric:
    """The metric that `pack_metric` sent, without what only the server needs.

    Args:
        records: the message's content. like: (d,), whose dtype and device it has. blocks: the parameter matrices.

    Raises:
        DataError: if it is of no known kind, or an array has another form.
    """
    what = "a metric"
    name, arrays = Header(records, what).text("metric"), arrays_of(records, what)
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


def metric_tag(records: RecordDict) -> str:
    """Names a metric by its contents, so that server and client know whether they speak of the same one."""
    state = hashlib.blake2b(Header(records, "a metric").text("metric").encode(), digest_size=16)
    for name, array in sorted(arrays_of(records, "a metric").items()):
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
