"""Opening the database file: its schema, its settings, and the lock that keeps a second broker out."""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
from pathlib import Path
from urllib.parse import quote

from broker.errors import ConfigurationError

_SCHEMA_VERSION = 1

_SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    # AUTOINCREMENT: an id is never given to a second life of a room.
    """CREATE TABLE room (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE,
       epoch TEXT NOT NULL, size INTEGER NOT NULL, ttl REAL NOT NULL, check_at REAL NOT NULL)""",
    "CREATE INDEX room_check ON room (check_at)",
    # ts never falls within a room, so that a search by time may halve the offsets.
    """CREATE TABLE event (room_id INTEGER NOT NULL, offset INTEGER NOT NULL, ts REAL NOT NULL,
       wire BLOB NOT NULL, PRIMARY KEY (room_id, offset)) WITHOUT ROWID""",
    # In order of arrival: appending touches one page a commit, and what expires lies in front.
    """CREATE TABLE publish_key (id INTEGER PRIMARY KEY, ts REAL NOT NULL, room_id INTEGER NOT NULL,
       publisher TEXT NOT NULL, key TEXT NOT NULL, offset INTEGER NOT NULL)""",
    """CREATE TABLE acknowledgement (room_id INTEGER NOT NULL, who TEXT NOT NULL, offset INTEGER NOT NULL,
       ts REAL NOT NULL, PRIMARY KEY (room_id, who)) WITHOUT ROWID""",
)

_PRAGMAS = (
    "PRAGMA synchronous = FULL",  # in WAL mode: the log is synced by every commit
    "PRAGMA secure_delete = OFF",  # Debian builds overwrite what is trimmed; that doubles its cost
    "PRAGMA cache_size = -8000",  # KiB
    "PRAGMA wal_autocheckpoint = 4000",  # pages: with 1,000 rooms 25 % more events/s than SQLite's 1,000
    "PRAGMA journal_size_limit = 33554432",  # bytes
)

BUSY_TIMEOUT = 2.0
"""How long a statement waits for a foreign tool that holds the database (s)."""


def open_locked(path: Path) -> tuple[sqlite3.Connection, str, int]:
    """The writer's connection, the store's generation, and the descriptor that holds the directory's lock.

    Raises :class:`ConfigurationError` if it cannot be used, or another broker uses it.
    """
    lock = _take_lock(path.parent)
    writer: sqlite3.Connection | None = None
    try:
        # Nobody else on the machine may read what people say to each other; SQLite gives its
        # companion files the mode of the database.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        writer = connect(uri(path, "rwc"))
        return writer, prepare(writer, path), lock
    except (sqlite3.Error, OSError, ConfigurationError) as error:
        if writer is not None:
            writer.close()
        os.close(lock)
        if not isinstance(error, ConfigurationError):
            raise unusable(path, error) from error
        raise


def unusable(path: Path | None, error: Exception) -> ConfigurationError:
    """What the operator is told when the database does not work."""
    return ConfigurationError(str(path), "store.data", f"the database cannot be used ({error})", _mend(error))


def connect(address: str, timeout: float = 0.0) -> sqlite3.Connection:
    """A connection that waits ``timeout`` seconds for others.

    It is used by one thread at a time, but opened and closed by others, so
    ``sqlite3`` must not check the thread. Transactions are ours.
    """
    return sqlite3.connect(address, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)


def uri(path: Path, mode: str) -> str:
    """Address of a file: ``mode`` is ``rwc`` or ``ro``."""
    return f"file:{quote(str(path.absolute()))}?mode={mode}"


def prepare(connection: sqlite3.Connection, path: Path | None) -> str:
    """Make the connection a writer's: settings, and the schema if the file is new. Returns the generation."""
    [mode] = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if path is not None and mode != "wal":
        raise sqlite3.OperationalError(f"no write-ahead log on this file system, only {mode!r}")
    for pragma in _PRAGMAS:
        connection.execute(pragma)
    connection.execute("BEGIN IMMEDIATE")
    [version] = connection.execute("PRAGMA user_version").fetchone()
    if version == 0:
        for statement in _SCHEMA:
            connection.execute(statement)
        # Part of every epoch: a new database can never pass for the one before it.
        connection.execute("INSERT INTO meta VALUES ('generation', ?)", (secrets.token_urlsafe(9),))
        connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    elif version != _SCHEMA_VERSION:
        raise ConfigurationError(
            str(path),
            "store.data",
            f"the database has format {version}, this broker writes format {_SCHEMA_VERSION}",
            "use the version of the broker that wrote it, or give this one another directory",
        )
    [generation] = connection.execute("SELECT value FROM meta WHERE name = 'generation'").fetchone()
    connection.execute("COMMIT")
    # Only now: while opening, whoever holds the database is reported at once.
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT * 1000:.0f}")
    return str(generation)


def _take_lock(directory: Path) -> int:
    """The descriptor that keeps a second broker out for as long as it is open."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(directory / "broker.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigurationError(
            str(directory),
            "store.data",
            f"the directory cannot be used ({error.strerror})",
            "name a directory that the broker may create and write to",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(lock, 32).decode("ascii", "replace").strip()
        os.close(lock)
        raise ConfigurationError(
            str(directory),
            "store.data",
            f"another broker uses this directory (process {holder or 'unknown'})",
            "stop it first, or give each broker a directory of its own",
        ) from error
    os.ftruncate(lock, 0)
    os.write(lock, b"%d\n" % os.getpid())
    return lock


def _mend(error: Exception) -> str:
    if "locked" in str(error):
        return "close the program that has the database open"
    if "malformed" in str(error) or "not a database" in str(error):
        return "restore it from a backup, or move it away to start with an empty past"
    return "check the permissions and the free space of its directory"
