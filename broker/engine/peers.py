"""Other nodes, as the hub, the sessions and the operators' port need them.

An :class:`~broker.engine.base.Engine` keeps the past of rooms with history and
brings their stored events to every node; everything else that nodes have to
tell each other goes through here. :class:`Alone` is the answer of a node that
has no others. Everything is called on the Trio thread, and only what is
``async`` waits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import trio

from broker.protocol.events import Event, SessionId, UserId


class Described(Protocol):
    """A member of a room, on its own node."""

    def describe(self) -> dict[str, Any]:
        """Its ``user``, ``session``, ``info``, ``state``, ``joined_at`` and ``seen``, as clients see them."""


class Mate(NamedTuple):
    """A member of a room whose session is on another node."""

    session: SessionId
    user: UserId | None
    fields: bytes
    """JSON of the member as clients see it."""


class Events(Protocol):
    """What other nodes and backends make happen here; the hub implements it."""

    def receive(self, events: Sequence[Event]) -> None:
        """Ephemeral events, from another node or from a backend; never stored, without a position."""

    def know_mates(self, room: str, node: str, mates: Mapping[SessionId, Mate]) -> None:
        """These are the members that ``node`` has in ``room``, and no others; empty when it has gone."""

    def change_mates(
        self, room: str, node: str, came: Sequence[Mate], changed: Sequence[Mate], went: Sequence[SessionId]
    ) -> None:
        """Changes since the last word about ``node`` and ``room``."""

    def part_mates(self, node: str) -> None:
        """``node`` drains: its members will come back elsewhere.

        So the hub keeps showing each until its user is in the room again, or
        until :meth:`know_mates` says that the node has gone.
        """


class NodeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One node, as it last described itself."""

    id: str
    """Of this incarnation: a restarted or fenced node has another."""
    name: str
    group: str = ""
    """Same for the workers of one machine that one supervisor started."""
    version: str = ""
    started_at: float = 0.0
    sessions: int = 0
    load: float = 0.0
    """0 to 1; see ``/api/load``."""
    draining: bool = False
    ended: bool = False
    """It has drained and is gone; only its members are kept for a while, until they are back."""


class Answer(NamedTuple):
    """What one node answered; ``error`` is set when it could not."""

    node: str
    """Name of the node."""
    result: Any
    error: str | None = None


Handler = Callable[[Any], Awaitable[Any]]
"""Answers a question: JSON in, JSON out. A :class:`~broker.errors.BrokerError` becomes the asker's."""


class Peers(Protocol):
    """What every node offers of the others."""

    def attached(self, room: str) -> bool:
        """Whether the room's events from elsewhere arrive here, so that :meth:`attach` would not wait."""

    async def attach(self, room: str, *, slots: bool = False) -> Sequence[Event]:
        """Hear of ``room`` from now on: events, and members where it shows them.

        Returns once that is so, or at once when the others cannot be reached
        now; they will be heard when they can. With ``slots``: the newest event
        of each slot that was relayed with ``remember``, oldest first.
        """

    def detach(self, room: str) -> None:
        """Nobody here needs the room any more. Unknown rooms are ignored."""

    def relay(self, event: Event, *, remember: float = 0.0) -> None:
        """Tell the other nodes an ephemeral event. ``remember`` (s): keep it as the newest of its slot."""

    def touch(self, room: str, session: SessionId, user: UserId | None, member: Described | None) -> None:
        """The session came into the room or has changed there; ``None``: it has left.

        Described when it is told, a moment later, so that many changes are one.
        """

    async def mates(self, room: str) -> Sequence[Mate]:
        """Members of a room on other nodes, also of one that is not attached. Raises ``unavailable``."""

    def appeared(self, session: SessionId, user: UserId | None) -> None:
        """A session was let in as anonymous, or identified, at once or later."""

    def vanished(self, session: SessionId, user: UserId | None) -> None:
        """One that appeared has ended."""

    async def part(self) -> None:
        """Tell nobody any more that members leave: the node drains, and they will come back elsewhere.

        Returns when the others have been told so, or when that takes too long.
        """

    def nodes(self) -> Sequence[NodeInfo]:
        """Nodes alive now, this one first."""

    def serve(self, method: str, handler: Handler) -> None:
        """Answer other nodes' questions called ``method``."""

    async def ask(self, method: str, parameters: Any) -> Sequence[Answer]:
        """Ask all other nodes; who does not answer within 2 s has ``error`` set. Raises nothing of theirs."""


class Alone:
    """A node without others: what it relays reaches nobody, and whom it asks does not exist."""

    def __init__(self, info: Callable[[], NodeInfo]) -> None:
        self._info = info

    def attached(self, room: str) -> bool:
        """Always: there is nobody to wait for."""
        return True

    async def attach(self, room: str, *, slots: bool = False) -> Sequence[Event]:
        """Nothing to do."""
        await trio.lowlevel.checkpoint()
        return ()

    def detach(self, room: str) -> None:
        """Nothing to do."""

    def relay(self, event: Event, *, remember: float = 0.0) -> None:
        """Nobody to tell."""

    def touch(self, room: str, session: SessionId, user: UserId | None, member: Described | None) -> None:
        """Nobody to tell."""

    async def mates(self, room: str) -> Sequence[Mate]:
        """There are none."""
        await trio.lowlevel.checkpoint()
        return ()

    def appeared(self, session: SessionId, user: UserId | None) -> None:
        """Nobody to tell."""

    def vanished(self, session: SessionId, user: UserId | None) -> None:
        """Nobody to tell."""

    async def part(self) -> None:
        """Nobody to tell."""
        await trio.lowlevel.checkpoint()

    def nodes(self) -> Sequence[NodeInfo]:
        """Only itself."""
        return (self._info(),)

    def serve(self, method: str, handler: Handler) -> None:
        """Nobody asks."""

    async def ask(self, method: str, parameters: Any) -> Sequence[Answer]:
        """Nobody answers."""
        await trio.lowlevel.checkpoint()
        return ()
