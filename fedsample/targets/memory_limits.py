"""Compute gradients in portions that fit the device's memory: on failure, half as many clients, then half the chains.

A portion depends on its own clients, points and keys alone, so random draws are unchanged. Sums may round differently,
since matrix products have other shapes; a warning says so. If no portion fits, the error says how much memory there is
and what would fit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fedsample.errors import DeviceMemoryError
from fedsample.random import Key
from fedsample.targets.base import Clients

_COPIES = 4  # arrays as large as all gradients that a round holds: gradients, memories, packets and their sum


class Portions:
    """Computes gradients all at once as long as they fit in memory, then in portions.

    Args:
        clients: the clients that compute.
    """

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._most: tuple[int, int] | None = None  # clients and chains at a time; None: all
        self._at_once = True  # whether values and gradients fit together

    def gradient(
        self, theta: Tensor, *, clients: Tensor | None = None, keys: Key | None = None, batch_size: int | None = None
    ) -> Tensor:
        """As `Clients.gradient`.

        Raises:
            DeviceMemoryError: if a single client and chain do not fit, or the result does not.
        """
        chains = theta.shape[-2]
        asked = self._clients.n if clients is None else len(clients), chains
        while True:
            portion = asked if self._most is None else (min(asked[0], self._most[0]), min(asked[1], self._most[1]))
            try:
                if portion == asked:
                    return self._clients.gradient(theta, clients=clients, keys=keys, batch_size=batch_size)
                return self._in_portions(portion, theta, clients, keys, batch_size)
            except torch.OutOfMemoryError as error:
                said = str(error)  # keep the text only: the error's traceback keeps large arrays alive
            if max(portion) <= 1:
                raise too_large(self._clients, chains, "the gradient of a single client and chain", said)
            self._most = ((portion[0] + 1) // 2, portion[1]) if portion[0] > 1 else (1, (portion[1] + 1) // 2)
            if self._clients.device.type == "cuda":
                torch.cuda.empty_cache()
            warnings.warn(
                f"out of memory on {self._clients.device}: gradients are computed for at most {self._most[0]} clients "
                f"and {self._most[1]} chains at a time, which may change their last bits",
                stacklevel=2,
            )

    def value_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """As `Clients.value_and_gradient`; in two passes where one does not fit in memory.

        Raises:
            DeviceMemoryError: if a single client and chain do not fit, or the result does not.
        """
        if self._at_once and self._most is None:
            try:
                return self._clients.value_and_gradient(theta)
            except torch.OutOfMemoryError:
                self._at_once = False  # from now on in two passes
            if self._clients.device.type == "cuda":
                torch.cuda.empty_cache()
        with on_device(self._clients, theta.shape[-2], "the value"):
            values = self._clients.potential(theta)
        return values, self.gradient(theta)

    def _in_portions(
        self, portion: tuple[int, int], theta: Tensor, clients: Tensor | None, keys: Key | None, batch_size: int | None
    ) -> Tensor:
        device = self._clients.device
        who = torch.arange(self._clients.n, device=device) if clients is None else clients
        chains = theta.shape[-2]
        with on_device(self._clients, chains, "all gradients together"):
            result = theta.new_empty(len(who), *theta.shape[-2:])
        for first in range(0, len(who), portion[0]):
            mine = slice(first, first + portion[0])
            for start in range(0, chains, portion[1]):
                these = slice(start, start + portion[1])
                own = None if keys is None else Key(keys.tensor()[mine, these], keys.device)
                points = theta[these] if theta.ndim == 2 else theta[mine, these]
                result[mine, these] = self._clients.gradient(points, clients=who[mine], keys=own, batch_size=batch_size)
        return result


@contextmanager
def on_device(clients: Clients, chains: int, what: str) -> Iterator[None]:
    """Turn an out-of-memory error while computing `what` into a `DeviceMemoryError` with advice.

    Raises:
        DeviceMemoryError: if the device is out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise too_large(clients, chains, what, str(error)) from None  # its traceback keeps large arrays alive


def too_large(clients: Clients, chains: int, what: str, said: str) -> DeviceMemoryError:
    """Make the error that says how much memory there is, what was wanted, and what would fit."""
    one = clients.d * clients.dtype.itemsize
    rows = int(clients.rows.max()) if clients.n else 0
    text = (
        f"out of memory on {clients.device}, at {what}: {clients.n} clients of up to {rows:,} rows, {chains} chains, "
        f"{clients.d:,} parameters; an array of all gradients takes {_gib(clients.n * chains * one)}, a round about "
        f"{_COPIES} of them. "
    )
    known = memory(clients.device)
    if known is not None:
        free, total = known
        text += (
            f"The device has {_gib(total)}, of which {_gib(free)} are free or this process's: enough for about "
            f"{free // (_COPIES * one):,} pairs of a client and a chain, data not counted. "
        )
    advice = "Take fewer chains or clients, a smaller batch_size, or fleet.device = 'cpu'"
    return DeviceMemoryError(f"{text}{advice}. PyTorch says: {said}")


def memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes of a GPU that are free or held by this process, and its total; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device), total


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
