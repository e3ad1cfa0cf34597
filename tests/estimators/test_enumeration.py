"""One round of the production code over every mask, coin, cohort and lost reply, against the second-moment map.

Nothing is sampled. A chain stands for one outcome of all the random bits of a round (or of two), see `dice`, and the
weighted mean of y+ y+^T over chains is the exact expectation. The noise enters linearly, so +-sqrt(d) e_j, equally
likely, stand for a standard normal. The expectation it must equal, to rounding, is `moment_maps`, where no mask is ever
drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from dice import SUM, Dice, Outcomes, advance, combinations, read, signs
from moment_maps import Array, Chain, block_pairs, difference, independent_pairs, subset_pairs, tolerance
from rounding import near
from torch import Tensor

from fedsample.compression import Compressor, Identity, RandBlock, RandK, Scaled
from fedsample.estimators import (
    Dense,
    Diana,
    Direct,
    Ef21,
    Ef21P,
    Links,
    Marina,
    Memory,
    Oracle,
    Turn,
    Upload,
    build,
    build_downlink,
)
from fedsample.fleets.faults import Faults
from fedsample.fleets.local import LocalFleet
from fedsample.strategies import Baoab, Cohort, Driver, Langevin, Stability, State
from fedsample.strategies.baoab import baoab_step
from fedsample.strategies.langevin import langevin_step
from fedsample.targets import GaussianPrior, Metric, Quadratic
from fedsample.targets.metric import Dense as DenseMetric
from fedsample.targets.metric import Identity as IdentityMetric

STEP, FRICTION, TEMPERATURE, PRIOR, SYNC, SEEN = 0.21, 0.8, 1.7, 0.6, 0.3, 7


# --- the cases ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A configuration, from which both the production objects and the map are built."""

    n: int
    d: int
    hessians: str = "dense"  # "equal", "unequal" (diagonal) or "dense" (not commuting)
    sampler: str = "langevin"
    uplink: str = "diana"
    compressor: str = "randk"
    k: int = 1
    participation: float | int = 1.0
    loss: float = 0.0
    engine: str = "batched"
    whitened: bool = False
    anchored: bool = False
    downlink: bool = False  # ef21-p with the uplink's K

    def target(self) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng(5)
        center = rng.normal(size=(self.n, self.d))
        if self.hessians == "dense":
            root = rng.normal(size=(self.n, self.d, self.d)) / math.sqrt(self.d)
            return torch.from_numpy(root @ root.transpose(0, 2, 1) + 0.2 * np.eye(self.d)), torch.from_numpy(center)
        if self.hessians == "equal":
            return torch.full((self.n, self.d), 0.7, dtype=torch.float64), torch.from_numpy(center)
        return torch.from_numpy(rng.uniform(0.2, 1.5, size=(self.n, self.d))), torch.from_numpy(center)

    def metric(self) -> Metric:
        if not self.whitened:
            return IdentityMetric(self.mode() if self.anchored else torch.zeros(self.d, dtype=torch.float64))
        mean = torch.full((self.d,), 0.3, dtype=torch.float64)
        root = torch.randn(self.d, self.d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return DenseMetric.of_precision(mean, root @ root.T + torch.eye(self.d))

    def mode(self) -> Tensor:
        """Of U; the clients' gradients do not sum to zero there, since the prior pulls."""
        curvature, center = self.target()
        hessians = curvature if curvature.dim() == 3 else torch.diag_embed(curvature)
        force = (hessians @ center.unsqueeze(-1)).sum(0).squeeze(-1)
        return torch.linalg.solve(hessians.sum(0) + PRIOR * torch.eye(self.d), force)

    def anchor(self) -> Tensor:
        """(d,) the clients' summed gradient at the origin of the metric's coordinates."""
        metric = self.metric()
        origin = metric.push(torch.zeros(1, self.d, dtype=torch.float64))
        return metric.pull(Quadratic(*self.target()).gradient(origin)).sum(0)[0]

    def order(self) -> list[int]:
        return [int(j) for j in np.random.default_rng(1).permutation(self.d)]

    def build(self) -> tuple[Callable[[int], Driver], Callable[[int], LocalFleet]]:
        sparse: Compressor = RandK(self.k) if self.compressor == "randk" else RandBlock(self.k)
        inner = {"dense": Identity(), "ef21": Scaled(sparse)}.get(self.uplink, sparse)
        uplink = build(self.uplink, inner, SYNC if self.uplink == "marina" else None, anchored=self.anchored)
        metric = self.metric()

        def fleet(chains: int) -> LocalFleet:
            faults = Faults(self.n, 0, loss=self.loss)
            made = LocalFleet(Quadratic(*self.target()), uplink, 0, chains, engine=self.engine, faults=faults)  # type: ignore[arg-type]
            made.set_metric(metric)
            return made

        def sampler(chains: int) -> Driver:
            common: dict[str, Any] = {"step_size": STEP, "temperature": TEMPERATURE, "seed": 0}
            links = Links(uplink)
            if self.downlink:
                links = Links(uplink, build_downlink("ef21-p", Scaled(sparse), 0, chains))
            return Driver(
                Baoab(friction=FRICTION, **common) if self.sampler == "baoab" else Langevin(**common),
                links,
                GaussianPrior(PRIOR),
                metric,
                cohort=Cohort(self.n, chains, 0, self.participation),
                stability=Stability(1.0, 1.0, math.inf),
                anchor=self.anchor() if self.anchored else None,
            )

        return sampler, fleet

    # --- the law ---

    def pairs(self, loss: bool = True) -> Array:
        """(n, n) probabilities that two clients' uploads both arrive."""
        size = self.participation
        asked = subset_pairs(self.n, size) if isinstance(size, int) else independent_pairs(self.n, size)
        return asked * independent_pairs(self.n, 1 - self.loss if loss else 1.0)

    def chain(self, *, loss: bool = True, first: bool = False) -> Chain:
        curvature, center = (tensor.numpy() for tensor in self.target())
        hessians = curvature if curvature.ndim == 3 else np.stack([np.diag(row) for row in curvature])
        metric = self.metric()
        mean, root = metric.mean.numpy(), metric.root.numpy() if isinstance(metric, DenseMetric) else np.eye(self.d)
        inverse = np.linalg.inv(root)
        masks = subset_pairs(self.d, self.k) if self.compressor == "randk" else block_pairs(self.order(), self.k)
        return Chain(
            root @ hessians @ root,
            (center - mean) @ inverse,
            self.sampler,
            self.uplink,
            STEP,
            FRICTION,
            TEMPERATURE,
            masks,
            self.pairs(loss),
            SYNC,
            PRIOR * root @ root,
            -mean @ inverse,
            first,
            self.anchored,
            masks if self.downlink else None,
        )

    # --- the outcomes ---

    def masks(self) -> Tensor:
        """Row m: the coordinates of mask m (RandK), or the start of block m."""
        if self.compressor == "randblock":
            return torch.arange(self.d).unsqueeze(-1)
        return torch.tensor(list(itertools.combinations(range(self.d), self.k)))

    def cohorts(self) -> list[tuple[float, tuple[bool, ...]]]:
        subsets = list(itertools.product((False, True), repeat=self.n))
        if isinstance(self.participation, int):
            subsets = [asked for asked in subsets if sum(asked) == self.participation]
            return [(1 / len(subsets), asked) for asked in subsets]
        if self.participation == 1.0:
            return [(1.0, (True,) * self.n)]
        q = self.participation
        return [(math.prod(q if one else 1 - q for one in asked), asked) for asked in subsets]

    def losses(self, rounds: int) -> Iterator[tuple[float, list[tuple[bool, ...]]]]:
        """Every pattern of lost replies over some rounds, with its probability."""
        if self.loss == 0:
            yield 1.0, [(False,) * self.n] * rounds
            return
        for flat in itertools.product((False, True), repeat=self.n * rounds):
            chance = math.prod(self.loss if lost else 1 - self.loss for lost in flat)
            yield chance, [flat[at * self.n : (at + 1) * self.n] for at in range(rounds)]

    def outcomes(self, coins: Sequence[tuple[float, bool]]) -> Outcomes:
        number = 1 if self.uplink == "dense" else len(self.masks())
        below = range(len(self.masks()) if self.downlink else 1)
        cohorts, noise = self.cohorts(), signs(self.d)
        coin, who, *masks, down, xi = combinations(coins, cohorts, *[range(number)] * self.n, below, noise)
        tossed, asked = (torch.tensor([chance for chance, _ in part], dtype=torch.float64) for part in (coins, cohorts))
        return Outcomes(
            tossed[coin] * asked[who] / (number**self.n * len(below) * len(noise)),
            torch.stack(masks, dim=1),
            down,
            torch.tensor([face for _, face in coins])[coin],
            torch.tensor([subset for _, subset in cohorts])[who],
            noise[xi],
        )


TOSSED = [(SYNC, True), (1 - SYNC, False)]
NO_SYNC = [(1.0, False)]


# --- running the production code ----------------------------------------------------------------------------------


def start(case: Case, chains: int) -> tuple[State, dict[str, Tensor]]:
    """A state and client memories with nothing special about them; the same for every chain.

    In the last round, SEEN, the reply of client 0 was applied and that of client 1 lost; a third client was not asked
    and holds an older pending packet, which was applied.
    """
    rng = np.random.default_rng(11)

    def draw(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=shape))

    def spread(tensor: Tensor) -> Tensor:  # (..., d) -> (..., C, d)
        return tensor.unsqueeze(-2).expand(*tensor.shape[:-1], chains, tensor.shape[-1]).clone()

    n, d, k = case.n, case.d, case.k
    params, previous, seen = draw(d), draw(d), draw(d)
    kernel = {"momenta": spread(draw(d))} if case.sampler == "baoab" else {}
    applied = torch.tensor([SEEN, SEEN - 3, SEEN - 2][:n])
    memory: dict[str, Tensor] = {}
    uplink: dict[str, Tensor] = {}
    if case.uplink in ("diana", "ef21"):
        shift, pending = draw(n, d), draw(n, k)
        support = torch.from_numpy(np.stack([rng.permutation(d)[:k] for _ in range(n)]))
        rounds = torch.tensor([SEEN, SEEN, SEEN - 2][:n])
        committed = shift.clone()
        for i in range(n):
            if int(rounds[i]) == int(applied[i]):
                committed[i, support[i]] += pending[i] * k / d
        memory = {
            "memory.shift": spread(shift),
            "memory.pending": spread(pending),
            "memory.support": spread(support),
            "memory.round": rounds,
            "memory.epoch": torch.zeros(n, dtype=torch.int64),
        }
        uplink = {SUM[case.uplink]: spread(committed.sum(0))}
    elif case.uplink == "marina":
        clients = Quadratic(*case.target())
        metric = case.metric()
        truth = metric.pull(clients.gradient(metric.push(previous.unsqueeze(0))))[:, 0]
        rounds = torch.tensor([SEEN, SEEN - 1, SEEN][:n])
        stale = (rounds != SEEN).unsqueeze(-1)
        memory = {"memory.gradient": spread(torch.where(stale, draw(n, d), truth)), "memory.round": rounds}
        uplink = {"estimate": spread(draw(d))}
    sight = spread(seen if case.downlink else params)
    return State(SEEN, spread(params), spread(previous), kernel, uplink, applied, 0, sight, 0 * sight), memory


