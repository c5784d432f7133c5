"""The other nodes, on Redis: :class:`RedisPeers` is :class:`~broker.engine.peers.Peers`.

It has a part for each thing that nodes tell each other: who is alive
(:mod:`~broker.peers.nodes`), who is in which room (:mod:`~broker.peers.members`
out, :mod:`~broker.peers.mates` in), ephemeral events (:mod:`~broker.peers.relay`)
and questions (:mod:`~broker.peers.asks`). This file joins them: what a
heartbeat has taught goes to the others, and so does what comes in.

After every connection to Redis the order is: heartbeat, then tell all and read
all. Only the heartbeat knows whether this node is still itself, and whether what
is missing in the store is gone or merely late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import trio

from broker.config import Redis
from broker.engine.peers import Answer, Described, Events, Handler, Mate, NodeInfo
from broker.link import wire
from broker.link.base import Link, Script
from broker.link.interest import Interest
from broker.link.keys import Keys
from broker.logs import Throttle, get_logger
from broker.peers.asks import Asks
from broker.peers.graves import BURY, Graves
from broker.peers.mates import MATES, Mates
from broker.peers.members import MEMBERS, Members
from broker.peers.nodes import HEARTBEAT, NO_ANSWER, Change, Nodes, new_id
from broker.peers.relay import RECALL, REMEMBER, Relay
from broker.protocol.events import Event, SessionId, UserId

log = get_logger(__name__)

SCRIPTS: tuple[Script, ...] = (HEARTBEAT, MEMBERS, MATES, BURY, REMEMBER, RECALL)
"""What the link must load for this part."""


PART_WITHIN = 1.0
"""How long sessions are kept from being asked to go until the others know that they will be back (s)."""


class Feed(Protocol):
    """Whoever tells backends who comes and goes; implemented by :mod:`broker.backends.lifecycle`."""

    def appeared(self, session: SessionId, user: UserId | None) -> None:
        """A session was let in, or turned out to be ``user``'s."""

    def vanished(self, session: SessionId, user: UserId | None) -> None:
        """It ended."""

    def came(self, room: str, session: SessionId, user: UserId | None) -> None:
        """A session came into a room."""

    def went(self, room: str, session: SessionId, user: UserId | None) -> None:
        """It left."""

    def write_all(self) -> None:
        """The store may have lost what was told, or this node has a new id."""


