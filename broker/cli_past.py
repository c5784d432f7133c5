"""A room's past, page by page, however long it is; for ``broker listen`` and ``broker export``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from broker.client import Client, Event, History, Lost, Position
    from broker.protocol.filters import Filter

PAGE: Final = 1000
"""Events asked for at once: as many as ``history`` gives. The broker cuts a page by its bytes, too."""

PAUSE: Final = 1.0
"""Seconds before asking again, where the broker says only that it was asked too often."""

NEWEST: Final = 2**53 - 1
"""Beyond every offset."""


class Past:
    """One reading of a room's past, from ``since`` or ``at`` up to ``until``, or to its newest event.

    ``position`` is how far it has come: whoever joins with it, or reads on from
    it, misses nothing and gets nothing twice. ``ended``: all of it was read.
    ``over``: because an event after ``until`` was seen. Times are Unix seconds.
    """

    def __init__(
        self,
        client: Client,
        room: str,
        *,
        since: Position | None = None,
        at: float | None = None,
        until: float | None = None,
        wanted: Filter | None = None,
    ) -> None:
        self.position = since
        self.ended = False
        self.over = False
        self._client = client
        self._room = room
        self._at = at
        self._until = until
        self._wanted = wanted

    @classmethod
    async def newest(
        cls,
        client: Client,
        room: str,
        count: int,
        *,
        until: float | None = None,
        wanted: Filter | None = None,
    ) -> Past:
        """The past from the newest ``count`` events on, or from the oldest that is left."""
        top = (await _ask(client, room, before=NEWEST, limit=1)).position
        kept = (await _ask(client, room, at=0.0, limit=1)).events
        oldest = kept[0].offset if kept else None
        start = max(top.offset - count, top.offset if oldest is None else oldest - 1)
        return cls(client, room, since=top._replace(offset=start), until=until, wanted=wanted)

    async def read(self) -> list[Event | Lost]:
        """The next page, oldest first, with ``Lost`` in front where something before it is gone.

        Raises what requests of the client raise; ``position`` is as before then.
        """
        from broker.client import Lost  # noqa: PLC0415 - --help does without

        asked = self.position
        page = await _ask(self._client, self._room, since=asked, at=self._at if asked is None else None)
        items: list[Event | Lost] = []
        if not page.recovered:
            assert asked is not None
            same = page.position.epoch == asked.epoch and asked.offset <= page.position.offset
            items.append(Lost(room=self._room, reason="trimmed" if same else "epoch"))
            if not same:  # another stream has taken its place: all of it came later
                page = await _ask(self._client, self._room, since=page.position._replace(offset=0))
        for event in page.events:
            if self._until is not None and event.ts > self._until:
                self.ended = self.over = True
                return items
            self.position = event.position
            if self._wanted is None or self._wanted(event.tags):
                items.append(event)
        if not page.more:
            self.ended = True
            self.position = page.position
        return items


async def _ask(
    client: Client,
    room: str,
    *,
    since: Position | None = None,
    at: float | None = None,
    before: int | None = None,
    limit: int = PAGE,
) -> History:
    """One page; when the broker has been asked too often, a moment later."""
    from broker.client import RequestError  # noqa: PLC0415 - as above

    while True:
        try:
            return await client.history(room, since=since, at=at, before=before, limit=limit)
        except RequestError as error:
            if error.code != "rate_limited":
                raise
            await trio.sleep(error.retry_after or PAUSE)