def enumerate_rounds(
    monkeypatch: pytest.MonkeyPatch,
    case: Case,
    coins: list[list[tuple[float, bool]]],
    *,
    fresh: bool = False,
) -> tuple[Array, Array]:
    """E y y^T before and E y+ y+^T after len(coins) rounds; `fresh` starts at round 1."""
    outcomes = [case.outcomes(round_coins) for round_coins in coins]
    paths = combinations(*(outcome.weight for outcome in outcomes))
    rounds = [outcome[path] for outcome, path in zip(outcomes, paths, strict=True)]
    weights = math.prod(outcome.weight for outcome in rounds).numpy()  # type: ignore[union-attr]
    chains = len(weights)
    sampler_of, fleet_of = case.build()
    seen = partial(read, uplink=case.uplink, rate=case.k / case.d, downlink=case.downlink)
    before: Array = np.zeros(0)
    after: Array = np.zeros(0)
    for chance, lost in case.losses(len(coins)):
        dice = Dice(rounds, case.masks(), case.order(), 1 if fresh else SEEN + 1, lost)
        with monkeypatch.context() as patch:
            dice.rule(patch)
            sampler, fleet = sampler_of(chains), fleet_of(chains)
            patch.setattr(sampler.noise, "at", dice.noise)
            state, memory = start(case, chains)
            if fresh:
                begun = sampler.begin(state.params)
                state = begun._replace(kernel=state.kernel)
                memory = {}
            if case.uplink == "direct":  # its server half never moves: what it starts from is production's
                state = state._replace(uplink=sampler.begin(state.params).uplink)
            if memory:
                fleet.restore({**fleet.state(), **memory})
            y = seen(state, fleet)
            before = y[0][:, None] * y[0]
            for _ in coins:
                state = advance(sampler, fleet, state)
            y = seen(state, fleet)
        part = chance * (y.T * weights) @ y
        after = after + part if after.size else part
    assert weights.sum() == near(1.0, len(paths) + 12 * len(coins))
    return before, after


