"""The messages between a server and its clients, whatever transport carries them.

    train, evaluate, query.exact   a Request -> an Answer
    query.hello                    -> the client's partition, and what it computes
    query.metric                   m and S -> nothing; the client discards what it remembered in other coordinates
    query.save, query.restore      a simulation's checkpoint: read the client's memory, and write it back

The bits that a fleet counts are the bytes of a message's arrays: an upload is what `Uplink.to_bytes` writes, under
`fedsample.<compressor>.v1`. Round, epoch, acknowledgement and which chains ask are the header, which is not counted.
"""

from fedsample.protocol.answers import pack_answer, unpack_answer
from fedsample.protocol.metrics import metric_tag, pack_metric, unpack_metric
from fedsample.protocol.names import EVALUATE, EXACT_QUERY, HELLO, METRIC, RESTORE, SAVE, TRAIN, UPLOAD, packet_stype
from fedsample.protocol.quantities import exact_forms
from fedsample.protocol.requests import Missed, Outgoing, Recall, unpack_request, with_previous
from fedsample.protocol.status import Failure, terms
from fedsample.protocol.tensors import unpack_points, unpack_vector

__all__ = [
    "EVALUATE",
    "EXACT_QUERY",
    "HELLO",
    "METRIC",
    "RESTORE",
    "SAVE",
    "TRAIN",
    "UPLOAD",
    "Failure",
    "Missed",
    "Outgoing",
    "Recall",
    "exact_forms",
    "metric_tag",
    "pack_answer",
    "pack_metric",
    "packet_stype",
    "terms",
    "unpack_answer",
    "unpack_metric",
    "unpack_points",
    "unpack_request",
    "unpack_vector",
    "with_previous",
]
