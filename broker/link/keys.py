"""Names in Redis: every key and channel, made in one place.

The keys and the live channel of a room share a hash tag, so that one script may
touch them all in a Redis Cluster. A room's name is escaped inside the tag, so
that no name can close it; names that backends type are used as they are.
"""

from __future__ import annotations

_ESCAPES = str.maketrans({"{": "%7B", "}": "%7D", "%": "%25"})


class Keys:
    """Names under ``prefix``. ``room`` is a room's name, ``node`` the id of a node's incarnation."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.store = f"{prefix}store"
        """Hash: the store's generation, how much it has stored, whose run it is (see ``generation``)."""
        # One hash tag for what one script touches; a room of that name has other keys.
        self.nodes = f"{prefix}{{nodes}}"
        """Hash: node id → what it says of itself; a node is alive while its lease is in ``leases``."""
        self.leases = f"{prefix}{{nodes}}:leases"
        """Sorted set: node id by the Redis time (ms) at which its lease ends."""
        self.beats = f"{prefix}{{nodes}}:beats"
        """Hash: Redis time (ms) of the ``last`` heartbeat of any node, and of the first (``began``)."""
        self.everybody = f"{prefix}nodes:all"
        """Channel that every node hears."""
        self.publish = f"{prefix}publish"
        """Stream: durable events from backends."""
        self.rejected = f"{prefix}rejected"
        """Stream: entries and messages that could not be used, with the reason."""
        self.lifecycle = f"{prefix}lifecycle"
        """Stream: who came and went, for backends."""
        self.departures = f"{prefix}lifecycle:departures"
        """Sorted set: departures by the time (ms) at which they become true."""
        self.writers = f"{prefix}lifecycle:nodes"
        """Set: nodes that have written numbers for the lifecycle feed."""
        self._backend = f"{prefix}room:"

    def _of(self, room: str, what: str) -> str:
        return f"{self.prefix}{{{room.translate(_ESCAPES)}}}:{what}"

    def meta(self, room: str) -> str:
        """Hash: ``epoch``, ``offset`` and time of the newest event of the stream."""
        return self._of(room, "meta")

    def stream(self, room: str) -> str:
        """Stream of the room's events; the id of an entry is ``<offset>-0``."""
        return self._of(room, "stream")

    def once(self, room: str, publisher: str, key: str) -> str:
        """String: the answer to a publish with this idempotency key."""
        return self._of(room, f"once:{len(publisher)}:{publisher}:{key}")

    def trial(self, room: str) -> str:
        """String: written to try whether the store takes anything, where the room is."""
        return self._of(room, "trial")

    def seen(self, room: str) -> str:
        """Hash: who → ``offset:ts``, acknowledged positions."""
        return self._of(room, "seen")

    def slots(self, room: str) -> str:
        """Hash: slot → newest event, of ephemeral rooms with ``last_value``."""
        return self._of(room, "slots")

    def slots_order(self, room: str) -> str:
        """Sorted set: the slots, the one that was filled last at the end."""
        return self._of(room, "slots:order")

    def members(self, room: str, node: str) -> str:
        """Hash: session → member, of the sessions that ``node`` has in the room."""
        return self._of(room, f"members:{node}")

    def member_nodes(self, room: str) -> str:
        """Hash: node id → version of its members, of the nodes that have any in the room."""
        return self._of(room, "members")

    def member_rooms(self, node: str) -> str:
        """Set: rooms in which ``node`` has members, and perhaps some in which it has none any more."""
        return f"{self.prefix}node:{node}:members"

    def who(self, room: str) -> str:
        """Hash: for the lifecycle feed, who is in the room by which node."""
        return self._of(room, "who")

    def live(self, room: str) -> str:
        """Channel among nodes; sharded in a Redis Cluster."""
        return self._of(room, "live")

    def backend(self, room: str) -> str:
        """Channel on which backends publish ephemeral events; never sharded."""
        return self._backend + room

    def node(self, node: str) -> str:
        """Channel that one node hears."""
        return f"{self.prefix}node:{node}"

    def lease(self, name: str) -> str:
        """String: which node has the lease ``name`` now."""
        return f"{self.prefix}lease:{name}"
