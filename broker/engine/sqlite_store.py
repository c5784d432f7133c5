"""The database of the embedded engine: every SQL statement that reads or writes it.

Called by the writer thread (everything that changes something) and by reader
threads (:meth:`Store.read_page`, :meth:`Store.read_acknowledgements`). Knows
neither Trio nor the rules of streams; those are in :mod:`broker.engine.writer`.

Theory. ``sqlite3`` gives the interpreter lock away around every step of a
statement, and takes it back with up to 5 ms of waiting (the switch interval)
while the Trio thread computes. What counts is therefore the number of *steps*,
not of rows. Measured with a thread that only computes beside it, 200 rows a
commit: ``executemany`` took 495 ms a commit, inserts of many rows at once 32 ms.
Hence two habits here: rows are inserted up to 128 to a statement, and every
read returns one row, aggregated inside SQLite. Many-row inserts must say ``OR
FAIL``: the default, ``OR ABORT``, keeps a statement journal, which costs 30 %
(the surrounding transaction is rolled back on any error in any case).

``event`` is clustered by (room, offset), so that a page of history is a few
neighbouring pages. A plain rowid table with an index took 15 % less CPU to
write with 1,000 rooms, but scatters each read over as many pages as events.
"""

from __future__ import annotations

import math
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from broker.engine.base import HistoryPage, HistoryQuery, Retention, Seen
from broker.engine.selection import select
from broker.engine.sqlite_file import BUSY_TIMEOUT, connect, open_locked, prepare, uri
from broker.protocol.events import Position, restore

_ROWS_PER_STATEMENT = 128

_SCAN_ROWS = 1024
"""A search by time halves the offsets until this many are left, which one statement scans."""

_LONGEST_TTL = 1e12
"""Seconds; SQLite's JSON cannot say infinity."""

_INSERT_ROOM = "INSERT OR FAIL INTO room (id, name, epoch, size, ttl, check_at) VALUES "
_INSERT_EVENT = "INSERT OR FAIL INTO event (room_id, offset, ts, wire) VALUES "
_INSERT_KEY = "INSERT OR FAIL INTO publish_key (ts, room_id, publisher, key, offset) VALUES "
_INSERT_ACKNOWLEDGEMENT = "INSERT INTO acknowledgement (room_id, who, offset, ts) VALUES "
_NEVER_BACKWARDS = """ ON CONFLICT DO UPDATE SET offset = excluded.offset, ts = excluded.ts
    WHERE excluded.offset > acknowledgement.offset"""

_STREAMS = """SELECT CAST(json_group_array(json_array(id, name, epoch, size, ttl,
    (SELECT offset FROM event WHERE room_id = room.id ORDER BY offset LIMIT 1),
    (SELECT offset FROM event WHERE room_id = room.id ORDER BY offset DESC LIMIT 1),
    (SELECT ts FROM event WHERE room_id = room.id ORDER BY offset LIMIT 1),
    (SELECT ts FROM event WHERE room_id = room.id ORDER BY offset DESC LIMIT 1))) AS BLOB) FROM """

_BOUNDS = """SELECT id, epoch,
    (SELECT offset FROM event WHERE room_id = room.id ORDER BY offset LIMIT 1),
    (SELECT offset FROM event WHERE room_id = room.id ORDER BY offset DESC LIMIT 1)
    FROM room WHERE name = ?"""

_EVENTS = """SELECT count(*), CAST(group_concat(wire) AS BLOB) FROM
    (SELECT wire FROM event WHERE room_id = ? AND offset BETWEEN ? AND ? ORDER BY offset)"""


class StreamRow(NamedTuple):
    """What the database says of one room. ``first`` to ``top`` are stored, ``None``: no event yet."""

    id: int
    name: str
    epoch: str
    size: int
    ttl: float
    first: int | None
    top: int | None
    first_ts: float | None
    top_ts: float | None


class KeyRow(NamedTuple):
    """One idempotency key and the offset its event got at ``ts``."""

    room_id: int
    publisher: str
    key: str
    offset: int
    ts: float


_decode_streams = msgspec.json.Decoder(list[StreamRow]).decode
_decode_keys = msgspec.json.Decoder(list[KeyRow]).decode
_decode_seen = msgspec.json.Decoder(list[Seen]).decode
_split = msgspec.json.Decoder(list[msgspec.Raw]).decode

