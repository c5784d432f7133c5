"""The engine of a single process: SQLite for the past, memory for the present.

Theory. One thread writes, in groups (:mod:`broker.engine.commit_queue`). When
a group is on disk, it comes back to the Trio thread in one call, which updates
the rings, delivers, and answers, in this order. Nothing is acknowledged before
its commit, and nothing is delivered that could still vanish.

The writer knows what is *stored*, the Trio thread what has been *delivered*.
``position`` and the rings are of the second kind, so a session that reads them
and joins in the same moment misses nothing. Reads that memory cannot answer go
to the disk in threads of their own (:mod:`broker.engine.shared_reads`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from broker.engine.base import Deliver, Done, HistoryPage, HistoryQuery, Moved, Retention, Seen, stays
from broker.engine.batch import Acknowledge, Batch, Close, Open, Request, Sweep, unavailable
from broker.engine.commit_queue import CommitQueue
from broker.engine.open_rooms import OpenRooms
from broker.engine.seen import SeenBuffer, newest
from broker.engine.shared_reads import SharedReads
from broker.engine.sqlite_file import unusable
from broker.engine.sqlite_store import STORE_ERRORS, Store
from broker.engine.writer import SWEEP_INTERVAL, Writer
from broker.logs import get_logger
from broker.protocol.events import Event, Position

ACKNOWLEDGE_AFTER = 1.0
"""How long acknowledged positions gather before they are written (s)."""

_log = get_logger(__name__)


class EmbeddedEngine:
    """Keeps the past of rooms in ``path/broker.db``; without a path, in memory.

    ``ring_events``: newest events of an open room kept in memory.
    ``commit_window``: seconds to wait for more publishes before each commit.
    ``clock``: Unix time in seconds, called from several threads.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        ring_events: int,
        commit_window: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._clock = clock
        self._queue = CommitQueue(self._finish, commit_window)
        self._rooms = OpenRooms(ring_events, self._request)
        self._reads = SharedReads()
        self._seen = SeenBuffer()
        self._seen_noted = trio.Event()
        # Set by run(), used only while _running.
        self._deliver: Deliver
        self._store: Store
        self._nursery: trio.Nursery
        self._writer: Writer | None = None
        self._started = False
        self._running = False
        self._crash: Exception | None = None
        self._failing = False
        self._batches = 0
        self._largest_batch = 0
        self._refused = 0
        self._ring_hits = 0
        self._ring_misses = 0

    # Life

    async def run(
        self,
        deliver: Deliver,
        moved: Moved = stays,  # never: nobody else touches this store
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run until cancelled; see :meth:`broker.engine.base.Engine.run`.

        Raises :class:`~broker.errors.ConfigurationError` if the store cannot be
        used, and whatever ``deliver`` raised, after everybody has been answered.
        """
        if self._started:
            raise RuntimeError("this engine runs already")
        self._started = True
        self._deliver = deliver
        self._crash = None
        try:
            store, writer = await trio.to_thread.run_sync(self._open_store)
            self._store, self._writer = store, writer
            try:
                await self._serve(writer, task_status)
            finally:
                self._queue.abandon()
                self._rooms.clear()
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(store.close)
        finally:
            self._started = False
        if self._crash is not None:
            raise self._crash

    def _open_store(self) -> tuple[Store, Writer]:
        store = Store.open(self._path)
        try:
            return store, Writer(store, self._clock)
        except STORE_ERRORS as error:
            store.close()
            raise unusable(self._path, error) from error

    async def _serve(self, writer: Writer, task_status: trio.TaskStatus[None]) -> None:
        """Run every task of the engine; returns after a crash."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._write, writer)
            nursery.start_soon(self._sweep)
            nursery.start_soon(self._send_seen_later)
            self._running = True
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                # What was accepted is still committed, what comes now is refused.
                self._send_seen()
                self._running = False
                self._queue.stop()

    async def _write(self, writer: Writer) -> None:
        try:
            await self._queue.run(writer)
        except Exception as error:  # a bug of ours; run() raises it
            self._fail(error)

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_INTERVAL)
            self._queue.request(Sweep())

    def _fail(self, error: Exception) -> None:
        """A bug ends the engine: run() raises it."""
        self._crash = self._crash or error
        self._nursery.cancel_scope.cancel()

    def _require_running(self) -> None:
        if not self._running:
            raise unavailable("the store is not running")

    def _request(self, request: Request, urgent: bool) -> None:
        if isinstance(request, Close) and not self._running:
            return  # rooms are left while the broker stops, and there is nobody to tell
        self._require_running()
        self._queue.request(request, urgent=urgent)

    # A batch comes back

    def _finish(self, batch: Batch) -> None:
        """Rings, delivery, answers. Runs on the Trio thread; nothing may escape from here."""
        self._batches += 1
        self._largest_batch = max(self._largest_batch, len(batch.publishes))
        self._report(batch)
        for request in batch.requests:
            self._finish_request(request, batch.error)
        if batch.stored:
            self._rooms.append(batch.stored)
            try:
                self._deliver(batch.stored)
            except Exception as error:  # a bug of the hub; its publishers get their answers first
                self._fail(error)
        for index, (_, _, done) in enumerate(batch.publishes):
            try:
                done(batch.answer(index))
            except Exception as error:  # may not happen, and must not cost the others their answer
                self._fail(error)

    def _finish_request(self, request: Request, failure: str | None) -> None:
        match request:
            case Open():
                request.finished(request.top, failure)
            case Acknowledge():
                self._seen.settle(request, written=failure is None)
                if failure is not None:
                    self._seen_noted.set()
            case Sweep():
                if request.more and self._running:
                    self._queue.request(Sweep())
            case Close():
                pass

    def _report(self, batch: Batch) -> None:
        """Tell the operator when the store begins to fail and when it works again, not in between."""
        failing = batch.error is not None
        if failing != self._failing:
            self._failing = failing
            if failing:
                _log.error("store fails", reason=batch.error)
            else:
                _log.info("store works again")

    # Rooms and events

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

    def publish(self, event: Event, retention: Retention, done: Done) -> None:
        """Store, deliver, then ``done``; see :meth:`broker.engine.base.Engine.publish`.

        If the engine does not run, or too much waits, ``done`` is called at once.
        """
        if not self._running or self._queue.full:
            self._refused += 1
            reason = "too many events wait for the disk" if self._running else "the store is not running"
            done(unavailable(reason, event.room))
            return
        self._queue.publish((event, retention, done))

    # The past

    def history_nowait(self, room: str, query: HistoryQuery) -> HistoryPage | None:
        """Answer from memory, exactly; else ``None``."""
        ring = self._rooms.get(room)
        page = ring.page(query, self._clock()) if ring is not None else None
        if page is None:
            self._ring_misses += 1
        else:
            self._ring_hits += 1
        return page

    async def history(self, room: str, query: HistoryQuery, retention: Retention) -> HistoryPage:
        """Read the past, from memory if that is possible. Raises ``unavailable``."""
        await trio.lowlevel.checkpoint()
        self._require_running()
        ring = self._rooms.get(room)
        if ring is not None and ring.retention == retention:
            page = self.history_nowait(room, query)
            if page is not None:
                return page
        # A read that is under way is as good as a new one only if nothing was
        # delivered since it began: else whoever joined meanwhile would get an
        # event neither from the page nor live.
        moment = ring.top if ring is not None else self._batches
        key = ("page", room, query, retention, moment)
        page = await self._reads.share(self._nursery, key, lambda: self._read_page(room, query, retention))
        ring = self._rooms.get(room)
        if ring is not None and ring.top.epoch == page.top.epoch:
            ring.extend_left(page.events)
        return page._replace(events=page.events.copy())

    async def _read_page(self, room: str, query: HistoryQuery, retention: Retention) -> HistoryPage:
        while True:
            page = await self._reads.in_thread(
                lambda: self._store.read_page(room, query, retention, self._clock())
            )
            if page is not None:
                return page
            # The epoch that is told must be the one that the first event will get.
            await self._create(room, retention)

    async def _create(self, room: str, retention: Retention) -> None:
        """Give the room a stream without holding it open."""
        done = trio.Event()
        failures: list[str] = []

        def created(_top: Position | None, failure: str | None) -> None:
            if failure is not None:
                failures.append(failure)
            done.set()

        self._request(Open(room, retention, created, keep=False), True)
        await done.wait()
        if failures:
            raise unavailable(failures[0], room)

    # Acknowledged positions

    def acknowledge(self, room: str, who: str, offset: int, ts: float) -> None:
        """Remember that ``who`` has seen up to ``offset``; on disk about a second later."""
        self._seen.note(room, who, offset, ts)
        self._seen_noted.set()

    async def acknowledgements(self, room: str) -> list[Seen]:
        """Everybody's acknowledged position, with those that are not on disk yet."""
        await trio.lowlevel.checkpoint()
        self._require_running()
        # Before the read: what is written while it runs is in one of the two.
        here = self._seen.of(room)
        stored = await self._reads.share(
            self._nursery,
            ("seen", room, self._batches),
            lambda: self._reads.in_thread(lambda: self._store.read_acknowledgements(room)),
        )
        return newest([*stored, *here])

    async def _send_seen_later(self) -> None:
        while True:
            await self._seen_noted.wait()
            await trio.sleep(ACKNOWLEDGE_AFTER)
            self._send_seen()

    def _send_seen(self) -> None:
        self._seen_noted = trio.Event()
        if self._seen:
            self._queue.request(self._seen.take())

    def statistics(self) -> dict[str, Any]:
        """Counters since the start, and gauges, by name."""
        numbers: dict[str, Any] = {
            "rooms_open": len(self._rooms),
            "ring_events": self._rooms.events,
            "waiting": len(self._queue),
            "batches": self._batches,
            "largest_batch": self._largest_batch,
            "refused": self._refused,
            "ring_hits": self._ring_hits,
            "ring_misses": self._ring_misses,
            "reads": self._reads.reads,
            "shared_reads": self._reads.shared,
            "failed_reads": self._reads.failures,
            "failing": int(self._failing),
        }
        if self._writer is not None:
            numbers |= self._writer.statistics()
        return numbers
