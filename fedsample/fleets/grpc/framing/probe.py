"""The probe: one unary call that returns who answers, when, in which protocol, and the caller's identity.

`fedsample doctor net` asks; any server of the fleet answers with `probe_handler`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc

from fedsample.errors import CertificateError
from fedsample.fleets.grpc.fedsample_pb2 import ProbeReply, ProbeRequest
from fedsample.fleets.grpc.framing.version import PROTOCOL, SERVICE
from fedsample.fleets.grpc.security.identity import identity_of
from fedsample.version import __version__

SOFTWARE = f"fedsample {__version__}"
METHOD = "Probe"

# The device's and the server's machine are asked as they are: a proxy between them would answer for the wrong one.
DIRECT = (("grpc.enable_http_proxy", 0),)


def probe_handler(clients: Callable[[], int] = lambda: 0, clock: Callable[[], float] = time.time) -> Any:
    """Make the server's handler: `server.add_generic_rpc_handlers((probe_handler(...),))` of `grpc.aio`.

    It answers a caller of any protocol version, so that the caller can say what differs.

    Args:
        clients: returns the number of clients that the server expects; 0: not known.
        clock: returns the time, in seconds since 1970.

    Returns:
        `grpc.GenericRpcHandler`; it leaves the service's other methods to other handlers.
    """

    async def answer(request: ProbeRequest, context: Any) -> ProbeReply:
        try:
            you = caller(context)
        except CertificateError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        return ProbeReply(
            protocol=PROTOCOL, software=SOFTWARE, unix_ms=round(clock() * 1000), you=you, clients=clients()
        )

    method = grpc.unary_unary_rpc_method_handler(
        answer, request_deserializer=ProbeRequest.FromString, response_serializer=ProbeReply.SerializeToString
    )
    return grpc.method_handlers_generic_handler(SERVICE, {METHOD: method})


def caller(context: Any) -> str:
    """Identify the caller by the URI in its certificate; "" over plaintext.

    Raises:
        CertificateError: TLS without a certificate of ours.
    """
    peer = context.auth_context()
    return identity_of(peer).uri if b"ssl" in peer.get("transport_security_type", ()) else ""


def probe_call(channel: Any) -> Callable[..., Any]:
    """Make the client's call on a channel of `grpc` or `grpc.aio`: a function of (ProbeRequest, timeout=seconds)."""
    call: Callable[..., Any] = channel.unary_unary(
        f"/{SERVICE}/{METHOD}",
        request_serializer=ProbeRequest.SerializeToString,
        response_deserializer=ProbeReply.FromString,
    )
    return call
