"""Streams of items, and the room at the client: what was received and not yet read.

Synchronous but for the waiting itself. The client's reader puts items in; any
task takes them out. A stream is bounded: :meth:`Stream.full` tells the reader
to stop, and then TCP carries the back-pressure to the broker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import trio

from broker.client.errors import ClientError
from broker.client.messages import Event, Item, Joined, Lost, Member, Position, Presence

OVERDRAFT = 10
"""How many times its limit a stream may grow while a request is waiting for its reply.

Whoever waits for a reply may be the very task that reads the stream, and the
reply stands behind the stream's events: a strict limit would be a deadlock.
"""


class Stream:
    """Items in order, for one reader or several (each item goes to one of them).

    ``async for event in stream`` gives the events alone, :meth:`items` all there
    is. It ends when the room is left or the client closed by this side;
    otherwise it raises :class:`~broker.client.errors.RoomClosed` or
    :class:`~broker.client.errors.Closed`, after what was received before.
    """

    def __init__(self, limit: int, on_space: Callable[[], None]) -> None:
        self.iterated = False
        self.reported = False
        self._limit = limit
        self._on_space = on_space
        self._items: deque[Item] = deque()
        self._readers = trio.lowlevel.ParkingLot()
        self._ended = False
        self._error: ClientError | None = None

    def __len__(self) -> int:
        return len(self._items)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<Stream, {len(self)} waiting>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while True:
            item = await self._take()
            if isinstance(item, Event):
                return item

    def items(self) -> AsyncIterator[Item]:
        """Events and what happened between them: presence, losses, recoveries."""
        return _Items(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(None)

    # ------------------------------------------------------ the client's side

    @property
    def ended(self) -> bool:
        """Whether nothing more will be put in."""
        return self._ended

    def full(self, *, overdraft: bool) -> bool:
        """Whether the reader must wait before the next :meth:`put`."""
        limit = self._limit * OVERDRAFT if overdraft else self._limit
        return len(self._items) >= limit and not self._ended

    def put(self, item: Item) -> None:
        """Add an item; ignored once the stream has ended."""
        if not self._ended:
            self._items.append(item)
            self._readers.unpark()

    def end(self, error: ClientError | None) -> None:
        """Nothing more comes. Readers get the rest, then ``error``, else a normal end."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._readers.unpark_all()
            self._on_space()

    async def _take(self) -> Item:
        self.iterated = True
        await trio.lowlevel.checkpoint_if_cancelled()  # before an item is taken, so that none is lost
        while not self._items:
            if self._ended:
                if self._error is None:
                    raise StopAsyncIteration
                raise self._error
            await self._readers.park()
        was_full = self.full(overdraft=False)
        item = self._items.popleft()
        if was_full:
            self._on_space()
        # A consumer that always finds an item must still let others run.
        await trio.lowlevel.cancel_shielded_checkpoint()
        return item


class _Items:
    """Iterator over everything in a stream. A class, because an abandoned async generator needs closing."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        return await self._stream._take()


class Owner(Protocol):
    """What a room needs of its client."""

    async def leave(self, room: Room) -> None:
        """Leave ``room``."""


class Room(Stream):
    """A joined room; made by :meth:`Client.join`, and by the client for rooms the broker joined.

    ``name``. ``recovered``: whether the last join continued without a hole.
    ``position``: up to where events were received (they may still wait here;
    ``event.position`` is where a reader stands), ``None`` in an ephemeral room.
    ``members``: by session, kept up to date if joined with ``presence=True``.
    """

    def __init__(
        self,
        name: str,
        owner: Owner,
        limit: int,
        on_space: Callable[[], None],
        *,
        tail: int | None = None,
        filter: Any = None,  # noqa: A002  # the protocol's word
        presence: bool = False,
        since: Position | None = None,
    ) -> None:
        super().__init__(limit, on_space)
        self.name = name
        self.recovered = False
        self.position = since
        self.members: dict[str, Member] = {}
        self.state: Mapping[str, Any] | None = None
        self.resuming = False
        self._owner = owner
        self._keep = limit > 0
        self._tail = tail
        self._filter = filter
        self._presence = presence
        self._unread = 0

    def __repr__(self) -> str:
        return f"<Room {self.name!r} at {self.position}, {len(self)} waiting>"

    async def leave(self) -> None:
        """Stop receiving; what was received before can still be read."""
        await self._owner.leave(self)

    # ------------------------------------------------------ the client's side

    def wish(self) -> dict[str, Any]:
        """Fields of the ``join`` that continues where this room stands."""
        fields: dict[str, Any] = {"room": self.name}
        if self.position is not None:
            fields["since"] = self.position._asdict()
        if self._tail is not None:
            fields["tail"] = self._tail
        if self._filter is not None:
            fields["filter"] = self._filter
        if self._presence:
            fields["presence"] = True
        return fields

    def joined(self, reply: Joined) -> None:
        """The broker's answer to :meth:`wish`; the replay follows it."""
        self.recovered = reply.recovered
        self.members = {member.session: member for member in reply.members}
        if reply.position is None:
            self.position = None
        elif not reply.recovered:
            # The tail is still to come: should the connection break before it
            # does, we are as far as before its first event.
            self.position = Position(reply.position.epoch, max(0, reply.offset - (self._tail or 0)))

    def advance(self, offset: int) -> None:
        """An event was received. Older ones come too: the snapshot of a ``last_value`` room."""
        if self.position is not None and offset > self.position.offset:
            self.position = Position(self.position.epoch, offset)

    def observe(self, change: Presence) -> None:
        """Apply a presence change."""
        for member in (*change.joined, *change.changed):
            self.members[member.session] = member
        for member in change.left:
            self.members.pop(member.session, None)

    def keeps(self, *, elsewhere: bool) -> bool:
        """Whether items are to be kept here.

        Not for a room that nobody iterates while its events are read
        ``elsewhere`` (:meth:`Client.events`), nor with a buffer of 0.
        """
        return self._keep and (self.iterated or not elsewhere)

    def skip(self, item: Item) -> None:
        """An item was not kept; a later reader is told how many events that were."""
        self._unread += isinstance(item, Event)

    async def _take(self) -> Item:
        if self._unread:
            count, self._unread = self._unread, 0
            self.iterated = True
            await trio.lowlevel.checkpoint()
            return Lost(room=self.name, reason="unread", count=count)
        return await super()._take()
