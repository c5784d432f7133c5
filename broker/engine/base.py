"""The engine contract: what the hub needs of whatever keeps the past.

An engine stores the events of rooms with history, gives each room one totally
ordered stream, and hands stored events back through one ``deliver`` callable,
in order per room. It never imports the hub. All methods run on the Trio
thread; those without ``async`` never wait. ``tests/engine/contract.py`` is the
same page as tests, and every engine passes it unchanged.

Life of a room here: ``open`` (its stream is known and warm; live events of it
are delivered) → ``publish`` / ``history`` → ``close`` (nobody here needs it).
``publish`` and ``history`` also work on a room that is not open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import trio

from broker.errors import BrokerError
from broker.protocol.events import Event, Position

Deliver = Callable[[Sequence[Event]], None]
"""Called with stored events, each placed; several rooms may be mixed, each in order."""

Done = Callable[["Position | BrokerError"], None]
"""Called once per publish, after ``deliver`` of that event. Must not raise."""


Moved = Callable[[str, Position], None]
"""Called with an open room and where its stream is now, when no event can be delivered that leads there."""


def stays(_room: str, _position: Position) -> None:
    """For callers whose engine's streams only ever move by events."""


class Retention(NamedTuple):
    """How much of a room's past is kept: ``size`` events, none older than ``ttl`` seconds."""

    size: int
    ttl: float


class HistoryQuery(NamedTuple):
    """Which part of a stream to read; exactly one of the first four is given.

    ``since``: events after that position, oldest first. ``before``: the newest
    events below that offset. ``at``: events from that Unix time on (seconds).
    ``tail``: the newest n events. ``limit`` bounds the answer. Events always
    come in ascending order.
    """

    limit: int
    since: Position | None = None
    before: int | None = None
    at: float | None = None
    tail: int | None = None


class HistoryPage(NamedTuple):
    """Answer to a :class:`HistoryQuery`.

    ``top`` is the room's newest position, read in the same moment as the
    events. ``recovered`` matters for ``since``: true when the epoch is the
    stream's own and nothing after the given offset is gone, so that the events
    follow it without a hole (an offset beyond the top is not recovered).
    ``more``: further events lie in the direction of reading.
    """

    events: list[Event]
    top: Position
    recovered: bool
    more: bool


class Seen(NamedTuple):
    """Up to where ``who`` (a user, else a session) has acknowledged a room, and when."""

    who: str
    offset: int
    ts: float


class Engine(Protocol):
    """What every engine offers."""

    async def run(
        self,
        deliver: Deliver,
        moved: Moved = stays,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run until cancelled; started once the store is usable. The owner of every task inside.

        ``moved`` is told of an open room whose stream was replaced (another
        epoch), or has lost what would have come next. A store that belongs to
        this engine alone never does that.
        On cancellation everything acknowledged is on disk and nothing else runs.
        Raises :class:`~broker.errors.ConfigurationError` if the store cannot be used at all.
        """

    def position(self, room: str) -> Position | None:
        """Top of an open room; ``None`` when the room is not open (use :meth:`open`)."""

    async def open(self, room: str, retention: Retention) -> Position:
        """Make the room warm and return its top. Creates the stream (offset 0) if there is none.

        Raises ``unavailable``.
        """

    def close(self, room: str) -> None:
        """The hub needs the room no longer. Unknown rooms are ignored."""

    def publish(self, event: Event, retention: Retention, done: Done) -> None:
        """Store ``event``, then ``deliver`` it, then ``done(position)``.

        Calls for one room are stored in call order. With ``event.key`` seen for
        the same (room, publisher) within 5 minutes: stored and delivered once,
        every ``done`` gets the first position. On failure ``done`` gets a
        :class:`~broker.errors.BrokerError` (``unavailable``) and nothing is delivered.
        """

    async def history(self, room: str, query: HistoryQuery, retention: Retention) -> HistoryPage:
        """Read the past. Events beyond ``retention`` are never returned. Raises ``unavailable``."""

    def history_nowait(self, room: str, query: HistoryQuery) -> HistoryPage | None:
        """The same from memory, when memory alone can answer; else ``None``."""

    def acknowledge(self, room: str, who: str, offset: int, ts: float) -> None:
        """Remember that ``who`` has seen up to ``offset``. Never moves backwards."""

    async def acknowledgements(self, room: str) -> list[Seen]:
        """Everybody's acknowledged positions in ``room``."""

    def statistics(self) -> dict[str, Any]:
        """Counters and gauges, plain numbers by name, for ``/api/stats`` and metrics."""
