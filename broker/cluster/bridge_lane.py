"""A connection for commands: gathered, written at once, answered in bulk.

A command waits at most for the end of the scheduler's pass in which it was
given, so that whatever one pass wants goes out as one write. Answers come in
the order of the commands.

Scripts are sent by their hash. When Redis has forgotten them (``SCRIPT FLUSH``),
nothing new is sent until what is under way has been answered; then the scripts
are loaded again, and the commands that failed for that reason go out first, in
their order. So two scripts for one room never overtake each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import hiredis
import trio

from broker.cluster.bridge_connection import NOTHING, Connection
from broker.cluster.bridge_counts import Counts
from broker.cluster.link import Argument, Done, LinkDown, LinkError, Reply, Script

LIMIT: Final = 32_768
"""Commands that may wait for an answer: two seconds of the busiest node, and some ten MB."""

NO_PRIMARY: Final = frozenset({"READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN"})
"""Errors that say: this server is not a primary that can be used, look for another."""

_TICKS: Final = 6
"""How often silence is looked at within the timeout."""

_RELOADS: Final = 3
"""Attempts to run a script that Redis keeps forgetting."""

Packed = bytes
_Entry = tuple[Done, Packed]


def pack(*command: Argument) -> Packed:
    """One command as bytes for the wire."""
    return hiredis.pack_command(command)


def pack_script(script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> Packed:
    """A call of a script by its hash."""
    return hiredis.pack_command(("EVALSHA", script.sha, len(keys), *keys, *arguments))


class Lane(Connection):
    """Commands on one connection. :meth:`run` gathers and watches; without it, only :meth:`ask` is served."""

    def __init__(self, name: str, counts: Counts, scripts: Sequence[Script]) -> None:
        super().__init__(name, counts)
        self._scripts = scripts
        self._flight: deque[_Entry] = deque()
        self._waiting: list[_Entry] = []
        self._forgotten: list[_Entry] = []
        self._reloads = 0
        self._wake = trio.Event()
        self._woken = False
        self._accepted = 0
        self._answered = 0

    @property
    def pending(self) -> int:
        """Commands that have no answer yet."""
        return len(self._flight) + len(self._waiting) + len(self._forgotten)

    def send(self, done: Done, packed: Packed) -> None:
        """Send soon; ``done`` is called once, perhaps before this returns."""
        if self.why is not None:
            done(LinkDown(self.why))
            return
        if len(self._flight) + len(self._waiting) >= LIMIT:
            self._counts.overflows += 1
            done(LinkDown("too many commands wait for Redis"))
            return
        self._accepted += 1
        self._waiting.append((done, packed))
        if not self._woken:
            self._woken = True
            self._wake.set()

    def flush(self) -> None:
        """Send what waits now."""
        waiting = self._waiting
        if not waiting or self.full or self._forgotten:
            return
        self._waiting = []
        self._flight.extend(waiting)
        self.write(waiting[0][1] if len(waiting) == 1 else b"".join([packed for _, packed in waiting]))

    async def ask(self, packed: Packed, timeout: float) -> Reply:
        """Send now and wait. Raises :class:`LinkError`; after a timeout or a cancellation the lane is closed."""
        answered = trio.Event()
        replies: list[Reply | LinkError] = []

        def done(reply: Reply | LinkError) -> None:
            replies.append(reply)
            answered.set()

        try:
            with trio.move_on_after(timeout):
                self.send(done, packed)
                self.flush()
                await answered.wait()
        finally:
            if not replies:
                # The answer that may still come must not be taken for that of the next command.
                self.close(f"no answer within {timeout:g} s")
        reply = replies[0]
        if isinstance(reply, LinkError):
            raise reply
        return reply

    async def load_scripts(self, timeout: float) -> None:
        """Make Redis know all scripts."""
        for script in self._scripts:
            await self.ask(pack("SCRIPT", "LOAD", script.source), timeout)

    async def run(self, timeout: float) -> None:
        """Send what is given until the connection is over; ``timeout`` bounds the wait for any answer."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._gather)
            nursery.start_soon(self._watch, timeout)
            await self.gone.wait()
            nursery.cancel_scope.cancel()

    async def _gather(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            self._woken = False
            self.flush()

    async def _watch(self, timeout: float) -> None:
        """Give up when something is not answered in time.

        Ticks are counted, not seconds: after the whole process stood still, the
        answers that wait in the kernel are read before anything is held against Redis.
        """
        marks: deque[int] = deque(maxlen=_TICKS)
        while True:
            await trio.sleep(timeout / _TICKS)
            if len(marks) == _TICKS and self._answered < marks[0]:
                self._counts.silences += 1
                self.close(f"no answer within {timeout:g} s")
                return
            marks.append(self._accepted)

    def resume_writing(self) -> None:
        """The kernel takes more again."""
        self.full = False
        self.flush()

    def _received(self, gets: Callable[[], Any]) -> None:
        flight = self._flight
        answered = 0
        try:
            while (reply := gets()) is not NOTHING:
                entry = flight.popleft()
                if type(reply) is LinkError:
                    self._failed(entry, reply)
                else:
                    answered += 1
                    entry[0](reply)
        finally:
            self._answered += answered
        if not flight:
            if self._forgotten:
                self._reload()
            else:
                self._reloads = 0
        if self._waiting:
            self.flush()

    def _failed(self, entry: _Entry, error: LinkError) -> None:
        """Handle an error reply."""
        code = str(error).partition(" ")[0]
        if code == "NOSCRIPT" and self._reloads < _RELOADS:
            self._forgotten.append(entry)
            return
        self._answered += 1
        self._counts.error_replies += 1
        entry[0](error)
        if code in NO_PRIMARY:
            self.close(str(error))

    def _reload(self) -> None:
        again, self._forgotten = self._forgotten, []
        self._counts.reloads += 1
        self._reloads += 1
        load = [pack("SCRIPT", "LOAD", script.source) for script in self._scripts]
        self._flight.extend((_ignore, packed) for packed in load)
        self._flight.extend(again)
        self._accepted += len(load)
        self.write(b"".join([*load, *(packed for _, packed in again)]))

    def _lost(self, why: str) -> None:
        over = [*self._forgotten, *self._flight, *self._waiting]
        self._forgotten, self._waiting = [], []
        self._flight.clear()
        self._counts.unanswered += len(over)
        down = LinkDown(why)
        for done, _ in over:
            done(down)


def _ignore(_: Reply | LinkError) -> None:
    """The answer says nothing that the next one would not."""
