"""One client of a federation as a Flower ClientApp.

A client is a partition: `partition-id` and `num-partitions` in the node's configuration, never the node id, which is
random. What it must remember between two messages (its metric, the estimator's memory) lies in `context.state`, which
Flower keeps for it; what it can make again (its rows, its keys) is cached in whatever process handles the message.
State is written last, so a message that fails changes nothing, and the failure travels back with the traceback.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsample import messages
from fedsample.clients.worker import Worker
from fedsample.config import Experiment, dump_toml
from fedsample.errors import ConfigError, DataError
from fedsample.exchange import ESTIMATE, Request
from fedsample.experiment import of_run_config, reread
from fedsample.links import links, refresh_of
from fedsample.problem import Problem, build_problem
from fedsample.targets import Metric
from fedsample.targets.metric import Identity
from fedsample.wire import ARRAYS, HEADER, Header, arrays_of, header, pack_tensors, unpack_tensors

_RAISED = 2  # Flower's code for a ClientApp that raised
_METRIC_HEADER, _METRIC_ARRAYS = "fedsample.metric.header", "fedsample.metric.arrays"  # in context.state
_MEMORY, _POINTS, _ROUND = "fedsample.memory", "fedsample.points", "fedsample.round"


def client_app(experiment: Experiment | None = None) -> ClientApp:
    """The client side of an experiment.

    Args:
        experiment: the experiment; None: what each run's configuration says, see `experiment.of_run_config`.
    """
    app = ClientApp()
    text = None if experiment is None else dump_toml(experiment)
    answer = _guarded(_answer, text)
    app.train()(answer)
    app.evaluate()(answer)
    for message_type, handler in (
        (messages.EXACT_QUERY, _answer),
        (messages.HELLO, _hello),
        (messages.METRIC, _set_metric),
        (messages.SAVE, _save),
        (messages.RESTORE, _restore),
    ):
        app.query(message_type.removeprefix("query."))(_guarded(handler, text))
    return app


# --- what is made again in each process ------------------------------------------------------------------------------


@dataclass
class Device:
    """One client in this process: everything that does not change between messages.

    Attributes:
        experiment: the configuration. index: which client. clients: n. worker: computes, for this client alone.
    """

    experiment: Experiment
    index: int
    clients: int
    worker: Worker

    @property
    def origin(self) -> torch.Tensor:
        """(d,) zeros, of the client's dtype and device."""
        base = self.worker.base
        return torch.zeros(base.d, dtype=base.dtype, device=base.device)


@lru_cache(maxsize=1)
def _problem(text: str) -> Problem:
    return build_problem(reread(text))


@lru_cache(maxsize=256)
def _device(text: str, index: int, partitions: int) -> Device:
    """The client of a partition, from the configuration as TOML.

    Raises:
        ConfigError: if the federation has another number of clients than the configuration.
    """
    experiment, problem = reread(text), _problem(text)
    n = problem.clients.n
    if partitions != n or not 0 <= index < n:
        raise ConfigError(
            f"partition {index} of {partitions}, but the configuration has {n} clients: run {n} nodes (in a simulation "
            f"--federation-config 'num-supernodes={n}'), or set data.clients = {partitions}"
        )
    indices = torch.tensor([index], device=problem.clients.device)
    worker = Worker(
        problem.clients.client(index),
        links(experiment, problem)[0],
        experiment.seed,
        experiment.chains,
        indices,
        experiment.batch_size,
    )
    return Device(experiment, index, n, worker)


@lru_cache(maxsize=16)
def _text_of(run_config: tuple[tuple[str, bool | float | int | str], ...]) -> str:
    return dump_toml(of_run_config(dict(run_config)))


# --- from message to message -----------------------------------------------------------------------------------------


@dataclass
class Trace:
    """How far the handling of a message has come, for the report of a failure."""

    client: int = -1
    round: int = -1
    stage: str = "configuration"


Handler = Callable[[Device, RecordDict, RecordDict, Trace], RecordDict]  # (device, content, state, trace) -> reply


def _guarded(handler: Handler, text: str | None) -> Callable[[Message, Context], Message]:
    """A handler as Flower wants it: whatever it raises becomes an error reply."""

    def handle(message: Message, context: Context) -> Message:
        trace = Trace()
        try:
            device = _find(context, text, trace)
            with _threads(device.experiment.fleet.threads or 1):
                return Message(handler(device, message.content, context.state, trace), reply_to=message)
        except Exception:
            failure = messages.Failure(trace.client, trace.round, trace.stage, traceback.format_exc())
            return Message(Error(_RAISED, failure.reason()), reply_to=message)

    return handle


