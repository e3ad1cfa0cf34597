"""The protocol's version, and the id of a run; light to import."""

import hashlib

PROTOCOL = 3
SERVICE = "fedsample.v1.Fleet"


def run_id(nonce: bytes, config: str) -> bytes:
    """Make the id of a run, 16 bytes, bound to its configuration."""
    return hashlib.blake2b(nonce + config.encode(), digest_size=16).digest()