def check(
    monkeypatch: pytest.MonkeyPatch, case: Case, coins: list[list[tuple[float, bool]]], chain: Chain | None = None
) -> None:
    """The production code's moments after len(coins) rounds equal the map's."""
    before, after = enumerate_rounds(monkeypatch, case, coins)
    want, chain = before, chain or case.chain()
    for tossed in coins:
        want = chain.after(want, False if case.uplink == "marina" and tossed == NO_SYNC else None)
    assert difference(after, want) <= tolerance(before, want, [chain] * len(coins))


# --- tests --------------------------------------------------------------------------------------------------------

SAMPLERS, UPLINKS = ("langevin", "baoab"), ("dense", "diana", "marina", "direct", "ef21")
LINKS: dict[str, dict[str, Any]] = {
    **{uplink: {"uplink": uplink} for uplink in UPLINKS},
    "qlsd-star": {"uplink": "direct", "anchored": True},
    "p-elf": {"uplink": "dense", "downlink": True},
    "b-elf": {"uplink": "ef21", "downlink": True},
    **{f"{uplink}+ef21-p": {"uplink": uplink, "downlink": True} for uplink in ("diana", "marina", "direct")},
}
SCENES = {
    "everyone": Case(n=2, d=3),
    "two-of-three-coordinates": Case(n=2, d=3, k=2),
    "blocks": Case(n=2, d=4, k=2, compressor="randblock"),
    "by-client": Case(n=3, d=2, engine="by-client"),
    "coins": Case(n=3, d=2, participation=0.6),
    "cohort": Case(n=3, d=2, participation=2),
    "coins-by-client": Case(n=2, d=2, participation=0.6, engine="by-client"),
}


