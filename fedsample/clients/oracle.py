"""Gradients of some clients in one round: of all rows or a minibatch, with or without variance reduction."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedsample.protocol.exchange import Request
from fedsample.random import Key
from fedsample.targets import MetricClients


class Reference:
    """Full gradients of n clients at points that stay for many rounds, cached.

    Attributes:
        round: (n,) int64, the round since which each client's gradient is cached; -1: none.
        gradient: (n, C, d); None: none yet.
        anchor: (n, 1, d) gradients at the origin of the metric's coordinates; None: none yet.
    """

    def __init__(self, n: int) -> None:
        self.round = torch.full((n,), -1, dtype=torch.int64)
        self.gradient: Tensor | None = None
        self.anchor: Tensor | None = None

    def at(self, clients: MetricClients, who: Tensor | None, point: Tensor, since: int) -> Tensor:
        """Gradients at `point` (C, d), which has been the reference since that round -> (m, C, d)."""
        mine = slice(None) if who is None else who
        told = slice(None) if who is None else who.cpu()  # the rounds are kept where clients are counted
        if self.gradient is None or bool((self.round[told] != since).any()):
            fresh = clients.gradient(point, clients=who)
            if self.gradient is None:
                self.gradient = fresh.new_zeros((clients.n, *fresh.shape[1:]))
            self.gradient[mine] = fresh
            self.round[told] = since
        return self.gradient[mine]

    def at_origin(self, clients: MetricClients, who: Tensor | None) -> Tensor:
        """Gradients at the origin -> (m, 1, d)."""
        if self.anchor is None:
            self.anchor = clients.gradient(torch.zeros(1, clients.d, dtype=clients.dtype, device=clients.device))
        return self.anchor if who is None else self.anchor[who]


@dataclass(frozen=True)
class _TurnOracle:
    """Gradients of some clients in one round, on one minibatch; variance-reduced if the request has a reference."""

    clients: MetricClients
    who: Tensor | None
    keys: Key
    batch_size: int | None
    request: Request
    about: Reference

    @property
    def full(self) -> bool:
        return self.batch_size is None

    def gradient(self, point: Tensor, *, full: bool = False) -> Tensor:
        if full or self.batch_size is None:
            return self.clients.gradient(point, clients=self.who)
        estimate = self._batch(point)
        reference = self.request.reference
        if reference is None:
            return estimate
        kept = self.about.at(self.clients, self.who, reference, self.request.reference_round)
        return estimate - self._batch(reference) + kept  # SVRG: Johnson & Zhang 2013

    def anchor(self) -> Tensor:
        return self.about.at_origin(self.clients, self.who)

    @cached_property
    def _drawn(self) -> Key:
        """The keys (m, C) of this round's minibatches."""
        mine = self.keys if self.who is None else Key(self.keys.tensor()[self.who], self.keys.device)
        return mine.fold(self.request.round)

    def _batch(self, point: Tensor) -> Tensor:
        return self.clients.gradient(point, clients=self.who, keys=self._drawn, batch_size=self.batch_size)
