"""All uses of Flower's private API: when Flower changes, this file changes and no other.

Metadata and message ids, the identity of the running task, error codes and their reasons, `Run`, the grammar of
`--run-config`, and the number of nodes that Flower's sampling waits for. The rest of fedsample uses `flwr.app`,
`flwr.serverapp` and `flwr.clientapp` as documented.
"""

from __future__ import annotations

import copy
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import click
import flwr
from flwr.app import Array, ArrayRecord, Context, Error, Message, Metadata, RecordDict

from fedsample.errors import ConfigError, DataError
from fedsample.fleets.flower_grid import versions

versions.check(flwr.__version__)
try:
    from flwr.app.message import make_message
    from flwr.clientapp.client_app import LoadClientAppError
    from flwr.common.config import flatten_dict, fuse_dicts, parse_config_args
    from flwr.common.constant import MESSAGE_TTL_TOLERANCE, NUM_PARTITIONS_KEY, PARTITION_ID_KEY, ErrorCode
    from flwr.common.constant import SUPERLINK_NODE_ID as SERVER
    from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
    from flwr.proto.message_pb2 import Context as ContextProto
    from flwr.proto.message_pb2 import Message as MessageProto
    from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
    from flwr.supercore.run import Run, RunNotRunningException
    from flwr.supercore.task_identity import TaskIdentity
except ImportError as error:
    raise ConfigError(
        f"flwr {flwr.__version__} has moved something that fedsample needs ({error}); pip install 'flwr==1.41.0'"
    ) from error

__all__ = ["NUM_PARTITIONS_KEY", "PARTITION_ID_KEY", "SERVER", "Run", "RunNotRunningException"]

Value = bool | float | int | str  # the types of values in Flower's configurations
_TASK = 1  # the task id of every ServerApp; there is one per run


# --- the identity of the running task ---------------------------------------------------------------------------------

_FIELDS = ("_run_id", "_task_id", "_node_id")  # those without an underscore cannot be read before they are set
_guard = threading.Lock()
_running: list[int | None] = []  # runs in progress, oldest first; None: in Flower's own runtime
_before: tuple[int | None, ...] = (None, None, None)


@contextmanager
def identity(run_id: int | None) -> Iterator[None]:
    """Let `Message(...)` be made in the name of a run's ServerApp, for as long as the context lasts.

    Flower keeps one identity for the whole process. Runs of ours may share it, since `outgoing` replaces it by each
    message's own run. Flower's own runtime (`run_id` None) sets it and relies on it, so there is one of those at a time
    and the others leave the identity to it. The initial identity is restored when the last run ends.

    Raises:
        ConfigError: if Flower's own runtime would run twice in this process.
    """
    global _before
    with _guard:
        if run_id is None and None in _running:
            raise ConfigError(
                "a Flower simulation is running in this process: wait for its end, or use another process"
            )
        if not _running:
            _before = tuple(getattr(TaskIdentity, name) for name in _FIELDS)
        _running.append(run_id)
        _become()
    try:
        yield
    finally:
        with _guard:
            _running.remove(run_id)
            if _running:
                _become()
            else:
                for name, value in zip(_FIELDS, _before, strict=True):
                    setattr(TaskIdentity, name, value)


def _become() -> None:
    """Take the identity of the latest run, unless Flower's runtime holds it."""
    youngest = _running[-1]
    if youngest is not None and None not in _running:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = youngest, _TASK, SERVER


def empty_run(run_id: int) -> Run:
    """Make the run that `Grid.run` shows."""
    run = Run.create_empty(run_id)
    run.primary_task_id = _TASK
    return run


# --- messages ---------------------------------------------------------------------------------------------------------


def outgoing(message: Message, run_id: int, message_id: str) -> Message:
    """Convert a ServerApp's message to what a node receives, with its id, as Flower does.

    Raises:
        ValueError: if it cannot be sent: it is a reply, or its time to live is not positive.
    """
    metadata = message.metadata
    metadata.__dict__.update(_message_id=message_id, _run_id=run_id, _src_node_id=SERVER, _src_task_id=_TASK)
    if metadata.reply_to_message_id != "" or metadata.ttl <= 0:
        raise ValueError(f"Invalid message: {message}")
    return copied(message)


def incoming(reply: Message, message_id: str) -> Message:
    """Convert a node's reply to what the ServerApp receives."""
    reply.metadata.__dict__["_message_id"] = message_id
    return copied(reply)


def copied(message: Message) -> Message:
    """Copy a message; nothing mutable is shared."""
    metadata = _copied_metadata(message)
    if message.has_error():
        return make_message(metadata=metadata, error=Error(message.error.code, message.error.reason))
    return make_message(metadata=metadata, content=copied_records(message.content))