def coin_of(case: Case) -> list[tuple[float, bool]]:
    return TOSSED if case.uplink == "marina" else NO_SYNC


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("hessians", ["equal", "unequal", "dense"])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_round_over_every_outcome(
    monkeypatch: pytest.MonkeyPatch, scene: str, hessians: str, link: str, sampler: str
) -> None:
    case = replace(SCENES[scene], hessians=hessians, sampler=sampler, **LINKS[link])
    check(monkeypatch, case, [coin_of(case)])


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_whitened_round(monkeypatch: pytest.MonkeyPatch, link: str, sampler: str) -> None:
    """Clients differentiate and compress in the metric's coordinates; the prior and the anchor follow."""
    case = Case(n=2, d=3, sampler=sampler, whitened=True, **LINKS[link])
    check(monkeypatch, case, [coin_of(case)])


@pytest.mark.parametrize("participation", [1.0, 0.6, 1])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_first_two_rounds(
    monkeypatch: pytest.MonkeyPatch, sampler: str, link: str, participation: float | int
) -> None:
    """From round 1: momenta are whole, clients see the iterate, marina and ef21 are dense whatever their coin says and
    whom they ask, diana's memories are empty."""
    case = Case(n=2, d=2, sampler=sampler, participation=participation, **LINKS[link])
    before, after = enumerate_rounds(monkeypatch, case, [NO_SYNC, coin_of(case)], fresh=True)
    middle = case.chain(first=True).after(before, coin=True if case.uplink in ("marina", "ef21") else None)
    want = case.chain().after(middle)
    assert difference(after, want) <= tolerance(before, want, [case.chain(first=True), case.chain()])


@pytest.mark.parametrize("participation", [1.0, 0.6, 1])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_two_rounds_over_every_lost_reply(
    monkeypatch: pytest.MonkeyPatch, sampler: str, link: str, participation: float | int
) -> None:
    """Every pattern of two rounds' losses: the second round commits or drops what the first left pending."""
    case = Case(n=2, d=2, sampler=sampler, loss=0.3, participation=participation, **LINKS[link])
    check(monkeypatch, case, [NO_SYNC, NO_SYNC])


