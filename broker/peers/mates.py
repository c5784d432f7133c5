"""The members that other nodes have in the rooms of this one.

Theory. Once a room's channel is heard, all its members are read; after that the
nodes tell their changes. Each change names the version that it follows
(:mod:`broker.peers.members`): the one that was known here, else something was
missed, and that node's members are read again. A change that is not above the
known version is old news, for versions of a node only grow. So reading and
hearing may overlap in any order.

What is read goes to the hub as a whole, which finds the differences; reading
too often is never wrong. Nodes without a lease do not count. One that is not
known may be new: the list of nodes is asked for, and its rooms are read when it
turns out to be alive.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec
import trio

from broker.engine.peers import Events, Mate
from broker.errors import BrokerError, ErrorCode
from broker.link.base import Link, LinkDown, LinkError, Reply, load_script
from broker.link.interest import Interest
from broker.link.keys import Keys
from broker.logs import Throttle, get_logger
from broker.peers.nodes import Nodes
from broker.protocol.events import SessionId, UserId

log = get_logger(__name__)

HOLDER: Final = "peers"
"""Our name towards :class:`Interest`."""
WINDOW: Final = 64
"""Reads of rooms under way at once."""
PATIENCE: Final = 2.0
"""Who attaches waits no longer (s): joining must not take much longer because Redis does not answer."""
AGAIN: Final = 0.1
"""After a read that failed, or while a channel is not heard that should be (s)."""

MATES: Final = load_script("mates")


class _Who(msgspec.Struct):
    session: str
    user: str | None = None


class _Change(msgspec.Struct):
    """Body of a change; see :mod:`broker.peers.members`."""

    after: int = 0
    came: list[msgspec.Raw] = []
    changed: list[msgspec.Raw] = []
    went: list[str] = []
    none: bool = False
    """Nobody is left."""
    anew: bool = False
    """Everything was replaced, read it."""


_who = msgspec.json.Decoder(_Who)
_change = msgspec.json.Decoder(_Change)


def make_mate(fields: bytes) -> Mate:
    """A member as another node told it. Raises :class:`msgspec.DecodeError`."""
    who = _who.decode(fields)
    user = UserId(who.user) if who.user is not None else None
    return Mate(SessionId(who.session), user, fields)


class _Said(NamedTuple):
    """What is kept of one node in one room."""

    version: int
    mates: dict[SessionId, Mate]


class _Room:
    """What is known of the others in one attached room."""

    __slots__ = ("flying", "heard", "settled", "stale", "touched", "versions", "whole")

    def __init__(self) -> None:
        self.versions: dict[str, int] = {}
        """Nodes with members here."""
        self.heard = False
        """The channel was heard before the members were read."""
        self.whole = False
        """All nodes have to be read."""
        self.stale: dict[str, int] = {}
        """Nodes that have to be read, and the version that this must have."""
        self.flying = False
        self.touched: dict[str, int] = {}
        """Nodes that were heard of while a read was under way, and the version that they told last."""
        self.settled = trio.Event()
        """Whoever attaches need not wait."""


class Mates:
    """Attached rooms, and who of other nodes is in them."""

    def __init__(self, link: Link, keys: Keys, interest: Interest, nodes: Nodes) -> None:
        self._link = link
        self._keys = keys
        self._interest = interest
        self._nodes = nodes
        self.events: Events
        self._rooms: dict[str, _Room] = {}
        self._due: dict[str, None] = {}
        self._later: dict[str, None] = {}
        """Rooms that could not be read, or not be heard of in time."""
        self._flying = 0
        self._retry = trio.Event()
        self._strangers: dict[str, set[str]] = {}
        """Rooms in which nodes were heard of that are not known to be alive."""
        self._older_strangers: dict[str, set[str]] = {}
        """The same, from before the last look at the list; those since may have been too late for it."""
        self._unsettled: dict[str, None] = {}
        """Rooms with members of nodes that have vanished from the store, but may only be late."""
        self._throttle = Throttle()
        self.reads = 0
        self.failed = 0
        self.missed = 0
        self.old = 0
        self.unknown = 0
        self.bad = 0
        self.degraded = 0

    # -- rooms --------------------------------------------------------------------------

    def attached(self, room: str) -> bool:
        """Whether :meth:`attach` would not wait."""
        record = self._rooms.get(room)
        return record is not None and record.settled.is_set()

    async def attach(self, room: str) -> None:
        """Hear of the room; returns when its members are known, or cannot be now."""
        while True:
            record = self._rooms.get(room)
            if record is None:
                record = self._rooms[room] = _Room()
                self._interest.want(room, HOLDER)
            if not record.settled.is_set():
                with trio.move_on_after(PATIENCE):
                    if await self._interest.wait(room):
                        self._begin(room, record)
                        await record.settled.wait()
            if self._rooms.get(room) is record:
                if not record.settled.is_set():
                    self.degraded += 1
                    record.settled.set()
                    self._repeat(room)
                return
            # It was detached meanwhile by somebody else.

    def _begin(self, room: str, record: _Room) -> None:
        """The room is heard: now its members can be read."""
        if not record.heard and self._rooms.get(room) is record:
            record.heard = record.whole = True
            self._need(room)

    def detach(self, room: str) -> None:
        """Nobody needs the room any more."""
        record = self._rooms.pop(room, None)
        if record is not None:
            self._interest.release(room, HOLDER)
            record.settled.set()
            self._due.pop(room, None)
            self._unsettled.pop(room, None)

    async def read(self, room: str) -> list[Mate]:
        """Members of any room on other nodes. Raises ``unavailable``."""
        try:
            reply = await self._link.call_script(MATES, self._keys_of(room))
        except LinkError as error:
            self.failed += 1
            raise BrokerError(
                ErrorCode.UNAVAILABLE, f"the other nodes cannot be asked ({error})", room=room
            ) from None
        self.reads += 1
        said = self._understand(room, reply)
        return [
            mate for node, (_, mates) in said.items() if self._nodes.lives(node) for mate in mates.values()
        ]

    def _keys_of(self, room: str) -> list[str]:
        return [self._keys.member_nodes(room), self._keys.members(room, "")]

    # -- reading ------------------------------------------------------------------------

    def rejoined(self) -> None:
        """The link is up again: anything may have been missed."""
        for room, record in self._rooms.items():
            if self._interest.hears(room):
                record.heard = record.whole = True
                self._due[room] = None
        self._pump()

    async def run(self) -> None:
        """Repeat what failed, until cancelled."""
        while True:
            await self._retry.wait()
            await trio.sleep(AGAIN)
            self._retry = trio.Event()
            self.repeat()

    def repeat(self) -> None:
        """Read what could not be read."""
        later, self._later = self._later, {}
        for room in later:
            record = self._rooms.get(room)
            if record is not None and self._interest.hears(room):
                record.heard = record.whole = True
                self._due[room] = None
            elif record is not None and self._link.up:
                self._repeat(room)
        self._pump()

    def _repeat(self, room: str) -> None:
        """Look at the room again in a moment; if the link goes down, rejoined() sees to it."""
        self._later[room] = None
        self._retry.set()

    def _need(self, room: str) -> None:
        if room in self._rooms:
            self._due[room] = None
            self._pump()

    def _pump(self) -> None:
        """Start as many reads as may be under way."""
        if not self._link.up:
            for room in self._due:
                self._rooms[room].settled.set()
            self._due.clear()  # rejoined() reads everything
            return
        while self._due and self._flying < WINDOW and self._link.up:
            room = next(iter(self._due))
            del self._due[room]
            record = self._rooms[room]
            if not record.flying and (record.whole or record.stale):
                self._read(room, record)

    def _read(self, room: str, record: _Room) -> None:
        asked = () if record.whole else tuple(record.stale)
        record.flying, record.whole = True, False
        record.touched.clear()
        self._flying += 1
        self.reads += 1
        self._link.send_script(partial(self._landed, room, record, asked), MATES, self._keys_of(room), *asked)

    def _landed(self, room: str, record: _Room, asked: Sequence[str], reply: Reply | LinkError) -> None:
        self._flying -= 1
        record.flying = False
        if isinstance(reply, LinkError):
            self.failed += 1
            record.whole = True
            record.settled.set()
            # Not at once: this may be called while the read is being sent.
            self._repeat(room)
            missed = self._throttle.admit("mates", trio.current_time())
            if missed is not None and not isinstance(reply, LinkDown):
                log.warning("members of a room cannot be read", room=room, why=str(reply), suppressed=missed)
            return
        if self._rooms.get(room) is record:
            self._apply(room, record, asked, self._understand(room, reply))
            record.settled.set()
            if record.whole or record.stale:
                self._due[room] = None
        self._pump()

    def _understand(self, room: str, reply: list[Any]) -> dict[str, _Said]:
        said: dict[str, _Said] = {}
        for raw, version, flat in zip(reply[::3], reply[1::3], reply[2::3], strict=True):
            node = raw.decode()
            if self._nodes.is_own(node):
                continue
            mates = self._mates_of(room, node, flat[1::2])
            said[node] = _Said(int(version), {mate.session: mate for mate in mates})
        return said

    def _mates_of(self, room: str, node: str, many: Iterable[bytes]) -> Iterator[Mate]:
        for fields in many:
            try:
                yield make_mate(fields)
            except (msgspec.DecodeError, ValueError) as error:
                self._cannot_read(room, node, error)

    def _apply(self, room: str, record: _Room, asked: Sequence[str], said: dict[str, _Said]) -> None:
        for node, (version, mates) in said.items():
            if not self._nodes.lives(node):
                self._meet(node, room)
            elif version > record.versions.get(node, 0) and version >= record.touched.get(node, 0):
                record.versions[node] = version
                self.events.know_mates(room, node, mates)
        record.stale = {
            node: wanted
            for node, wanted in record.stale.items()
            if self._nodes.lives(node)
            and not (wanted and record.versions.get(node, 0) >= wanted)
            and (node in record.touched or (asked and node not in asked))
        }
        for node in asked or tuple(record.versions):
            if node in record.versions and node not in said:
                self._miss(room, record, node)

    def _miss(self, room: str, record: _Room, node: str) -> None:
        """The store knows of no members of ``node`` here, of which we know some."""
        if node in record.touched:
            record.stale[node] = 0  # heard before or after the store was asked: nobody can say
        elif self._nodes.settled:
            del record.versions[node]
            self.events.know_mates(room, node, {})
        else:
            self._unsettled[room] = None

    # -- nodes --------------------------------------------------------------------------

    def came(self, node: str) -> None:
        """A node is alive: read the rooms in which it was heard of."""
        for room in (*self._strangers.pop(node, ()), *self._older_strangers.pop(node, ())):
            record = self._rooms.get(room)
            if record is not None:
                record.stale[node] = 0
                record.touched.setdefault(node, 0)
                self._due[room] = None
        self._pump()

    def gone(self, node: str) -> None:
        """A node is no more, and nobody is where it was."""
        for room, record in self._rooms.items():
            record.stale.pop(node, None)
            if record.versions.pop(node, None) is not None:
                self.events.know_mates(room, node, {})

    def settled(self) -> None:
        """Every node had the time to say who it has: who is missing now has left."""
        for room in self._unsettled:
            self._rooms[room].whole = True
            self._due[room] = None
        self._unsettled.clear()
        self._pump()

    def looked(self) -> dict[str, set[str]]:
        """The list of nodes is new: who was heard of before it was asked for and is not on it, is dead.

        Returns the rooms in which the dead were heard of.
        """
        dead, self._older_strangers, self._strangers = self._older_strangers, self._strangers, {}
        return dead

    def _meet(self, node: str, room: str) -> None:
        self.unknown += 1
        self._strangers.setdefault(node, set()).add(room)
        self._nodes.look()

    # -- hearing ------------------------------------------------------------------------

    def take(self, room: str, node: str, version: int, body: bytes) -> None:
        """A node tells a change. The hot path of presence."""
        record = self._rooms.get(room)
        if record is None:
            return
        if not self._nodes.lives(node):
            self._meet(node, room)
            return
        known = record.versions.get(node, 0)
        if version <= known:
            self.old += 1
            return
        try:
            change = _change.decode(body)
            came = [make_mate(fields) for fields in map(bytes, change.came)]
            changed = [make_mate(fields) for fields in map(bytes, change.changed)]
        except (msgspec.DecodeError, ValueError) as error:
            self._cannot_read(room, node, error)
            change = _Change(anew=True)
        if record.flying:
            record.touched[node] = version
        if change.anew or change.after != known:
            self.missed += not change.anew
            record.stale[node] = version
            self._need(room)
            return
        if change.none:
            record.versions.pop(node, None)
        else:
            record.versions[node] = version
        self.events.change_mates(room, node, came, changed, [SessionId(session) for session in change.went])

    def _cannot_read(self, room: str, node: str, error: Exception) -> None:
        self.bad += 1
        missed = self._throttle.admit(node, trio.current_time())
        if missed is not None:
            log.warning(
                "what a node tells cannot be read", node=node, room=room, why=str(error), suppressed=missed
            )

    def statistics(self) -> dict[str, int]:
        """Counters and gauges by name."""
        return {
            "attached": len(self._rooms),
            "mates_read": self.reads,
            "failed_reads": self.failed,
            "versions_missed": self.missed,
            "old_versions": self.old,
            "unknown_nodes": self.unknown,
            "degraded_attaches": self.degraded,
        }
