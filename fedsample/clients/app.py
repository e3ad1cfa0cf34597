"""One client of a federation as a Flower ClientApp.

A client is a partition: `partition-id` and `num-partitions` in the node's configuration, never the node id, which is
random. What it must remember between two messages (its metric, the estimator's memory) lies in `context.state`, which
Flower keeps for it; what it can make again (its rows, its keys) is cached in whatever process handles the message.
State is written last, so a message that fails changes nothing, and the failure travels back with the traceback.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsample import protocol
from fedsample.clients.message_handler import MessageHandler, Trace
from fedsample.config import Experiment, dump_toml
from fedsample.config.loading import of_run_config, reread
from fedsample.errors import ConfigError
from fedsample.problem import Problem, build_problem
from fedsample.protocol.flower_records import HEADER, parcel_of, records_of
from fedsample.protocol.wire import Parcel, header, pack_tensors, unpack_tensors

if TYPE_CHECKING:
    from flwr.clientapp.typing import Mod

_RAISED = 2  # Flower's code for a ClientApp that raised
_METRIC, _STATE = "fedsample.metric/", "fedsample.state/"  # prefixes of the records in context.state


def client_app(experiment: Experiment | None = None, *, mods: Sequence[Mod] = ()) -> ClientApp:
    """Make the ClientApp of an experiment.

    Args:
        experiment: the configuration; None: read from each run's configuration, see `config.loading.of_run_config`.
        mods: Flower mods around every message, the outermost first. Messages have fedsample's own format: a mod that
            changes them must know it.
    """
    app = ClientApp(mods=list(mods))
    text = None if experiment is None else dump_toml(experiment)
    app.train()(_handler(protocol.TRAIN, text))
    app.evaluate()(_handler(protocol.EVALUATE, text))
    for kind in (protocol.EXACT_QUERY, protocol.HELLO, protocol.METRIC, protocol.SAVE, protocol.RESTORE):
        app.query(kind.removeprefix("query."))(_handler(kind, text))
    return app


# --- cached per process ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _problem(text: str) -> Problem:
    return build_problem(reread(text))


@lru_cache(maxsize=256)
def _device(text: str, index: int, partitions: int) -> MessageHandler:
    """Make the client of a partition, from the configuration as TOML.

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
    return MessageHandler(experiment, problem, problem.clients.client(index), index, n)


@lru_cache(maxsize=16)
def _text_of(run_config: tuple[tuple[str, bool | float | int | str], ...]) -> str:
    return dump_toml(of_run_config(dict(run_config)))


# --- handling messages -----------------------------------------------------------------------------------------------


def _handler(kind: str, text: str | None) -> Callable[[Message, Context], Message]:
    """Make a Flower handler for one type of message: any exception becomes an error reply."""

    def handle(message: Message, context: Context) -> Message:
        trace = Trace()
        try:
            device = _find(context, text, trace)
            with _threads(device.experiment.fleet.threads or 1):
                parcel = parcel_of(message.content, "a message")
                _recall(device, context.state)
                reply = device.handle(kind, parcel, trace)
                _keep(context.state, device)
                return Message(records_of(reply), reply_to=message)
        except Exception:
            failure = protocol.Failure(trace.client, trace.round, trace.stage, traceback.format_exc())
            return Message(Error(_RAISED, failure.reason()), reply_to=message)

    return handle


def _recall(device: MessageHandler, state: RecordDict) -> None:
    """Restore the client's memory from `context.state`, where the last message left it."""
    what = "what this client remembers"
    device.hold(parcel_of(state, what, _METRIC) if f"{_METRIC}{HEADER}" in state else None)
    if f"{_STATE}{HEADER}" not in state:
        device.restore({})
        return
    arrays, forms = parcel_of(state, what, _STATE).arrays, device.forms()
    device.restore(unpack_tensors(arrays, {name: forms[name] for name in arrays if name in forms}, what))


def _keep(state: RecordDict, device: MessageHandler) -> None:
    """Store the client's memory in `context.state` until the next message."""
    parts = {_STATE: Parcel(header(), pack_tensors(device.state()))}
    if device.metric is not None:
        parts[_METRIC] = device.metric
    for prefix, parcel in parts.items():
        for name, record in records_of(parcel, prefix).items():
            state[name] = record


def _find(context: Context, text: str | None, trace: Trace) -> MessageHandler:
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
    """Set the number of CPU threads, which changes bits, and restore it: others may share the process."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
