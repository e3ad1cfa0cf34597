"""Small requests of every uplink, to pack and unpack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedsample.protocol.exchange import ESTIMATE, Request
from fedsample.protocol.wire import Array, Parcel

N, CHAINS, D, SEED = 3, 3, 7, 5


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def request_of(
    outputs: tuple[str, ...] = (ESTIMATE,), dtype: torch.dtype = torch.float32, **changes: object
) -> Request:
    plain = Request(
        round=4,
        points=normal(CHAINS, D, dtype=dtype),
        outputs=frozenset(outputs),
        previous=normal(CHAINS, D, seed=8, dtype=dtype),
        sync=torch.tensor([True, False, True]),
        active=torch.tensor([[True, True, False], [False, True, True], [True, False, False]]),
        applied=torch.tensor([3, 0, 2]),
        epoch=2,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


Spoil = Callable[[Parcel], Parcel]


def changed(kept: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**kept, **changes}.items() if value is not None}


def spoiled_header(**fields: object) -> Spoil:
    return lambda parcel: replace(parcel, header=changed(parcel.header, fields))


def spoiled_arrays(**arrays: Array | None) -> Spoil:
    return lambda parcel: replace(parcel, arrays=changed(parcel.arrays, arrays))


def without(part: str) -> Spoil:
    return lambda parcel: replace(parcel, **{part: {}})
