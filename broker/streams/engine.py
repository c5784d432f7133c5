"""The engine of a cluster: the past of rooms in Redis, the present on every node.

Theory. A publish is one script (``lua/publish.lua``) that stores the event and
tells all nodes of it in one step. Its answer and the message travel on two
connections; :mod:`broker.streams.delivery` puts both in order. A message is a
hint that may be lost, the offset is the truth: holes are filled from the stream
(:mod:`broker.streams.repairs`), and positions are compared with the store once
in a while and after every reconnect (:mod:`broker.streams.sweeper`). That the
store itself may lose something is the matter of :mod:`broker.streams.generation`.

What was sent and not answered may or may not be stored. Whoever published it is
told ``unavailable``, and may send it again with the same key; if it was stored
after all, it is delivered like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import trio

from broker.engine.base import Deliver, Done, HistoryPage, HistoryQuery, Moved, Retention, Seen, stays
from broker.engine.batch import Close, Open, Request, unavailable
from broker.engine.open_rooms import OpenRooms
from broker.engine.seen import newest
from broker.link.base import Link, LinkDown, LinkError, Reply, publishing
from broker.link.interest import Interest
from broker.link.keys import Keys
from broker.link.wire import Head
from broker.protocol.events import Event, Position
from broker.streams.delivery import LATE, Delivery, Stream
from broker.streams.generation import Generation
from broker.streams.openings import HOLDER, STOPPED, Openings, reason
from broker.streams.past import Past
from broker.streams.proofs import Proofs
from broker.streams.refusals import Refusals
from broker.streams.repairs import Repairs
from broker.streams.replication import Replication
from broker.streams.scripts import PUBLISH, StreamNames, life
from broker.streams.seen_writer import SeenWriter
from broker.streams.sweeper import Sweeper

KEY_WINDOW: Final = 300.0
"""How long an idempotency key is remembered (s)."""

WAITING_EVENTS: Final = 32_768
"""Publishes that may wait for Redis; past it they are refused, or a stalled Redis would fill the memory."""

DRAIN: Final = 2.0
"""How long the end waits for answers to what was sent (s)."""


class _Publish:
    """One event on its way to Redis."""

    __slots__ = ("commits", "done", "event")

    def __init__(self, event: Event, done: Done, commits: int) -> None:
        self.event = event
        self.done = done
        self.commits = commits
        """How much the store had stored, as far as was known when this was sent."""


class RedisEngine:
    """Keeps the past of rooms in the Redis behind ``link``, which somebody else runs.

    Whoever composes the node hands over messages (:meth:`take`), and says when
    the link is down and up again (:meth:`disconnected`, :meth:`reconnected`).
    ``ring_events``: newest events of an open room kept in memory.
    ``sweep_interval``: seconds between two comparisons with the store.
    ``replicas``: how many must have an event before it counts. ``key_windows``:
    by publisher, how long keys count (s) where that is not ``KEY_WINDOW``.
    ``clock``: Unix time in seconds.
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        interest: Interest,
        generation: Generation,
        *,
        ring_events: int,
        sweep_interval: float,
        replicas: int = 0,
        key_windows: Mapping[str, float] = MappingProxyType({}),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._link = link
        self._key_windows = key_windows
        self._keys = keys
        self._interest = interest
        self._generation = generation
        self._clock = clock
        self._tokens = generation.tokens
        self._names = StreamNames(keys)
        self._rooms = OpenRooms(ring_events, self._request)
        self._past = Past(link, self._names, self._tokens, saw=generation.saw, clock=clock)
        self._delivery = Delivery(
            self._rooms,
            generation,
            self._tokens.start,
            repair=self._want_repair,
            strange=self._look_again,
            failed=self._fail,
        )
        self._openings = Openings(
            link, interest, generation, self._delivery, names=self._names, strange=self._look_again
        )
        self._sweeper = Sweeper(
            link,
            generation,
            self._delivery,
            Proofs(self._rooms),
            names=self._names,
            tokens=self._tokens,
            interval=sweep_interval,
        )
        self._repairs = Repairs(self._delivery, self._past, self._sweeper.lost)
        self._replication: Replication[_Publish] | None = (
            Replication(link, replicas, self._answered) if replicas else None
        )
        self._seen = SeenWriter(link, self._names, self._rooms, self._wake)
        self._answered_some = trio.Event()
        self._refusals = Refusals(link, keys, replicas)
        # Set by run(), used only while _running.
        self._nursery: trio.Nursery
        self._started = False
        self._running = False
        self._crash: Exception | None = None
        self._in_flight = 0
        self._stored = 0
        self._duplicates = 0
        self._refused = 0
        self._failed_publishes = 0
        self._ring_hits = 0
        self._ring_misses = 0

    # Life

    async def run(
        self,
        deliver: Deliver,
        moved: Moved = stays,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run until cancelled; see :meth:`broker.engine.base.Engine.run`.

        The link must outlive this by a moment, so that what was sent is answered.
        Raises whatever ``deliver`` or ``moved`` raised, after everybody has been answered.
        """
        if self._started:
            raise RuntimeError("this engine runs already")
        self._started = True
        self._delivery.deliver, self._delivery.moved = deliver, moved
        self._crash = None
        try:
            await self._serve(task_status)
        finally:
            self._started = False
            for room in self._delivery.streams:
                self._interest.release(room, HOLDER)
            self._delivery.streams.clear()
            self._rooms.clear()
            self._repairs.clear()
        if self._crash is not None:
            raise self._crash

    async def _serve(self, task_status: trio.TaskStatus[None]) -> None:
        """Run every task of the engine; returns after a crash."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._flush_answers)
            nursery.start_soon(self._answer_late)
            nursery.start_soon(self._repairs.run)
            nursery.start_soon(self._sweeper.run)
            nursery.start_soon(self._seen.run)
            nursery.start_soon(self._refusals.run)
            if self._replication is not None:
                nursery.start_soon(self._replication.run)
            self._running = True
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._running = False
                await self._drain()

    async def _drain(self) -> None:
        """What was sent gets its answer, which may still be a good one."""
        self._seen.flush()
        if self._replication is not None:
            self._replication.flush()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + DRAIN):
            while self._in_flight or self._seen.leaving:
                await self._answered_some.wait()
                self._answered_some = trio.Event()
                self._delivery.flush()
        self._delivery.flush()

    def _wake(self) -> None:
        self._answered_some.set()

    def _fail(self, error: Exception) -> None:
        """A bug ends the engine: run() raises it."""
        self._crash = self._crash or error
        if self._running:
            self._nursery.cancel_scope.cancel()

    def _require_running(self) -> None:
        if not self._running:
            raise unavailable(STOPPED)

    def disconnected(self) -> None:
        """The link is down: what was delivered until now is held against the store when it is up again."""
        self._sweeper.remember()

    def reconnected(self) -> None:
        """The link is up again, and every subscription confirmed: find out what was missed meanwhile."""
        self._sweeper.hurry()

    def take(self, messages: Sequence[tuple[str, Head]]) -> None:
        """Take what nodes said of stored events (kind ``d``): room and message, as they came."""
        if self._running:
            self._delivery.take(messages)

    def _want_repair(self, stream: Stream, at: float) -> None:
        self._repairs.want(stream, at)

    def _look_again(self) -> None:
        self._sweeper.hurry()

    # Publishing

    def publish(self, event: Event, retention: Retention, done: Done) -> None:
        """Store, deliver, then ``done``; see :meth:`broker.engine.base.Engine.publish`."""
        if not self._running or self._in_flight >= WAITING_EVENTS:
            self._refused += 1
            why = "too many events wait for Redis" if self._running else STOPPED
            done(unavailable(why, event.room))
            return
        keys = self._names.of(event.room)
        clustered = self._link.clustered
        names = [keys.meta, keys.stream, keys.live]
        if not clustered:
            names.append(self._keys.store)
        window: str | float = ""
        if event.key is not None:
            names.append(self._keys.once(event.room, event.publisher, event.key))
            window = self._key_windows.get(event.publisher, KEY_WINDOW)
        publish = _Publish(event, done, self._generation.commits)
        self._in_flight += 1
        self._link.send_script(
            self._taker(publish, keys.meta),
            PUBLISH,
            names,
            event.body,
            repr(event.ts),
            event.exclude or "",
            retention.size,
            life(retention.ttl),
            self._tokens(),
            publishing(self._link),
            repr(self._clock()),
            window,
            "" if self._replication is None else "1",
            self._tokens.start,
        )

    def _taker(self, publish: _Publish, key: str) -> Callable[[Reply | LinkError], None]:
        if self._replication is not None:
            return self._replication.sent(publish, key)
        return lambda reply: self._answered(publish, reply)

    def _answered(self, publish: _Publish, reply: Reply | LinkError) -> None:
        """Redis has stored an event, or has not. Called for many in one go, then they are flushed."""
        self._in_flight -= 1
        self._answered_some.set()
        if isinstance(reply, LinkError):
            self._failed_publishes += 1
            if not isinstance(reply, LinkDown):  # the link tells that by itself, and `failing` asks it
                self._refusals.refused(publish.event.room, reply)
            self._delivery.answer(publish.done, unavailable(reason(reply), publish.event.room))
            return
        if self._refusals.why is not None:
            self._refusals.stored()
        shown, offset, commits, again = reply
        epoch = shown.decode()
        if again:
            self._duplicates += 1
        else:
            self._stored += 1
            # It was stored after what was known then, so the count must be higher.
            if not self._generation.saw(epoch, commits) or 0 < commits <= publish.commits:
                self._sweeper.hurry()
        self._delivery.stored(publish.event, Position(epoch, offset), publish.done, again=bool(again))

    async def _answer_late(self) -> None:
        while True:
            await trio.sleep(LATE / 2)
            self._delivery.answer_late(trio.current_time())

    async def _flush_answers(self) -> None:
        while True:
            await self._answered_some.wait()
            self._answered_some = trio.Event()
            self._delivery.flush()

    # Rooms

    def position(self, room: str) -> Position | None:
        """Newest delivered position of an open room; ``None`` if it is not open."""
        ring = self._rooms.get(room)
        return ring.top if ring is not None else None

    async def open(self, room: str, retention: Retention) -> Position:
        """Make the room warm and return its top. Raises ``unavailable``."""
        await trio.lowlevel.checkpoint()
        return (await self._rooms.open(room, retention)).top

    def close(self, room: str) -> None:
        """Drop the room's ring. Unknown rooms are ignored."""
        self._rooms.close(room)

    def _request(self, request: Request, _urgent: bool) -> None:
        """What the rooms want."""
        match request:
            case Open():
                self._require_running()
                self._nursery.start_soon(self._openings.open, request)
            case Close(room=room):
                self._interest.release(room, HOLDER)
                self._delivery.end(room)
            case _:
                raise NotImplementedError(request)

    # The past

    def history_nowait(self, room: str, query: HistoryQuery) -> HistoryPage | None:
        """Answer from memory, exactly; else ``None``."""
        ring = self._rooms.get(room)
        page = None
        if ring is not None and not self._is_news(room, query.since, ring.top):
            page = ring.page(query, self._clock())
        if page is None:
            self._ring_misses += 1
        else:
            self._ring_hits += 1
        return page

    def _is_news(self, room: str, since: Position | None, top: Position) -> bool:
        """Whether a client may know more than this node does: another node may have told it."""
        if since is None:
            return False
        if since.epoch == top.epoch:
            return since.offset > top.offset
        return not self._delivery.streams[room].sequencer.is_retired(since.epoch)

    async def history(self, room: str, query: HistoryQuery, retention: Retention) -> HistoryPage:
        """Read the past, from memory if that is possible. Raises ``unavailable``."""
        await trio.lowlevel.checkpoint()
        self._require_running()
        ring = self._rooms.get(room)
        if ring is not None and ring.retention == retention:
            page = self.history_nowait(room, query)
            if page is not None:
                return page
        page = await self._past.page(self._nursery, room, query, retention)
        ring = self._rooms.get(room)
        if ring is not None:
            if ring.top.epoch == page.top.epoch:
                ring.extend_left(page.events)
            elif (stream := self._delivery.streams.get(room)) is not None:
                self._delivery.suspect(stream, trio.current_time())
        return page

    # Acknowledged positions

    def acknowledge(self, room: str, who: str, offset: int, ts: float) -> None:
        """Remember that ``who`` has seen up to ``offset``; in Redis about a second later."""
        self._seen.note(room, who, offset, ts)

    async def acknowledgements(self, room: str) -> list[Seen]:
        """Everybody's acknowledged position, with those that are not in Redis yet."""
        await trio.lowlevel.checkpoint()
        self._require_running()
        # Before the read: what is written while it runs is in one of the two.
        here = self._seen.of(room)
        return newest([*await self._past.acknowledged(self._nursery, room), *here])

    def statistics(self) -> dict[str, Any]:
        """Counters since the start, and gauges, by name."""
        delivery, repairs, sweeper, flights = self._delivery, self._repairs, self._sweeper, self._past.flights
        return {
            "rooms_open": len(self._rooms),
            "ring_events": self._rooms.events,
            "waiting": self._in_flight,
            "batches": delivery.batches,
            "largest_batch": delivery.largest_batch,
            "stored": self._stored,
            "duplicates": self._duplicates,
            "answered_late": self._delivery.late,
            "refused": self._refused,
            "failed_publishes": self._failed_publishes,
            "failed_opens": self._openings.failures,
            "too_few_replicas": self._replication.too_few if self._replication is not None else 0,
            "received": delivery.received,
            "known": delivery.known,
            "bad_messages": delivery.bad_messages,
            "holes": repairs.holes,
            "repairs": repairs.repairs,
            "repaired_events": repairs.repaired_events,
            "failed_repairs": repairs.failed_repairs,
            "moved": delivery.moves,
            "sweeps": sweeper.sweeps,
            "failed_sweeps": sweeper.failed_sweeps,
            "behind": sweeper.behind,
            "tails_lost": sweeper.tails_lost,
            "generations": self._generation.changes,
            "witnesses": self._generation.pending,
            "ring_hits": self._ring_hits,
            "ring_misses": self._ring_misses,
            "reads": flights.reads,
            "shared_reads": flights.shared,
            "failed_reads": flights.failures,
            "unreadable": self._past.unreadable,
            "acknowledgements": self._seen.moved,
            "failed_acknowledgements": self._seen.failures,
            "failing": int(self._refusals.why is not None or not self._link.up),
        }
