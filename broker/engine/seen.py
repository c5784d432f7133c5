"""Acknowledged positions on their way to the disk.

They come often and matter little each, so the newest of each member is
gathered here and written about once a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from broker.engine.base import Seen
from broker.engine.batch import Acknowledge


class SeenBuffer:
    """What was acknowledged and is not yet known to be on disk."""

    def __init__(self) -> None:
        self._gathered: dict[str, dict[str, tuple[int, float]]] = {}
        self._leaving: list[Acknowledge] = []

    def __bool__(self) -> bool:
        """Whether something waits to be taken."""
        return bool(self._gathered)

    def note(self, room: str, who: str, offset: int, ts: float) -> None:
        """Gather one position; an older one than gathered is ignored."""
        people = self._gathered.setdefault(room, {})
        known = people.get(who)
        if known is None or known[0] < offset:
            people[who] = (offset, ts)

    def take(self) -> Acknowledge:
        """Everything gathered, to be written. Give it back to :meth:`settle`."""
        request = Acknowledge(self._gathered)
        self._gathered = {}
        self._leaving.append(request)
        return request

    def settle(self, request: Acknowledge, *, written: bool) -> None:
        """The write has ended; what could not be written is gathered again."""
        self._leaving.remove(request)
        if not written:
            for room, people in request.positions.items():
                for who, (offset, ts) in people.items():
                    self.note(room, who, offset, ts)

    def of(self, room: str) -> list[Seen]:
        """What is known here about ``room``."""
        sources: list[Mapping[str, tuple[int, float]]] = [
            request.positions.get(room, {}) for request in self._leaving
        ]
        sources.append(self._gathered.get(room, {}))
        return [Seen(who, *position) for people in sources for who, position in people.items()]


def newest(positions: Iterable[Seen]) -> list[Seen]:
    """One position of everybody, the furthest."""
    best: dict[str, Seen] = {}
    for seen in positions:
        known = best.get(seen.who)
        if known is None or known.offset < seen.offset:
            best[seen.who] = seen
    return list(best.values())