def _find(context: Context, text: str | None, trace: Trace) -> Device:
    node = context.node_config
    index, partitions = node.get("partition-id"), node.get("num-partitions")
    if not isinstance(index, int) or not isinstance(partitions, int):
        raise ConfigError(
            f"the node's configuration has partition-id = {index!r} and num-partitions = {partitions!r}, expected two "
            "integers: start the SuperNode with --node-config 'partition-id=0 num-partitions=10'"
        )
    trace.client = index
    if text is None:
        text = _text_of(tuple(sorted(context.run_config.items())))
    trace.stage = "data"
    return _device(text, index, partitions)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """The number of CPU threads changes bits, and in a simulation the process belongs to others too."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the handlers ----------------------------------------------------------------------------------------------------


def _hello(device: Device, content: RecordDict, state: RecordDict, trace: Trace) -> RecordDict:
    """Which client this is, what it computes, and which metric it holds."""
    worker = device.worker
    agreed = messages.terms(
        worker.uplink, device.experiment.seed, device.clients, worker.chains, worker.base.d, worker.base.dtype
    )
    return RecordDict({HEADER: header(client=device.index, metric=_held(state), **agreed)})


def _set_metric(device: Device, content: RecordDict, state: RecordDict, trace: Trace) -> RecordDict:
    """New coordinates: what was remembered in the old ones is void."""
    trace.stage = "metric"
    messages.unpack_metric(content, device.origin, device.worker.base.blocks())
    state[_METRIC_HEADER] = header(tag=messages.metric_tag(content), metric=Header(content, "a metric").text("metric"))
    state[_METRIC_ARRAYS] = arrays_of(content, "a metric")
    for name in (_MEMORY, _POINTS, _ROUND):
        state.pop(name, None)
    return RecordDict({HEADER: header(client=device.index)})


def _answer(device: Device, content: RecordDict, state: RecordDict, trace: Trace) -> RecordDict:
    """Estimates and exact outputs."""
    trace.stage = "request"
    worker = device.worker
    request = messages.unpack_request(content, device.clients, worker.chains, device.origin)
    trace.round = request.round
    estimate = ESTIMATE in request.outputs
    trace.stage = "metric"
    worker.set_metric(_metric(device, state, Header(content, "a request").text("metric")))
    if estimate:
        trace.stage = "memory"
        worker.memory = _memory(device, state)
        request = _with_previous(device, request, state)
        if refresh_of(device.experiment) == 0:  # variance is reduced about the mode, which needs no message
            request = replace(request, reference=torch.zeros_like(request.points))
    trace.stage = "estimate" if estimate else ", ".join(sorted(request.outputs))
    answer = worker.answer(request)
    trace.stage = "answer"
    reply = messages.pack_answer(answer, request, device.index, worker.uplink)
    if estimate:
        state[_MEMORY] = pack_tensors(worker.memory)
        if worker.uplink.needs_previous:
            state[_POINTS] = pack_tensors({"points": request.points})
            state[_ROUND] = ConfigRecord({"round": request.round})
    return reply


def _save(device: Device, content: RecordDict, state: RecordDict, trace: Trace) -> RecordDict:
    """The estimator's memory, for a checkpoint of a simulation."""
    trace.stage = "memory"
    return RecordDict({HEADER: header(client=device.index), ARRAYS: pack_tensors(_memory(device, state))})


def _restore(device: Device, content: RecordDict, state: RecordDict, trace: Trace) -> RecordDict:
    """The estimator's memory, from a checkpoint of a simulation."""
    trace.stage = "memory"
    arrays = arrays_of(content, "a memory")
    unpack_tensors(arrays, _fresh(device), "a memory")
    state[_MEMORY] = arrays
    return RecordDict({HEADER: header(client=device.index)})


# --- what is kept in context.state -----------------------------------------------------------------------------------


def _held(state: RecordDict) -> str:
    """The tag of the metric that this client holds; empty: none."""
    record = state.get(_METRIC_HEADER)
    return str(record["tag"]) if isinstance(record, ConfigRecord) else ""


def _metric(device: Device, state: RecordDict, tag: str) -> Metric:
    """The coordinates of a request: the model's own, or those of the metric that this client holds.

    Raises:
        DataError: if the request speaks of another metric.
    """
    if not tag:
        return Identity(device.origin)
    held = _held(state)
    if held != tag:
        raise DataError(
            f"the request is in the coordinates of metric {tag}, but this client holds {held or 'none'}: its state was "
            "lost, or another run has replaced it; start the run anew, or resume it"
        )
    records = RecordDict({HEADER: state[_METRIC_HEADER], ARRAYS: state[_METRIC_ARRAYS]})
    return messages.unpack_metric(records, device.origin, device.worker.base.blocks())


def _fresh(device: Device) -> dict[str, torch.Tensor]:
    worker = device.worker
    return worker.uplink.memory((1, worker.chains, worker.base.d), worker.base.dtype, worker.base.device)


def _memory(device: Device, state: RecordDict) -> dict[str, torch.Tensor]:
    """The estimator's memory as the last message left it; a new one before the first."""
    record = state.get(_MEMORY)
    fresh = _fresh(device)
    return unpack_tensors(record, fresh, "this client's memory") if isinstance(record, ArrayRecord) else fresh


def _with_previous(device: Device, request: Request, state: RecordDict) -> Request:
    """The request with the points of the round before, where the estimator needs them and the server left them out."""
    if not device.worker.uplink.needs_previous or request.previous is not None or request.round == 1:
        return request
    record, counter = state.get(_POINTS), state.get(_ROUND)
    last = counter["round"] if isinstance(counter, ConfigRecord) else None
    if not isinstance(record, ArrayRecord) or last != request.round - 1:
        raise DataError(
            f"round {request.round} comes without the points of round {request.round - 1}, and those that this client "
            f"remembers are of round {last!r}: its state was lost; start the run anew, or resume it"
        )
    points = unpack_tensors(record, {"points": request.points}, "this client's points")["points"]
    return replace(request, previous=points)
