"""Replies in order, while publishes are on their way to the store. Sans-IO.

A store answers when it can: a full queue says no at once while earlier events
still wait for the disk. What a session is told must nevertheless come in the
order in which it asked, so each reply takes its place when its message is
handled, and leaves when all before it have left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

Post = Callable[[bytes, bool], None]
"""Sends one reply on; the flag says that it waits for events pending in rooms."""


class Reply:
    """A place in the order; ``message`` is ``None`` where nothing was asked for."""

    __slots__ = ("_after_events", "_message", "_ready")

    def __init__(self, message: bytes | None = None, *, ready: bool = False, after_events: bool = False):
        self._ready = ready
        self._message = message
        self._after_events = after_events

    def fill(self, message: bytes | None, *, after_events: bool) -> None:
        """The answer is known now."""
        self._ready = True
        self._message = message
        self._after_events = after_events

    def leave(self, post: Post) -> bool:
        """Go, if the answer is known; false if it is not."""
        if self._ready and self._message is not None:
            post(self._message, self._after_events)
        return self._ready


class Replies:
    """The replies of one session that wait, oldest first. Made with the first, dropped with the last."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: deque[Reply] = deque()

    def reserve(self) -> Reply:
        """Take the next place for an answer that is not known yet."""
        reply = Reply()
        self._waiting.append(reply)
        return reply

    def hold(self, message: bytes, *, after_events: bool) -> None:
        """Keep an answer back until those before it have left."""
        self._waiting.append(Reply(message, ready=True, after_events=after_events))

    def release(self, post: Post) -> None:
        """Post all that nothing unknown stands before."""
        waiting = self._waiting
        while waiting and waiting[0].leave(post):
            waiting.popleft()

    def __len__(self) -> int:
        return len(self._waiting)
