"""Who owns the truth: offsets, epochs, idempotency keys and retention, one batch at a time.

Runs in the engine's writer thread and nowhere else, so nothing here is locked.
What it keeps in memory is a copy of the database; after a failed transaction
the copy is thrown away and read again, which is the whole error handling.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from typing import Any

from broker.engine.base import Retention
from broker.engine.batch import Acknowledge, Acknowledgements, Batch, Close, Open, Request, Sweep
from broker.engine.sqlite_store import STORE_ERRORS, Store, StreamRow, first_newer
from broker.protocol.events import Event, Position

KEY_TTL = 300.0
"""How long an idempotency key is remembered (s)."""

SWEEP_INTERVAL = 60.0
"""How often rooms that are due are trimmed or removed (s)."""

SWEEP_ROOMS = 128
"""Rooms looked at in one transaction; publishes wait for it."""

TRIM_EVENTS = 5000
"""Events of a room deleted in one transaction, for the same reason (about 5 ms)."""


class _Stream:
    """A room as the database has it, and as this transaction is about to leave it."""

    __slots__ = ("epoch", "first", "id", "retention", "top", "trim_at", "ts")

    def __init__(self, row: StreamRow) -> None:
        self.id = row.id
        self.epoch = row.epoch
        self.first = row.first or 1
        self.top = row.top or 0
        self.ts = row.top_ts or 0.0
        self.retain(Retention(row.size, row.ttl))

    def retain(self, retention: Retention) -> None:
        self.retention = retention
        # Trimming a few at a time would cost more than the insert itself.
        self.trim_at = self.first + retention.size + max(retention.size // 8, 64)


class Writer:
    """Applies batches to the store, each in one transaction."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._streams: dict[str, _Stream] = {}
        self._opened: set[str] = set()
        self._next_room_id = store.next_room_id()
        # About 350 bytes a key, for five minutes. Asking the database instead
        # would be a statement per event.
        self._keys: dict[tuple[int, str, str], tuple[int, float]] = {
            (row.room_id, row.publisher, row.key): (row.offset, row.ts) for row in store.remembered_keys()
        }
        self._fresh_keys: list[tuple[int, str, str]] = []
        self.commits = 0
        self.stored = 0
        self.duplicates = 0
        self.failures = 0
        self.failed_publishes = 0
        self.trimmed = 0
        self.removed_rooms = 0
        self.sweeps = 0
        self.acknowledgements = 0

    def statistics(self) -> dict[str, int]:
        """Counters since the start, and gauges. May be called from another thread."""
        return {
            "commits": self.commits,
            "stored": self.stored,
            "duplicates": self.duplicates,
            "failed_commits": self.failures,
            "failed_publishes": self.failed_publishes,
            "trimmed": self.trimmed,
            "removed_rooms": self.removed_rooms,
            "sweeps": self.sweeps,
            "acknowledgements": self.acknowledgements,
            "keys": len(self._keys),
        }

    def commit(self, batch: Batch) -> None:
        """Do all of ``batch``, or nothing and say so in ``batch.error``."""
        now = self._clock()
        try:
            with self._store.transaction():
                self._ensure_streams(batch, now)
                for request in batch.requests:
                    self._handle(request, now)
                self._place(batch, now)
                for request in batch.requests:
                    if isinstance(request, Open):
                        stream = self._streams[request.room]
                        # Events of this batch reach the ring next, and lead up to this top.
                        request.top = Position(stream.epoch, stream.top)
                for request in batch.requests:
                    if isinstance(request, Sweep):  # last, because it forgets streams
                        request.more = self._sweep(now)
        except STORE_ERRORS as error:
            self._take_back(batch)
            batch.error = f"the store refused ({error})"
            self.failures += 1
            self.failed_publishes += len(batch.publishes)
            return
        except BaseException:
            self._take_back(batch)
            raise
        self._fresh_keys.clear()
        batch.error = None
        self.commits += 1
        self.stored += len(batch.stored)
        self.duplicates += len(batch.duplicates)

    def _take_back(self, batch: Batch) -> None:
        """The transaction failed: memory must not know more than the database."""
        self._streams.clear()
        for key in self._fresh_keys:
            self._keys.pop(key, None)
        self._fresh_keys.clear()
        for event, _, _ in batch.publishes:
            event.position = None
            event.wire = event.body
        batch.stored.clear()
        batch.duplicates.clear()
        for request in batch.requests:
            if isinstance(request, Open):
                request.top = None
                self._opened.discard(request.room)

    # Streams

    def _ensure_streams(self, batch: Batch, now: float) -> None:
        """Load or create every room that the batch needs, in two statements for all of them."""
        streams = self._streams
        wanted: dict[str, Retention] = {}
        for event, retention, _ in batch.publishes:
            if event.room not in streams:
                wanted[event.room] = retention
        for request in batch.requests:
            if isinstance(request, Open) and request.room not in streams:
                wanted[request.room] = request.retention
        if not wanted:
            return
        self._load(wanted)
        missing = [name for name in wanted if name not in streams]
        rows = []
        for name in missing:
            # The generation of the store, then this life of the room.
            epoch = f"{self._store.generation}.{secrets.token_urlsafe(9)}"
            retention = wanted[name]
            rows.append((self._next_room_id, name, epoch, retention, now + max(retention.ttl, KEY_TTL)))
            streams[name] = _Stream(
                StreamRow(self._next_room_id, name, epoch, *retention, None, None, None, None)
            )
            self._next_room_id += 1
        self._store.insert_rooms(rows)

    def _load(self, names: Iterable[str]) -> None:
        for row in self._store.streams(list(names)):
            self._streams[row.name] = _Stream(row)

    def _retain(self, stream: _Stream, retention: Retention, now: float) -> None:
        if retention != stream.retention:
            self._store.set_retention(stream.id, retention, now + retention.ttl)
        stream.retain(retention)

    # Requests

    def _handle(self, request: Request, now: float) -> None:
        match request:
            case Open(room=room, retention=retention):
                stream = self._streams[room]
                if retention is not stream.retention:
                    self._retain(stream, retention, now)
                if request.keep:
                    self._opened.add(room)
            case Close(room=room):
                self._opened.discard(room)
            case Acknowledge(positions=positions):
                self._acknowledge(positions)
            case Sweep():
                pass  # after the events

    def _acknowledge(self, positions: Acknowledgements) -> None:
        self._load(name for name in positions if name not in self._streams)
        flat: list[Any] = []
        for room, people in positions.items():
            stream = self._streams.get(room)
            if stream is not None:  # else the room has vanished, and what was seen of it with it
                for who, (offset, ts) in people.items():
                    flat += (stream.id, who, offset, ts)
        self._store.insert_acknowledgements(flat)
        self.acknowledgements += len(flat) // 4

    # Events

    def _place(self, batch: Batch, now: float) -> None:
        """Give every event its offset, and write them. The hot loop: 2 µs an event."""
        streams, stored = self._streams, batch.stored
        rows: list[Any] = []
        keys: list[Any] = []
        full: set[_Stream] = set()
        for index, (event, retention, _) in enumerate(batch.publishes):
            stream = streams[event.room]
            if retention is not stream.retention:
                self._retain(stream, retention, now)
            offset = stream.top + 1
            if event.key is not None:
                first = self._first_use(stream, event, offset, now, keys)
                if first is not None:
                    batch.duplicates[index] = Position(stream.epoch, first)
                    continue
            stream.top = offset
            event.place(Position(stream.epoch, offset))
            if event.ts > stream.ts:  # noqa: PLR1730 - max() takes three times as long
                stream.ts = event.ts
            rows += (stream.id, offset, stream.ts, event.wire)
            stored.append(event)
            if offset >= stream.trim_at:
                full.add(stream)
        self._store.insert_events(rows)
        self._store.insert_keys(keys)
        for stream in full:
            self._trim(stream, stream.top - stream.retention.size + 1)

    def _first_use(
        self, stream: _Stream, event: Event, offset: int, now: float, rows: list[Any]
    ) -> int | None:
        """The offset that the event's key got before; ``None`` if it is new (``offset`` is noted for it)."""
        assert event.key is not None
        key = (stream.id, event.publisher, event.key)
        known = self._keys.get(key)
        if known is not None:
            if known[1] > now - KEY_TTL:
                return known[0]
            del self._keys[key]  # so that it moves to the end: the oldest are found in front
        self._keys[key] = (offset, now)
        self._fresh_keys.append(key)
        rows += (now, stream.id, event.publisher, event.key, offset)
        return None

    # Retention

    def _trim(self, stream: _Stream, below: int) -> bool:
        """Delete events below an offset, but never the newest: it carries the top. False if some remain."""
        below = min(below, stream.top)
        reached = min(below, stream.first + TRIM_EVENTS)
        if reached > stream.first:
            self._store.trim(stream.id, reached)
            self.trimmed += reached - stream.first
            stream.first = reached
            stream.retain(stream.retention)
        return reached >= below

    def _sweep(self, now: float) -> bool:
        """Look at the rooms that are due. Returns whether there is more to do at once."""
        self.sweeps += 1
        self._drop_keys(now)
        # Rooms that nobody holds are read again when needed.
        self._streams = {name: stream for name, stream in self._streams.items() if name in self._opened}
        due = self._store.due_streams(now, SWEEP_ROOMS)
        done = [self._review(row, now) for row in due]
        return len(due) == SWEEP_ROOMS or not all(done)

    def _review(self, row: StreamRow, now: float) -> bool:
        """Trim or remove one room, and say when to look again. False if it takes another turn."""
        stream = self._streams.get(row.name) or _Stream(row)
        # While a key may still come again the room remembers what it answered.
        life = max(row.ttl, KEY_TTL)
        ends = now if row.top_ts is None else row.top_ts + life
        expired = ends <= now and row.name not in self._opened
        below = stream.top if expired else self._first_alive(stream, row, now)
        if not self._trim(stream, below):
            self._store.set_check(row.id, now)
            return False
        if expired:
            self._store.remove_room(row.id)
            self.removed_rooms += 1
            return True
        # An eighth later than necessary, so that there is something to trim.
        patience = max(SWEEP_INTERVAL, row.ttl / 8)
        oldest = now if row.first_ts is None else row.first_ts
        self._store.set_check(row.id, max(now + patience, oldest + row.ttl))
        return True

    def _first_alive(self, stream: _Stream, row: StreamRow, now: float) -> int:
        oldest = now - row.ttl
        if row.first_ts is None or row.first_ts > oldest:
            return stream.first
        return first_newer(self._store.writer, stream.id, stream.first, stream.top, oldest)

    def _drop_keys(self, now: float) -> None:
        oldest = now - KEY_TTL
        expired = []
        for key, (_, ts) in self._keys.items():
            if ts > oldest:
                break
            expired.append(key)
        for key in expired:
            del self._keys[key]
        if expired:
            self._store.drop_keys(oldest)
