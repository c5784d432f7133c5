"""What the Trio thread and the writer thread tell each other.

A :class:`Batch` belongs to one thread at a time: made when the writer takes
what waits, filled in by :class:`~broker.engine.writer.Writer`, handed back to
the Trio thread for good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from broker.engine.base import Done, Retention
from broker.errors import BrokerError, ErrorCode
from broker.protocol.events import Event, Position

Publish = tuple[Event, Retention, Done]
Acknowledgements = Mapping[str, Mapping[str, tuple[int, float]]]
"""By room, then by who: (offset, ts)."""
Opened = Callable[["Position | None", "str | None"], None]


class Open:
    """Make sure that the room has a stream; with ``keep``, it lives until :class:`Close`.

    ``finished(top, failure)`` is called on the Trio thread with one of the two.
    """

    __slots__ = ("finished", "keep", "retention", "room", "top")

    def __init__(self, room: str, retention: Retention, finished: Opened, *, keep: bool) -> None:
        self.room = room
        self.retention = retention
        self.finished = finished
        self.keep = keep
        self.top: Position | None = None


class Close:
    """Nobody needs the room; it may vanish once its events have expired."""

    __slots__ = ("room",)

    def __init__(self, room: str) -> None:
        self.room = room


class Acknowledge:
    """Write acknowledged positions."""

    __slots__ = ("positions",)

    def __init__(self, positions: Acknowledgements) -> None:
        self.positions = positions


class Sweep:
    """Remove what has expired; ``more`` says that there was too much for one transaction."""

    __slots__ = ("more",)

    def __init__(self) -> None:
        self.more = False


Request = Open | Close | Acknowledge | Sweep


class Batch:
    """What one transaction does. The writer fills in ``stored``, ``duplicates``, ``error``.

    Until it has been committed a batch counts as failed, so that even a crash
    of the writer answers everybody.
    """

    __slots__ = ("duplicates", "error", "publishes", "requests", "stored")

    def __init__(self, publishes: list[Publish], requests: list[Request]) -> None:
        self.publishes = publishes
        self.requests = requests
        self.stored: list[Event] = []
        self.duplicates: dict[int, Position] = {}
        """Answers of publishes (by index) whose event was stored before."""
        self.error: str | None = "the store stopped"

    def __bool__(self) -> bool:
        return bool(self.publishes or self.requests)

    def answer(self, index: int) -> Position | BrokerError:
        """What the publish at ``index`` is told."""
        event = self.publishes[index][0]
        if self.error is not None:
            return unavailable(self.error, event.room)
        return event.position or self.duplicates[index]


def unavailable(reason: str, room: str | None = None) -> BrokerError:
    """The one refusal of this engine."""
    return BrokerError(ErrorCode.UNAVAILABLE, reason, room=room, retry_after=1.0)