@pytest.mark.parametrize("participation", [1.0, 2])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_reply_is_lost_where_a_chain_synchronises(
    monkeypatch: pytest.MonkeyPatch, sampler: str, participation: float | int
) -> None:
    """A dense round waits for everyone, so the other chains of that round lose nothing and are not scaled for loss."""
    case = Case(n=3, d=2, uplink="marina", sampler=sampler, loss=0.3, participation=participation)
    check(monkeypatch, case, [TOSSED], case.chain(loss=False))


# --- what these tests would catch ---------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def slow_memory(patch: Patch) -> None:
    rate = Diana.rate
    patch.setattr(Diana, "rate", lambda self, d: 0.99 * rate(self, d))


def hasty_memory(patch: Patch) -> None:
    """Commits at once, whether or not the reply arrives."""
    for uplink in (Diana, Ef21):
        encode = uplink.encode

        def hasty(self: Any, oracle: Oracle, memory: Memory, turn: Turn, encode: Any = encode) -> tuple[Upload, Memory]:
            upload, memory = encode(self, oracle, memory, turn)
            rate = self.rate(memory["shift"].shape[-1]) if isinstance(self, Diana) else 1.0
            self.compressor.add_to(memory["shift"], upload.packet, rate)
            return upload, {**memory, "pending": 0 * memory["pending"]}

        patch.setattr(uplink, "encode", hasty)


def dropped_memory(patch: Patch) -> None:
    """A client's memory never moves."""
    settle = "fedsample.estimators.ef21.settle"
    patch.setattr(settle, lambda compressor, memory, turn, rate: memory["shift"])


def scaled_memory(patch: Patch) -> None:
    """The server moves its memories by the sum scaled for absentees."""
    decode = Diana.decode
    patch.setattr(Diana, "decode", lambda self, state, total, sync, pi: decode(self, state, total / pi, sync, 1.0))


def stale_marina(patch: Patch) -> None:
    """The difference to the gradient that the client last saw, however old."""
    encode = Marina.encode

    def stale(self: Marina, oracle: Oracle, memory: Memory, turn: Turn) -> tuple[Upload, Memory]:
        return encode(self, oracle, {**memory, "round": torch.full_like(memory["round"], turn.round - 1)}, turn)

    patch.setattr(Marina, "encode", stale)


def unscaled(patch: Patch) -> None:
    for uplink in (Dense, Diana, Marina, Direct):
        decode = uplink.decode
        patch.setattr(
            uplink, "decode", lambda self, state, total, sync, pi, decode=decode: decode(self, state, total, sync, 1.0)
        )


def scaled_feedback(patch: Patch) -> None:
    """Error feedback scaled for absentees, who stand in with their memories already."""
    decode = Ef21.decode
    patch.setattr(Ef21, "decode", lambda self, state, total, sync, pi: decode(self, state, total / pi, sync, pi))


def no_contraction(patch: Patch) -> None:
    """Masked values scaled by d / K, as an unbiased compressor wants them."""
    patch.setattr(Scaled, "alpha", lambda self, d: 1.0)


def no_anchor(patch: Patch) -> None:
    """The server forgets what it knows of the reference; the clients subtract their part of it."""
    patch.setattr(Direct, "anchor", lambda self, state, total: state)


def double_anchor(patch: Patch) -> None:
    anchor = Direct.anchor
    patch.setattr(Direct, "anchor", lambda self, state, total: anchor(self, state, 2 * total))


def anchor_of_the_server_only(patch: Patch) -> None:
    patch.setattr("fedsample.clients.client_stack._TurnOracle.anchor", lambda self: 0.0)


def forgotten_increments(patch: Patch) -> None:
    """Clients see the last increment from zero."""
    see = Ef21P.see
    patch.setattr(Ef21P, "see", lambda self, seen, params, round: (see(self, seen, params, round)[0] - seen, None))


