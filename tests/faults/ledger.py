"""The ledger: whether a run kept its promises, judged by what clients saw, and by nothing else.

No IO and no clock: whoever runs the load tells it what was published, what was
answered, and every message that a session got, in the order in which it got
them; time comes as ``now``. It knows nothing of nodes, Redis or faults.

A *publication* is one event, known by its key, however often it was sent. A
*session* is one subscriber over all its connections; for each of its rooms a
*follower* holds the position that the contract gives it, and the *visits*: which
epochs it was in, from where to where. A published event that was acknowledged
at a position must lie in a visit of every session that is entitled to it, or in
an interval that the session was told of by ``recovered: false``. Positions are
common to all: what one session saw at an offset of an epoch, no other may see
elsewhere, and nobody may see anything else there.

Ephemeral rooms promise less: to one connection, each event of one publisher's
connection at most once and in order (a *line*).

Two things are not faults. Between two epochs the past is gone, so an event may
come once in each. And an event that was sent several times may have been stored
in one epoch and acknowledged in the next; where epochs may not change at all,
the change itself is the fault.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from enum import StrEnum
from typing import NamedTuple

from broker.protocol.events import Position

SHOWN = 20
"""Violations kept with their words; the others are counted."""
REMEMBERED = 12
"""Messages of a follower that are shown with a violation."""


class Verdict(StrEnum):
    """What can be wrong."""

    HOLE = "silent hole"
    """An event that should have come did not, and nobody said so."""
    DUPLICATE = "duplicate"
    """An offset came twice."""
    REORDER = "reorder"
    """An offset came after a later one, or a backend's entry after one that was behind it."""
    TWICE = "stored twice"
    """One publication, two offsets of one epoch; or two publications, one offset."""
    FOREIGN = "foreign room"
    """An event of another room, or of one that the session is not in, or that nobody published."""
    STALE = "stale epoch"
    """What belongs to one epoch was taken for another's."""
    GONE = "acknowledged and gone"
    """At the end, the store does not have it where it was acknowledged."""
    CONTENT = "wrong content"
    """Not what was published under this key."""
    TOLD = "told without cause"
    """``recovered: false``, where the fault allows no loss."""
    CLOSED = "closed without cause"
    """A socket was closed, where the fault allows none to be."""
    REFUSED = "refused for good"
    """A publish or a join was answered with an error that does not say to try again."""
    PRESENCE = "wrong presence"
    """At the end, with everything healed, a node counts other members than there are."""
    UNFINISHED = "unfinished"
    """At the end, with everything healed, something was still on its way."""


class Violation(NamedTuple):
    """One broken promise, and what led to it."""

    verdict: Verdict
    words: str


@dataclasses.dataclass(slots=True)
class Publication:
    """One event, from the first attempt to its acknowledgement."""

    room: str
    key: str
    digest: str
    sent_at: float
    attempts: int = 1
    position: Position | None = None
    """Where it was acknowledged; of a backend's, where it was first seen."""
    answered: bool = False
    by_backend: bool = False
    """Handed in at the store, to be published by whichever node reads it there."""
    accepted: bool = False
    """The store has it."""


@dataclasses.dataclass(slots=True)
class Visit:
    """One stay in an epoch: everything after ``entered`` up to ``reached`` came."""

    epoch: str
    entered: int
    reached: int
    ended: float | None = None
    """When the session was told that what follows is gone."""


class Follower:
    """What one session saw of one room."""

    def __init__(self, session: str, room: str) -> None:
        self.session = session
        self.room = room
        self.visits: list[Visit] = []
        self.came_at = 0.0
        """When its first join was answered."""
        self.since: Position | None = None
        """What the join that is under way asked for."""
        self.live = False
        """Between an answered join and the next end of it: events may come."""
        self.recent: deque[str] = deque(maxlen=REMEMBERED)

    @property
    def position(self) -> Position | None:
        """What the next join must say in ``since``."""
        if not self.visits:
            return None
        visit = self.visits[-1]
        return Position(visit.epoch, visit.reached)

    def covers(self, publication: Publication) -> bool:
        """Whether the session got it, was told that it did not, or came too late to be entitled."""
        position = publication.position
        assert position is not None
        if not self.visits:
            return True
        known = False
        for visit, following in zip(self.visits, [*self.visits[1:], None], strict=True):
            if visit.epoch != position.epoch:
                continue
            known = True
            if position.offset <= visit.reached:
                return True  # it came, or lies before the visit
            if following is not None and (
                following.epoch != visit.epoch or position.offset <= following.entered
            ):
                return True  # between two visits, of which the session was told
        if known:
            return False
        # An epoch that the session never saw: before its time, or in what it was told is gone.
        ends = [visit.ended for visit in self.visits if visit.ended is not None]
        return publication.sent_at <= max([self.came_at, *ends])


