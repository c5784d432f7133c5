"""The lifecycle feed: tells backends, in one capped stream, who comes and who goes.

Theory. Each node keeps, per room, how many of its sessions belong to whom, and
writes what changed to a hash of the room, as absolute numbers, so that saying
it twice changes nothing. The script that writes compares with the other nodes'
numbers and answers who is new in the whole cluster, and who has left it. A
newcomer is told at once, unless its departure was still waiting; a departure
waits in a sorted set for the grace time, from which each is taken by one node
only. The numbers of a node that died are taken out by the others; until then
they count, so that who moves to another node has not been away.

*Who* is a user, or an anonymous session. The empty one stands for everybody, so
that a room is ``occupied`` and ``vacated`` by the same rule. Connections are the
members of one more room, whose name no client can write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import trio

from broker.config import Redis as Settings
from broker.link.base import Link, LinkError, Reply, load_script
from broker.link.keys import Keys
from broker.logs import Throttle, get_logger
from broker.protocol.events import SessionId, UserId

log = get_logger(__name__)

FLUSH: Final = 0.1
"""Changes gather this long, so that a storm of joins is a few scripts (s)."""
SWEEP: Final = 1.0
"""Between two looks at departures (s)."""
TAKEN: Final = 500
"""Departures taken at once."""
FORGET: Final = 7 * 24 * 3600 * 1000
"""A room of which nobody spoke for this long is forgotten (ms)."""
EVERYWHERE: Final = "*"
"""The room that every session is in. No name of a room holds this character."""
EVERYBODY: Final = ""

WRITE: Final = load_script("lifecycle")
DEPART: Final = load_script("depart")
DUE: Final = load_script("due")

_NAMES: Final = {
    # (in the room of all sessions, everybody): what is told of a coming, of a going
    (False, False): ("joined", "left"),
    (False, True): ("occupied", "vacated"),
    (True, False): ("connected", "disconnected"),
}


def _who(session: SessionId, user: UserId | None) -> str:
    return f"u{user}" if user is not None else f"s{session}"


class Lifecycle:
    """What one node has to do with the feed.

    ``node`` gives the id of this node's incarnation, ``alive`` those of all
    nodes. ``clock`` is Unix time (s), for the entries' ``ts``.
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        settings: Settings,
        *,
        node: Callable[[], str],
        alive: Callable[[], Sequence[str]],
        clock: Callable[[], float],
    ) -> None:
        self._link = link
        self._keys = keys
        self._settings = settings
        self._node = node
        self._alive = alive
        self._clock = clock
        self._here: dict[str, dict[str, int]] = {}
        """Room → who → sessions here."""
        self._changed: dict[str, set[str]] = {}
        """Room → who: numbers that have yet to be written."""
        self._rooms_written: set[str] = set()
        self._writers: set[str] = set()
        """Nodes that have numbers in the store, as of the last sweep."""
        self._throttle = Throttle()
        self.told = 0
        self.failed = 0

    # -- what happens here ----------------------------------------------------------

    def appeared(self, session: SessionId, user: UserId | None) -> None:
        """A session was let in, or turned out to be ``user``'s."""
        if user is not None and self._here.get(EVERYWHERE, {}).get(_who(session, None)):
            self._count(EVERYWHERE, _who(session, None), -1)
        self._count(EVERYWHERE, _who(session, user), 1)

    def vanished(self, session: SessionId, user: UserId | None) -> None:
        """It ended."""
        self._count(EVERYWHERE, _who(session, user), -1)

    def came(self, room: str, session: SessionId, user: UserId | None) -> None:
        """A session came into a room."""
        self._count(room, _who(session, user), 1)
        self._count(room, EVERYBODY, 1)

    def went(self, room: str, session: SessionId, user: UserId | None) -> None:
        """It left."""
        self._count(room, _who(session, user), -1)
        self._count(room, EVERYBODY, -1)

    def _count(self, room: str, who: str, change: int) -> None:
        people = self._here.setdefault(room, {})
        number = people.get(who, 0) + change
        if number > 0:
            people[who] = number
        else:
            people.pop(who, None)
            if not people:
                del self._here[room]
        self._changed.setdefault(room, set()).add(who)

    def write_all(self) -> None:
        """Write every number again: the store may have lost them, or this node has a new id."""
        for room, people in self._here.items():
            self._changed.setdefault(room, set()).update(people)
        self._rooms_written.clear()

    # -- the feed ---------------------------------------------------------------------

    async def run(self) -> None:
        """Write, and tell departures that are due, until cancelled."""
        sweep = trio.current_time() + SWEEP
        while True:
            await trio.sleep(FLUSH)
            if not self._link.up:
                continue
            self.flush()
            if trio.current_time() >= sweep:
                sweep = trio.current_time() + SWEEP
                try:
                    await self._tell_departures()
                    await self._clear_dead()
                except LinkError as error:
                    self._fail(error)

    def flush(self) -> None:
        """Write what changed."""
        changed, self._changed = self._changed, {}
        if not changed:
            return
        node = self._node()
        if node not in self._writers:
            self._writers.add(node)
            self._link.send(self._ignore, self._keys.writers, "SADD", self._keys.writers, node)
        for room, people in changed.items():
            here = self._here.get(room, {})
            numbers: list[str | int] = []
            for who in people:
                numbers += (who, here.get(who, 0))
            if room not in self._rooms_written:
                self._rooms_written.add(room)
                self._link.send(self._ignore, self._index(node), "SADD", self._index(node), room)
                self._link.send(self._ignore, self._index(node), "PEXPIRE", self._index(node), FORGET)
            if not here:
                self._rooms_written.discard(room)
                self._link.send(self._ignore, self._index(node), "SREM", self._index(node), room)
            self._link.send_script(
                self._written(room, people),
                WRITE,
                [self._keys.who(room)],
                *self._speaker(node, "some"),
                *numbers,
            )

    def _speaker(self, node: str, mode: str) -> Iterator[str | int]:
        writers = {*self._alive(), *self._writers}
        yield node
        yield mode
        yield FORGET
        yield len(writers)
        yield from writers

    def _index(self, node: str) -> str:
        return f"{self._keys.node(node)}:rooms"

    def _written(self, room: str, people: Iterable[str]) -> Callable[[Reply | LinkError], None]:
        def done(reply: Reply | LinkError) -> None:
            if isinstance(reply, LinkError):
                self._fail(reply)
                self._changed.setdefault(room, set()).update(people)
            else:
                self._tell_changes(room, reply)

        return done

    def _tell_changes(self, room: str, reply: list[Any]) -> None:
        """``reply``: pairs of who, and 1 or -1."""
        departures = []
        for who, change in zip(reply[::2], reply[1::2], strict=True):
            departure = json.dumps([room, who.decode()])
            if change < 0:
                departures.append(departure)
            else:
                key = self._keys.departures
                self._link.send(self._came(room, who.decode()), key, "ZREM", key, departure)
        if departures:
            grace = round(self._settings.lifecycle_grace * 1000)
            self._link.send_script(self._ignore, DEPART, [self._keys.departures], grace, *departures)

    def _came(self, room: str, who: str) -> Callable[[Reply | LinkError], None]:
        def done(reply: Reply | LinkError) -> None:
            if isinstance(reply, LinkError):
                self._fail(reply)
            elif not reply:  # nobody was waiting for it to be gone
                self._tell(room, who, came=True)

        return done

    def _tell(self, room: str, who: str, *, came: bool) -> None:
        name = _NAMES[room == EVERYWHERE, who == EVERYBODY][0 if came else 1]
        fields: list[str | float] = ["event", name]
        if room != EVERYWHERE:
            fields += ["room", room]
        if who != EVERYBODY:
            fields += ["user" if who[0] == "u" else "session", who[1:]]
        fields += ["ts", round(self._clock(), 3)]
        key = self._keys.lifecycle
        self.told += 1
        self._link.send(
            self._ignore, key, "XADD", key, "MAXLEN", "~", self._settings.lifecycle_length, "*", *fields
        )

    async def _tell_departures(self) -> None:
        while True:
            due = await self._link.call_script(DUE, [self._keys.departures], TAKEN)
            for departure in due:
                room, who = json.loads(departure)
                self._tell(room, who, came=False)
            if len(due) < TAKEN:
                return

    async def _clear_dead(self) -> None:
        """Take out the numbers of nodes that are no more. Several nodes may; each change is told once."""
        writers = self._keys.writers
        self._writers = {raw.decode() for raw in await self._link.call(writers, "SMEMBERS", writers)}
        for node in self._writers - {*self._alive(), self._node()}:
            index = self._index(node)
            for raw in await self._link.call(index, "SMEMBERS", index):
                hash_, arguments = self._keys.who(raw.decode()), self._speaker(node, "gone")
                self._tell_changes(raw.decode(), await self._link.call_script(WRITE, [hash_], *arguments))
            await self._link.call(index, "DEL", index)
            await self._link.call(writers, "SREM", writers, node)

    def _ignore(self, reply: Reply | LinkError) -> None:
        if isinstance(reply, LinkError):
            self._fail(reply)

    def _fail(self, error: LinkError) -> None:
        self.failed += 1
        missed = self._throttle.admit("feed", trio.current_time())
        if missed is not None:
            log.warning("the lifecycle feed cannot be written", error=str(error), suppressed=missed)

    def statistics(self) -> dict[str, int]:
        """Counters and gauges by name."""
        return {"told": self.told, "failed": self.failed, "waiting": len(self._changed)}
