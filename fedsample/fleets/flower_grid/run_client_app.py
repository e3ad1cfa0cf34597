"""A node's handling of a message: run the ClientApp, and reply whatever happens."""

from __future__ import annotations

import logging

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsample.fleets.compute_thread import Stopped
from fedsample.fleets.flower_grid import adapter

_log = logging.getLogger("flwr")


def answer(app: ClientApp, message: Message, context: Context) -> tuple[Message, Context]:
    """Return a node's reply, and its context afterwards.

    Args:
        app: the node's ClientApp.
        message: the node's own copy; the app may change it.
        context: the node's context; not changed.

    Returns:
        The app's reply, or an error with Flower's code if it raises, returns nothing or replies to something else; and
        a new context, or the old one after an error: a failed message leaves no trace, as in Flower.

    Raises:
        Stopped: if it is raised in the app.
    """
    who = context.node_config.get(adapter.PARTITION_ID_KEY, context.node_id)
    asked, fresh = adapter.envelope(message), adapter.copied_context(context)
    try:
        reply = app(message, fresh)
        fault = adapter.mismatch(asked, reply)
        if fault is None:
            return adapter.incoming(reply, f"{asked.metadata.message_id}-reply"), fresh
    except Stopped:
        raise
    except BaseException as error:  # whatever the ClientApp raises is reported to the server
        _log.error("ClientApp of partition %s raised", who, exc_info=error)
        return adapter.raised(asked, error), context
    _log.error("ClientApp of partition %s: %s", who, fault)
    return adapter.no_reply(asked, fault), context
