"""The server's half of a round: build the request, estimate the gradient from the answers, advance the chains.

    request(state) -> Request          the fleet answers with an Aggregate
    update(state, request, aggregate) -> state
    draw(state) -> (C, d) in the model's parameters

A state holds everything that lasts between two rounds, as tensors. The sampler says what it asks of U and what it makes
of the reply; the uplink estimates the gradient of the likelihood, and the server adds the prior's exact gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedsample.compression import Packet
from fedsample.errors import DataError
from fedsample.estimators import Direct, Links, ServerState
from fedsample.protocol.exchange import ESTIMATE, Aggregate, Request
from fedsample.strategies.base import Sampler
from fedsample.strategies.cohort import Cohort
from fedsample.strategies.divergence import Stability
from fedsample.strategies.noise import Keys, Noise, SyncCoins
from fedsample.strategies.state import State
from fedsample.targets import GaussianPrior, Metric, MetricPrior

_CHECK_EVERY = 16  # rounds between two checks for divergence


class Driver:
    """Server side of C chains, for any sampler and any pair of links.

    Args:
        sampler: computes one step of the chains.
        links: the uplink (gradient estimator) and the downlink (what clients see of the iterate).
        prior: U_0 in the model's parameters.
        metric: the chains' coordinates.
        cohort: draws the clients of each round.
        stability: detects and explains divergence.
        refresh: rounds after which the reference point of variance reduction moves to the iterate; 0: it stays at the
            origin; None: no variance reduction.
        anchor: (d,) summed gradient at the origin of the metric's coordinates, for an anchored `Direct` uplink.
    """

    def __init__(
        self,
        sampler: Sampler,
        links: Links,
        prior: GaussianPrior,
        metric: Metric,
        *,
        cohort: Cohort,
        stability: Stability,
        refresh: int | None = None,
        anchor: Tensor | None = None,
    ) -> None:
        self.sampler, self.uplink, self.downlink = sampler, links.uplink, links.downlink
        self.metric, self.prior = metric, MetricPrior(prior, metric)
        self.cohort, self.stability = cohort, stability
        self.refresh, self.anchor = refresh, anchor
        self.noise, self.coins = Noise(sampler.seed), SyncCoins(sampler.seed)
        self._increment: tuple[int, Packet | None] = (0, None)

    def begin(self, params: Tensor) -> State:
        """Create the state before round 1, at positions (C, d) in the metric's coordinates."""
        chains, d = params.shape
        uplink = self.uplink.start(chains, d, params.device)
        begun = self.sampler.begin(params, self.keys(0))
        applied = torch.zeros(self.cohort.n, dtype=torch.int64, device=params.device)
        if isinstance(self.uplink, Direct) and self.anchor is not None:
            uplink = self.uplink.anchor(uplink, self.anchor)
        origin = torch.zeros_like(params)
        asked = self.sampler.ask(begun)
        return State(0, begun[0], asked, _own(begun), uplink, applied, 0, asked, origin)

    def request(self, state: State, *, observe: bool = False) -> Request:
        """Build the next round's request; with `observe`, also ask for the potentials and the uploads' norms."""
        round = state.round + 1
        chains, d = state.params.shape
        device = state.params.device
        sync = self.coins.at(round, self.uplink.sync_probability(round, d), chains, device)
        if state.resync:
            sync = torch.ones(chains, dtype=torch.bool, device=device)
        active = self.cohort.active(round, sync, self.uplink.needs_everyone_to_sync)
        reference, since = self._reference(state, round)
        return Request(
            round=round,
            points=state.seen,
            outputs=frozenset((ESTIMATE, "value") if observe else (ESTIMATE,)),
            previous=state.previous if self.uplink.needs_previous and round > 1 else None,
            sync=sync,
            active=None if active is None else active.to(device),
            applied=state.applied,
            epoch=state.epoch,
            observe=observe,
            reference=reference,
            reference_round=since,
            increment=partial(self._increment_of, state, round) if round > 1 and self.downlink.compresses else None,
        )

    def update(self, state: State, request: Request, aggregate: Aggregate) -> State:
        """Advance the state by one round.

        Raises:
            DivergenceError: if a chain has diverged; checked in round 1 and every 16 rounds.
        """
        gradient, uplink = self.gradient(state, request, aggregate)
        held = self.sampler.tell(self.held(state), gradient, self.keys(request.round))
        params, asked = held[0], self.sampler.ask(held)
        applied = torch.where(aggregate.arrived.to(state.applied.device), request.round, state.applied)
        if request.round % _CHECK_EVERY == 0 or request.round == 1:
            self.check(params, request.round)
        seen, packet = self.downlink.see(state.seen, asked, request.round + 1)
        self._increment = (request.round + 1, packet)
        reference = state.reference if request.reference is None else request.reference
        own = _own(held)
        return State(request.round, params, request.points, own, uplink, applied, state.epoch, seen, reference)

    def gradient(self, state: State, request: Request, aggregate: Aggregate) -> tuple[Tensor, ServerState]:
        """Estimate the gradient (C, d) of U where the sampler asks; also return the estimator's new server state."""
        if aggregate.total is None:
            raise ValueError("the aggregate holds no estimate")
        inclusion = aggregate.arrival * self.cohort.probability
        estimate, uplink = self.uplink.decode(state.uplink, aggregate.total, request.sync, inclusion)
        return estimate.to(state.params.dtype) + self.prior.gradient(self.sampler.ask(self.held(state))), uplink

    def keys(self, round: int) -> Keys:
        """The sampler's randomness of a round; 0: before round 1."""
        return Keys(self.sampler.seed, round, self.noise)

    def held(self, state: State) -> Any:
        """The sampler's own state, as it made it.

        Raises:
            DataError: if it is the state of another sampler.
        """
        wanted = self.sampler.state._fields[1:]
        if state.kernel.keys() != set(wanted):
            raise DataError(
                f"a state with {', '.join(sorted(state.kernel)) or 'positions alone'}, where {self.sampler.name} has "
                f"{', '.join(wanted) or 'positions alone'}: it is another sampler's; start anew, or take that sampler"
            )
        return self.sampler.state(state.params, **state.kernel)

    def draw(self, state: State) -> Tensor:
        """The chains' draws as parameters theta (C, d)."""
        return self.metric.push(self.sampler.draw(self.held(state)))

    def drift(self, before: State, after: State) -> float:
        """Root mean square, over chains, of the displacement that the gradient alone caused in one round."""
        still = self.sampler.tell(self.held(before), torch.zeros_like(before.params), self.keys(after.round))[0]
        return float((after.params - still).norm(dim=-1).square().mean().sqrt())

    def check(self, params: Tensor, round: int) -> None:
        """Raise if a chain has diverged.

        Raises:
            DivergenceError: with the step, the curvature and the largest stable step.
        """
        self.stability.check(params, round, self.sampler.step_at(round))

    def forked(self, state: State) -> State:
        """The state after a client has lost its memory: the chain continues on another path of the same law.

        Clients start new memories in a new epoch; an estimator that needs a dense round to restart asks for one.
        """
        uplink = self.uplink.forget(state.uplink)
        return state._replace(uplink=uplink, epoch=state.epoch + 1, resync=self.uplink.resyncs)

    def _increment_of(self, state: State, round: int) -> Packet:
        """Compressed increment from the previous round's points to this round's; recomputed after a resume."""
        if self._increment[0] != round or self._increment[1] is None:
            asked = self.sampler.ask(self.held(state))
            self._increment = (round, self.downlink.see(state.previous, asked, round)[1])
        return self._increment[1]  # type: ignore[return-value]

    def _reference(self, state: State, round: int) -> tuple[Tensor | None, int]:
        """Reference point of variance reduction in a round, and the round in which it was set."""
        if self.refresh is None:
            return None, 0
        if self.refresh == 0:
            return state.reference, 0
        since = (round - 1) // self.refresh * self.refresh + 1
        return (state.seen if since == round else state.reference), since


def _own(held: Any) -> dict[str, Tensor]:
    """A sampler's own variables besides the positions, by name."""
    variables: dict[str, Tensor] = held._asdict()
    del variables[held._fields[0]]
    return variables
