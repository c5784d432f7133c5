"""Members of one room whose sessions are on other nodes, and what each word about them changes.

Theory. Each node is the only one that knows its members, and what it says is
kept apart from what others say: a word about one node never undoes that of
another, said twice it changes nothing, and a session that two nodes have (one
that was frozen comes back under another id) is shown once, until both let it go.
What watchers are told are the differences in what is shown.

A node that *drains* says no more that its members leave, because they come back
elsewhere at once. So they stay shown, and each arrival of a user takes the place
of one of them: whoever watches sees another session of a user who never went
away. Those in whose place nobody came go with the node.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import NamedTuple

from broker.engine.peers import Mate
from broker.protocol.events import SessionId, UserId


class Changes(NamedTuple):
    """What is shown otherwise than before."""

    came: list[Mate]
    changed: list[Mate]
    went: list[Mate]
    """As they were."""


class Mates:
    """Who is in one room on other nodes. ``parted`` are those that drain, one collection for all rooms."""

    __slots__ = ("_nodes", "_parted", "_replaced", "_returning")

    def __init__(self, parted: Container[str]) -> None:
        self._parted = parted
        self._nodes: dict[str, dict[SessionId, Mate]] = {}
        self._replaced: set[tuple[str, SessionId]] = set()
        """Members of parted nodes in whose place another session came: not shown any more."""
        self._returning: dict[UserId, list[tuple[str, SessionId]]] | None = None
        """Members of parted nodes in whose place none came yet; made when it is asked for."""

    def __bool__(self) -> bool:
        return bool(self._nodes)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Mate]:
        """Everybody who is shown."""
        seen: set[SessionId] = set()
        for node, mates in self._nodes.items():
            for session, mate in mates.items():
                if session not in seen and (node, session) not in self._replaced:
                    seen.add(session)
                    yield mate

    def _shown(self, session: SessionId) -> Mate | None:
        for node, mates in self._nodes.items():
            if session in mates and (node, session) not in self._replaced:
                return mates[session]
        return None

    def know(self, node: str, mates: Mapping[SessionId, Mate]) -> Changes:
        """``node`` has these, and no others."""
        before = self._nodes.get(node, {})
        news = [mate for mate in mates.values() if before.get(mate.session) != mate]
        return self.change(node, news, [session for session in before if session not in mates])

    def change(self, node: str, news: Iterable[Mate], gone: Iterable[SessionId]) -> Changes:
        """``node`` has ``news``, perhaps otherwise than before, and ``gone`` no more."""
        mates = self._nodes.setdefault(node, {})
        there = {mate.session: mate for mate in news}
        lost = {session for session in gone if session in mates and session not in there}
        before = {session: self._shown(session) for session in (*there, *lost)}
        mates.update(there)
        for session in lost:
            del mates[session]
            self._replaced.discard((node, session))
        if not mates:
            del self._nodes[node]
        if node in self._parted:
            self._returning = None
        return self._compare(before, arrivals=node not in self._parted)

    def _compare(self, before: dict[SessionId, Mate | None], *, arrivals: bool) -> Changes:
        changes = Changes([], [], [])
        for session, was in before.items():
            now = self._shown(session)
            if was is None and now is not None:
                changes.came.append(now)
                if arrivals and (replaced := self.replace(now.user)) is not None:
                    changes.went.append(replaced)
            elif was is not None and now is None:
                changes.went.append(was)
            elif was is not None and now is not None and was != now:
                changes.changed.append(now)
        return changes

    # -- nodes that drain -------------------------------------------------------

    def part(self) -> None:
        """Another node drains."""
        self._returning = None

    def replace(self, user: UserId | None) -> Mate | None:
        """A session of ``user`` came: the member of a draining node in whose place it is, shown no more."""
        if user is None:
            return None
        if self._returning is None:
            self._returning = self._find_returning()
        waiting = self._returning.get(user)
        while waiting:
            node, session = waiting.pop()
            if sum(session in mates for mates in self._nodes.values()) == 1:  # else it came back itself
                self._replaced.add((node, session))
                return self._nodes[node][session]
        return None

    def _find_returning(self) -> dict[UserId, list[tuple[str, SessionId]]]:
        returning: dict[UserId, list[tuple[str, SessionId]]] = {}
        for node, mates in self._nodes.items():
            if node in self._parted:
                for session, mate in mates.items():
                    if mate.user is not None and (node, session) not in self._replaced:
                        returning.setdefault(mate.user, []).append((node, session))
        return returning
