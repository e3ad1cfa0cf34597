"""Separate global random generators for the ServerApp and for the ClientApps in the same process.

Flower runs them in different processes. Here a ClientApp that seeds `random`, as many do, would make a strategy sample
the same nodes in every round, and its privacy noise the same noise. So there are two states of the generators of
`random`, numpy and torch (on the CPU): the ServerApp's, and one that all ClientApps share. They are swapped when the
first message is on its way to a ClientApp, and when the last reply has arrived or is no longer waited for. The second
state starts at a digest of the first, so an app that seeds before a run gets the same draws in every run.
"""

from __future__ import annotations

import hashlib
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

_MERSENNE = "MT19937"  # numpy's default global generator; an app may have replaced it


class _State(NamedTuple):
    """The state of each library's global generator; None: not loaded, or of an unknown kind."""

    python: Any
    numpy: Any
    torch: Any


_lock = threading.Lock()
_inside: set[str] = set()  # messages that ClientApps are handling or will handle
_kept: _State | None = None  # the inactive state: the ClientApps', or the ServerApp's while ClientApps run
_runs = 0


@contextmanager
def kept_apart() -> Iterator[None]:
    """Keep the states apart for a run; the ClientApps' follows from the state at which the first of them begins."""
    global _kept, _runs
    with _lock:
        if not _runs and not _inside:
            _kept = None
        _runs += 1
    try:
        yield
    finally:
        with _lock:
            _runs -= 1


def enter(message_id: str) -> None:
    """A message is on its way to a ClientApp; may be called twice."""
    with _lock:
        if not _inside:
            _swap()
        _inside.add(message_id)


def leave(message_id: str) -> None:
    """The reply has arrived, or is no longer waited for; may be called twice."""
    with _lock:
        if message_id in _inside:
            _inside.remove(message_id)
            if not _inside:
                _swap()


def _swap() -> None:
    global _kept
    current = _read()
    _write(_derived(current) if _kept is None else _kept)
    _kept = current


def _read() -> _State:
    torch: Any = sys.modules.get("torch")
    of_torch = getattr(torch, "get_rng_state", None)  # None too while another thread is importing it
    of_numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002  the global one is what apps use
    return _State(
        random.getstate(),
        of_numpy if of_numpy["bit_generator"] == _MERSENNE else None,
        None if of_torch is None else of_torch(),
    )


def _write(state: _State) -> None:
    random.setstate(state.python)
    if state.numpy is not None:
        np.random.set_state(state.numpy)  # noqa: NPY002  as above
    if state.torch is not None:
        sys.modules["torch"].set_rng_state(state.torch)


def _derived(state: _State) -> _State:
    """Derive another state, a digest of this one: unrelated, but reproducible."""
    digest = hashlib.blake2b(repr(state.python).encode(), digest_size=8)
    if state.numpy is not None:
        digest.update(state.numpy["state"]["key"].tobytes() + str(state.numpy["state"]["pos"]).encode())
    if state.torch is not None:
        digest.update(state.torch.numpy().tobytes())
    seed = int.from_bytes(digest.digest(), "little")
    of_numpy = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    return _State(
        random.Random(seed).getstate(),
        None if state.numpy is None else of_numpy.get_state(legacy=False),
        None if state.torch is None else sys.modules["torch"].Generator().manual_seed(seed >> 1).get_state(),
    )
