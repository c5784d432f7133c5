"""The members that this node has in rooms, told to the other nodes.

Theory. The hub says who came, changed or went; that is gathered for a moment
and told once for each room, by a script that keeps the members in a hash of the
room and this node and publishes the change in the same moment. Every change
carries a version and names the one that it follows, so that whoever missed one
sees it and reads the hash. Versions count up over all rooms of the node, so
that one is never used twice.

The script does nothing where the store has not what the change follows (it lost
it, or a reply was lost on its way); then all members of the room are told
*anew*, replacing the hash, as after every reconnect. At most one script of a
room is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple

import orjson
import trio

from broker.engine.peers import Described
from broker.link import wire
from broker.link.base import Link, LinkDown, LinkError, Reply, load_script, publishing
from broker.link.keys import Keys
from broker.logs import Throttle, get_logger
from broker.protocol.events import SessionId, UserId

log = get_logger(__name__)

FLUSH: Final = 0.05
"""Changes gather this long (s). The hub gathers what it tells its watchers for another tenth."""
BATCH: Final = 500
"""Rooms told in one go, so that a node with 100,000 rooms comes back without stalling."""
AGAIN: Final = 1.0
"""After Redis has refused a change (s)."""
REFRESH: Final = 3600.0
"""Between two signs of life for what is kept of each room (s)."""
FORGET: Final = 3 * 3600 * 1000
"""Without such a sign it is dropped after this long (ms): rubbish of nodes that nobody cleaned up after."""

MEMBERS: Final = load_script("members")


class Here(NamedTuple):
    """A member whose session is on this node, and whose it was when we last heard."""

    member: Described
    user: UserId | None


class _Room:
    """What this node has to tell of one room."""

    __slots__ = ("anew", "dirty", "flying", "members", "version")

    def __init__(self) -> None:
        self.members: dict[SessionId, Here] = {}
        self.dirty: dict[SessionId, bool] = {}
        """Sessions that came, changed or went since the last telling, and whether they were told before."""
        self.version = 0
        """The last one told; 0 while others know of no members here."""
        self.anew = False
        self.flying = False
        """A script is under way."""


class _Change(NamedTuple):
    """What one script is to do; see ``lua/members.lua``."""

    after: int | str
    version: int
    before: int
    now: int
    """How many members there are after it."""
    message: bytes = b""
    kept: Sequence[str | bytes] = ()
    gone: Sequence[SessionId] = ()


class Members:
    """Own members, by room. ``node`` gives the id of this node now."""

    def __init__(self, link: Link, keys: Keys, node: Callable[[], str]) -> None:
        self._link = link
        self._keys = keys
        self._node = node
        self._rooms: dict[str, _Room] = {}
        self._due: dict[str, None] = {}
        self._later: dict[str, None] = {}
        """Rooms that could not be told."""
        self._new_rooms: list[str] = []
        self._old_rooms: list[str] = []
        self._held = True
        self._parting = False
        self._version = 0
        self._wake = trio.Event()
        self._throttle = Throttle()
        self.told = 0
        self.told_anew = 0
        self.lost = 0
        self.failed = 0

    # -- what the hub says --------------------------------------------------------------

    def touch(
        self, room: str, session: SessionId, user: UserId | None, member: Described | None
    ) -> Here | None:
        """Note a coming, a change, or with ``None`` a going. Returns what was known of the session there."""
        record = self._rooms.get(room)
        if record is None:
            if member is None:
                return None
            record = self._rooms[room] = _Room()
            self._new_rooms.append(room)
        before = record.members.get(session)
        told = record.dirty.get(session, before is not None)
        if member is not None:
            record.members[session] = Here(member, user)
            record.dirty[session] = told
        elif before is None:
            return None
        elif self._parting and told:
            return before  # it will come back elsewhere; until then the others keep it
        else:
            del record.members[session]
            if told:
                record.dirty[session] = told
            else:
                record.dirty.pop(session, None)  # came and went before anybody heard of it
        self._need(room)
        return before

    def part(self) -> None:
        """Tell nobody any more who leaves."""
        self._parting = True

    @property
    def some(self) -> bool:
        """Whether there are any members in any room."""
        return any(record.members for record in self._rooms.values())

    # -- telling ------------------------------------------------------------------------

    def hold(self) -> None:
        """Gather only: whether this node still has its lease is being found out."""
        self._held = True

    def begin(self) -> None:
        """Tell all members of all rooms anew: the store may have lost them, or knows them by an old id."""
        self._held = False
        self._new_rooms = list(self._rooms)
        self._old_rooms = []
        for room, record in self._rooms.items():
            record.anew = True
            self._need(room)

    def _need(self, room: str) -> None:
        self._due[room] = None
        self._wake.set()

    async def run(self) -> None:
        """Tell what has changed, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._refresh)
            nursery.start_soon(self._repeat)
            while True:
                await self._wake.wait()
                await trio.sleep(FLUSH)
                self._wake = trio.Event()
                self.flush()

    async def _repeat(self) -> None:
        while True:
            await trio.sleep(AGAIN)
            self.repeat()

    def repeat(self) -> None:
        """Tell again what could not be told."""
        later, self._later = self._later, {}
        for room in later:
            self._need(room)

    def flush(self) -> None:
        """Tell what has changed now, of a bounded number of rooms."""
        if self._held or not self._link.up:
            return  # begin() comes when that is over
        self._index("SADD", self._new_rooms)
        for room in list(islice(self._due, BATCH)):
            del self._due[room]
            record = self._rooms.get(room)
            if record is not None and not record.flying:  # else it is looked at again when that lands
                self._tell(room, record)
        self._index("SREM", self._old_rooms)
        if self._due:
            self._wake.set()

    def _index(self, command: str, rooms: list[str]) -> None:
        """Keep the list of rooms for whoever will have to clean up; a room too many does no harm."""
        if not rooms:
            return
        key = self._keys.member_rooms(self._node())
        for start in range(0, len(rooms), BATCH):
            self._link.send(self._ignore, key, command, key, *rooms[start : start + BATCH])
        self._link.send(self._ignore, key, "PEXPIRE", key, FORGET)
        rooms.clear()

    def _tell(self, room: str, record: _Room) -> None:
        anew, record.anew = record.anew, False
        change = self._everybody(record) if anew else self._changes(record)
        if change is not None:
            self._send(room, record, change)
        elif not record.members:
            del self._rooms[room]
            self._old_rooms.append(room)

    def _send(self, room: str, record: _Room, change: _Change) -> None:
        keys, node = self._keys, self._node()
        record.flying = True
        self._link.send_script(
            partial(self._landed, room, record, node, change),
            MEMBERS,
            [keys.members(room, node), keys.member_nodes(room), keys.live(room)],
            node,
            change.after,
            change.version,
            change.before,
            FORGET,
            publishing(self._link),
            change.message,
            len(change.kept) // 2,
            *change.kept,
            *change.gone,
        )

    def _pack(self, body: dict[str, Any]) -> bytes:
        """The message of a new version."""
        self._version += 1
        return wire.pack(wire.PRESENCE, self._node(), self._version, body=orjson.dumps(body))

    def _everybody(self, record: _Room) -> _Change:
        """All members, in place of what was told before."""
        record.dirty.clear()
        kept: list[str | bytes] = []
        for session, here in record.members.items():
            kept += (session, orjson.dumps(here.member.describe()))
        message = self._pack({"anew": True})
        return _Change("", self._version, 0, len(record.members), message, kept)

    def _changes(self, record: _Room) -> _Change | None:
        """What the others do not know yet; ``None`` if they know all."""
        came: list[orjson.Fragment] = []
        changed: list[orjson.Fragment] = []
        kept: list[str | bytes] = []
        gone: list[SessionId] = []
        for session, told in record.dirty.items():
            here = record.members.get(session)
            if here is None:
                gone.append(session)
                continue
            fields = orjson.dumps(here.member.describe())
            kept += (session, fields)
            (changed if told else came).append(orjson.Fragment(fields))
        record.dirty.clear()
        if not kept and not gone:
            return None
        body: dict[str, Any] = {"after": record.version}
        for name, members in (("came", came), ("changed", changed), ("went", gone)):
            if members:
                body[name] = members
        now = len(record.members)
        if not now:
            body["none"] = True
        message = self._pack(body)
        return _Change(record.version, self._version, now - len(came) + len(gone), now, message, kept, gone)

    def _landed(self, room: str, record: _Room, node: str, change: _Change, reply: Reply | LinkError) -> None:
        record.flying = False
        if isinstance(reply, LinkError):
            self.failed += 1
            record.anew = True
            self._later[room] = None
            missed = self._throttle.admit("members", trio.current_time())
            if missed is not None and not isinstance(reply, LinkDown):
                log.warning("members of a room cannot be told", room=room, why=str(reply), suppressed=missed)
            return
        if reply and node == self._node():
            record.version = change.version if change.now else 0
            if change.after == "":
                self.told_anew += 1
            elif change.message:
                self.told += 1
        else:
            self.lost += not reply
            record.anew = True
        if record.anew or record.dirty or not record.members:
            self._need(room)

    def _ignore(self, reply: Reply | LinkError) -> None:
        """The list is for cleaning up, and what it lacks is dropped a little later."""
        self.failed += isinstance(reply, LinkError)

    # -- signs of life ------------------------------------------------------------------

    async def _refresh(self) -> None:
        while True:
            await trio.sleep(REFRESH)
            rooms = list(self._rooms)
            for start in range(0, len(rooms), BATCH):
                self.refresh(rooms[start : start + BATCH])
                await trio.sleep(FLUSH)

    def refresh(self, rooms: Sequence[str] | None = None) -> None:
        """Have the store keep what it has of ``rooms``, else of all; what it has lost is told anew."""
        if self._held or not self._link.up:
            return
        rooms = list(self._rooms) if rooms is None else rooms
        self._index("SADD", list(rooms))
        for room in rooms:
            record = self._rooms.get(room)
            if record is not None and record.version and not record.flying:
                # As it was when it was told last.
                untold = sum(not told for told in record.dirty.values())
                gone = sum(session not in record.members for session in record.dirty)
                told = len(record.members) - untold + gone
                self._send(room, record, _Change(record.version, record.version, told, told))

    def statistics(self) -> dict[str, int]:
        """Counters and gauges by name."""
        return {
            "member_rooms": len(self._rooms),
            "told_changes": self.told,
            "told_anew": self.told_anew,
            "lost_members": self.lost,
            "failed_changes": self.failed,
        }
