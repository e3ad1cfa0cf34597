"""A round with clients elsewhere, in two halves between which a transport carries the messages.

`compose` makes a message for each client that is asked; `collect` takes the answers in client order and sums them by
the same tree as in every fleet, so the draws are those of `LocalFleet` with its by-client engine, bit for bit. An
answer is decoded, added and freed before the next one is read: the server's memory does not grow with the clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsample import protocol
from fedsample.compression import LinkKeys
from fedsample.compression.base import finite
from fedsample.errors import ConfigError, DivergenceError
from fedsample.estimators import DenseDownlink, Downlink, Ef21P, Links, Turn, Uplink
from fedsample.numerics.tree_sum import TreeSum
from fedsample.protocol.exchange import ESTIMATE, Aggregate, Request, Traffic
from fedsample.protocol.quantities import per_block
from fedsample.protocol.wire import Form, Parcel

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.targets import Clients


@dataclass(frozen=True)
class Federation:
    """What the server knows of its clients, whatever the transport.

    Attributes:
        n: number of clients.
        uplink: the estimator.
        seed: the experiment's seed.
        chains: C.
        like: (d,) gives dtype and device of points and sums.
        downlink: how points are sent.
        blocks: makes the flat positions (out, in) of the model's parameter matrices, for Kronecker factors; None: there
            are none.
        arrival: probability in (0, 1] with which a reply comes in time; None: unknown, so every reply is waited for.

    Raises:
        ConfigError: if `arrival` is not in (0, 1].
    """

    n: int
    uplink: Uplink
    seed: int
    chains: int
    like: Tensor
    downlink: Downlink = field(default_factory=DenseDownlink)
    blocks: Callable[[], list[Tensor]] | None = None
    arrival: float | None = None

    def __post_init__(self) -> None:
        """Check the range, which no type expresses."""
        if self.arrival is not None and not 0 < self.arrival <= 1:
            raise ConfigError(f"arrival = {self.arrival}: the probability with which a reply comes must lie in (0, 1]")

    @classmethod
    def of(cls, experiment: Experiment, clients: Clients, links: Links, arrival: float | None = None) -> Federation:
        """Make the federation of an experiment, once the number of clients and the model's parameters are known."""
        like = torch.zeros(clients.d, dtype=clients.dtype, device=clients.device)
        return cls(
            clients.n, links.uplink, experiment.seed, experiment.chains, like, links.downlink, clients.blocks, arrival
        )


@dataclass(frozen=True)
class Dispatch:
    """The requests of one round, needed to read the replies.

    Attributes:
        request: the request to all clients.
        estimate: (n,) bool, clients that were asked for an estimate.
        anyone: (n,) bool, clients that were asked for anything.
        down: bits sent.
    """

    request: Request
    estimate: Tensor
    anyone: Tensor
    down: int


