"""What server and devices speak, and how a run is named; light to import."""

import hashlib

PROTOCOL = 1
SERVICE = "fedsample.v1.Fleet"


def run_id(nonce: bytes, config: str) -> bytes:
    """16 bytes that name a run, bound to its configuration."""
    return hashlib.blake2b(nonce + config.encode(), digest_size=16).digest()