def blind_increments(patch: Patch) -> None:
    """The increment of the iterate, not its distance to what clients see: what a mask drops is lost for good."""
    update = Driver.update
    see = Ef21P.see

    def watched(self: Driver, state: State, request: Any, aggregate: Any) -> State:
        before = state.params
        patch.setattr(Ef21P, "see", lambda link, seen, params, round: see(link, seen, seen + params - before, round))
        return update(self, state, request, aggregate)

    patch.setattr(Driver, "update", watched)


def clients_see_the_iterate(patch: Patch) -> None:
    request = Driver.request
    patch.setattr(Driver, "request", lambda self, state: request(self, state._replace(seen=state.params)))


def sync_keeps_the_estimate(patch: Patch) -> None:
    decode = Marina.decode
    patch.setattr(Marina, "decode", lambda self, state, total, sync, pi: decode(self, state, total, None, pi))


def one_mask(patch: Patch) -> None:
    at = Dice.Link.at
    patch.setattr(Dice.Link, "at", lambda self, round, who=None: at(Dice.Link(self.dice, 0 * self.clients), round, who))


def prior_from_every_client(patch: Patch) -> None:
    gradient = Quadratic.gradient
    patch.setattr(
        Quadratic, "gradient", lambda self, theta, **rest: gradient(self, theta, **rest) + PRIOR / self.n * theta
    )


def prior_at_what_clients_see(patch: Patch) -> None:
    gradient = Driver.gradient

    def lagged(self: Driver, state: State, request: Any, aggregate: Any) -> tuple[Tensor, Any]:
        return gradient(self, state._replace(params=state.seen), request, aggregate)

    patch.setattr(Driver, "gradient", lagged)


def half_kick(patch: Patch) -> None:
    step = baoab_step
    patch.setattr("fedsample.strategies.baoab.baoab_step", lambda *given, first: step(*given, first=True))


def no_square_root(patch: Patch) -> None:
    step = langevin_step
    patch.setattr(
        "fedsample.strategies.langevin.langevin_step", lambda x, g, xi, *rest: step(x, g, xi / math.sqrt(2), *rest)
    )


MUTANTS: list[tuple[Callable[[Patch], None], Case]] = [
    (slow_memory, Case(n=2, d=2)),
    (hasty_memory, Case(n=2, d=2, loss=0.3)),
    (scaled_memory, Case(n=2, d=2, participation=0.6)),
    (stale_marina, Case(n=2, d=2, uplink="marina")),
    (sync_keeps_the_estimate, Case(n=2, d=2, uplink="marina")),
    (hasty_memory, Case(n=2, d=2, uplink="ef21", loss=0.3)),
    (dropped_memory, Case(n=2, d=2, uplink="ef21")),
    (scaled_feedback, Case(n=2, d=2, uplink="ef21", participation=0.6)),
    (scaled_feedback, Case(n=2, d=2, uplink="ef21", participation=1)),
    (no_contraction, Case(n=2, d=2, uplink="ef21")),
    (no_contraction, Case(n=2, d=2, uplink="dense", downlink=True)),
    *((anchor, Case(n=2, d=2, **LINKS["qlsd-star"])) for anchor in (double_anchor, no_anchor)),
    (anchor_of_the_server_only, Case(n=2, d=2, **LINKS["qlsd-star"])),
    *((seen, Case(n=2, d=2, **LINKS["p-elf"])) for seen in (forgotten_increments, blind_increments)),
    *((seen, Case(n=2, d=2, **LINKS["b-elf"])) for seen in (clients_see_the_iterate, prior_at_what_clients_see)),
    *((unscaled, Case(n=2, d=2, uplink=uplink, participation=0.6)) for uplink in UPLINKS if uplink != "ef21"),
    *((one_mask, Case(n=2, d=2, uplink=uplink)) for uplink in UPLINKS if uplink != "dense"),
    *((prior_from_every_client, Case(n=2, d=2, uplink=uplink)) for uplink in UPLINKS),
    (half_kick, Case(n=2, d=2, sampler="baoab")),
    (no_square_root, Case(n=2, d=2)),
]


@pytest.mark.parametrize(("mutate", "case"), MUTANTS)
def test_a_mutant_is_seen(monkeypatch: Patch, mutate: Callable[[Patch], None], case: Case) -> None:
    """Each breaks one line of production code, and each makes a test above fail."""
    coins = [TOSSED if case.uplink == "marina" else NO_SYNC] * (2 if case.loss else 1)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check(monkeypatch, case, coins)