class RemoteFleet(ABC):
    """Composes requests and collects answers; subclasses transport them.

    Args:
        federation: the clients, and how their messages are made and read.
    """

    def __init__(self, federation: Federation) -> None:
        self.n, self.chains, self.like = federation.n, federation.chains, federation.like
        self.uplink, self.downlink, self.arrival = federation.uplink, federation.downlink, federation.arrival
        self.tag = ""  # of the metric that the clients hold
        self._blocks = federation.blocks
        self._keys = LinkKeys(federation.seed, torch.arange(self.n), self.chains, "uplink")
        self.forget()

    def forget(self) -> None:
        """Record that no client holds any points."""
        self._informed = [0] * self.n  # the last round whose points each client holds
        self._reference = [0] * self.n  # the round of each client's point of variance reduction
        self._increments: dict[int, bytes] = {}  # by round, as long as they are smaller than the points themselves

    def lost(self, client: int) -> None:
        """Record that one client no longer holds points."""
        self._informed[client] = self._reference[client] = 0

    def blocks(self) -> list[Tensor]:
        """Flat positions of the model's parameter matrices."""
        if self._blocks is None:
            raise ConfigError("a Kronecker metric needs the model's blocks: give the fleet `blocks`, or another metric")
        return self._blocks()

    def links_state(self) -> dict[str, Tensor]:
        """Return which clients hold which points, and the increments that lead to them."""
        state = {"informed": torch.tensor(self._informed), "reference": torch.tensor(self._reference)}
        if self._increments:
            state["increments.round"] = torch.tensor(list(self._increments))
            stack = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in self._increments.values()]
            state["increments"] = torch.stack(stack)
        return state

    def restore_links(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `links_state`."""
        self._informed, self._reference = state["informed"].tolist(), state["reference"].tolist()
        rounds = state["increments.round"].tolist() if "increments" in state else []
        self._increments = {round: state["increments"][i].numpy().tobytes() for i, round in enumerate(rounds)}

    # --- the first half ----------------------------------------------------------------------------------------------

    def compose(self, request: Request) -> tuple[dict[int, Parcel], Dispatch]:
        """Make the messages of a round by client, and the record that `collect` needs.

        Raises:
            DivergenceError: if the points are not finite.
        """
        if not finite(request.points):
            raise DivergenceError(
                f"the points of round {request.round} hold NaN or infinite values: a chain diverged; lower step_size, "
                "or set it to 'auto'"
            )
        estimate, anyone = self._who(request)
        coins = ESTIMATE in request.outputs and self.uplink.sync_probability(request.round, len(self.like)) > 0
        outgoing = protocol.Outgoing(request, self.tag, coins=coins or request.sync is not None)
        self._remember(request)
        asked, parcels, missed = estimate.tolist(), {}, {}
        for i in _indices(anyone):
            since = self._informed[i]
            if asked[i] and since not in missed:
                missed[since] = self._missed(since, request)
            parcels[i] = outgoing.parcel(
                i,
                estimate=asked[i],
                missed=missed[since] if asked[i] else None,
                # sent under sampling, and to clients that missed the round before
                previous=request.active is not None or since != request.round - 1,
                reference=self._reference[i] < request.reference_round,
            )
        return parcels, Dispatch(request, estimate, anyone, sum(parcel.bits for parcel in parcels.values()))

    def _who(self, request: Request) -> tuple[Tensor, Tensor]:
        """Which clients are asked for an estimate (n,), and which for anything (n,)."""
        everyone, nobody = torch.ones(self.n, dtype=torch.bool), torch.zeros(self.n, dtype=torch.bool)
        if ESTIMATE not in request.outputs:
            return nobody, everyone
        estimate = everyone if request.active is None else request.active.any(-1).cpu()
        return estimate, everyone if request.outputs - {ESTIMATE} else estimate

    def _remember(self, request: Request) -> None:
        """Keep the round's increment for clients that miss it, as long as that is smaller than the points."""
        if request.increment is None or not isinstance(self.downlink, Ef21P):
            return
        self._increments[request.round] = self.downlink.pack(request.increment())
        whole = self.chains * len(self.like) * self.like.dtype.itemsize
        kept = whole // max(1, len(self._increments[request.round]))
        for round in [round for round in self._increments if round <= request.round - max(1, kept)]:
            del self._increments[round]

    def _missed(self, since: int, request: Request) -> protocol.Missed | None:
        """The increments from the points of a round to those of the request, if they are smaller than the points."""
        if since == 0 or not isinstance(self.downlink, Ef21P):
            return None
        rounds = range(since + 1, request.round + 1)
        if not all(round in self._increments for round in rounds):
            return None
        packets = [self._increments[round] for round in rounds]
        if sum(map(len, packets)) >= self.chains * len(self.like) * self.like.dtype.itemsize:
            return None
        return protocol.Missed.of(since, packets, self.downlink, self.like.dtype)

    # --- the second half ---------------------------------------------------------------------------------------------

    def collect(self, dispatch: Dispatch, answers: Iterable[tuple[int, Parcel]]) -> Aggregate:
        """Sum the answers over clients.

        Args:
            dispatch: as `compose` returned it.
            answers: (client, content), in client order.

        Raises:
            QuorumError: if a client did not answer and is needed.
            DataError: if an answer has another form than was asked for.
        """
        request, round = dispatch.request, dispatch.request.round
        forms = self._forms(request)
        total, exact = TreeSum(), {name: TreeSum() for name in forms}
        norms = torch.full((self.n,), float("nan"), dtype=torch.float64) if request.observe else None
        traffic, asked = Traffic(down=dispatch.down), dispatch.estimate.tolist()
        here, arrived = [False] * self.n, [False] * self.n
        for i, content in answers:
            here[i], arrived[i] = True, asked[i]
            part, more = self._read(i, content, request, asked[i], forms, exact)
            traffic = traffic.plus(more)
            if part is not None:
                total.add(part)
                if norms is not None:
                    norms[i] = part.to(torch.float64).square().sum(-1).mean().sqrt()
        missing = [i for i in _indices(dispatch.anyone) if not here[i]]
        if missing:
            self._allow_missing(missing, request)
            exact = {}
        if ESTIMATE in request.outputs:
            for i in range(self.n):
                if here[i]:
                    self._informed[i] = round
                if arrived[i]:
                    self._reference[i] = request.reference_round
        device = self.like.device
        sums = {name: sum_.total().to(device) for name, sum_ in exact.items()}
        if ESTIMATE not in request.outputs:
            return Aggregate(None, sums, torch.ones(self.n, dtype=torch.bool), 1.0, traffic)
        arrival = 1.0 if self.arrival is None or self._whole(request) else self.arrival
        summed = total.total() if any(arrived) else torch.zeros(self.chains, len(self.like), dtype=self.like.dtype)
        return Aggregate(summed.to(device), sums, torch.tensor(arrived), arrival, traffic, norms)

    def _read(
        self, client: int, content: Parcel, request: Request, estimate: bool, forms: dict[str, Form],
        exact: dict[str, TreeSum],
    ) -> tuple[Tensor | None, Traffic]:  # fmt: skip
        """Read one answer: decode its upload (C, d), add its exact outputs."""
        turn = self._turn(request, client) if estimate else None
        upload, outputs = protocol.unpack_answer(content, client, turn, request.round, forms, self.uplink)
        for name, sum_ in exact.items():
            sum_.add(outputs[name])
        full = sum(form.bits for form in forms.values())
        part = None
        if upload is not None and turn is not None:
            part = self.uplink.decompress(upload, turn.sync, turn.active, len(self.like))
            full += 8 * self.like.dtype.itemsize * len(self.like) * _active(turn, self.chains)
        return part, Traffic(up=content.bits, up_dense=full)

    def _forms(self, request: Request) -> dict[str, Form]:
        """The forms of the exact outputs of one client's answer."""
        return protocol.exact_forms(request, self.blocks() if per_block(request.outputs) else [])

    def _turn(self, request: Request, client: int) -> Turn:
        """What a client was told, which the server needs to decode the answer; on the CPU."""
        sync, active = request.sync, request.active
        return Turn(
            round=request.round,
            point=request.points,
            previous=None,
            sync=None if sync is None else sync.cpu(),
            active=None if active is None else active[client].cpu(),
            applied=0,
            epoch=request.epoch,
            keys=self._keys.at(request.round, client),
        )

    @abstractmethod
    def _allow_missing(self, missing: list[int], request: Request) -> None:
        """Go on without some answers, if the estimate stays correct.

        Raises:
            QuorumError: if it would not.
        """

    def _whole(self, request: Request) -> bool:
        """Whether the estimate of this round needs all clients."""
        return self.uplink.needs_everyone_to_sync and request.sync is not None


def _indices(mask: Tensor) -> list[int]:
    return [int(i) for i in mask.nonzero().flatten()]


def _active(turn: Turn, chains: int) -> int:
    return chains if turn.active is None else int(turn.active.sum())
