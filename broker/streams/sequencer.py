"""One room's events in their order, from wherever they come. Sans-IO.

A stored event reaches a node twice, as the answer to whoever published it here
and on the room's channel; either may come first, and a message may be lost.
Offsets decide: what is known is dropped, what is next passes, what lies ahead
is kept until the hole before it has been filled. The engine looks at
:attr:`~Sequencer.hole_since` and fills the hole from the stream.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from broker.protocol.events import Event, Position

AHEAD: Final = 512
"""Events kept beyond a hole; further ones are read from the stream when it is filled."""

RETIRED: Final = 8
"""Earlier epochs remembered, to know a latecomer from news."""


class Sequencer:
    """The stream of one room: everything up to ``offset`` of ``epoch`` has passed."""

    __slots__ = ("_ahead", "_retired", "dropped", "epoch", "hole_since", "known_top", "offset")

    def __init__(self, top: Position) -> None:
        self.epoch, self.offset = top
        self.known_top = top.offset
        """The highest offset that is known to exist."""
        self.hole_since: float | None = None
        """When it became known that something is missing (the caller's clock); ``None``: nothing is."""
        self.dropped = 0
        """Events that were too far ahead to be kept."""
        # Most rooms never need these two.
        self._ahead: dict[int, Event] | None = None
        self._retired: tuple[str, ...] = ()

    @property
    def position(self) -> Position:
        """Up to where events have passed."""
        return Position(self.epoch, self.offset)

    @property
    def ahead(self) -> Collection[int]:
        """Offsets of the events that are kept."""
        return self._ahead or ()

    def is_retired(self, epoch: str) -> bool:
        """Whether ``epoch`` is one that this stream has had before."""
        return epoch in self._retired

    def offer(self, event: Event, now: float, passed: list[Event]) -> None:
        """Take an event of this epoch; what may pass now is appended to ``passed``."""
        offset = event.offset
        if offset == self.offset + 1:  # the common case
            self.offset = offset
            passed.append(event)
            if self.hole_since is None:
                self.known_top = offset
            else:
                self._go_on(now, passed)
        elif offset > self.offset:
            self._keep(offset, event, now)

    def expect(self, offset: int, now: float) -> None:
        """An event with ``offset`` exists."""
        self.known_top = max(self.known_top, offset)
        if self.known_top > self.offset and self.hole_since is None:
            self.hole_since = now

    def skip(self, offset: int, now: float, passed: list[Event]) -> None:
        """Nothing up to ``offset`` can be had any more: go on after it."""
        if offset > self.offset:
            self.offset = offset
            self._go_on(now, passed)

    def restart(self, top: Position) -> None:
        """The stream has another epoch from now on; what is kept belongs to the old one."""
        if top.epoch != self.epoch:
            self._retired = (*self._retired, self.epoch)[-RETIRED:]
        self.epoch, self.offset = top
        self.known_top = top.offset
        self.hole_since = None
        self._ahead = None

    def _keep(self, offset: int, event: Event, now: float) -> None:
        if self._ahead is None:
            self._ahead = {}
        if len(self._ahead) < AHEAD:
            self._ahead.setdefault(offset, event)
        elif offset not in self._ahead:
            self.dropped += 1
        self.expect(offset, now)

    def _go_on(self, now: float, passed: list[Event]) -> None:
        """The offset has moved up: let pass what was kept, and see whether a hole remains."""
        ahead = self._ahead
        if ahead:
            while (event := ahead.pop(self.offset + 1, None)) is not None:
                self.offset += 1
                passed.append(event)
            for offset in [offset for offset in ahead if offset <= self.offset]:
                del ahead[offset]  # came by another way meanwhile
        if not ahead:
            self._ahead = None
        self.known_top = max(self.known_top, self.offset)
        # Another hole than before, if there is one, and as young as that.
        self.hole_since = now if self.known_top > self.offset else None
