"""Members that cannot follow: what each policy does with them, and how they are told.

Owned by the hub. A member is *suspended* when something did not reach it: it
gets nothing more until its backlog is gone, then ``lost``, and then events again
where there is no history, or nothing until it joins again where there is. Policy
``latest`` holds the newest event of each slot instead. The reasons and what a
client does about them: ``docs/slow-consumers.md``.
"""

from __future__ import annotations

from typing import Any

from broker.errors import CloseCode
from broker.hub.fanout import FanOut
from broker.hub.rooms import Held, Member, MemberState, Passing, Room, Sink, Verdict
from broker.protocol.events import Event
from broker.protocol.messages import encode_op


class SlowMembers:
    """The policies. ``held_bytes`` bounds what is held for one member under policy ``latest``."""

    def __init__(self, fanout: FanOut, held_bytes: int) -> None:
        self._fanout = fanout
        self._held_bytes = held_bytes
        self.dropped = 0
        """Events that sessions missed and were told of by ``lost``."""
        self.superseded = 0
        """Events replaced by a newer one of their slot before they were sent (policy ``latest``)."""
        self.lost_told = 0

    def refused(self, member: Member, events: list[Event], verdict: int) -> None:
        """A send was not taken: the room's policy decides (``docs/slow-consumers.md``)."""
        if verdict == Verdict.CLOSED or member.status is not MemberState.LIVE:
            return
        policy = member.room.options.slow
        if verdict == Verdict.FULL and policy == "disconnect":
            member.sink.disconnect(CloseCode.SLOW_CONSUMER, f"too slow for room {member.room.name}")
        elif verdict == Verdict.FULL and policy == "latest":
            self._hold(member, events)
        else:
            if member.held is None:
                _mark_hole(member, events)
            self._suspend(member, "slow" if verdict == Verdict.FULL else "gap")

    def _suspend(self, member: Member, reason: str) -> None:
        """It gets nothing more until it is told that something is missing: not what is held, either."""
        member.held = None
        member.reason = reason
        member.room.set_apart(member, MemberState.SUSPENDED)
        member.sink.on_drained()

    def _hold(self, member: Member, events: list[Event]) -> None:
        held = member.held
        if held is None:
            held = member.held = Held()
            _mark_hole(member, events)
        for event in events:
            self.superseded += held.put(event)
        if held.size > self._held_bytes:
            self._suspend(member, "slow")  # too many slots: a slow session costs its outbox, and no more
        else:
            member.sink.on_drained()

    def resume(self, sink: Sink) -> None:
        """The backlog of ``sink`` is gone: tell it what it missed, and go on."""
        for member in list(sink.memberships.values()):
            if member.held is not None:
                self._release_held(member, member.held.events())
            if member.status is MemberState.SUSPENDED:
                self.tell_lost(member, member.reason)

    def _release_held(self, member: Member, events: list[Event]) -> None:
        member.held = None
        room = member.room
        frame = self._fanout.encode(member.sink.codec_for(room.name), events)
        if frame is None:
            self._suspend(member, "gap")
        elif member.sink.write(frame) == Verdict.FULL:
            self._hold(member, events)
        elif room.has_history:
            self._fanout.hid_members[member] = None

    def break_off(self, room: Room, reason: str) -> None:
        """The stream goes on elsewhere; who followed it must be told.

        Who catches up will notice, who is suspended will be told what it reached.
        """
        self._fanout.settle(room)
        for member in list(room.everybody()):
            if member.status is MemberState.LIVE:
                if member.held is None:
                    member.reached = room.position
                self._suspend(member, reason)
            elif room.ahead and member in room.ahead:
                self._suspend(member, reason)
        room.ahead = None

    def tell_lost(self, member: Member, reason: str) -> None:
        """Say that events are missing. With history nothing more comes until the next join."""
        room = member.room
        if member.sink.memberships.get(room.name) is not member:
            return
        fields: dict[str, Any] = {"room": room.name, "reason": reason}
        if room.position is not None:
            member.status = MemberState.LOST
            reached = member.reached or room.position
            fields |= reached._asdict()
            same = reached.epoch == room.position.epoch
            missed = max(room.position.offset - reached.offset, 0) if same else 0
        else:
            if member.sink.posts_wait:
                self._fanout.flush()  # else what comes next would overtake this
            self._fanout.settle(room)
            missed = room.sent - member.missed_from
            room.make_live(member)
        if missed and member.filter is None:
            fields["count"] = missed
        self.dropped += missed
        self.lost_told += 1
        member.sink.post(encode_op("lost", **fields))


def _mark_hole(member: Member, events: list[Event]) -> None:
    """``events`` do not reach the member; all before them did."""
    first = events[0]
    if isinstance(first, Passing):
        member.reached = first.after
    else:
        at = first.position
        member.reached = at._replace(offset=at.offset - 1) if at is not None else None
    member.missed_from = member.room.sent - len(events)
