"""The past of rooms, read from Redis: pages of events, and acknowledged positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec
import trio

from broker.engine.base import HistoryPage, HistoryQuery, Retention, Seen
from broker.link.base import Argument, Link
from broker.logs import Throttle, get_logger
from broker.protocol.events import Event, Position, SessionId, restore
from broker.streams.flights import Flights
from broker.streams.scripts import (
    ACKNOWLEDGED,
    HISTORY,
    LONGEST_TTL,
    StreamKeys,
    StreamNames,
    Tokens,
    ask,
    life,
)

log = get_logger(__name__)

EVERYTHING: Final = Retention(2**53, LONGEST_TTL)
"""For those who want whatever the stream still has."""


class Chunk(NamedTuple):
    """What one read of a stream brought."""

    page: HistoryPage
    reached: int
    """Offset up to which the stream was read; an entry below it that is not in the page cannot be read."""


def place(room: str, body: bytes, position: Position, exclude: str | None) -> Event:
    """The event that was published as ``body``. Raises :class:`msgspec.MsgspecError`."""
    event = restore(room, body, position)
    event.place(position)
    if exclude is not None:
        event.exclude = SessionId(exclude)
    return event


class Past:
    """Reads. ``saw(epoch, commits)`` is told what each answer carried."""

    def __init__(
        self,
        link: Link,
        names: StreamNames,
        tokens: Tokens,
        *,
        saw: Callable[[str, int], object],
        clock: Callable[[], float],
    ) -> None:
        self._link = link
        self._names = names
        self._tokens = tokens
        self._saw = saw
        self._clock = clock
        self._throttle = Throttle()
        self.flights = Flights()
        self.unreadable = 0

    async def page(
        self, nursery: trio.Nursery, room: str, query: HistoryQuery, retention: Retention
    ) -> HistoryPage:
        """Answer ``query``. Raises ``unavailable``."""

        async def read() -> HistoryPage:
            keys = self._names.of(room)
            arguments = self._arguments(query, retention)
            reply = await self._link.call_script(HISTORY, self._with_store(keys), *arguments)
            return self._read(room, reply).page

        page = await self.flights.share(nursery, ("page", room, query, retention), read)
        return page._replace(events=page.events.copy())

    async def since(self, room: str, position: Position, limit: int) -> Chunk:
        """What is stored after ``position``, also beyond the room's retention. Raises ``LinkError``."""
        arguments = self._arguments(HistoryQuery(limit, since=position), EVERYTHING)
        return self._read(
            room, await ask(self._link, HISTORY, self._with_store(self._names.of(room)), *arguments)
        )

    async def acknowledged(self, nursery: trio.Nursery, room: str) -> list[Seen]:
        """Everybody's stored position. Raises ``unavailable``."""

        async def read() -> list[Seen]:
            keys = self._names.of(room)
            reply = await self._link.call_script(ACKNOWLEDGED, (keys.meta, keys.seen))
            return [
                Seen(who.decode(), int(offset), float(ts))
                for who, value in zip(reply[::2], reply[1::2], strict=True)
                if who
                for offset, _, ts in [value.partition(b":")]
            ]

        return await self.flights.share(nursery, ("seen", room), read)

    def _with_store(self, keys: StreamKeys) -> tuple[str, ...]:
        if self._link.clustered:
            return keys.meta, keys.stream
        return keys.meta, keys.stream, self._names.keys.store

    def _arguments(self, query: HistoryQuery, retention: Retention) -> list[Argument]:
        ttl = min(retention.ttl, LONGEST_TTL)
        arguments: list[Argument] = [self._tokens(), life(ttl), repr(self._clock())]
        arguments += [retention.size, ttl, query.limit]
        if query.since is not None:
            return [*arguments, "since", query.since.offset, query.since.epoch]
        if query.at is not None:
            return [*arguments, "at", repr(query.at)]
        if query.before is not None:
            return [*arguments, "before", query.before]
        assert query.tail is not None, "one of since, before, at, tail must be given"
        return [*arguments, "tail", query.tail]

    def _read(self, room: str, reply: list[Any]) -> Chunk:
        shown, offset, commits, recovered, more, first, entries = reply
        epoch = shown.decode()
        self._saw(epoch, commits)
        events: list[Event] = []
        reached = first - 1
        for name, fields in entries:
            reached = int(name.partition(b"-")[0])
            exclude = fields[5].decode() if len(fields) > 4 else None
            try:
                events.append(place(room, fields[3], Position(epoch, reached), exclude))
            except (msgspec.MsgspecError, UnicodeDecodeError, IndexError) as error:
                self._skip(room, reached, error)
        # Somebody else's hand in the stream, or an entry that cannot be read, is a hole like any other.
        whole = len(events) == reached - first + 1
        page = HistoryPage(events, Position(epoch, offset), bool(recovered) and whole, bool(more))
        return Chunk(page, reached)

    def _skip(self, room: str, offset: int, error: Exception) -> None:
        self.unreadable += 1
        if (missed := self._throttle.admit(room)) is not None:
            log.error(
                "a stored event cannot be read",
                room=room,
                offset=offset,
                error=str(error),
                suppressed=missed,
            )
