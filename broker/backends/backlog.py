"""Which entries of a stream are being worked on, in which order, and what comes next. No IO.

The stream itself is the list of what is to be done: an entry stands there until
it is done, so that anything here may be forgotten and read again. Three rules
give the order within a room, whatever fails:

- One entry of a room is on its way at a time. With two, a failure of the first
  whose cause passes a moment later (``OOM``, ``BUSY``, a script that had to be
  loaded) would let the second overtake it. Rooms do not wait for each other.
- After a failure the room is blocked: what was queued for it is forgotten, and
  what is read for it is skipped.
- Rooms are freed only by :meth:`Backlog.restart`, which begins to read at the
  first entry of the stream again; so the one that failed is met first.

The life of an entry: ``admit`` → (its turn) → ``settle`` or ``fail``; settled
ones wait in ``take_settled`` to be removed from the stream, then ``removed``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

from broker.protocol.events import Event

START: Final = "0-0"
"""Before the first entry."""

WINDOW: Final = 1024
"""Entries worked on at once: enough for many rooms at once, and soon read again by another node."""

WINDOW_BYTES: Final = 16 * 1024 * 1024
"""The same in bytes of events."""

BLOCKED_ROOMS: Final = 64
"""Blocked rooms with which reading stops: so many do not fail for reasons of their own."""

SKIPPED: Final = 10_000
"""Entries of blocked rooms skipped until reading stops: each restart reads them all again."""


class Item:
    """One entry on its way."""

    __slots__ = ("event", "id", "stored")

    def __init__(self, identifier: str, event: Event, *, stored: bool) -> None:
        self.id = identifier
        self.event = event
        self.stored = stored
        """The room keeps history."""


class Backlog:
    """The entries that one node has read and not yet removed."""

    __slots__ = ("_blocked", "_bytes", "_known", "_queues", "_settled", "_skipped", "cursor")

    def __init__(self) -> None:
        self.cursor = START
        """Read on after this id."""
        self._known: dict[str, int] = {}  # id → bytes
        self._bytes = 0
        self._queues: dict[str, deque[Item]] = {}  # room → its entries; the first is on its way
        self._blocked: set[str] = set()
        self._skipped = 0
        self._settled: list[str] = []

    # -- reading ----------------------------------------------------------------

    @property
    def free(self) -> int:
        """How many entries may be read now."""
        stalled = (
            self._bytes >= WINDOW_BYTES or len(self._blocked) >= BLOCKED_ROOMS or self._skipped >= SKIPPED
        )
        return 0 if stalled else WINDOW - len(self._known)

    @property
    def blocked(self) -> int:
        """Rooms that wait for a restart."""
        return len(self._blocked)

    @property
    def idle(self) -> bool:
        """Whether nothing is known: what the stream holds is what is still to be done."""
        return not self._known and not self._blocked

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, identifier: str) -> bool:
        return identifier in self._known

    def restart(self) -> None:
        """Free all rooms, and read from the start; call it only between two reads."""
        self.cursor = START
        self._blocked.clear()
        self._skipped = 0

    def hold(self, identifier: str) -> None:
        """Know an entry that is being rejected; then :meth:`settle_held` or :meth:`forget`."""
        self._known[identifier] = 0

    def admit(self, item: Item) -> Item | None:
        """An entry was read. Returned, if it is to be sent on its way now; else it waits, or is skipped."""
        room = item.event.room
        if room in self._blocked:
            self._skipped += 1
            return None
        size = len(item.event.body)
        self._known[item.id] = size
        self._bytes += size
        queue = self._queues.get(room)
        if queue is not None:
            queue.append(item)
            return None
        self._queues[room] = deque((item,))
        return item

    # -- outcomes ---------------------------------------------------------------

    def settle(self, item: Item, *, gone: bool = False) -> Item | None:
        """The entry on its way is done (``gone``: and removed already). Returns the next of its room."""
        if gone:
            self.forget(item.id)
        else:
            self._settled.append(item.id)
        queue = self._queues[item.event.room]
        queue.popleft()
        if queue:
            return queue[0]
        del self._queues[item.event.room]
        return None

    def settle_held(self, identifier: str) -> None:
        """An entry that is no event stands among the rejected."""
        self._settled.append(identifier)

    def fail(self, item: Item) -> None:
        """The entry on its way could not be done now: its room waits for a restart."""
        room = item.event.room
        for waiting in self._queues.pop(room):
            self.forget(waiting.id)
        self._blocked.add(room)

    def forget(self, identifier: str) -> None:
        """Know an entry no more; if it stands in the stream, it is read again after a restart."""
        self._bytes -= self._known.pop(identifier)

    def abandon(self) -> None:
        """Another node reads now: forget all but what is on its way or done."""
        for queue in self._queues.values():
            while len(queue) > 1:
                self.forget(queue.pop().id)
        self.restart()

    # -- removal ----------------------------------------------------------------

    @property
    def settled(self) -> int:
        """Entries that may be removed from the stream."""
        return len(self._settled)

    def take_settled(self) -> list[str]:
        """Entries to remove now; then call :meth:`removed`, or :meth:`not_removed`."""
        taken, self._settled = self._settled, []
        return taken

    def removed(self, identifiers: Iterable[str]) -> None:
        """They are out of the stream."""
        for identifier in identifiers:
            self.forget(identifier)

    def not_removed(self, identifiers: Iterable[str]) -> None:
        """They may still stand in the stream: to be removed again."""
        self._settled.extend(identifiers)
