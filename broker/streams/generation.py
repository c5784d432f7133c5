"""Whether the store is still the one that the nodes have told clients about.

Theory. A Redis that crashes, or hands over to a replica, may have lost the
newest events, and will give their offsets to others. A client that was told
the lost ones would take the new ones for known: it must see another epoch. So
every epoch ends in the *generation* of the store, a random word in the hash
``store``, and whoever finds that the store has lost something replaces it. Then
all rooms have another epoch at once, and everybody is told once that the past
cannot be vouched for; streams and offsets stay as they are.

How is a loss found? The hash also counts ``commits``, one for each event stored
in any room, and every answer and message carries the number. Each node remembers
the highest that it has seen of the run that it knows. A Redis process is known by its run id. The first
node to meet a new one writes down what it had counted until then
(``run_commits``), and lists as *witnesses* all nodes that lived at that moment.
A node that comes and has seen more than this proves a loss. A witness that comes
and has not is taken off the list. One that does not come within
:data:`PATIENCE` may have died together with Redis, and taken its knowledge with
it: then the doubt counts as a loss, unless this Redis cannot lose anything. It
cannot if it was started from a log that it synced at every write, and has not
been promoted from a replica, which may have been behind.

So a clean failover, and a restart with ``appendfsync always``, are told to
nobody, and a lost tail always is. The same comparison without a new run finds
``FLUSHALL`` and a backup that was put back under our feet: the count has fallen
(:meth:`Generation.look`, with every sweep and whenever an answer carries a
lower number than had been seen when the command was sent).

In a Redis Cluster no script may touch both a room and such a hash. There the
epoch is the room's own, and a shard's lost tail is found by comparing each open
room with what was delivered of it here (:mod:`broker.streams.proofs`): after
every fall of the link, and with every sweep. A room that no living node had open
then keeps its epoch. Who needs more must have the shards wait for their replicas
(``redis.replicas``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from broker.link.base import Link, LinkDown, LinkError, Reply
from broker.link.keys import Keys
from broker.logs import get_logger
from broker.streams.scripts import GENERATION, Tokens

log = get_logger(__name__)

PATIENCE: Final = 5.0
"""How long the other nodes may take to reach a new run of Redis (s): longer than they need to notice."""

_REASONS: Final = {
    "empty": "the store is empty",
    "behind": "the store has lost events that this node had seen",
    "silent": "a node that may have seen more did not come back",
    "hurried": "Redis changed again before every node had come back",
}


class Generation:
    """What this node knows of the store.

    ``node`` gives the id of this node's incarnation, ``patience`` is how long
    the other nodes may take to reach a new run of Redis (s).
    """

    def __init__(
        self, keys: Keys, node: Callable[[], str], tokens: Tokens, *, patience: float = PATIENCE
    ) -> None:
        self._keys = keys
        self._node = node
        self._patience = patience
        self.tokens = tokens
        self._run = ""
        self._mark = ""
        self._suffix = ""
        self.value = ""
        """The generation; empty before the first answer, and always in a Redis Cluster."""
        self.commits = 0
        """The highest count that was seen in this generation."""
        self.pending = 0
        """Witnesses that had not come when the store was looked at last."""
        self.changes = 0

    def saw(self, epoch: str, commits: int) -> bool:
        """Note what an answer carried; false if it is of another generation than ours."""
        return self.heard(epoch, commits, self._mark)

    def heard(self, epoch: str, commits: int, mark: str) -> bool:
        """The same of a message, which may come from a run of Redis that this node has yet to greet.

        Then it does not count: what that run has stored does not prove that it lost anything.
        """
        if epoch.endswith(self._suffix):
            if commits > self.commits and mark == self._mark:
                self.commits = commits
            return True
        return False

    def epoch(self, own: str) -> str:
        """A room's epoch as clients see it."""
        return own + self._suffix

    async def greet(self, link: Link, run_id: str) -> None:
        """Meet a Redis just connected to, before anything else is asked of it. Raises ``LinkError``."""
        if not link.clustered:
            self._run = run_id
            await self._ask(link, durable=await self._is_durable(link), greeting=True)

    async def look(self, link: Link, *, behind: bool = False) -> bool:
        """Look again; true if there is another generation. Raises ``LinkError``.

        ``behind``: a room's stream ends before what was delivered of it.
        """
        if link.clustered:
            return False
        return await self._ask(link, behind=behind)

    async def _ask(
        self, link: Link, *, durable: bool = False, behind: bool = False, greeting: bool = False
    ) -> bool:
        keys = self._keys
        reply = await link.call_script(
            GENERATION,
            (keys.store, keys.leases, keys.nodes),
            self._run,
            self._node(),
            self.value,
            self.commits,
            self._mark,
            self.tokens(),
            int(durable),
            int(behind),
            round(self._patience * 1000),
            int(greeting),
        )
        return self._take(reply)

    def _take(self, reply: Reply) -> bool:
        value, commits, mark, self.pending, why = reply
        value, self._mark = value.decode(), mark.decode()
        before = self.value
        if why:
            # Clients are told only if there was another one before.
            say = log.warning if before else log.info
            say("the store begins a generation", reason=_REASONS[why.decode()])
        if value == before:
            self.commits = max(self.commits, commits)
            return False
        self.value, self._suffix = value, f".{value}"
        self.commits = commits
        if before:
            self.changes += 1
            if not why:
                log.warning("the store has another generation; another node found out why")
        return True

    async def _is_durable(self, link: Link) -> bool:
        """Whether this Redis has every write that it ever acknowledged, as far as it can say."""
        key = self._keys.store
        try:
            # A pattern, because only Redis 7 takes several names.
            found = await link.call(key, "CONFIG", "GET", "append*")
            replication = await link.call(key, "INFO", "replication")
        except LinkDown:
            raise
        except LinkError:
            return False  # not allowed to ask
        settings = dict(zip(found[::2], found[1::2], strict=True))
        if settings.get(b"appendonly") != b"yes" or settings.get(b"appendfsync") != b"always":
            return False
        # A promoted replica remembers whose history it continues; else there are only zeros.
        continues = [
            line.partition(b":")[2].strip()
            for line in replication.splitlines()
            if line.startswith(b"master_replid2:")
        ]
        return bool(continues) and not continues[0].strip(b"0")