def envelope(message: Message) -> Message:
    """Copy a message without its content: replies are checked against it, whatever the app does to its message."""
    return make_message(metadata=_copied_metadata(message), content=RecordDict())


def _copied_metadata(message: Message) -> Metadata:
    twin = Metadata.__new__(Metadata)
    twin.__dict__.update(message.metadata.__dict__)
    return twin


def copied_records(records: RecordDict) -> RecordDict:
    """Copy records; the bytes of arrays, which are immutable, are shared."""
    fresh = records.copy()
    for name, record in records.items():
        twin = record.copy()
        if isinstance(twin, ArrayRecord):
            for key, array in twin.items():
                twin[key] = _copied_array(array)
        else:
            lists = {key: list(value) for key, value in twin.items() if isinstance(value, list)}
            twin.update(lists)  # type: ignore[arg-type]  # of the same kind as the original
        fresh[name] = twin
    return fresh


def _copied_array(array: Array) -> Array:
    twin = Array.__new__(type(array))
    data = array.data if isinstance(array.data, bytes) else bytes(array.data)
    twin.__dict__.update(dtype=array.dtype, shape=tuple(array.shape), stype=array.stype, data=data)
    return twin


def copied_context(context: Context) -> Context:
    """Copy a context."""
    twin = copy.copy(context)
    twin.node_config, twin.run_config = dict(context.node_config), dict(context.run_config)
    twin.state = copied_records(context.state)
    return twin


def packed(message: Message) -> bytes:
    """Serialise a message as Flower does, for carriers that leave the process."""
    return bytes(message_to_proto(message).SerializeToString())


def unpacked(data: bytes) -> Message:
    """Read what `packed` wrote.

    Raises:
        DataError: if the bytes are no message.
    """
    with _telling(f"{len(data)} bytes that are no message of Flower's", "is the other side of the same version?"):
        return message_from_proto(MessageProto.FromString(data))


def packed_context(context: Context) -> bytes:
    """Serialise a context as Flower does, for nodes that store theirs on disk."""
    return bytes(context_to_proto(context).SerializeToString())


def unpacked_context(data: bytes) -> Context:
    """Read what `packed_context` wrote.

    Raises:
        DataError: if the bytes are no context.
    """
    with _telling(f"{len(data)} bytes that are no context of Flower's", "were they written by another version?"):
        return context_from_proto(ContextProto.FromString(data))


@contextmanager
def _telling(what: str, question: str) -> Iterator[None]:
    """Turn an error in reading bytes into a `DataError` that says what they should be."""
    try:
        yield
    except Exception as error:  # protobuf's own exception, not one of Python's
        raise DataError(f"{what} ({error}): {question}") from error


def mark_delivered(message: Message, now: float) -> None:
    """Set the time at which a message reached the other side."""
    message.metadata.delivered_at = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(now))


def mismatch(message: Message, reply: object) -> str | None:
    """Say why something is not the reply to a message; None: it is."""
    if not isinstance(reply, Message):
        return f"the ClientApp returned {type(reply).__name__}, expected a Message that replies to what it was given"
    got, sent = reply.metadata, message.metadata
    if got.reply_to_message_id != sent.message_id or got.run_id != sent.run_id or got.src_node_id != sent.dst_node_id:
        return (
            f"the ClientApp's Message replies to message {got.reply_to_message_id!r} of run {got.run_id}, expected "
            f"{sent.message_id!r} of run {sent.run_id}: make it with Message(content, reply_to=message)"
        )
    if reply.has_content() == reply.has_error():
        return "the ClientApp's Message holds neither content nor an error"
    if got.created_at + got.ttl - sent.created_at - sent.ttl > MESSAGE_TTL_TOLERANCE:
        return f"the ClientApp's Message lives {got.ttl:g} s, longer than what it replies to"
    return None


# --- errors -----------------------------------------------------------------------------------------------------------


def raised(message: Message, error: BaseException) -> Message:
    """Make Flower's error reply for a ClientApp that raised."""
    if isinstance(error, LoadClientAppError):
        reason = "An exception was raised when attempting to load `ClientApp`"
        return _error_reply(message, ErrorCode.LOAD_CLIENT_APP_EXCEPTION, reason)
    try:
        text = str(error)
    except Exception:  # an exception whose text cannot be made is still reported
        text = "no message"
    return _error_reply(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error)}:<'{text}'>")


def no_reply(message: Message, reason: str) -> Message:
    """Make the error reply for a ClientApp that returned nothing, or a reply to something else."""
    return _error_reply(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)


