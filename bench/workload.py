"""What a run asks of a server, in no particular language: who is where, who says what when.

Built by the scenarios, turned into bytes by :mod:`bench.plan`, and held against
what arrived by :mod:`bench.analysis`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SEQUENCE = "##########"
"""Stands in a body where the load client writes the publish's number, as ten digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One run.

    ``member`` gives each connection its room (an index into ``rooms``, -1 for
    none). The publishes are three arrays of one length, in time order: ``at``
    (ns after the start), ``publisher`` (a connection) and ``room`` (an index
    into ``rooms``). ``bodies`` are JSON objects that hold :data:`SEQUENCE`
    once; publish *i* says ``bodies[i % len(bodies)]``. Connections in
    ``deaf`` read nothing once they have joined, and are not held to
    account. With ``asks`` every publisher ends with a question; its answer
    proves that the server has handled all that came before it.

    With several servers ``place`` gives each connection its own, as an index
    (``None``: all to the first). Those in ``backends`` are no clients: they speak
    to Redis. Publishes that stand together, of one connection and due at one
    moment, go out as one array or one pipeline of at most ``gather``.
    """

    rooms: Sequence[str]
    member: NDArray[np.int32]
    at: NDArray[np.uint64]
    publisher: NDArray[np.int32]
    room: NDArray[np.int32]
    bodies: Sequence[str]
    deaf: frozenset[int] = frozenset()
    asks: bool = False
    place: NDArray[np.int32] | None = None
    backends: frozenset[int] = frozenset()
    gather: int = 1

    @property
    def connections(self) -> int:
        """How many connections take part."""
        return len(self.member)

    @property
    def publishes(self) -> int:
        """How many events are sent."""
        return len(self.at)

    def on(self, place: int) -> Workload:
        """The same with all connections to one server."""
        return dataclasses.replace(self, place=np.full(self.connections, place, dtype=np.int32))

    def unsaid(self) -> Workload:
        """The same connections in the same rooms, but nobody publishes."""
        return dataclasses.replace(
            self, at=np.zeros(0, dtype=np.uint64), publisher=nothing(), room=nothing(), bodies=[]
        )


def even(rate: float, seconds: float) -> NDArray[np.uint64]:
    """Moments at equal distances: ``rate`` a second for ``seconds``, in ns from 0."""
    count = max(1, round(rate * seconds))
    return (np.arange(count, dtype=np.float64) * (1e9 / rate)).astype(np.uint64)


def nothing() -> NDArray[np.int32]:
    """No publishes."""
    return np.zeros(0, dtype=np.int32)


def one_room(
    sessions: int,
    rate: float,
    seconds: float,
    bodies: Sequence[str],
    *,
    room: str = "bench:room",
    deaf: frozenset[int] = frozenset(),
) -> Workload:
    """``sessions`` in one room, the first of them publishing ``rate`` events a second."""
    at = even(rate, seconds)
    return Workload(
        rooms=[room],
        member=np.zeros(sessions, dtype=np.int32),
        at=at,
        publisher=np.zeros(len(at), dtype=np.int32),
        room=np.zeros(len(at), dtype=np.int32),
        bodies=bodies,
        deaf=deaf,
    )


def many_rooms(connections: int, rooms: int, rate: float, seconds: float, bodies: Sequence[str]) -> Workload:
    """``connections`` spread evenly over ``rooms``; publishes go round the rooms, from members in turn."""
    at = even(rate, seconds)
    number = np.arange(len(at), dtype=np.int64)
    room = (number % rooms).astype(np.int32)
    # Members of room r are r, r + rooms, r + 2 * rooms, …; they take turns.
    seats = connections // rooms
    publisher = (room + rooms * (number // rooms % seats)).astype(np.int32)
    return Workload(
        rooms=[f"bench:{index}" for index in range(rooms)],
        member=(np.arange(connections) % rooms).astype(np.int32),
        at=at,
        publisher=publisher,
        room=room,
        bodies=bodies,
    )


def inbound(connections: int, rate: float, seconds: float, bodies: Sequence[str]) -> Workload:
    """``connections`` take turns to publish, each into a room of its own that nobody has joined."""
    at = even(rate, seconds)
    turn = (np.arange(len(at)) % connections).astype(np.int32)
    return Workload(
        rooms=[f"quiet:{index}" for index in range(connections)],
        member=np.full(connections, -1, dtype=np.int32),
        at=at,
        publisher=turn,
        room=turn,
        bodies=bodies,
        asks=True,
    )


def silent(connections: int) -> Workload:
    """Connections that are welcomed and then say nothing."""
    return Workload(
        rooms=[],
        member=np.full(connections, -1, dtype=np.int32),
        at=np.zeros(0, dtype=np.uint64),
        publisher=nothing(),
        room=nothing(),
        bodies=[],
    )


def from_elsewhere(
    sessions: int,
    rooms: int,
    senders: int,
    at: NDArray[np.uint64],
    bodies: Sequence[str],
    *,
    sessions_at: int,
    senders_at: int,
    backends: bool = False,
    gather: int = 1,
) -> Workload:
    """``sessions`` spread over ``rooms`` on one server, and ``senders`` on another that are in none of them.

    Publishes go round the rooms; the senders take turns, each with ``gather`` at a time.
    """
    number = np.arange(len(at), dtype=np.int64)
    places = [np.full(sessions, sessions_at, dtype=np.int32), np.full(senders, senders_at, dtype=np.int32)]
    members = [(np.arange(sessions) % rooms).astype(np.int32), np.full(senders, -1, dtype=np.int32)]
    return Workload(
        rooms=[f"bench:{index}" for index in range(rooms)],
        member=np.concatenate(members),
        at=at,
        publisher=(sessions + number // gather % senders).astype(np.int32),
        room=(number % rooms).astype(np.int32),
        bodies=bodies,
        place=np.concatenate(places),
        backends=frozenset(range(sessions, sessions + senders)) if backends else frozenset(),
        gather=gather,
    )


def in_turn(connections: int, at: NDArray[np.uint64], bodies: Sequence[str], prefix: str) -> Workload:
    """Each connection has a room of its own and publishes there, one after the other."""
    turn = (np.arange(len(at)) % connections).astype(np.int32)
    return Workload(
        rooms=[f"{prefix}:{index}" for index in range(connections)],
        member=np.arange(connections, dtype=np.int32),
        at=at,
        publisher=turn,
        room=turn,
        bodies=bodies,
    )


def together(at: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """The same publishes, ``count`` at a time: all of them at the moment at which the first was due."""
    return at[np.arange(len(at)) // count * count]
