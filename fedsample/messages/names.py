"""What messages, and the arrays in them, are called."""

from __future__ import annotations

from fedsample.compression import Compressor

TRAIN, EVALUATE, EXACT_QUERY = "train", "evaluate", "query.exact"
HELLO, METRIC, SAVE, RESTORE = "query.hello", "query.metric", "query.save", "query.restore"

UPLOAD = "upload"


def packet_stype(compressor: Compressor) -> str:
    """The serialisation of a compressor's packets."""
    return f"fedsample.{compressor.name}.v1"
