"""Every shape that goes over the operators' port, typed: bodies, queries, answers.

Bodies and queries refuse unknown fields by name, because a misspelt option that
is silently ignored is worse than an error. Answers are open: fields may be
added. The OpenAPI document is made from these structures.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from broker.errors import CloseCode, ErrorCode
from broker.protocol.messages import Name, Room

MAX_PAGE = 1000
"""Rooms or sessions in one answer; together with their size this bounds it to some 100 KiB."""
MAX_BROADCAST = 1000
"""Rooms in one broadcast."""

Limit = Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE)]
Text = Annotated[str, msgspec.Meta(max_length=512)]


class Input(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what comes in."""


# -- queries ----------------------------------------------------------------------


class NoQuery(Input, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing can be asked for."""


class LocalQuery(Input, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whom to ask."""

    local: bool = False
    """Ask this node alone, and no other."""


class RoomsQuery(LocalQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which rooms to list."""

    limit: Limit = 100
    after: Text | None = None
    """``next`` of the page before."""
    prefix: Text = ""
    sort: Literal["name", "members"] = "name"


class SessionsQuery(LocalQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which sessions to list."""

    limit: Limit = 100
    after: Text | None = None
    """``next`` of the page before."""
    user: Text | None = None
    room: Text | None = None
    address: Text | None = None


# -- bodies -----------------------------------------------------------------------


class Publish(Input, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One event for one room."""

    room: Room
    event: Name
    data: Any
    key: Name | None = None
    """Idempotency: the same room and key within 5 minutes are stored once."""
    slot: Name | None = None
    tags: dict[str, Any] | None = None


class Broadcast(Input, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One event for many rooms."""

    rooms: Annotated[list[Room], msgspec.Meta(min_length=1, max_length=MAX_BROADCAST)]
    event: Name
    data: Any
    key: Name | None = None
    slot: Name | None = None
    tags: dict[str, Any] | None = None


class Disconnect(Input, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """End one session, or all of one user; exactly one of the two is given."""

    session: Text | None = None
    user: Text | None = None
    code: CloseCode = CloseCode.FORBIDDEN
    reason: Annotated[str, msgspec.Meta(max_length=123)] = "disconnected by an operator"
    """At most what a close frame holds (123 bytes)."""


# -- answers ----------------------------------------------------------------------


class NodeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A node that was asked; ``error`` says why it did not answer."""

    node: str
    error: str | None = None


class Health(msgspec.Struct, frozen=True):
    """It is well."""

    status: Literal["ok"] = "ok"


class PositionInfo(msgspec.Struct, frozen=True):
    """A place in a room's stream."""

    epoch: str
    offset: int


class RoomSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the list of rooms."""

    room: str
    members: int
    position: PositionInfo | None
    """``None`` in an ephemeral room."""
    slots: int
    pending: int
    """Events that wait for the fan-out."""


class RoomPage(msgspec.Struct, frozen=True, kw_only=True):
    """Rooms of all nodes."""

    rooms: list[RoomSummary]
    total: int
    """Rooms alive, whatever the query; one counts once for each node that has it."""
    next: str | None
    """``after`` of the next page; ``None`` on the last."""
    nodes: list[NodeAnswer]
    """Who was asked, this node first."""
    partial: bool
    """Whether some of them did not answer, so that there may be more than this."""


class MemberInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A session in a room."""

    node: str
    user: str | None
    session: str
    info: Any
    state: dict[str, Any] | None
    joined_at: float
    seen: int
    status: str
    """``catching_up``, ``live``, ``suspended`` or ``lost``."""


class SeenInfo(msgspec.Struct, frozen=True):
    """Up to where somebody, who may have left, has acknowledged a room."""

    who: str
    offset: int
    ts: float


class RoomDetail(RoomSummary, frozen=True, kw_only=True):
    """One room."""

    alive: bool
    """Whether a node holds it open; if not, only the stored part is told."""
    options: dict[str, Any]
    users: int
    """Different users among the members; it may lag behind ``members`` for a moment."""
    listed: list[MemberInfo]
    """At most 500 members."""
    watchers: int
    seen: list[SeenInfo]
    """At most 500, those who acknowledged last first."""
    seen_total: int
    nodes: list[NodeAnswer]
    """Who was asked, this node first."""
    partial: bool
    """Whether some of them did not answer, so that there may be more than this."""


class SessionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A session."""

    node: str
    session: str
    user: str | None
    info: Any
    address: str
    connected_at: float
    expires: float | None
    codec: str
    rooms: list[str]
    outbox_bytes: int
    inbox: int
    calls: int
    frames_handled: int
    ending: int | None
    """Close code, once it is to end."""


class SessionPage(msgspec.Struct, frozen=True, kw_only=True):
    """Sessions of all nodes, oldest first."""

    sessions: list[SessionInfo]
    total: int
    """Sessions, whatever the query."""
    next: str | None
    nodes: list[NodeAnswer]
    """Who was asked, this node first."""
    partial: bool
    """Whether some of them did not answer, so that there may be more than this."""


class Membership(msgspec.Struct, frozen=True, kw_only=True):
    """A room as one session has it."""

    room: str
    status: str
    joined_at: float
    seen: int
    position: PositionInfo | None
    """Up to where it was sent the room's events; ``None`` in an ephemeral room."""
    filtered: bool
    watches_presence: bool


class SessionDetail(SessionInfo, frozen=True, kw_only=True):
    """One session with its rooms."""

    memberships: list[Membership]


class UserDetail(msgspec.Struct, frozen=True, kw_only=True):
    """One user."""

    user: str
    sessions: list[SessionInfo]
    """At most 500, oldest first."""
    session_count: int
    room: str
    position: PositionInfo | None
    nodes: list[NodeAnswer]
    """Who was asked, this node first."""
    partial: bool
    """Whether some of them did not answer, so that there may be more than this."""


class Placed(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where an event was stored; empty for an ephemeral room."""

    epoch: str | None = None
    offset: int | None = None


class RoomResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of a broadcast in one room: ``epoch`` and ``offset`` where it was stored, or an error."""

    room: str
    ok: bool
    epoch: str | None = None
    offset: int | None = None
    code: ErrorCode | None = None
    message: str | None = None


class BroadcastResult(msgspec.Struct, frozen=True, kw_only=True):
    """Results in the order of the rooms that were given."""

    results: list[RoomResult]
    published: int
    failed: int


class Disconnected(msgspec.Struct, frozen=True, kw_only=True):
    """How many sessions were told to end."""

    disconnected: int
    nodes: list[NodeAnswer]
    """Who was asked, this node first."""
    partial: bool
    """Whether some of them did not answer, so that there may be more than this."""
