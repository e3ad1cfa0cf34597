"""Asking the devices of a run, and giving newcomers the setup that the others have."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing

from fedsample.errors import ClientError
from fedsample.fleets.grpc.framing.frames import Digests, Message
from fedsample.fleets.grpc.framing.headers import Damaged, Name
from fedsample.fleets.grpc.server.hub import Hub
from fedsample.fleets.grpc.server.streams import last_line
from fedsample.protocol.wire import Parcel

SLACK = 1 << 16  # bytes of an answer beyond its arrays
_ANSWER = 1 << 24  # bytes of a newcomer's answer to a setup message


class Dispatcher:
    """Names requests, asks devices, and keeps the setup messages for newcomers.

    Args:
        hub: the streams of the devices.

    Attributes:
        told: (kind, content) of the messages that every device was sent, in order.
        welcome: handles a newcomer while others are asked; by default it gets the setup of the others and is then asked
            too.
    """

    def __init__(self, hub: Hub) -> None:
        self.hub, self.n = hub, hub.invitation.clients
        self.told: list[tuple[str, Parcel]] = []
        self.welcome: Callable[[int], None] = self.equip
        self._sequence = 0

    def ask(
        self, kind: str, parcels: Mapping[int, Parcel], round: int, limit: int, *, deadline: float | None = None,
        quorum: int | None = None, welcome: Callable[[int], None] | None = None,
    ) -> Generator[tuple[int, Parcel]]:  # fmt: skip
        """Ask devices, and yield their answers in the order of clients.

        Args:
            kind: the type of message.
            parcels: messages by client.
            round: the round of the request.
            limit: largest size of an answer in bytes.
            deadline: see `Hub.ask`.
            quorum: see `enough` of `Hub.ask`.
            welcome: used in place of the dispatcher's own.
        """
        digests = Digests()
        asked = {client: self._message(client, kind, parcel, round, digests) for client, parcel in parcels.items()}
        answers = self.hub.ask(asked, limit, welcome=welcome or self.welcome, deadline=deadline, enough=quorum)
        with closing(answers):
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
        self.told.append((kind, parcel))  # before asking: a device that dies after its answer must be told again
        return self.broadcast(kind, parcel, limit=limit)

    def equip(self, client: int) -> None:
        """Give a newcomer the setup of the others, then accept it; one that cannot use it is refused."""
        stream, digests = self.hub.records[client].stream, Digests()
        if stream is None:
            return
        parts = [self._message(client, kind, parcel, 0, digests) for kind, parcel in self.told]
        try:
            self.hub.converse(client, stream, parts, _ANSWER)
        except Damaged:
            return  # it left again; when it is back it is a newcomer again
        except ClientError as error:
            self.hub.say(f"client {client} is back, but cannot take part: {last_line(error.detail)}")
            self.hub.refuse(client, stream, last_line(error.detail), retry=False)
            return
        self._sequence += 1
        self.hub.accept(client, stream, self._sequence)

    def _message(self, client: int, kind: str, parcel: Parcel, round: int, digests: Digests) -> Message:
        self._sequence += 1
        hub = self.hub
        sealed = digests.sealed(kind, parcel)
        name = Name(hub.invitation.run, hub.term, round, client, sealed.digest, self._sequence)
        return Message(name, kind, parcel, sealed)
