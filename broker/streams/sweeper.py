"""Comparing what was delivered with what is stored.

Messages are only a hint, and an event that nobody speaks of again would not be
missed. So once in a while, and at once after every reconnect, the position of
every open room is held against the store's: a room that is behind is repaired,
one whose stream was replaced is moved, and a store that is behind what clients
were told has lost something, which begins another generation. A Redis Cluster
has no generation that all rooms share; each room proves itself (:mod:`broker.streams.proofs`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

import trio

from broker.link.base import Link, LinkError, Reply
from broker.logs import Throttle, get_logger
from broker.protocol.events import Position
from broker.streams.delivery import Delivery, Stream
from broker.streams.generation import Generation
from broker.streams.proofs import Proofs
from broker.streams.scripts import PROOF, RENEW, SLACK, TOPS, StreamNames, Tokens, ask, life

log = get_logger(__name__)

CHUNK: Final = 128
"""Rooms compared in one script; it stops Redis for some 0.1 ms."""

REFRESH: Final = SLACK / 3
"""Between two words to Redis that an open room without new events is still in use (s)."""

BREATH: Final = 0.02
"""Between two sweeps, however great the hurry (s)."""

RECHECK: Final = 1.0
"""Between two looks at the generation while witnesses are waited for (s)."""


class Sweeper:
    """Compares all open rooms every ``interval`` seconds, spread over the interval."""

    def __init__(
        self,
        link: Link,
        generation: Generation,
        delivery: Delivery,
        proofs: Proofs,
        *,
        names: StreamNames,
        tokens: Tokens,
        interval: float,
    ) -> None:
        self._link = link
        self._generation = generation
        self._delivery = delivery
        self._proofs = proofs
        self._names = names
        self._tokens = tokens
        self._interval = interval
        self._hurried = trio.Event()
        self._throttle = Throttle()
        self.sweeps = 0
        self.failed_sweeps = 0
        self.behind = 0
        self.tails_lost = 0

    def hurry(self) -> None:
        """Compare everything now."""
        self._hurried.set()

    def remember(self) -> None:
        """The link is down: note what must not be lost until it is up."""
        if self._link.clustered:
            self._proofs.note(self._delivery.streams.keys())

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            due = trio.current_time() + self._interval
            hurried = self._hurried.is_set()
            self._hurried = trio.Event()
            try:
                if self._link.up:
                    await self._sweep(due, hurried=hurried)
                await self._rest(due)
            except LinkError as error:
                self.failed_sweeps += 1
                if (missed := self._throttle.admit("sweep")) is not None:
                    log.warning("rooms cannot be compared", error=str(error), suppressed=missed)
                await self._pause(self._interval)
            await trio.sleep(BREATH)

    async def _pause(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._hurried.wait()

    async def _rest(self, due: float) -> None:
        """Wait for the next sweep, and meanwhile for witnesses, if there are any that have not come."""
        while not self._hurried.is_set() and (left := due - trio.current_time()) > 0:
            if not self._generation.pending:
                await self._pause(left)
                return
            await self._pause(min(left, RECHECK))
            if self._link.up and await self._generation.look(self._link):
                self.hurry()

    async def _sweep(self, due: float, *, hurried: bool) -> None:
        self.sweeps += 1
        if await self._generation.look(self._link):
            hurried = True
        self._proofs.keep(self._delivery.streams.keys())
        streams = list(self._delivery.streams.values())
        chunks = [streams[start : start + CHUNK] for start in range(0, len(streams), CHUNK)]
        for left, chunk in zip(range(len(chunks), 0, -1), chunks, strict=True):
            await self._compare(chunk, hurried=hurried)
            self._refresh(chunk)
            if not hurried:
                # Comparing may have taken longer than the whole interval.
                await self._pause(max(0.0, (due - trio.current_time()) / left))
                if self._hurried.is_set():
                    return

    # -- comparing --------------------------------------------------------------------

    async def _compare(self, streams: Sequence[Stream], *, hurried: bool) -> None:
        asked = [stream.sequencer.position for stream in streams]
        tops = await (self._proven_tops(streams, asked) if self._link.clustered else self._tops(streams))
        if tops is None:
            self.hurry()  # the store was emptied a moment ago
            return
        now = trio.current_time()
        for stream, before, top in zip(streams, asked, tops, strict=True):
            sequencer = stream.sequencer
            if self._delivery.streams.get(stream.room) is not stream or sequencer.epoch != before.epoch:
                continue  # closed or moved meanwhile
            if top is None:
                self._delivery.suspect(stream, now)  # reading it makes it anew
            elif top.epoch != before.epoch:
                self._delivery.move(stream, top)
            elif top.offset < before.offset:
                await self.lost(stream, before.epoch)
            elif top.offset > sequencer.offset:
                self.behind += 1
                sequencer.expect(top.offset, now)
                if hurried:
                    self._delivery.suspect(stream, now)
                else:
                    self._delivery.repair(stream, now)

    async def _tops(self, streams: Sequence[Stream]) -> list[Position | None] | None:
        """Where the streams are in the store, ``None`` for one that is not there; ``None``: nothing is."""
        metas = [stream.keys.meta for stream in streams]
        generation, commits, *flat = await ask(self._link, TOPS, metas, self._names.keys.store)
        if generation is None:
            return None
        suffix = f".{generation.decode()}"
        if not self._generation.saw(suffix, commits):
            self.hurry()
        return [
            Position(epoch.decode() + suffix, offset) if epoch is not None else None
            for epoch, offset in zip(flat[::2], flat[1::2], strict=True)
        ]

    async def _proven_tops(
        self, streams: Sequence[Stream], ends: Sequence[Position]
    ) -> list[Position | None]:
        """The same in a Redis Cluster. A stream without an event that was delivered ends before it."""
        tops: list[Position | None] = [None] * len(streams)
        failures: list[LinkError] = []

        async def one(number: int) -> None:
            stream, end = streams[number], ends[number]
            place = self._proofs.place(stream.room, end)
            try:
                epoch, offset, digest = await ask(
                    self._link, PROOF, (stream.keys.meta, stream.keys.stream), place
                )
            except LinkError as error:
                failures.append(error)
                return
            if epoch is None:
                return
            top = Position(epoch.decode(), offset)
            if top.epoch == end.epoch:
                seen = digest.decode() if digest is not None else None
                if not self._proofs.holds(stream.room, Position(end.epoch, place), seen):
                    top = Position(end.epoch, place - 1)
            tops[number] = top

        # Each key may be on another shard.
        async with trio.open_nursery() as nursery:
            for number in range(len(streams)):
                nursery.start_soon(one, number)
        if failures:
            raise failures[0]
        return tops

    async def lost(self, stream: Stream, epoch: str) -> None:
        """The store ends before what was delivered of ``epoch``. Raises :class:`LinkError`."""
        self.tails_lost += 1
        log.warning("the store has lost events", room=stream.room, epoch=epoch)
        if self._link.clustered:
            await ask(self._link, RENEW, (stream.keys.meta,), epoch, self._tokens())
        else:
            await self._generation.look(self._link, behind=True)
        self.hurry()

    def _refresh(self, streams: Sequence[Stream]) -> None:
        """Keep open rooms in which nothing is said from expiring."""
        now = trio.current_time()
        for stream in streams:
            if stream.refresh_at > now:
                continue
            fresh = not stream.refresh_at  # opening it was word enough
            # Not all of them at once, though they may have been opened so.
            stream.refresh_at = now + REFRESH * random.uniform(0.5, 1.0)
            if fresh:
                continue
            for key in (stream.keys.meta, stream.keys.seen):
                self._link.send(_ignore, stream.keys.meta, "PEXPIRE", key, life(stream.ttl))


def _ignore(_reply: Reply | LinkError) -> None:
    """Asked again before long in any case."""
