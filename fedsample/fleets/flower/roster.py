"""The clients on a Flower Grid: their partitions, their nodes, and messages to and from them in client order."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from flwr.app import Message

from fedsample import protocol
from fedsample.errors import ClientError, ConfigError, QuorumError
from fedsample.protocol.flower_records import parcel_of, records_of
from fedsample.protocol.wire import Header, Parcel, header

if TYPE_CHECKING:
    from flwr.serverapp import Grid

_PAUSE = 0.2  # seconds between two queries for nodes
_ABSENT = (3, 4, 5)  # Flower's codes for an unavailable message, reply or node: no client failed


class Roster:
    """The clients of a federation, whatever nodes they run on.

    Args:
        grid: the grid of a running ServerApp.
        n: number of clients.
        terms: what each must compute, see `protocol.terms`.
        timeout: seconds to wait for nodes and for replies.
    """

    def __init__(self, grid: Grid, n: int, terms: Mapping[str, int | str], timeout: float) -> None:
        self.grid, self.n, self.timeout = grid, n, timeout
        self._terms = terms
        self._nodes: list[int] = []
        self._tags: list[str] = []

    @property
    def nodes(self) -> list[int]:
        """The node of each client; asked for once.

        Raises:
            QuorumError: if too few nodes are there in time.
            ConfigError: if they run something else.
        """
        if not self._nodes:
            self._meet()
        return self._nodes

    @property
    def tags(self) -> list[str]:
        """The tag of the metric that each client held when it was greeted; empty: none."""
        return self._tags if self.nodes else []

    def send(self, contents: Mapping[int, Parcel], kind: str, group: str = "") -> list[Message]:
        """Make messages to some clients, ready for the grid."""
        return [Message(records_of(each), self.nodes[i], kind, group_id=group) for i, each in contents.items()]

    def sort(self, replies: Iterable[Message], round: int) -> dict[int, Parcel]:
        """Sort replies by client, in client order, without those that Flower reports as unavailable.

        Raises:
            ClientError: the first failure, in client order.
        """
        client_of = {node: client for client, node in enumerate(self.nodes)}
        there = [reply for reply in replies if reply.has_content() or reply.error.code not in _ABSENT]
        found = {client_of[reply.metadata.src_node_id]: reply for reply in there}  # the others come from the SuperLink
        answers = {}
        for client, reply in sorted(found.items()):
            if reply.has_error():
                raise _failed(reply, client, round)
            answers[client] = parcel_of(reply.content, f"the answer of client {client}")
        return answers

    def broadcast(self, kind: str, contents: Sequence[Parcel]) -> list[Parcel]:
        """Send one message to each client -> their replies, in client order.

        Raises:
            ClientError: if a client failed.
            QuorumError: if one did not answer.
        """
        sent = self.send(dict(enumerate(contents)), kind)
        answers = self.sort(self.grid.send_and_receive(sent, timeout=self.timeout), 0)
        missing = [i for i in range(self.n) if i not in answers]
        if missing:
            raise self.quorum(missing, f"message {kind}")
        return list(answers.values())

    def quorum(self, missing: list[int], what: str) -> QuorumError:
        """Make the error that names the clients that did not answer."""
        return QuorumError(
            f"{what}: {_listed(missing)} of {self.n} did not answer within {self.timeout:g} s, and without knowing how "
            "likely that is nothing sound can be done without them; see that they run, then resume, or allow more time"
        )

    def _meet(self) -> None:
        """Ask every node for its partition and what it computes."""
        deadline = time.monotonic() + self.timeout
        while len(found := sorted(self.grid.get_node_ids())) < self.n:
            if time.monotonic() > deadline:
                raise QuorumError(
                    f"{len(found)} of {self.n} clients connected within {self.timeout:g} s: start the other SuperNodes "
                    f"(in a simulation --federation-config 'num-supernodes={self.n}')"
                )
            time.sleep(_PAUSE)
        hello = [Message(records_of(Parcel(header())), node, protocol.HELLO) for node in found]
        greeted: dict[int, tuple[int, str]] = {}
        for reply in self.grid.send_and_receive(hello, timeout=self.timeout):
            node = reply.metadata.src_node_id
            if reply.has_error():
                raise _failed(reply, -1, 0)
            greeting = f"the greeting of node {node}"
            said = Header(parcel_of(reply.content, greeting), greeting)
            client = said.integer("client")
            self._agree(client, said)
            if client in greeted:
                raise ConfigError(
                    f"nodes {greeted[client][0]} and {node} both have partition-id {client}: give each SuperNode one "
                    f"of its own, 0 to {self.n - 1}"
                )
            greeted[client] = node, said.text("metric")
        missing = [i for i in range(self.n) if i not in greeted]
        if missing:
            raise QuorumError(
                f"{_listed(missing)} of {self.n} did not answer the greeting within {self.timeout:g} s ({len(found)} "
                "nodes are connected): see the SuperNodes' logs"
            )
        self._nodes = [greeted[i][0] for i in range(self.n)]
        self._tags = [greeted[i][1] for i in range(self.n)]

    def _agree(self, client: int, said: Header) -> None:
        differing = [
            f"{name} = {said.value(name)!r}, expected {want!r}"
            for name, want in self._terms.items()
            if said.value(name) != want
        ]
        if differing:
            raise ConfigError(f"client {client} runs another configuration: {'; '.join(differing)}")


def _failed(reply: Message, client: int, round: int) -> ClientError:
    failure = protocol.Failure.of_reason(reply.error.reason, client, round)
    return ClientError(failure.client, failure.round, failure.stage, failure.detail)


def _listed(clients: list[int]) -> str:
    shown = ", ".join(map(str, clients[:20])) + (", ..." if len(clients) > 20 else "")
    return f"client{'s' * (len(clients) != 1)} {shown}"
