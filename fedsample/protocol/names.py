"""Names of messages and of the arrays in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsample.compression import Compressor

if TYPE_CHECKING:
    pass


FIT, SPREAD, SCALE = "query.fit", "query.spread", "query.scale"
SNAPSHOT, REWIND, SCORE = "query.snapshot", "query.rewind", "query.score"


TRAIN, EVALUATE, EXACT_QUERY = "train", "evaluate", "query.exact"
HELLO, METRIC, SAVE, RESTORE = "query.hello", "query.metric", "query.save", "query.restore"

UPLOAD = "upload"


def packet_stype(compressor: Compressor) -> str:
    """Name the serialisation of a compressor's packets."""
    return f"fedsample.{compressor.name}.v1"
