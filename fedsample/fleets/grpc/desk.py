"""Asking the devices of a run, and telling newcomers what the others know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from fedsample.fleets.grpc.frames import Damaged, Digests, Message, Name
from fedsample.fleets.grpc.hub import Hub
from fedsample.wire import Parcel

SLACK = 1 << 16  # bytes of an answer beyond what its arrays must have
_GAP = 1 << 20  # numbers between two requests to everyone, for what newcomers are told in between


class Desk:
    """Names requests, asks them, and keeps what every newcomer is told first.

    Args:
        hub: the streams.

    Attributes:
        told: (kind, content) of what every device was told, in order. welcome: what is done with a newcomer while
            others are asked; by default it is told what they know, and then asked too.
    """

    def __init__(self, hub: Hub) -> None:
        """Nothing is told yet."""
        self.hub, self.n = hub, hub.invitation.clients
        self.told: list[tuple[str, Parcel]] = []
        self.welcome: Callable[[int], None] = self.equip
        self._asks = 0
        self._inserted = 0

    def ask(
        self, kind: str, parcels: Mapping[int, Parcel], round: int, limit: int, *, deadline: float | None = None,
        quorum: int | None = None, welcome: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, Parcel]]:  # fmt: skip
        """Ask devices, and yield their answers in the order of clients.

        Args:
            kind: of message. parcels: by client. round: of the request. limit: bytes of an answer. deadline, quorum:
                see `Hub.ask`. welcome: in place of the desk's.
        """
        self._asks, self._inserted = self._asks + 1, 0
        digests, at = Digests(), self._asks * _GAP
        asked = {client: self._message(client, kind, parcel, round, digests, at) for client, parcel in parcels.items()}
        answers = self.hub.ask(asked, limit, welcome=welcome or self.welcome, deadline=deadline, enough=quorum)
        for client, message in answers:
            yield client, message.parcel

    def broadcast(
        self, kind: str, parcel: Parcel, round: int = 0, limit: int = SLACK, *,
        welcome: Callable[[int], None] | None = None,
    ) -> list[Parcel]:  # fmt: skip
        """Ask every device the same -> answers, in client order."""
        parcels = dict.fromkeys(range(self.n), parcel)
        return [each for _, each in self.ask(kind, parcels, round, limit, welcome=welcome)]

    def tell(self, kind: str, parcel: Parcel, limit: int = SLACK) -> list[Parcel]:
        """Ask every device the same, and every newcomer from now on."""
        answers = self.broadcast(kind, parcel, limit=limit)
        self.told.append((kind, parcel))
        return answers

    def equip(self, client: int) -> None:
        """Tell a newcomer what the others know; from then on it is asked."""
        digests, at = Digests(), (self._asks - 1) * _GAP + self._inserted  # before what it will be asked next
        self._inserted += len(self.told)
        told = enumerate(self.told, at + 1)
        parts = [self._message(client, kind, parcel, 0, digests, number) for number, (kind, parcel) in told]
        try:
            self.hub.converse(client, parts, SLACK)
        except Damaged:
            return  # it left again; when it comes back it is a newcomer again
        self.hub.accept(client)

    def _message(self, client: int, kind: str, parcel: Parcel, round: int, digests: Digests, sequence: int) -> Message:
        hub = self.hub
        name = Name(hub.invitation.run, hub.term, round, client, digests.of(kind, parcel), sequence)
        return Message(name, kind, parcel)
