"""Which nodes there are, and this one among them: leases in Redis, by the time of Redis alone.

Theory. Every node renews its lease three times as often as it must, by a script
that also tells it of all others, and takes out whoever has let a lease end. The
answer names those to one node only, which cleans up after them. A node that is
told that it has been taken out (it was frozen) goes on under a new id, because
the others have forgotten its members.

Absence counts only when the leases have been kept for a while. Where nobody was
heard of for half a lease, or where Redis has lost everything, it was Redis that
was away, and the nodes need time to say so. Until then they are not ``settled``.

A node that drains takes one last lease, long enough for its sessions to come
back elsewhere, and lets that end.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec
import trio

from broker.engine.peers import NodeInfo
from broker.link import wire
from broker.link.base import Link, LinkError, Reply, load_script
from broker.link.keys import Keys
from broker.logs import Throttle, get_logger

log = get_logger(__name__)

RENEWALS: Final = 3
"""Heartbeats in the length of a lease."""
RETRY: Final = 0.5
"""Between a heartbeat that failed and the next (s)."""
FAREWELL: Final = 0.5
"""How long the last word of a node that has drained may take (s)."""
SHORTEST: Final = 0.1
"""Between any two heartbeats (s), however much news there is."""

HEARTBEAT: Final = load_script("heartbeat")

FENCED: Final = 0
FORGOTTEN: Final = 2

NO_ANSWER: Final = 0
"""Number of a question that wants none."""
NEWS: Final = b'{"method":""}'
"""The question without a name: nodes have changed, look."""

_infos = msgspec.json.Decoder(NodeInfo)


def new_id() -> str:
    """An id for one incarnation of a node."""
    return secrets.token_hex(8)


class Change(NamedTuple):
    """What one heartbeat has taught about other nodes."""

    came: list[str]
    gone: list[str]
    parted: list[str]
    """They drain."""
    ended: list[str]
    """Nodes to clean up after; nobody else was told so."""
    anew: bool
    """The others may know nothing of this node, or by an old id: tell them everything, ask everything."""


class Nodes:
    """The lease of this node, and the list of all.

    ``describe`` gives what this node says of itself; id and ``draining`` are
    filled in here. ``changed`` is called after every heartbeat. ``lease`` and
    ``parting`` (s) are the lengths of a lease, and of the last one of a node
    that drains.
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        describe: Callable[[], NodeInfo],
        changed: Callable[[Change], None],
        *,
        node: str,
        lease: float,
        parting: float,
    ) -> None:
        self._link = link
        self._keys = keys
        self._describe = describe
        self._changed = changed
        self._lease = lease
        self._parting = parting
        self._others: dict[str, NodeInfo] = {}
        self._former: set[str] = set()
        self._registered = False
        self._anew = True
        self._draining = False
        self._ended = False
        self._last_lease = parting
        self._news = trio.Event()
        self._throttle = Throttle()
        self.id = node
        self.parted = trio.Event()
        """Set once the others can know that this node drains."""
        self.settled = False
        """Whether a node that is not listed is gone."""
        self.heartbeats = 0
        self.failed = 0
        self.fenced = 0
        self.forgotten = 0
        self.buried = 0
        self.unreadable = 0

    # -- who there is -------------------------------------------------------------------

    def is_own(self, node: str) -> bool:
        """Whether this is the id of this node, or was."""
        return node == self.id or node in self._former

    def lives(self, node: str) -> bool:
        """Whether another node has a lease, as of the last heartbeat."""
        return node in self._others

    def others(self) -> dict[str, NodeInfo]:
        """All other nodes that are alive; not to be changed."""
        return self._others

    def running(self) -> list[NodeInfo]:
        """All other nodes that can be asked something, by name."""
        running = [info for info in self._others.values() if not info.ended]
        return sorted(running, key=lambda info: (info.name, info.id))

    def infos(self) -> list[NodeInfo]:
        """All nodes, this one first, the others by name."""
        return [self.own(), *self.running()]

    def own(self) -> NodeInfo:
        """What this node says of itself."""
        info = self._describe()
        draining = info.draining or self._draining
        return msgspec.structs.replace(info, id=self.id, draining=draining, ended=self._ended)

    # -- what happens -------------------------------------------------------------------

    def look(self) -> None:
        """Somebody has news, or is not known: the next heartbeat comes at once."""
        self._news.set()

    def rejoin(self) -> None:
        """The link is up again, or for the first time: find out what has become of everything."""
        self._anew = True
        self._news.set()

    def part(self, *, missed: bool) -> None:
        """Drain. ``missed``: there are members whom others must keep until they are back."""
        self._draining = True
        self._last_lease = self._parting if missed else self._lease
        self._news.set()

    async def end(self) -> None:
        """Nobody should ask this node anything any more; its last lease goes on for its members."""
        self._ended = True
        with trio.move_on_after(FAREWELL, shield=True):
            await self._beat()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the lease until cancelled. Started after the first attempt."""
        known = await self._beat()
        task_status.started()
        while True:
            await trio.sleep(SHORTEST)
            pause = self._lease / RENEWALS * random.uniform(0.9, 1.0) if known else RETRY
            with trio.move_on_after(pause - SHORTEST):
                await self._news.wait()
            self._news = trio.Event()
            known = await self._beat()

    async def _beat(self) -> bool:
        """One heartbeat; false if there was no answer, or one that calls for another heartbeat."""
        keys, anew = self._keys, self._anew
        mode, length = self._mode()
        self._anew = False
        try:
            status, settled, ended, listing = await self._link.call_script(
                HEARTBEAT,
                [keys.leases, keys.nodes, keys.beats],
                self.id,
                mode,
                round(length * 1000),
                msgspec.json.encode(self.own()),
                round(self._lease * 1000),
            )
        except LinkError as error:
            self._anew = self._anew or anew
            self.failed += 1
            missed = self._throttle.admit("heartbeat", trio.current_time())
            if missed is not None:
                log.warning("the lease cannot be renewed", why=str(error), suppressed=missed)
            return False
        self.heartbeats += 1
        if status == FENCED:
            self._rename()
            return False
        if status == FORGOTTEN:
            self.forgotten += 1
            log.warning("Redis has lost the leases of the nodes; everybody tells everything again")
        self.settled = bool(settled)
        if mode == "part":
            self.parted.set()
        change = self._learn(ended, listing, anew=anew or mode == "first" or status == FORGOTTEN)
        self._registered = self._registered or mode == "first"
        if change.ended or mode in {"first", "part", "end"}:
            self._tell()
        self._changed(change)
        return True

    def _mode(self) -> tuple[str, float]:
        if self._ended:
            return "end", self._lease
        if not self._registered and not self._draining:
            return "first", self._lease
        if self.parted.is_set():
            return "look", self._lease
        return ("part", self._last_lease) if self._draining else ("keep", self._lease)

    def _rename(self) -> None:
        """Others have declared this node dead, and forgotten its members."""
        self.fenced += 1
        self._former.add(self.id)
        former, self.id = self.id, new_id()
        self._registered = False
        self.look()
        log.warning("this node was taken for dead; it goes on under a new id", former=former, id=self.id)

    def _learn(self, ended: list[bytes], listing: list[bytes], *, anew: bool) -> Change:
        """Compare the answer with what was known."""
        found: dict[str, NodeInfo] = {}
        for raw, text in zip(listing[::2], listing[1::2], strict=True):
            node = raw.decode()
            if not self.is_own(node):
                found[node] = self._read(node, text)
        dead = [raw.decode() for raw in ended]
        before, self._others = self._others, found
        if not self.settled:
            self._others = {node: info for node, info in before.items() if node not in dead} | found
        now = self._others
        self.buried += len(dead)
        for node in dead:
            log.warning("a node has not been heard of; its members leave", node=node)
        return Change(
            came=[node for node in now if node not in before],
            gone=[node for node in before if node not in now],
            parted=[
                node
                for node, info in now.items()
                if info.draining and not (node in before and before[node].draining)
            ],
            ended=dead,
            anew=anew,
        )

    def _read(self, node: str, text: bytes) -> NodeInfo:
        try:
            return _infos.decode(text)
        except (msgspec.DecodeError, ValueError) as error:
            self.unreadable += 1
            if self._throttle.admit(node, trio.current_time()) is not None:
                log.warning("what a node says of itself cannot be read", node=node, why=str(error))
            # It has a lease, so it lives; perhaps it is of another version.
            return self._others.get(node) or NodeInfo(id=node, name=node)

    def _tell(self) -> None:
        """Have the others look at the list now."""
        message = wire.pack(wire.ASK, self.id, NO_ANSWER, body=NEWS)
        self._link.send(self._ignore, self._keys.everybody, "PUBLISH", self._keys.everybody, message)

    def _ignore(self, reply: Reply | LinkError) -> None:
        """Nobody is harmed if the others look a little later."""
        self.failed += isinstance(reply, LinkError)

    def statistics(self) -> dict[str, Any]:
        """Counters and gauges by name."""
        return {
            "nodes": len(self._others) + 1,
            "settled": int(self.settled),
            "heartbeats": self.heartbeats,
            "failed_heartbeats": self.failed,
            "fenced": self.fenced,
            "forgotten": self.forgotten,
            "buried_nodes": self.buried,
            "unreadable_nodes": self.unreadable,
        }
