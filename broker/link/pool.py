"""Connections for calls: each serves one call at a time, so that a long answer holds up nobody."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from typing import Final

import trio

from broker.link.base import LinkDown, LinkError, Reply
from broker.link.lane import Lane, Packed

SIZE: Final = 6
"""Connections at most. Calls are reads of history and presence: a few at a time keep one Redis busy."""


class _Caller:
    """Somebody who waits for a connection."""

    __slots__ = ("event", "outcome")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.outcome: Lane | LinkDown | None = None

    def give(self, outcome: Lane | LinkDown) -> None:
        self.outcome = outcome
        self.event.set()


class Pool:
    """Connections to one server, opened when they are needed and kept.

    They are opened by tasks of :meth:`run`, never by a caller's: whoever calls
    may be cancelled, and knows nothing of asyncio.
    """

    def __init__(self, dial: Callable[[], Awaitable[Lane]]) -> None:
        self._dial = dial
        self._idle: list[Lane] = []
        self._lent: set[Lane] = set()
        self._dialing = 0
        self._callers: deque[_Caller] = deque()
        self._nursery: trio.Nursery | None = None
        self._context = copy_context()

    async def run(self) -> None:
        """Serve callers until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                # A task inherits the context of who starts it rather than that of its nursery,
                # and callers' contexts know no asyncio loop.
                self._context = copy_context()
                try:
                    await trio.sleep_forever()
                finally:
                    self._nursery = None  # who asks from now on must not find it closed
        finally:
            self.close("the link has ended")

    def close(self, why: str) -> None:
        """Give up all connections; who waits for an answer or a connection is told."""
        for lane in [*self._idle, *self._lent]:
            lane.close(why)
        self._idle.clear()
        callers, self._callers = self._callers, deque()
        for caller in callers:
            caller.give(LinkDown(why))

    async def ask(self, *commands: Packed) -> list[Reply | LinkError]:
        """Send commands and wait for their answers. Raises :class:`LinkDown`."""
        lane = await self._borrow()
        self._lent.add(lane)
        try:
            return await lane.ask(*commands)
        finally:
            self._lent.discard(lane)
            self._give_back(lane)

    async def _borrow(self) -> Lane:
        while self._idle:
            lane = self._idle.pop()
            if lane.why is None:
                return lane
        caller = _Caller()
        self._callers.append(caller)
        self._open_more()
        try:
            await caller.event.wait()
        except trio.Cancelled:
            if isinstance(caller.outcome, Lane):
                self._give_back(caller.outcome)
            elif caller in self._callers:
                self._callers.remove(caller)
            raise
        if isinstance(caller.outcome, Lane):
            return caller.outcome
        assert caller.outcome is not None
        raise caller.outcome

    def _give_back(self, lane: Lane) -> None:
        if lane.why is not None:
            self._open_more()
        elif self._callers:
            self._callers.popleft().give(lane)
        else:
            self._idle.append(lane)

    def _open_more(self) -> None:
        if self._nursery is None:
            while self._callers:
                self._callers.popleft().give(LinkDown("the link has ended"))
            return
        free = SIZE - self._dialing - len(self._lent) - len(self._idle)
        for _ in range(min(len(self._callers) - self._dialing, free)):
            self._dialing += 1
            self._context.run(self._nursery.start_soon, self._open)

    async def _open(self) -> None:
        try:
            lane = await self._dial()
        except LinkDown as error:
            self._dialing -= 1
            if self._callers:
                self._callers.popleft().give(error)
        else:
            self._dialing -= 1
            self._give_back(lane)
