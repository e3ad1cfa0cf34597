"""Addresses of servers: `host:port`, and where plaintext is allowed.

A host is a DNS name, an IPv4 address, or an IPv6 address in brackets, as in `[2001:db8::1]:8443`.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from typing import NamedTuple

from fedsample.errors import AddressError, FedSampleError

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_SHAPES = "expected HOST:PORT such as sampler.example.org:8443, 192.0.2.7:8443 or [2001:db8::1]:8443"

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Address(NamedTuple):
    """Where a server listens.

    Attributes:
        host: DNS name in lower case, or an IP address without brackets.
        port: 1 to 65535; 0, only for listening: a free port is chosen.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, *, listen: bool = False) -> Address:
    """Read `host:port`.

    Args:
        text: the address.
        listen: allow port 0, for which a free port is chosen.

    Raises:
        AddressError: no port, a port out of range, IPv6 without brackets, a URL, or an invalid host.
    """
    if "://" in text or "/" in text:
        raise AddressError(f"address {text!r}: looks like a URL or a path; {_SHAPES}")
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not rest.startswith(":") or ":" not in host:
            raise AddressError(f"address {text!r}: brackets are for an IPv6 address before a port; {_SHAPES}")
        port = rest[1:]
    else:
        host, colon, port = text.rpartition(":")
        if not colon:
            raise AddressError(f"address {text!r}: has no port; {_SHAPES}")
        if ":" in host:
            raise AddressError(f"address {text!r}: an IPv6 address stands in brackets, [ADDRESS]:PORT; {_SHAPES}")
    lowest = 0 if listen else 1
    if not re.fullmatch(r"[0-9]{1,5}", port) or not lowest <= int(port) <= 65535:
        raise AddressError(f"address {text!r}: port {port!r} is not a whole number from {lowest} to 65535")
    return Address(parse_host(host, text), int(port))


def parse_host(host: str, where: str) -> str:
    """Normalise a host: a DNS name in lower case, or an IP address.

    Args:
        host: a name, or an address without brackets.
        where: what it was read from, for the error.

    Raises:
        AddressError: it is neither.
    """
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    name = host.lower().removesuffix(".")
    labels = name.split(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
        raise AddressError(
            f"{where!r}: host {host!r} is neither an IP address nor a DNS name (labels of 1 to 63 of a-z, 0-9, '-'; "
            "other letters in their xn-- form)"
        )
    return name


def is_loopback(address: IPAddress) -> bool:
    """Whether packets to it stay on this machine; an IPv4 address mapped into IPv6 counts as that address."""
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def check_free(address: Address) -> None:
    """Refuse an address that cannot be listened at, with the operating system's reason; gRPC's says little.

    Raises:
        FedSampleError: another process listens there, it is not this machine's, or the port is reserved.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise _occupied(address, error) from None
    errors = []
    for family, kind, protocol, _, place in found:
        try:
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
                trial.bind(place)
                trial.listen(1)
        except OSError as error:
            errors.append(error)
            if error.errno == errno.EADDRINUSE or len(errors) == len(found):  # a name may have one that is not here
                raise _occupied(address, error) from None


def _occupied(address: Address, error: OSError) -> FedSampleError:
    advice = {
        errno.EADDRINUSE: "another process listens there, perhaps another server: end it, or choose another port",
        errno.EADDRNOTAVAIL: "it is none of this machine's addresses: take one of them, or 0.0.0.0 for all",
        errno.EACCES: "ports below 1024 are reserved: choose one above",
    }.get(error.errno or 0, "choose another with --listen")
    return FedSampleError(f"cannot listen at {address} ({error.strerror or error}): {advice}")


def check_insecure(address: Address | str, *, listen: bool = False) -> Address:
    """Refuse plaintext anywhere but on loopback, and say where it is allowed.

    Args:
        address: as given to `--insecure`.
        listen: allow port 0.

    Returns:
        The address with its host as an IP address (IPv4 if a name has both): use this one, because a name may resolve
        to something else the next time.

    Raises:
        AddressError: the host is, or one of the addresses of its name is, not loopback; or the name has no address.
    """
    parsed = parse_address(address, listen=listen) if isinstance(address, str) else address
    try:
        found = socket.getaddrinfo(parsed.host, parsed.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise AddressError(
            f"--insecure {parsed}: {parsed.host!r} has no address here ({error.strerror or error}), so it cannot be "
            "checked to be loopback; use 127.0.0.1 or [::1]"
        ) from None
    hosts = sorted({str(entry[4][0]) for entry in found}, key=lambda host: (":" in host, host))
    outside = [host for host in hosts if not is_loopback(ipaddress.ip_address(host))]
    if outside:
        raise AddressError(
            f"--insecure {parsed}: {', '.join(outside)} is not loopback, and plaintext never leaves this machine; use "
            "127.0.0.1, [::1] or localhost, or certificates (fedsample certs init)"
        )
    return Address(hosts[0], parsed.port)
