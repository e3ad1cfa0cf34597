"""The server of a chain: which gradients it asks for, what it makes of the answers, and where the chain stands.

    request(state) -> Request          the fleet answers with an Aggregate
    update(state, request, aggregate) -> state
    draw(state) -> (C, d) in the model's parameters

A state is data: everything between two rounds, in tensors. The sampler supplies one kernel step; the uplink estimator
supplies the gradient; the prior is exact and the server's own; the noise is the server's, keyed by round and chain.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedsample.compression import Packet
from fedsample.errors import DivergenceError
from fedsample.estimators import DenseDownlink, Direct, Downlink, ServerState, Uplink
from fedsample.protocol.exchange import ESTIMATE, Aggregate, Request
from fedsample.random import SERVER, key
from fedsample.strategies.cohort import Cohort
from fedsample.strategies.divergence import Stability
from fedsample.strategies.flower import FlowerStrategy
from fedsample.strategies.schedule import Constant, Schedule
from fedsample.strategies.state import State
from fedsample.targets import GaussianPrior, Metric, MetricPrior

_NOISE_BLOCK = 16  # rounds of noise made at once; each round's is the same however many are
_COIN_BLOCK = 64  # the same for the coins of synchronising rounds
_CHECK_EVERY = 16  # rounds between two looks for divergence


class Sampler(FlowerStrategy):
    """C chains of one sampler, seen from the server; a Flower `Strategy`, whose methods are in `strategies.flower`.

    Args:
        uplink: the gradient estimator. prior: U_0 in the model's parameters. metric: the chain's coordinates.
        step_size: h > 0, or a schedule. temperature: T >= 0. seed: the experiment's. cohort: who is asked.
        stability: see there. downlink: what clients see; None: the iterate as it is.
        refresh: rounds after which the reference of variance reduction moves to the iterate; 0: it stays at the origin;
            None: there is none.
        anchor: (d,) summed gradient at the origin, for uplinks that are anchored there.
    """

    name: ClassVar[str]
    rule: ClassVar[str]
    reference: ClassVar[str]

    def __init__(
        self,
        uplink: Uplink,
        prior: GaussianPrior,
        metric: Metric,
        *,
        step_size: float | Schedule,
        temperature: float,
        seed: int,
        cohort: Cohort,
        stability: Stability,
        downlink: Downlink | None = None,
        refresh: int | None = None,
        anchor: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.downlink, self.refresh, self.anchor = downlink or DenseDownlink(), refresh, anchor
        self.uplink, self.metric, self.prior = uplink, metric, MetricPrior(prior, metric)
        self.schedule = step_size if isinstance(step_size, Schedule) else Constant(step_size)
        self.step_size, self.temperature, self.seed = self.schedule.initial, temperature, seed
        self.cohort, self.stability = cohort, stability
        self._noise: tuple[int, Tensor] | None = None
        self._coins: tuple[tuple[int, float], Tensor, list[bool]] | None = None
        self._increment: tuple[int, Packet | None] = (0, None)

    @abstractmethod
    def kernel_start(self, params: Tensor) -> dict[str, Tensor]:
        """The sampler's own variables before round 1."""

    @abstractmethod
    def kernel_step(self, state: State, gradient: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Positions and variables after a round, from the gradient of U at the state's positions."""

    def begin(self, params: Tensor) -> State:
        """The state before round 1, at positions (C, d) in the metric's coordinates."""
        chains, d = params.shape
        uplink = self.uplink.start(chains, d, params.device)
        applied = torch.zeros(self.cohort.n, dtype=torch.int64, device=params.device)
        if isinstance(self.uplink, Direct) and self.anchor is not None:
            uplink = self.uplink.anchor(uplink, self.anchor)
        origin = torch.zeros_like(params)
        return State(0, params, params, self.kernel_start(params), uplink, applied, 0, params, origin)

    def request(self, state: State, *, observe: bool = False) -> Request:
        """What to ask in the next round; with `observe`, also the potentials and the uploads' norms."""
        round = state.round + 1
        chains, d = state.params.shape
        sync = self._sync(round, chains, d, state.params.device)
        if state.resync:
            sync = torch.ones(chains, dtype=torch.bool, device=state.params.device)
        active = self.cohort.active(round, sync, self.uplink.needs_everyone_to_sync)
        reference, since = self._reference(state, round)
        return Request(
            round=round,
            points=state.seen,
            outputs=frozenset((ESTIMATE, "value") if observe else (ESTIMATE,)),
            previous=state.previous if self.uplink.needs_previous and round > 1 else None,
            sync=sync,
            active=None if active is None else active.to(state.params.device),
            applied=state.applied,
            epoch=state.epoch,
            observe=observe,
            reference=reference,
            reference_round=since,
            increment=partial(self._increment_of, state, round) if round > 1 and self.downlink.compresses else None,
        )

    def _increment_of(self, state: State, round: int) -> Packet:
        """What leads from the points of the round before to those of this one; made again after a resume."""
        if self._increment[0] != round or self._increment[1] is None:
            self._increment = (round, self.downlink.see(state.previous, state.params, round)[1])
        return self._increment[1]  # type: ignore[return-value]

    def _reference(self, state: State, round: int) -> tuple[Tensor | None, int]:
        """Where clients reduce variance in a round, and since which round."""
        if self.refresh is None:
            return None, 0
        if self.refresh == 0:
            return state.reference, 0
        since = (round - 1) // self.refresh * self.refresh + 1
        return (state.seen if since == round else state.reference), since

    def forked(self, state: State) -> State:
        """The state when a client has lost its memory for good: the chain goes on along another path of the same law.

        Clients start new memories in a new epoch; an estimator whose server half cannot start anew by itself asks for a
        dense round.
        """
        uplink = self.uplink.forget(state.uplink)
        return state._replace(uplink=uplink, epoch=state.epoch + 1, resync=self.uplink.resyncs)

    def step_at(self, round: int) -> float:
        """The step h of a round."""
        return self.schedule.at(round)

    def update(self, state: State, request: Request, aggregate: Aggregate) -> State:
        """The state after a round.

        Raises:
            DivergenceError: if a chain has left every bounded region.
        """
        if aggregate.total is None:
            raise ValueError("the aggregate holds no estimate")
        gradient, uplink = self.gradient(state, request, aggregate)
        noise = self._draw_noise(request.round, state.params)
        params, kernel = self.kernel_step(state, gradient, noise)
        applied = torch.where(aggregate.arrived.to(state.applied.device), request.round, state.applied)
        if request.round % _CHECK_EVERY == 0 or request.round == 1:
            self.check(params, request.round)
        seen, packet = self.downlink.see(state.seen, params, request.round + 1)
        self._increment = (request.round + 1, packet)
        reference = state.reference if request.reference is None else request.reference
        return State(request.round, params, request.points, kernel, uplink, applied, state.epoch, seen, reference)

    def gradient(self, state: State, request: Request, aggregate: Aggregate) -> tuple[Tensor, ServerState]:
        """The estimated gradient of U at the state's positions (C, d), and the estimator's new server half."""
        if aggregate.total is None:
            raise ValueError("the aggregate holds no estimate")
        inclusion = aggregate.arrival * self.cohort.probability
        estimate, uplink = self.uplink.decode(state.uplink, aggregate.total, request.sync, inclusion)
        return estimate.to(state.params.dtype) + self.prior.gradient(state.params), uplink

    def draw(self, state: State) -> Tensor:
        """The chains' positions as parameters theta (C, d)."""
        return self.metric.push(state.params)

    def drift(self, before: State, after: State) -> float:
        """Root mean square over chains of how far the gradient alone moved the positions in a round."""
        noise = self._draw_noise(after.round, before.params)
        still, _ = self.kernel_step(before, torch.zeros_like(before.params), noise)
        return float((after.params - still).norm(dim=-1).square().mean().sqrt())

    def check(self, params: Tensor, round: int) -> None:
        """Stop when a chain has diverged.

        Raises:
            DivergenceError: with the step, the curvature and the largest stable step.
        """
        size = params.abs().amax(-1)
        bad = ~(size < self.stability.radius)
        if bool(bad.any()):
            chain = int(bad.nonzero()[0])
            raise DivergenceError(f"chain {chain} diverged in round {round}: {self._why(self.step_at(round))}")

    def _why(self, step: float) -> str:
        """What makes a chain diverge at a step, and what to do."""
        seen = f"the curvature {self.stability.curvature:.4g} (the largest seen, in the metric's coordinates)"
        limit = f"the largest stable step is {self.stability.limit:.4g}"
        if not step < self.stability.limit:
            advice = "Set step_size well below it, or to 'auto'"
            return f"the step {step:.4g} is too large for {seen}, where {limit}. {advice}"
        return (
            f"the step {step:.4g} suits {seen}, where {limit}, so it met more than that: curvature that grows away "
            "from the mode, or clients' gradients so large beside their sum that what a compressor leaves out throws "
            "the chain. Scale the data (and a Gaussian's target, or model.noise_scale, to its residuals), or lower "
            "step_size"
        )

    def _sync(self, round: int, chains: int, d: int, device: torch.device) -> Tensor | None:
        probability = self.uplink.sync_probability(round, d)
        if probability == 0:
            return None
        if probability == 1:
            return torch.ones(chains, dtype=torch.bool, device=device)
        case = (round // _COIN_BLOCK, probability)
        if self._coins is None or self._coins[0] != case:
            rounds = torch.arange(case[0] * _COIN_BLOCK, (case[0] + 1) * _COIN_BLOCK).unsqueeze(-1)
            coins = key(self.seed, rounds, SERVER, torch.arange(chains), "sync").bernoulli(probability)  # (rounds, C)
            self._coins = (case, coins.to(device), coins.any(-1).tolist())
        at = round % _COIN_BLOCK
        return self._coins[1][at] if self._coins[2][at] else None

    def _draw_noise(self, round: int, like: Tensor) -> Tensor:
        """(C, d) standard normals of this round."""
        block = max(1, min(_NOISE_BLOCK, (1 << 20) // max(1, like.numel())))
        index = (round - 1) // block
        if self._noise is None or self._noise[0] != index:
            chains, d = like.shape
            keys = key(
                self.seed,
                client=SERVER,
                chain=torch.arange(chains, device=like.device),
                purpose="noise",
                device=like.device,
            )
            rounds = torch.arange(index * block + 1, (index + 1) * block + 1, device=like.device).unsqueeze(-1)
            self._noise = (index, keys.fold("round").fold(rounds).normal(d, like.dtype))
        return self._noise[1][round - 1 - index * block]