STORE_ERRORS = (sqlite3.Error, msgspec.MsgspecError, UnicodeError, OverflowError)
"""What a call may raise when the disk, the file, or a value that SQLite cannot take is at fault."""


def first_newer(connection: sqlite3.Connection, room_id: int, low: int, high: int, ts: float) -> int:
    """First offset from ``low`` to ``high`` stored later than ``ts``, else ``high + 1``; all must exist."""
    while high - low > _SCAN_ROWS:
        middle = (low + high) // 2
        row = connection.execute(
            "SELECT ts FROM event WHERE room_id = ? AND offset = ?", (room_id, middle)
        ).fetchone()
        if row is None:
            raise sqlite3.DatabaseError(f"event {middle} is missing")
        low, high = (low, middle) if row[0] > ts else (middle + 1, high)
    row = connection.execute(
        "SELECT min(offset) FROM event WHERE room_id = ? AND offset BETWEEN ? AND ? AND ts > ?",
        (room_id, low, high, ts),
    ).fetchone()
    return high + 1 if row[0] is None else int(row[0])


class Store:
    """An open database. One thread writes; reader threads have connections of their own.

    Without a directory the database lives in memory; it has only one connection then,
    which ``_guard`` keeps readers from using in the middle of a transaction.
    """

    def __init__(
        self, writer: sqlite3.Connection, generation: str, lock: int | None, path: Path | None
    ) -> None:
        self.writer = writer
        self.generation = generation
        self._lock = lock
        self._path = path
        self._guard: AbstractContextManager[Any] = threading.Lock() if path is None else nullcontext()
        self._idle: deque[sqlite3.Connection] = deque()

    # Opening and closing

    @classmethod
    def open(cls, directory: Path | None) -> Store:
        """Open or create the database in ``directory``; ``None``: in memory.

        Raises :class:`ConfigurationError` if it cannot be used, or another broker uses it.
        """
        if directory is None:
            writer = connect(":memory:")
            return cls(writer, prepare(writer, None), None, None)
        path = directory / "broker.db"
        return cls(*open_locked(path), path)

    def close(self) -> None:
        """Fold the log into the database and let go of everything. Nobody reads or writes any more."""
        try:
            while self._idle:
                self._idle.pop().close()
            self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error:
            pass  # what is committed stays in the log, and the next start reads it there
        finally:
            self.writer.close()
            if self._lock is not None:
                os.close(self._lock)

    # Writing, all of it within a transaction

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, on disk at the end. Whatever raises inside takes everything back."""
        connection = self.writer
        with self._guard:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                connection.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors (disk full, I/O).
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def next_room_id(self) -> int:
        """The id after the highest one ever used."""
        row = self.writer.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'room'")
        return int(row.fetchone()[0]) + 1

    def streams(self, names: Sequence[str]) -> list[StreamRow]:
        """Those of ``names`` that exist."""
        sql = f"{_STREAMS} room WHERE name IN (SELECT value FROM json_each(?))"  # noqa: S608
        return _decode_streams(self.writer.execute(sql, (msgspec.json.encode(names).decode(),)).fetchone()[0])

    def due_streams(self, now: float, limit: int) -> list[StreamRow]:
        """Rooms that wanted to be looked at by ``now``."""
        sql = f"{_STREAMS} (SELECT * FROM room WHERE check_at <= ? ORDER BY check_at LIMIT ?) AS room"  # noqa: S608
        return _decode_streams(self.writer.execute(sql, (now, limit)).fetchone()[0])

    def insert_rooms(self, rooms: Sequence[tuple[int, str, str, Retention, float]]) -> None:
        """Create rooms: (id, name, epoch, retention, when to look at it again)."""
        flat: list[Any] = []
        for room_id, name, epoch, retention, check_at in rooms:
            flat += (room_id, name, epoch, retention.size, min(retention.ttl, _LONGEST_TTL), check_at)
        self._insert(_INSERT_ROOM, 6, flat)

    def insert_events(self, flat: list[Any]) -> None:
        """Append events: room id, offset, ts, wire, of one after the other."""
        self._insert(_INSERT_EVENT, 4, flat)

    def insert_keys(self, flat: list[Any]) -> None:
        """Remember idempotency keys: ts, room id, publisher, key, offset."""
        self._insert(_INSERT_KEY, 5, flat)

    def insert_acknowledgements(self, flat: list[Any]) -> None:
        """Move acknowledged positions forward: room id, who, offset, ts."""
        self._insert(_INSERT_ACKNOWLEDGEMENT, 4, flat, _NEVER_BACKWARDS)

    def _insert(self, head: str, width: int, flat: list[Any], tail: str = "") -> None:
        """Insert rows in as few steps as possible, see the top of the file."""
        row = f"({','.join('?' * width)})"
        start, rows = 0, _ROWS_PER_STATEMENT
        while start < len(flat):
            while rows * width > len(flat) - start:
                rows //= 2  # powers of two: eight statements per table stay prepared
            self.writer.execute(head + ",".join([row] * rows) + tail, flat[start : start + rows * width])
            start += rows * width

    def set_retention(self, room_id: int, retention: Retention, check_at: float) -> None:
        """The room keeps its past differently from now on."""
        self.writer.execute(
            "UPDATE room SET size = ?, ttl = ?, check_at = min(check_at, ?) WHERE id = ?",
            (retention.size, min(retention.ttl, _LONGEST_TTL), check_at, room_id),
        )

    def set_check(self, room_id: int, check_at: float) -> None:
        """Look at the room again at that time."""
        self.writer.execute("UPDATE room SET check_at = ? WHERE id = ?", (check_at, room_id))

    def trim(self, room_id: int, below: int) -> None:
        """Delete the events with offsets below ``below``."""
        self.writer.execute("DELETE FROM event WHERE room_id = ? AND offset < ?", (room_id, below))

    def remove_room(self, room_id: int) -> None:
        """Delete a room whose life is over."""
        for table, column in (("event", "room_id"), ("acknowledgement", "room_id"), ("room", "id")):
            self.writer.execute(f"DELETE FROM {table} WHERE {column} = ?", (room_id,))  # noqa: S608

    def remembered_keys(self) -> list[KeyRow]:
        """All remembered idempotency keys, oldest first."""
        sql = """SELECT CAST(json_group_array(json_array(room_id, publisher, key, offset, ts)) AS BLOB)
            FROM (SELECT * FROM publish_key ORDER BY id)"""
        return _decode_keys(self.writer.execute(sql).fetchone()[0])

    def drop_keys(self, oldest: float) -> None:
        """Forget the keys up to the first that was used after ``oldest``."""
        self.writer.execute(
            """DELETE FROM publish_key WHERE id < coalesce(
                (SELECT id FROM publish_key WHERE ts > ? ORDER BY id LIMIT 1), 9223372036854775807)""",
            (oldest,),
        )

    # Reading, from any thread

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees one moment of the database."""
        if self._path is None:
            with self._guard:
                yield self.writer
            return
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = connect(uri(self._path, "ro"), BUSY_TIMEOUT)
        try:
            connection.execute("BEGIN")
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)

    def read_page(
        self, room: str, query: HistoryQuery, retention: Retention, now: float
    ) -> HistoryPage | None:
        """Answer ``query``; ``None`` if there is no such room."""
        with self._reading() as connection:
            row = connection.execute(_BOUNDS, (room,)).fetchone()
            if row is None:
                return None
            room_id, epoch, stored_first, stored_top = row
            top = Position(epoch, stored_top or 0)
            floor = max((stored_first or 1) - 1, top.offset - retention.size)
            if floor < top.offset:
                floor = first_newer(connection, room_id, floor + 1, top.offset, now - retention.ttl) - 1

            def first_since(ts: float) -> int:
                if floor == top.offset:
                    return top.offset + 1
                before = math.nextafter(ts, -math.inf)
                return first_newer(connection, room_id, floor + 1, top.offset, before)

            chosen = select(query, top, floor, first_since)
            count, wires = connection.execute(_EVENTS, (room_id, chosen.first, chosen.last)).fetchone()
        if count != chosen.last - chosen.first + 1:
            raise sqlite3.DatabaseError(f"events of {room!r} are missing")
        pieces = _split(b"[%b]" % (wires or b""))
        events = [
            restore(room, bytes(wire), Position(epoch, offset))
            for offset, wire in enumerate(pieces, chosen.first)
        ]
        return HistoryPage(events, top, chosen.recovered, chosen.more)

    def read_acknowledgements(self, room: str) -> list[Seen]:
        """Everybody's stored position in ``room``."""
        sql = """SELECT CAST(json_group_array(json_array(who, offset, acknowledgement.ts)) AS BLOB)
            FROM acknowledgement JOIN room ON room.id = room_id WHERE name = ?"""
        with self._reading() as connection:
            return _decode_seen(connection.execute(sql, (room,)).fetchone()[0])