def _error_reply(message: Message, code: int, reason: str) -> Message:
    left = max(message.metadata.created_at + message.metadata.ttl - time.time(), 0.001)
    return Message(Error(code, reason), reply_to=message, ttl=left)


@cache
def _reasons() -> dict[str, tuple[int, str]]:
    """Flower's codes and reasons for errors that the SuperLink reports in a node's place."""
    from flwr.server.superlink.linkstate import utils  # imports a database, so not before it is needed

    return {
        "message": (ErrorCode.MESSAGE_UNAVAILABLE, utils.MESSAGE_UNAVAILABLE_ERROR_REASON),
        "reply": (ErrorCode.REPLY_MESSAGE_UNAVAILABLE, utils.REPLY_MESSAGE_UNAVAILABLE_ERROR_REASON),
        "node": (ErrorCode.NODE_UNAVAILABLE, utils.NODE_UNAVAILABLE_ERROR_REASON),
    }


def unavailable(what: str, run_id: int, message_id: str, sent: Metadata | None = None) -> Message:
    """Make the SuperLink's error reply in a node's place.

    Args:
        what: "message": expired, or never sent. "reply": it came and has expired. "node": it is gone.
        run_id: the grid's run.
        message_id: the message that was asked.
        sent: its metadata, if known.
    """
    code, reason = _reasons()[what]
    metadata = Metadata(
        run_id=run_id,
        message_id=f"{message_id}-{what}",
        src_node_id=SERVER,
        dst_node_id=SERVER,
        reply_to_message_id=message_id,
        group_id="" if sent is None else sent.group_id,
        created_at=time.time(),
        ttl=0 if sent is None else max(sent.created_at + sent.ttl - time.time(), 0),
        message_type=SYSTEM_MESSAGE_TYPE if sent is None else sent.message_type,
    )
    metadata.delivered_at = ""
    return make_message(metadata=metadata, error=Error(code, reason))


def is_expired(reply: Message) -> bool:
    """Whether a reply is the SuperLink's error for a message that no node answered in time."""
    return reply.has_error() and reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE


# --- configurations ---------------------------------------------------------------------------------------------------

_PAIR = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")  # as in Flower's own parser, which ignores what is not a pair


def flat(config: Mapping[str, object], what: str) -> dict[str, Value]:
    """Flatten nested tables to dotted keys.

    Raises:
        ConfigError: if a value is not a bool, int, float or str.
    """
    try:
        return dict(flatten_dict(dict(config)))
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from error


def overridden(config: dict[str, Value], overrides: Sequence[str]) -> dict[str, Value]:
    """Apply `--run-config` to a run configuration: 'key=value ...', or one TOML file.

    Raises:
        ConfigError: if it cannot be read, or names a key that the app does not have.
    """
    for line in overrides:
        rest = "" if line.endswith(".toml") else _PAIR.sub("", line).strip()
        if rest:
            raise ConfigError(
                f"--run-config {line!r}: {rest!r} is no key=value; text wants quotes, as in key='some text'"
            )
    try:
        parsed = parse_config_args(list(overrides))
    except (click.ClickException, ValueError, OSError) as error:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        raise ConfigError(f"--run-config {' '.join(overrides)!r}: {text}") from error
    try:
        return dict(fuse_dicts(dict(config), parsed))
    except ValueError:
        unknown = sorted(parsed.keys() - config.keys())
        known = ", ".join(sorted(config)) or "none"
        raise ConfigError(
            f"--run-config sets {', '.join(unknown)}, and the app has no such key in [tool.flwr.app.config]; it has: "
            f"{known}"
        ) from None


# --- waiting ----------------------------------------------------------------------------------------------------------


def awaited_nodes() -> int:
    """How many nodes Flower's sampling waits for, if it is the caller of `get_node_ids`; else 0.

    Flower asks again every second, or for a day, until there are that many.
    """
    frame = sys._getframe(2)
    for _ in range(3):
        of_flower = str(frame.f_globals.get("__name__")).startswith("flwr.")  # an app may have functions of these names
        if of_flower and frame.f_code.co_name == "sample_nodes":  # flwr.serverapp.strategy
            return int(frame.f_locals.get("min_available_nodes", 0))
        if of_flower and frame.f_code.co_name == "wrapped_method":  # the client manager of older strategies
            return _awaited_clients(*frame.f_locals.get("args", ()), **frame.f_locals.get("kwargs", {}))
        if frame.f_back is None:
            break
        frame = frame.f_back
    return 0


def _awaited_clients(num_clients: int = 0, min_num_clients: int | None = None, *_: object, **__: object) -> int:
    """The number that `ClientManager.sample` waits for; it does not wait to sample more clients than that."""
    return int(num_clients if min_num_clients is None else min_num_clients)
