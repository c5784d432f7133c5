"""A connection for commands: gathered, written at once, answered in bulk.

A command waits for the end of the scheduler's pass in which it was given, so
that whatever one pass wants goes out as one write; when answers come in, what
has gathered meanwhile goes out with them. Answers come in the order of the
commands.

Two errors mean that a command was not executed and is to be sent again, and
both are handled without one command overtaking another:

- Redis has forgotten our scripts (``SCRIPT FLUSH``). Nothing new is sent until
  what is under way has been answered; then the scripts are loaded again, and
  the commands that failed for that reason go out first, in their order.
- In a Redis Cluster the key lives elsewhere now. The lane stops in the same way
  and waits to be asked for what it has left (:meth:`Lane.take_back`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, cast

import hiredis
import trio

from broker.link.base import Argument, Done, LinkDown, LinkError, Reply, Script
from broker.link.connection import NOTHING, Connection
from broker.link.counts import Counts
from broker.logs import Throttle, get_logger

log = get_logger(__name__)

LIMIT: Final = 32_768
"""Commands that may wait for an answer: two seconds of the busiest node, and some ten MB."""

NO_PRIMARY: Final = frozenset({"READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN"})
"""Errors that say: this server is not a primary that can be used, look for another."""

STATES: Final = frozenset({"OOM", "MISCONF", "BUSY", "NOPERM", "NOREPLICAS"})
"""Errors that say how Redis is rather than what the command was: worth a line in the log, once in a while."""

ELSEWHERE: Final = frozenset({"MOVED", "ASK", "TRYAGAIN"})
"""Errors of a cluster that say: not here, or not now."""

TRIES: Final = 4
"""How often a command is sent that was not executed for one of the reasons above."""

_TICKS: Final = 6
"""How often silence is looked at within the timeout."""

Packed = bytes
"""A command as bytes for the wire."""

# Its stub knows tuples of one only.
_pack = cast("Callable[[tuple[Argument, ...]], bytes]", hiredis.pack_command)


def pack(*command: Argument) -> Packed:
    """One command."""
    return _pack(command)


def pack_script(script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> Packed:
    """A call of a script by its hash."""
    return _pack(("EVALSHA", script.sha, len(keys), *keys, *arguments))


class Entry(NamedTuple):
    """A command on its way."""

    done: Done
    packed: Packed
    slot: int
    """Where its key lives in a cluster; 0 without one."""
    tries: int


class Moved(NamedTuple):
    """A command that has to be sent elsewhere, and the error that said so."""

    entry: Entry
    error: str


class Lane(Connection):
    """Commands on one connection. :meth:`run` gathers and watches; :meth:`ask` works without it."""

    def __init__(
        self, name: str, counts: Counts, scripts: Sequence[Script], answer_timeout: float, states: Throttle
    ) -> None:
        super().__init__(name, counts)
        self.unusable = False
        """Set when Redis said that it is no primary."""
        self.on_moved: Callable[[], None] | None = None
        """In a cluster: called when commands have to be sent elsewhere. The lane is held then."""
        self._held = False
        self._scripts = scripts
        self._timeout = answer_timeout
        self._states = states
        self._flight: deque[Entry] = deque()
        self._waiting: list[Entry] = []
        self._forgotten: list[Entry] = []
        self._moved: list[Moved] = []
        self._drained = trio.Event()
        self._wake = trio.Event()
        self._woken = False
        self._accepted = 0
        self._settled = 0

    @property
    def pending(self) -> int:
        """Commands that have no answer yet."""
        return len(self._flight) + len(self._waiting) + len(self._forgotten) + len(self._moved)

    def send(self, done: Done, packed: Packed, slot: int = 0, tries: int = 1) -> None:
        """Send soon; ``done`` is called once, perhaps before this returns."""
        if self.why is not None:
            done(LinkDown(self.why))
            return
        if len(self._flight) + len(self._waiting) >= LIMIT:
            self._counts.overflows += 1
            done(LinkDown("too many commands wait for Redis"))
            return
        self._accepted += 1
        self._waiting.append(Entry(done, packed, slot, tries))
        if not self._woken:
            self._woken = True
            self._wake.set()

    def flush(self) -> None:
        """Send what waits, unless the order forbids it."""
        waiting = self._waiting
        if not waiting or self.full or self._held or self._forgotten:
            return
        self._waiting = []
        self._flight.extend(waiting)
        self.write(waiting[0].packed if len(waiting) == 1 else b"".join([entry[1] for entry in waiting]))

    async def ask(self, *commands: Packed) -> list[Reply | LinkError]:
        """Send now and wait for all answers, errors among them.

        Raises :class:`LinkDown` when they do not come in time. After that the
        lane is closed: the answers that may still come must not be taken for
        those of the next command. It is closed after a cancellation, too, even
        when all answers are there: whoever was about to use it may be gone.
        """
        answered = trio.Event()
        replies: list[Reply | LinkError] = []

        def done(reply: Reply | LinkError) -> None:
            replies.append(reply)
            if len(replies) == len(commands):
                answered.set()

        try:
            with trio.move_on_after(self._timeout):
                for packed in commands:
                    self.send(done, packed)
                self.flush()
                await answered.wait()
        except trio.Cancelled:
            self.close("the command was cancelled")
            raise
        if len(replies) < len(commands):
            self.close(f"no answer within {self._timeout:g} s")
        for reply in replies:
            if isinstance(reply, LinkDown):
                raise reply
        return replies

    async def load_scripts(self) -> None:
        """Make Redis know all scripts. Raises :class:`LinkError`."""
        if not self._scripts:
            return
        for reply in await self.ask(*(pack("SCRIPT", "LOAD", script.source) for script in self._scripts)):
            if isinstance(reply, LinkError):
                raise reply

    async def run(self) -> None:
        """Send what is given until the connection is over."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._gather)
            nursery.start_soon(self._watch)
            await self.gone.wait()
            nursery.cancel_scope.cancel()

    async def _gather(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            self._woken = False
            self.flush()

    async def _watch(self) -> None:
        """Give up when something is not answered in time.

        Ticks are counted, not seconds: after the whole process stood still, the
        answers that wait in the kernel are read before anything is held against Redis.
        """
        marks: deque[int] = deque(maxlen=_TICKS)
        while True:
            await trio.sleep(self._timeout / _TICKS)
            if len(marks) == _TICKS and self._settled < marks[0]:
                self._counts.silences += 1
                self.close(f"no answer within {self._timeout:g} s")
                return
            marks.append(self._accepted)

    # -- a cluster's changes ------------------------------------------------------------

    @property
    def held(self) -> bool:
        """Whether nothing new is sent for now."""
        return self._held

    def hold(self) -> None:
        """Send nothing new until :meth:`take_back`."""
        self._held = True

    async def drained(self) -> None:
        """Wait until everything that was sent has been answered, or the lane is over."""
        while self._flight and self.why is None:
            if self._drained.is_set():
                self._drained = trio.Event()
            await self._drained.wait()

    def take_back(self) -> list[Moved]:
        """What was not executed here, in its order; the lane goes on."""
        moved, self._moved = self._moved, []
        moved += [Moved(entry, "") for entry in self._waiting]
        self._waiting = []
        self._settled += len(moved)
        self._held = False
        return moved

    # -- answers ----------------------------------------------------------------------------

    def resume_writing(self) -> None:
        """The kernel takes more again."""
        self.full = False
        self.flush()

    def _received(self, gets: Callable[[], Any]) -> None:
        flight = self._flight
        settled = 0
        while (reply := gets()) is not NOTHING:
            if not flight:
                self.close("an answer that nobody asked for")
                return
            entry = flight.popleft()
            if type(reply) is LinkError:
                self._failed(entry, reply)
            else:
                settled += 1
                entry[0](reply)
        self._settled += settled
        if not flight:
            self._drained.set()
            if self._forgotten:
                self._reload()
        if self._waiting:
            self.flush()

    def _failed(self, entry: Entry, error: LinkError) -> None:
        """An error instead of an answer."""
        code = error.code
        if entry.tries < TRIES:
            if code == "NOSCRIPT":
                self._forgotten.append(entry._replace(tries=entry.tries + 1))
                return
            if code in ELSEWHERE and self.on_moved is not None:
                self._moved.append(Moved(entry._replace(tries=entry.tries + 1), str(error)))
                self._held = True
                self.on_moved()
                return
        self._settled += 1
        self._counts.error_replies += 1
        if code in STATES and (missed := self._states.admit(code)) is not None:
            log.warning("redis refuses commands", why=str(error), suppressed=missed)
        entry.done(error)
        if code in NO_PRIMARY:
            self.unusable = True
            self.close(str(error))

    def _reload(self) -> None:
        again, self._forgotten = self._forgotten, []
        self._counts.reloads += 1
        load = [Entry(_ignore, pack("SCRIPT", "LOAD", script.source), 0, 1) for script in self._scripts]
        self._accepted += len(load)
        self._flight.extend((*load, *again))
        self.write(b"".join([entry.packed for entry in self._flight]))

    def _lost(self, why: str) -> None:
        over = [*self._flight, *self._forgotten, *(moved.entry for moved in self._moved), *self._waiting]
        self._flight.clear()
        self._forgotten, self._moved, self._waiting = [], [], []
        self._drained.set()
        self._counts.unanswered += len(over)
        down = LinkDown(why)
        for entry in over:
            try:
                entry.done(down)
            except Exception:
                # The others' callbacks are somebody else's, who would wait forever.
                self._counts.callback_failures += 1
                log.exception("callback failed", connection=self.name)


def _ignore(_: Reply | LinkError) -> None:
    """Of what only has to be done: the next answer tells whether it was."""