@dataclasses.dataclass(frozen=True, slots=True)
class Balance:
    """The ledger of one round."""

    published: int = 0
    acknowledged: int = 0
    retried: int = 0
    """Publications that needed more than one attempt."""
    handed_in: int = 0
    """Events that a backend put into the store."""
    delivered: int = 0
    whispered: int = 0
    """Ephemeral events that came."""
    told: int = 0
    """Intervals of which a session was told that their events are gone for it."""
    interrupted: int = 0
    """``lost``: live delivery broke off, and the session joined again."""
    closed: int = 0
    """Sockets that ended."""
    violations: dict[str, int] = dataclasses.field(default_factory=dict)
    evidence: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether every promise was kept."""
        return not self.violations

    @property
    def holes(self) -> int:
        """Events that never came."""
        return self.of(Verdict.HOLE)

    @property
    def duplicates(self) -> int:
        """Events that came twice, for whatever reason."""
        return self.of(Verdict.DUPLICATE, Verdict.TWICE)

    def of(self, *verdicts: Verdict) -> int:
        """How many violations of these kinds there are."""
        return sum(self.violations.get(verdict.value, 0) for verdict in verdicts)


class Ledger:
    """What everybody saw. :meth:`begin` a round, tell it everything, ask for its :meth:`balance`."""

    def __init__(self) -> None:
        self.publications: dict[str, Publication] = {}
        self.followers: dict[tuple[str, str], Follower] = {}
        self._places: dict[tuple[str, str, int], str] = {}
        """(room, epoch, offset) → key: what lies where, for everybody."""
        self._found: dict[str, dict[str, int]] = {}
        """key → epoch → offset: where what lies."""
        self._former: dict[str, Publication] = {}
        """Those of the round before, of which a late copy would still be known."""
        self._violations: list[Violation] = []
        self._counts: Counter[Verdict] = Counter()
        self._done: Counter[str] = Counter()
        self._lines: dict[str, dict[str, int]] = {}
        """Session → line of a publisher → number of the last event that came."""
        self._may_tell = False
        self._may_close = False

    def begin(self, *, may_tell: bool = False, may_close: bool = False) -> None:
        """A new round. The last one is forgotten, save where everybody is."""
        self._former = self.publications
        self.publications = {
            key: one for key, one in self.publications.items() if not one.answered and not one.accepted
        }
        self._places.clear()
        self._found.clear()
        self._violations.clear()
        self._counts.clear()
        self._done.clear()
        self._may_tell = may_tell
        self._may_close = may_close
        for follower in self.followers.values():
            del follower.visits[:-1]

    def _accuse(self, verdict: Verdict, words: str, follower: Follower | None = None) -> None:
        self._counts[verdict] += 1
        if self._counts[verdict] <= SHOWN:
            if follower is not None:
                words = (
                    f"{follower.session} in {follower.room}: {words}; before: {' · '.join(follower.recent)}"
                )
            self._violations.append(Violation(verdict, words))

    # -- publishers -----------------------------------------------------------------

    def sends(self, room: str, key: str, digest: str, now: float, *, by_backend: bool = False) -> None:
        """An event goes out, for the first time or again."""
        publication = self.publications.get(key)
        if publication is None:
            self._done["published"] += 1
            self.publications[key] = Publication(room, key, digest, now, by_backend=by_backend)
        else:
            publication.attempts += 1
            if publication.attempts == 2:
                self._done["retried"] += 1

    def acknowledged(self, key: str, epoch: str, offset: int) -> None:
        """It was answered ``ok``."""
        publication = self.publications[key]
        publication.answered = True
        publication.position = Position(epoch, offset)
        self._done["acknowledged"] += 1

    def accepted(self, key: str) -> None:
        """A backend's event is in the store; it must reach its room, in the order of the room's entries."""
        publication = self.publications[key]
        publication.accepted = True
        publication.answered = publication.position is not None
        self._done["handed_in"] += 1

    def refused(self, key: str, code: str) -> None:
        """It was answered with an error that is final."""
        publication = self.publications[key]
        publication.answered = True
        self._accuse(Verdict.REFUSED, f"{key} to {publication.room}: {code}")

    # -- sessions -------------------------------------------------------------------

    def follower(self, session: str, room: str) -> Follower:
        """The one of this session and room."""
        found = self.followers.get((session, room))
        if found is None:
            found = self.followers[session, room] = Follower(session, room)
        return found

    def joins(self, session: str, room: str) -> Position | None:
        """The session asks to come (back) into a room; what to say in ``since``."""
        follower = self.follower(session, room)
        follower.since = follower.position
        follower.live = False
        follower.recent.append(f"join since {_tell(follower.since)}")
        return follower.since

    def turned_away(self, session: str, room: str, code: str) -> None:
        """The join was answered with an error that is final."""
        self._accuse(Verdict.REFUSED, f"{session} may not join {room}: {code}")

    def joined(
        self, session: str, room: str, epoch: str, offset: int, *, recovered: bool, now: float
    ) -> None:
        """The join was answered ``ok``."""
        follower = self.follower(session, room)
        follower.live = True
        follower.recent.append(f"ok {epoch}:{offset} recovered {recovered}")
        since = follower.since
        if since is None:
            if recovered:
                self._accuse(Verdict.STALE, "recovered, where nothing was asked for", follower)
            follower.came_at = now
            follower.visits.append(Visit(epoch, offset, offset))
        elif recovered:
            if epoch != since.epoch or offset < since.offset:
                self._accuse(Verdict.STALE, f"recovered from {_tell(since)} at {epoch}:{offset}", follower)
                follower.visits.append(Visit(epoch, offset, offset))
        else:
            self._told(follower, since, Position(epoch, offset), now)

    def _told(self, follower: Follower, since: Position, here: Position, now: float) -> None:
        self._done["told"] += 1
        if not self._may_tell:
            self._accuse(Verdict.TOLD, f"{_tell(since)} is gone, says the store at {_tell(here)}", follower)
        if here.epoch == since.epoch and here.offset < since.offset:
            self._accuse(Verdict.STALE, f"{_tell(since)} went back to {_tell(here)} in one epoch", follower)
        if here.epoch != since.epoch and any(visit.epoch == here.epoch for visit in follower.visits):
            self._accuse(Verdict.STALE, f"back in {here.epoch}, which had ended", follower)
        follower.visits[-1].ended = now
        follower.visits.append(Visit(here.epoch, here.offset, here.offset))

    def event(self, session: str, room: str, offset: int | None, key: str, digest: str) -> None:
        """An event of ``room`` came, by its own word; ``digest`` of its data."""
        follower = self.follower(session, room)
        follower.recent.append(f"event {offset}")
        self._done["delivered"] += 1
        publication = self.publications.get(key) or self._former.get(key)
        if not follower.live:
            self._accuse(Verdict.FOREIGN, f"event {offset} of a room that it is not in", follower)
            return
        if publication is None:
            self._accuse(Verdict.FOREIGN, f"event {offset}: nobody published {key}", follower)
        elif publication.room != room:
            self._accuse(Verdict.FOREIGN, f"event {offset} was published to {publication.room}", follower)
        elif publication.digest != digest:
            self._accuse(Verdict.CONTENT, f"event {offset} is not what {key} was", follower)
        if offset is None:
            self._accuse(Verdict.STALE, "an event without an offset in a room with history", follower)
            return
        visit = follower.visits[-1]
        if publication is not None and publication.by_backend and publication.position is None:
            publication.position = Position(visit.epoch, offset)
            publication.answered = publication.accepted
        self._lies(follower, key, visit.epoch, offset)
        if offset == visit.reached + 1:
            visit.reached = offset
        elif offset == visit.reached:
            self._accuse(Verdict.DUPLICATE, f"event {offset} came twice", follower)
        elif offset < visit.reached:
            self._accuse(Verdict.REORDER, f"event {offset} came after {visit.reached}", follower)
        else:
            self._skipped(follower, offset)
            visit.reached = offset

    def _skipped(self, follower: Follower, offset: int) -> None:
        reached = follower.visits[-1].reached
        self._accuse(Verdict.HOLE, f"{offset - reached - 1} missing between {reached} and {offset}", follower)

    def _lies(self, follower: Follower, key: str, epoch: str, offset: int) -> None:
        """Hold one place of one event against all the others."""
        there = self._places.setdefault((follower.room, epoch, offset), key)
        if there != key:
            self._accuse(Verdict.TWICE, f"{key} at {epoch}:{offset}, where {there} is", follower)
        found = self._found.setdefault(key, {}).setdefault(epoch, offset)
        if found != offset:
            self._accuse(Verdict.TWICE, f"{key} at {epoch}:{offset}, and at {found}", follower)

    def whisper(self, session: str, line: str, number: int) -> None:
        """An ephemeral event came: the ``number``-th of a publisher's connection."""
        self._done["whispered"] += 1
        last = self._lines.setdefault(session, {})
        before = last.get(line, 0)
        if number <= before:
            verdict = Verdict.DUPLICATE if number == before else Verdict.REORDER
            self._accuse(verdict, f"{session}: ephemeral event {number} of {line} after {before}")
        last[line] = number

    def claims(self, session: str, room: str, epoch: str, offset: int) -> None:
        """``position``: the session has everything up to there; nothing is hidden, so it must be so."""
        follower = self.follower(session, room)
        follower.recent.append(f"position {epoch}:{offset}")
        here = follower.position
        if here is None or here.epoch != epoch:
            self._accuse(Verdict.STALE, f"position {epoch}:{offset} while at {_tell(here)}", follower)
        elif offset > here.offset:
            self._skipped(follower, offset + 1)
            follower.visits[-1].reached = offset

    def lost(self, session: str, room: str, epoch: str, offset: int, reason: str) -> None:
        """Live delivery broke off; the session must join again."""
        follower = self.follower(session, room)
        follower.recent.append(f"lost {reason} {epoch}:{offset}")
        follower.live = False
        self._done["interrupted"] += 1
        here = follower.position
        if here is None or here.epoch != epoch:
            self._accuse(Verdict.STALE, f"lost after {epoch}:{offset} while at {_tell(here)}", follower)
        elif offset > here.offset:
            self._skipped(follower, offset + 1)
            follower.visits[-1].reached = offset

    def closed(self, session: str, code: int, *, at_home: bool = True) -> None:
        """The session's socket ended, which the session had not asked for.

        ``at_home``: it had been given everything it asked for. Who comes while a
        store is away may be sent off again; who is there may not.
        """
        self._done["closed"] += at_home
        if at_home and not self._may_close:
            self._accuse(Verdict.CLOSED, f"{session}: {code}")
        self.left(session)

    def left(self, session: str) -> None:
        """The session has no connection now, so nothing may come."""
        self._lines.pop(session, None)
        for (name, _), follower in self.followers.items():
            if name == session:
                follower.live = False

    def miscounted(self, room: str, node: str, said: int, really: int) -> None:
        """A node counts ``said`` members in a room where there are ``really``."""
        self._accuse(Verdict.PRESENCE, f"{node} counts {said} in {room}, where {really} are")

    def failed(self, words: str) -> None:
        """What breaks things or mends them could not do so."""
        self._accuse(Verdict.UNFINISHED, words)

    def oldest_acknowledged(self, room: str) -> int | None:
        """The lowest offset at which something was acknowledged in this round."""
        offsets = [one.position.offset for one in self._acknowledged_in(room) if one.position is not None]
        return min(offsets, default=None)

    def kept(self, room: str, keys: dict[int, str]) -> None:
        """What the store has in the room, by offset, from :meth:`oldest_acknowledged` on."""
        for publication in self._acknowledged_in(room):
            position = publication.position
            if position is not None and keys.get(position.offset) != publication.key:
                self._accuse(
                    Verdict.GONE, f"{publication.key} was acknowledged at {_tell(position)} of {room}"
                )

    def _acknowledged_in(self, room: str) -> list[Publication]:
        return [one for one in self.publications.values() if one.room == room and one.position is not None]

    # -- verdict --------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        """Publications that nobody has answered yet, and backends' that nobody has seen."""
        return sum(not self._finished(publication) for publication in self.publications.values())

    def _finished(self, publication: Publication) -> bool:
        """A store that may lose what it has may also lose what backends handed in."""
        return publication.answered or (self._may_tell and publication.accepted)

    @property
    def acknowledgements(self) -> int:
        """Publications answered ``ok`` in this round."""
        return self._done["acknowledged"]

    def behind(self, tops: dict[str, Position]) -> list[Follower]:
        """Followers that are not at the top of their room, or not in it."""
        return [
            follower
            for follower in self.followers.values()
            if not follower.live or follower.position != tops.get(follower.room, follower.position)
        ]

    def balance(self, *, tops: dict[str, Position] | None = None) -> Balance:
        """Judge the round. Everything must be at rest, and every session at the top of each room."""
        for publication in self.publications.values():
            if not self._finished(publication):
                self._accuse(Verdict.UNFINISHED, f"{publication.key} to {publication.room} has no answer")
        for follower in self.behind(tops or {}):
            top = (tops or {}).get(follower.room)
            self._accuse(Verdict.UNFINISHED, f"at {_tell(follower.position)}, top {_tell(top)}", follower)
        by_room: dict[str, list[Follower]] = {}
        for follower in self.followers.values():
            by_room.setdefault(follower.room, []).append(follower)
        for publication in self.publications.values():
            if publication.position is not None:
                self._judge(publication, publication.position, by_room.get(publication.room, []))
        self._judge_order()
        return Balance(
            **{name: self._done[name] for name in _COUNTED},
            violations={verdict.value: count for verdict, count in sorted(self._counts.items())},
            evidence=tuple(f"{verdict}: {words}" for verdict, words in self._violations),
        )

    def _judge(self, publication: Publication, position: Position, followers: list[Follower]) -> None:
        """An acknowledged event: it lies where it was acknowledged, and everybody entitled knows."""
        key = publication.key
        there = self._places.get((publication.room, *position), key)
        if there != key:
            self._accuse(Verdict.TWICE, f"{key} is acknowledged at {_tell(position)}, where {there} is")
        found = self._found.get(key, {})
        if found.get(position.epoch, position.offset) != position.offset:
            self._accuse(Verdict.TWICE, f"{key} is acknowledged at {_tell(position)}, but lies at {found}")
        strange = found and position.epoch not in found
        if strange and (publication.attempts == 1 or not self._may_tell):
            self._accuse(Verdict.STALE, f"{key} is acknowledged at {_tell(position)}, but came in {found}")
        for follower in followers:
            if not follower.covers(publication):
                self._accuse(Verdict.HOLE, f"{key}, acknowledged at {_tell(position)}, never came", follower)

    def _judge_order(self) -> None:
        """What a backend handed in lies in its room in the order of its entries."""
        last: dict[tuple[str, str], int] = {}
        for publication in self.publications.values():
            if publication.by_backend and publication.position is not None:
                epoch, offset = publication.position
                before = last.get((publication.room, epoch), 0)
                if offset < before:
                    self._accuse(
                        Verdict.REORDER, f"{publication.key} lies at {offset}, an earlier one at {before}"
                    )
                last[publication.room, epoch] = offset


_COUNTED = (
    "published",
    "acknowledged",
    "retried",
    "handed_in",
    "delivered",
    "whispered",
    "told",
    "interrupted",
    "closed",
)


def _tell(position: Position | None) -> str:
    return "nowhere" if position is None else f"{position.epoch}:{position.offset}"