class RedisPeers:
    """Other nodes, through ``link``.

    ``describe`` gives what this node says of itself; its ``id`` is filled in.
    ``parting`` (s): how long members of a draining node are kept for its
    sessions to come back elsewhere. ``slot_limit`` gives the number of slots
    remembered of a room. ``node``: the id to begin with, for whoever must know
    it before there is a link.

    The link must be started after this object exists and tell it :meth:`on_up`
    and what comes in: :meth:`take_live` and :meth:`take_node`.
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        interest: Interest,
        settings: Redis,
        describe: Callable[[], NodeInfo],
        *,
        parting: float,
        slot_limit: Callable[[str], int],
        node: str | None = None,
        feed: Feed | None = None,
    ) -> None:
        self._link = link
        self._keys = keys
        self._feed = feed
        self._nodes = Nodes(
            link,
            keys,
            describe,
            self._changed,
            node=node or new_id(),
            lease=settings.node_lease,
            parting=parting,
        )
        self._members = Members(link, keys, lambda: self._nodes.id)
        self._mates = Mates(link, keys, interest, self._nodes)
        self._relay = Relay(link, keys, lambda: self._nodes.id, slot_limit)
        self._asks = Asks(link, keys, self._nodes)
        self._graves = Graves(link, keys)
        self._events: Events | None = None
        self._nursery: trio.Nursery | None = None
        self._throttle = Throttle()
        self._bad = 0

    @property
    def id(self) -> str:
        """Of this node now; another one after it was taken for dead."""
        return self._nodes.id

    def alive(self) -> list[str]:
        """Ids of all nodes that have a lease, and of this one."""
        return [self._nodes.id, *self._nodes.others()]

    # -- life ---------------------------------------------------------------------------

    async def run(
        self, events: Events, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Run until cancelled; started after the first heartbeat, whether it was answered or not.

        ``events`` hears what others make happen here; it must not raise.
        """
        self._events = self._mates.events = events
        self._listen()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._members.run)
                nursery.start_soon(self._mates.run)
                nursery.start_soon(self._relay.run)
                nursery.start_soon(self._graves.run)
                await nursery.start(self._nodes.run)
                task_status.started()
                try:
                    await trio.sleep_forever()
                finally:
                    self._nursery = None  # what is asked from now on must not find it closed
        finally:
            self._nursery = None
            if self._nodes.parted.is_set():
                await self._nodes.end()

    def on_up(self) -> None:
        """Commands are answered and all subscriptions confirmed, for the first time or again."""
        self._members.hold()
        self._nodes.rejoin()

    def _listen(self) -> None:
        # The channel of a former id stays subscribed: the link probes itself on the first one.
        self._link.subscribe((self._keys.everybody, self._keys.node(self._nodes.id)), sharded=False)

    def _changed(self, change: Change) -> None:
        """A heartbeat was answered."""
        for node in change.gone:
            self._mates.gone(node)
        if change.anew:
            self._listen()
            self._members.begin()
            self._mates.rejoined()
            if self._feed is not None:
                self._feed.write_all()
        for node in change.came:
            self._mates.came(node)
        for node in change.parted:
            if self._events is not None:
                self._events.part_mates(node)
        for node in change.ended:
            self._graves.add(node)
        dead = self._mates.looked()
        if self._nodes.settled:
            self._mates.settled()
            for node, rooms in dead.items():
                self._graves.add_rooms(node, rooms)

    # -- what comes in ------------------------------------------------------------------

    def take_live(self, room: str, head: wire.Head) -> None:
        """A message of kind ``e`` or ``p`` on the live channel of ``room``. The hot path."""
        events, words = self._events, head.words
        if events is None:
            return
        if head.kind == wire.EPHEMERAL and len(words) == 1:
            if not self._nodes.is_own(words[0]):
                events.receive(self._relay.take(room, head.body))
        elif head.kind == wire.PRESENCE and len(words) == 2 and words[1].isdecimal():
            if not self._nodes.is_own(words[0]):
                self._mates.take(room, words[0], int(words[1]), head.body)
        else:
            self._cannot_read(head)

    def take_node(self, head: wire.Head) -> None:
        """A message of kind ``a`` or ``r``, on the channel of this node or of all."""
        words, nursery = head.words, self._nursery
        if nursery is None:
            return
        if len(words) != 2 or not words[1].isdecimal() or head.kind not in {wire.ASK, wire.ANSWER}:
            self._cannot_read(head)
        elif self._nodes.is_own(words[0]):
            return
        elif head.kind == wire.ANSWER:
            self._asks.take_answer(words[0], int(words[1]), head.body)
        elif int(words[1]) == NO_ANSWER:
            self._nodes.look()
        else:
            self._asks.take_question(words[0], int(words[1]), head.body, nursery.start_soon)

    def _cannot_read(self, head: wire.Head) -> None:
        self._bad += 1
        missed = self._throttle.admit(head.kind, trio.current_time())
        if missed is not None:
            log.warning("a message cannot be read", kind=head.kind, words=head.words, suppressed=missed)

    # -- rooms --------------------------------------------------------------------------

    def attached(self, room: str) -> bool:
        """See :meth:`broker.engine.peers.Peers.attached`."""
        return self._mates.attached(room)

    async def attach(self, room: str, *, slots: bool = False) -> Sequence[Event]:
        """See :meth:`broker.engine.peers.Peers.attach`."""
        await self._mates.attach(room)
        return await self._relay.recall(room) if slots else ()

    def detach(self, room: str) -> None:
        """See :meth:`broker.engine.peers.Peers.detach`."""
        self._mates.detach(room)

    def relay(self, event: Event, *, remember: float = 0.0) -> None:
        """See :meth:`broker.engine.peers.Peers.relay`."""
        self._relay.relay(event, remember)

    def remember(self, event: Event, ttl: float) -> None:
        """Keep what a backend told all nodes as the newest of its slot, for ``ttl`` (s)."""
        self._relay.remember(event, ttl)

    # -- members ------------------------------------------------------------------------

    def touch(self, room: str, session: SessionId, user: UserId | None, member: Described | None) -> None:
        """See :meth:`broker.engine.peers.Peers.touch`."""
        before = self._members.touch(room, session, user, member)
        feed = self._feed
        if feed is None:
            return
        if before is not None and (member is None or before.user != user):
            feed.went(room, session, before.user)
        if member is not None and (before is None or before.user != user):
            feed.came(room, session, user)

    def refresh_members(self) -> None:
        """Give Redis a sign of life for all that it keeps of this node's members; happens by itself, too."""
        self._members.refresh()

    async def mates(self, room: str) -> Sequence[Mate]:
        """See :meth:`broker.engine.peers.Peers.mates`."""
        return await self._mates.read(room)

    def appeared(self, session: SessionId, user: UserId | None) -> None:
        """See :meth:`broker.engine.peers.Peers.appeared`."""
        if self._feed is not None:
            self._feed.appeared(session, user)

    def vanished(self, session: SessionId, user: UserId | None) -> None:
        """See :meth:`broker.engine.peers.Peers.vanished`."""
        if self._feed is not None:
            self._feed.vanished(session, user)

    # -- nodes --------------------------------------------------------------------------

    async def part(self) -> None:
        """See :meth:`broker.engine.peers.Peers.part`."""
        self._members.part()
        self._nodes.part(missed=self._members.some)
        with trio.move_on_after(PART_WITHIN):
            await self._nodes.parted.wait()

    def nodes(self) -> Sequence[NodeInfo]:
        """See :meth:`broker.engine.peers.Peers.nodes`."""
        return self._nodes.infos()

    def serve(self, method: str, handler: Handler) -> None:
        """See :meth:`broker.engine.peers.Peers.serve`."""
        self._asks.serve(method, handler)

    async def ask(self, method: str, parameters: Any) -> Sequence[Answer]:
        """See :meth:`broker.engine.peers.Peers.ask`."""
        return await self._asks.ask(method, parameters)

    def statistics(self) -> dict[str, Any]:
        """Counters and gauges by name."""
        return {
            **self._nodes.statistics(),
            **self._members.statistics(),
            **self._mates.statistics(),
            **self._relay.statistics(),
            **self._asks.statistics(),
            **self._graves.statistics(),
            "bad_messages": self._bad + self._mates.bad + self._relay.bad + self._asks.bad,
        }
