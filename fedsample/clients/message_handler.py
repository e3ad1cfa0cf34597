"""One client behind messages: it answers requests and keeps a memory between them.

The same `MessageHandler` answers in a Flower ClientApp, which gives it its memory back with each message, and in a
process of its own at the end of a gRPC stream, which keeps it. A message that fails changes nothing that is remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsample import protocol
from fedsample.clients.client_stack import ClientStack
from fedsample.errors import DataError
from fedsample.estimators import Memory, build_links
from fedsample.estimators.links import refresh_of
from fedsample.protocol import Recall
from fedsample.protocol.exchange import ESTIMATE
from fedsample.protocol.wire import Header, Parcel, header, pack_tensors, unpack_tensors
from fedsample.targets import Clients
from fedsample.targets.metric import Identity

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.problem import Problem


@dataclass
class Trace:
    """The stage that the handling of a message has reached, for the report of a failure."""

    client: int = -1
    round: int = -1
    stage: str = "configuration"


class MessageHandler:
    """A client, its estimator's memory, and the points that it was sent.

    Args:
        experiment: the configuration.
        problem: gives the links and the number of parameters.
        clients: the client's potential, as a stack of one.
        index: the client's index.
        n: number of clients.
    """

    def __init__(self, experiment: Experiment, problem: Problem, clients: Clients, index: int, n: int) -> None:
        self.experiment, self.index, self.n = experiment, index, n
        links = build_links(experiment, problem.clients)
        uplink, self.downlink = links.uplink, links.downlink
        indices = torch.tensor([index], device=clients.device)
        self.worker = ClientStack(clients, uplink, experiment.seed, experiment.chains, indices, experiment.batch_size)
        self.origin = torch.zeros(clients.d, dtype=clients.dtype, device=clients.device)
        self.recall = Recall()
        self._anchored = refresh_of(experiment) == 0
        self._held: tuple[str, Parcel | None] = ("", None)  # the metric that this client was given, with its tag
        self._used = ""  # the tag of the metric that the worker uses

    @property
    def tag(self) -> str:
        """The tag of the metric that this client holds; empty: none."""
        return self._held[0]

    # --- messages --------------------------------------------------------------------------------------------------

    def handle(self, kind: str, parcel: Parcel, trace: Trace) -> Parcel:
        """Return the reply to a message.

        Args:
            kind: the message's type, such as `protocol.EXACT_QUERY`.
            parcel: the message's content.
            trace: updated as the message is handled.

        Raises:
            DataError: if the message does not fit; other errors come from the model.
        """
        if kind == protocol.HELLO:
            return self._hello()
        if kind == protocol.METRIC:
            return self._set_metric(parcel, trace)
        if kind == protocol.SAVE:
            trace.stage = "memory"
            return Parcel(header(client=self.index), pack_tensors(self.worker.memory))
        if kind == protocol.RESTORE:
            trace.stage = "memory"
            self.worker.memory = unpack_tensors(parcel.arrays, self.fresh(), "a memory")
            return Parcel(header(client=self.index))
        return self._answer(parcel, trace)

    def _hello(self) -> Parcel:
        """Report the client's index, what it computes, and the tag of its metric."""
        worker, base = self.worker, self.worker.base
        agreed = protocol.terms(worker.uplink, self.experiment.seed, self.n, worker.chains, base.d, base.dtype)
        return Parcel(header(client=self.index, metric=self.tag, **agreed))

    def _set_metric(self, parcel: Parcel, trace: Trace) -> Parcel:
        """Take a new metric; the memory in the old coordinates is discarded."""
        trace.stage = "metric"
        metric = protocol.unpack_metric(parcel, self.origin, self.worker.base.blocks())
        self._held = (protocol.metric_tag(parcel), parcel)
        self.worker.set_metric(metric)
        self._used = self.tag
        self.worker.memory, self.recall = self.fresh(), Recall()
        return Parcel(header(client=self.index))

    def _answer(self, parcel: Parcel, trace: Trace) -> Parcel:
        """Compute an estimate and exact outputs."""
        trace.stage = "request"
        worker, head = self.worker, Header(parcel, "a request")
        trace.round = head.integer("round")
        request = protocol.unpack_request(parcel, self.n, worker.chains, self.origin, self.recall, self.downlink)
        estimate = ESTIMATE in request.outputs
        trace.stage = "metric"
        self._use(head.text("metric"))
        if estimate:
            trace.stage = "memory"
            if worker.uplink.needs_previous and request.previous is None and request.round > 1:
                request = protocol.with_previous(request, self.recall)
        trace.stage = "estimate" if estimate else ", ".join(sorted(request.outputs))
        answer = worker.answer(request)
        trace.stage = "answer"
        reply = protocol.pack_answer(answer, request, self.index, worker.uplink)
        if head.value("track") is True:
            self.recall.round, self.recall.points = request.round, request.points
        if request.reference is not None and not self._anchored:
            self.recall.reference, self.recall.reference_round = request.reference, request.reference_round
        return reply

    def _use(self, tag: str) -> None:
        """Switch to the coordinates of a request: the model's own, or those of the metric that this client holds.

        Raises:
            DataError: if the request names another metric.
        """
        if tag == self._used:
            return
        if tag and tag != self.tag:
            raise DataError(
                f"the request is in the coordinates of metric {tag}, but this client holds {self.tag or 'none'}: its "
                "state was lost, or another run has replaced it; start the run anew, or resume it"
            )
        held = self._held[1]
        blocks = self.worker.base.blocks()
        metric = Identity(self.origin) if not tag or held is None else protocol.unpack_metric(held, self.origin, blocks)
        self.worker.set_metric(metric)
        self._used = tag

    # --- what is remembered ------------------------------------------------------------------------------------------

    @property
    def metric(self) -> Parcel | None:
        """The metric that this client holds, as it was received."""
        return self._held[1]

    def hold(self, metric: Parcel | None) -> None:
        """Hold a metric received in an earlier message; it is decoded when a request names it."""
        tag = "" if metric is None else protocol.metric_tag(metric)
        if tag != self.tag and self._used:
            self.worker.set_metric(Identity(self.origin))
            self._used = ""
        self._held = (tag, metric)

    def fresh(self) -> Memory:
        """Return the estimator's memory before round 1."""
        worker = self.worker
        return worker.uplink.memory((1, worker.chains, worker.base.d), worker.base.dtype, worker.base.device)

    def state(self) -> dict[str, Tensor]:
        """The rest of the memory, as tensors by name; they are the client's own."""
        recall = self.recall
        state = {f"memory.{name}": tensor for name, tensor in self.worker.memory.items()}
        state["rounds"] = torch.tensor([recall.round, recall.reference_round])
        points = {"points": recall.points, "reference": recall.reference}
        return state | {name: each for name, each in points.items() if each is not None}

    def forms(self) -> dict[str, Tensor]:
        """Tensors of the shapes and dtypes that a `state` may hold."""
        points = self.origin.expand(self.worker.chains, -1)
        memory = {f"memory.{name}": tensor for name, tensor in self.fresh().items()}
        return {**memory, "rounds": torch.zeros(2, dtype=torch.int64), "points": points, "reference": points}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state`; an empty one is that before the first message.

        Raises:
            DataError: if the state belongs to another uplink or compressor, or has another shape.
        """
        before, self.recall = self.recall, Recall()
        self.worker.memory = self.fresh()
        if state:
            for name, form in self.forms().items():
                found = state.get(name)
                if found is None and name in ("points", "reference"):
                    continue
                if found is None or found.shape != form.shape or found.dtype != form.dtype:
                    got = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
                    raise DataError(
                        f"what this client remembers: {name} is {got}, expected {form.dtype} {list(form.shape)}: it is "
                        "of another uplink, compressor or number of chains"
                    )
            rounds, device = state["rounds"].tolist(), self.origin.device
            points = {name: state[name].to(device) for name in ("points", "reference") if name in state}
            self.recall = Recall(rounds[0], points.get("points"), rounds[1], points.get("reference"))
            self.worker.memory = {name: state[f"memory.{name}"].to(device).clone() for name in self.worker.memory}
        if not self._anchored and not _same(before.reference, self.recall.reference):
            self.worker.forget_reference()  # gradients kept at another reference are not valid


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
