"""Out-of-memory errors of the CPU, turned into errors with advice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedsample.errors import DeviceMemoryError


@contextmanager
def within_memory() -> Iterator[None]:
    """Turn an out-of-memory error of the CPU into a `DeviceMemoryError` with advice.

    Raises:
        DeviceMemoryError: PyTorch, or Python, could not allocate what was asked for.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or "can't allocate memory" in str(error)):
            raise
        said = next(iter(str(error).splitlines()), "no memory").removesuffix(" (Cannot allocate memory)")
        raise DeviceMemoryError(
            "out of memory on cpu: take fewer chains, clients or draws, a smaller model, or metric.name = 'diagonal'; "
            f"PyTorch says: {said}"
        ) from None
