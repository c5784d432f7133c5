"""Opening rooms: listen first, then ask where the stream is, so that nothing can fall between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from broker.engine.batch import Open
from broker.link.base import Link, LinkDown, LinkError, Reply
from broker.link.interest import Interest
from broker.protocol.events import Position
from broker.streams.delivery import Delivery, Stream
from broker.streams.generation import Generation
from broker.streams.scripts import OPEN, StreamNames, life

HOLDER: Final = "engine"
"""As whom the engine wants rooms to be listened to."""

OPEN_WITHIN: Final = 2.0
"""How long opening a room may take (s)."""

AWAY: Final = "Redis is away"
STOPPED: Final = "the store is not running"


class _Attempt:
    """A room that is being opened."""

    __slots__ = ("answered", "failure", "given_up", "opened")

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.failure: LinkError | None = None
        self.given_up = False
        self.opened = False


class Openings:
    """Answers requests to open a room. ``strange()``: the store has another generation than we know."""

    def __init__(
        self,
        link: Link,
        interest: Interest,
        generation: Generation,
        delivery: Delivery,
        *,
        names: StreamNames,
        strange: Callable[[], None],
    ) -> None:
        self._link = link
        self._interest = interest
        self._generation = generation
        self._delivery = delivery
        self._names = names
        self._strange = strange
        self.failures = 0

    async def open(self, request: Open) -> None:
        """Open a room; ``request`` is told how it went, whatever happens."""
        room = request.room
        failure = AWAY
        attempt = _Attempt()
        self._delivery.hold(room)
        self._interest.want(room, HOLDER)
        try:
            with trio.move_on_after(OPEN_WITHIN):
                if await self._interest.wait(room):
                    self._ask(request, attempt)
                    await attempt.answered.wait()
                    if attempt.failure is not None:
                        failure = reason(attempt.failure)
        except trio.Cancelled:
            failure = STOPPED
            raise
        finally:
            if not attempt.opened:
                attempt.given_up = True
                self.failures += 1
                self._delivery.release(room)
                self._interest.release(room, HOLDER)
                request.finished(None, failure)

    def _ask(self, request: Open, attempt: _Attempt) -> None:
        """Ask where the stream is. The answer opens the room at once, before anything else is read."""
        keys = self._names.of(request.room)
        names = keys[:2] if self._link.clustered else (*keys[:2], self._names.keys.store)

        def done(reply: Reply | LinkError) -> None:
            if isinstance(reply, LinkError):
                attempt.failure = reply
            elif not attempt.given_up:
                attempt.opened = True
                self._opened(request, reply)
            attempt.answered.set()

        self._link.send_script(done, OPEN, names, self._generation.tokens(), life(request.retention.ttl))

    def _opened(self, request: Open, reply: Reply) -> None:
        shown, offset, commits = reply
        top = Position(shown.decode(), offset)
        if not self._generation.saw(top.epoch, commits):
            self._strange()
        stream = Stream(request.room, self._names.of(request.room), top, request.retention.ttl)
        self._delivery.begin(stream, lambda: request.finished(top, None))


def reason(error: LinkError) -> str:
    """What people are told."""
    return str(error) if isinstance(error, LinkDown) else f"the store refused ({error.code})"
