"""Clients behind a Flower Grid: one message to each client that is asked, one reply from each.

Clients are known by their partition, whatever node they run on: the first exchange asks every node which partition it
has. Replies arrive in any order and are summed in client order, by the same tree as everywhere, so the draws are those
of `LocalFleet` with its by-client engine, bit for bit.

A reply that does not come in time has an unknown probability of coming, and an estimate scaled by a wrong one targets
another posterior. So a round waits for everyone it asked and then stops with the names of who is missing, unless the
caller states the probability; then who does not answer counts as absent, where the estimator can bear it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from fedsample import messages
from fedsample.clients.exact import exact_bits
from fedsample.compression import LinkKeys
from fedsample.errors import ConfigError, DivergenceError
from fedsample.estimators import Turn, Uplink
from fedsample.exchange import ESTIMATE, Aggregate, Request, Traffic
from fedsample.fleets.roster import Roster
from fedsample.sums import TreeSum
from fedsample.targets import Metric
from fedsample.wire import ARRAYS, HEADER, arrays_of, header, pack_tensors, unpack_tensors, wire_bits

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from fedsample.config import Experiment
    from fedsample.problem import Problem

TIMEOUT = 3600.0


@dataclass(frozen=True)
class Dispatch:
    """What has been asked, to be read together with the replies.

    Attributes:
        request: for all clients. estimate: (n,) bool, who was asked for an estimate. anyone: (n,) bool, who was asked
            for anything. down: bits sent.
    """

    request: Request
    estimate: Tensor
    anyone: Tensor
    down: int


class FlowerFleet:
    """A federation of Flower ClientApps made by `fedsample.clients.app.client_app`.

    Args:
        grid: of a running ServerApp. n: clients. uplink: the estimator. seed: the experiment's. chains: C. like: (d,),
            whose dtype and device points and sums have. blocks: the model's parameter matrices, for Kronecker factors.
        timeout: seconds to wait for replies. arrival: probability with which a reply comes in time, if it is known;
            None: every reply is waited for.
    """

    def __init__(
        self,
        grid: Grid,
        n: int,
        uplink: Uplink,
        seed: int,
        chains: int,
        like: Tensor,
        *,
        blocks: Callable[[], list[Tensor]] | None = None,
        timeout: float = TIMEOUT,
        arrival: float | None = None,
    ) -> None:
        """Remember; nobody is asked yet."""
        if arrival is not None and not 0 < arrival <= 1:
            raise ConfigError(f"arrival = {arrival}: the probability with which a reply comes must lie in (0, 1]")
        self.grid, self.n, self.uplink, self.chains, self.like = grid, n, uplink, chains, like
        self.timeout, self.arrival = timeout, arrival
        self.roster = Roster(grid, n, messages.terms(uplink, seed, n, chains, len(like), like.dtype), timeout)
        self.fresh = False  # whether clients hold a metric and no memory yet
        self._blocks = blocks
        self._keys = LinkKeys(seed, torch.arange(n), chains, "uplink")
        self._tag = ""
        self._informed = [0] * n  # the last round whose points each client holds

    # --- the Fleet protocol --------------------------------------------------------------------------------------

    def exchange(self, request: Request) -> Aggregate:
        """One round trip.

        Raises:
            ClientError: if a client failed. QuorumError: if one did not answer.
        """
        content, dispatch = self.dispatch(request)
        return self.collect(dispatch, self.grid.send_and_receive(content, timeout=self.timeout))

    def set_metric(self, metric: Metric) -> Traffic:
        """Send m and S to every client, which forgets what it remembered in other coordinates."""
        records = messages.pack_metric(metric)
        self.roster.broadcast(messages.METRIC, [records] * self.n)
        self._tag, self.fresh, self._informed = messages.metric_tag(records), True, [0] * self.n
        return Traffic(down=self.n * wire_bits(records))

    def holds(self, metric: Metric) -> bool:
        """Whether all clients hold this metric, from this fleet or an earlier one in the same run."""
        tag = messages.metric_tag(messages.pack_metric(metric))
        if not self._tag and set(self.roster.tags) == {tag}:
            self._tag = tag
        return self._tag == tag

    def blocks(self) -> list[Tensor]:
        """Flat positions of the model's parameter matrices."""
        if self._blocks is None:
            raise ConfigError(
                "a Kronecker metric needs the model's blocks: give FlowerFleet `blocks`, or another metric"
            )
        return self._blocks()

    def state(self) -> dict[str, Tensor]:
        """Client memories stacked over clients, fetched from them: for the checkpoints of a simulation."""
        like = self._memory()
        if not like:
            return {}
        replies = self.roster.broadcast(messages.SAVE, [RecordDict({HEADER: header()})] * self.n)
        stacks = [unpack_tensors(arrays_of(r, f"client {i}"), like, f"client {i}") for i, r in enumerate(replies)]
        return {f"memory.{name}": torch.cat([stack[name] for stack in stacks]) for name in like}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Back to a `state`, given to each client."""
        like = self._memory()
        if like:
            rows = [{name: state[f"memory.{name}"][i : i + 1] for name in like} for i in range(self.n)]
            contents = [RecordDict({HEADER: header(), ARRAYS: pack_tensors(row)}) for row in rows]
            self.roster.broadcast(messages.RESTORE, contents)
        self.fresh = False

    def _memory(self) -> dict[str, Tensor]:
        return self.uplink.memory((1, self.chains, len(self.like)), self.like.dtype, self.like.device)

    # --- a round in two halves, between which Flower carries the messages ----------------------------------------

    def dispatch(self, request: Request, kind: str | None = None) -> tuple[list[Message], Dispatch]:
        """The messages of a round, of a given Flower type, and what `collect` needs to know of them.

        Raises:
            DivergenceError: if the points are not finite.
        """
        if not bool(torch.isfinite(request.points).all()):
            raise DivergenceError(
                f"the points of round {request.round} hold NaN or infinite values: a chain diverged; lower step_size, "
                "or set it to 'auto'"
            )
        estimate, anyone = self._who(request)
        coins = ESTIMATE in request.outputs and self.uplink.sync_probability(request.round, len(self.like)) > 0
        outgoing = messages.Outgoing(request, self._tag, coins=coins)
        contents = {}
        for i in _indices(anyone):  # the round before is told under sampling, and to who missed it
            previous = request.active is not None or self._informed[i] != request.round - 1
            contents[i] = outgoing.records(i, estimate=bool(estimate[i]), previous=previous)
        if ESTIMATE in request.outputs:
            self.fresh = False
        kind = kind or (messages.TRAIN if ESTIMATE in request.outputs else messages.EXACT_QUERY)
        sent = self.roster.send(contents, kind, str(request.round))
        return sent, Dispatch(request, estimate, anyone, sum(wire_bits(content) for content in contents.values()))

    def collect(self, dispatch: Dispatch, replies: Iterable[Message]) -> Aggregate:
        """The sums over clients, in client order.

        Raises:
            ClientError: if a client failed. QuorumError: if one did not answer and had to. DataError: if an answer has
                another form than what was asked for.
        """
        request, round = dispatch.request, dispatch.request.round
        answers = self.roster.sort(replies, round)
        missing = [i for i in _indices(dispatch.anyone) if i not in answers]
        if missing:
            self._bear(missing, request)
        arrived = dispatch.estimate & torch.tensor([i in answers for i in range(self.n)])
        for i in _indices(arrived):
            self._informed[i] = round
        forms = messages.exact_forms(request, self.blocks() if "factors" in request.outputs else [])
        total, exact = TreeSum(), {name: TreeSum() for name in ([] if missing else forms)}
        norms = torch.full((self.n,), float("nan"), dtype=torch.float64) if request.observe else None
        traffic = Traffic(down=dispatch.down)
        for i, content in answers.items():
            turn = self._turn(request, i) if bool(dispatch.estimate[i]) else None
            upload, outputs = messages.unpack_answer(content, i, turn, round, forms, self.uplink)
            for name, sum_ in exact.items():
                sum_.add(outputs[name])
            full = sum(exact_bits(name, tensor) for name, tensor in outputs.items())
            if upload is not None and turn is not None:
                part = self.uplink.decompress(upload, turn.sync, turn.active, len(self.like))
                total.add(part)
                full += 8 * self.like.dtype.itemsize * len(self.like) * _active(turn, self.chains)
                if norms is not None:
                    norms[i] = part.to(torch.float64).square().sum(-1).mean().sqrt()
            traffic = traffic.plus(Traffic(up=wire_bits(content), up_dense=full))
        device = self.like.device
        sums = {name: sum_.total().to(device) for name, sum_ in exact.items()}
        if ESTIMATE not in request.outputs:
            return Aggregate(None, sums, torch.ones(self.n, dtype=torch.bool), 1.0, traffic)
        arrival = 1.0 if self.arrival is None or self._whole(request) else self.arrival
        nothing = torch.zeros(self.chains, len(self.like), dtype=self.like.dtype)
        summed = total.total() if bool(arrived.any()) else nothing
        return Aggregate(summed.to(device), sums, arrived, arrival, traffic, norms)

    def _who(self, request: Request) -> tuple[Tensor, Tensor]:
        """Who is asked for an estimate (n,), and who for anything (n,)."""
        everyone, nobody = torch.ones(self.n, dtype=torch.bool), torch.zeros(self.n, dtype=torch.bool)
        if ESTIMATE not in request.outputs:
            return nobody, everyone
        estimate = everyone if request.active is None else request.active.any(-1).cpu()
        return estimate, everyone if request.outputs - {ESTIMATE} else estimate

    def _turn(self, request: Request, client: int) -> Turn:
        """What a client was told, as the server needs it to read the answer; on the CPU."""
        sync, active = request.sync, request.active
        return Turn(
            round=request.round,
            point=request.points,
            previous=None,
            sync=None if sync is None else sync.cpu(),
            active=None if active is None else active[client].cpu(),
            applied=0,
            epoch=request.epoch,
            keys=self._keys.at(request.round, torch.tensor(client)),
        )

    def _bear(self, missing: list[int], request: Request) -> None:
        """Go on without some answers, where that is sound.

        Raises:
            QuorumError: where it is not.
        """
        if self.arrival is None or ESTIMATE not in request.outputs or self._whole(request):
            raise self.roster.quorum(missing, f"round {request.round}" if request.round else "preparation")

    def _whole(self, request: Request) -> bool:
        """Whether the estimate of this round needs everyone."""
        return self.uplink.needs_everyone_to_sync and request.sync is not None


def fleet_on(grid: Grid, experiment: Experiment, problem: Problem) -> FlowerFleet:
    """The clients of an experiment, on the grid of a running ServerApp."""
    from fedsample.links import links

    clients = problem.clients
    like = torch.zeros(clients.d, dtype=clients.dtype, device=clients.device)
    uplink, _ = links(experiment, problem)
    return FlowerFleet(grid, clients.n, uplink, experiment.seed, experiment.chains, like, blocks=clients.blocks)


def _indices(mask: Tensor) -> list[int]:
    return [int(i) for i in mask.nonzero().flatten()]


def _active(turn: Turn, chains: int) -> int:
    return chains if turn.active is None else int(turn.active.sum())
