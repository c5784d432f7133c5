"""Who may do what in which room. Pure and synchronous; asked by the command table.

One gate per verb (:func:`may_join`, :func:`may_publish`,
:func:`may_see_presence`), each a ladder read from the top: the rooms that
belong to the server, then the namespace's options, then what the token names.
The first rung stands above everything an operator or a token can say, so that
neither ``--dev`` nor a generous ``*`` ever opens another user's room.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import msgspec

from broker.config import Access, RoomOptions
from broker.errors import BrokerError, ErrorCode
from broker.protocol.events import UserId

MAX_ROOM_BYTES: Final = 200
"""Length of a room name in UTF-8."""

MAX_PATTERNS: Final = 256
"""Patterns in one list of a token. A token is at most 8 KiB, so this only bounds the silly."""

ALL: Final = "all"
"""The room that reaches every session. The server joins it; nobody else does."""

USER_PREFIX: Final = "user:"
"""Rooms that reach every session of one user."""

_SHOWN_PATTERNS = 5
"""Patterns quoted in a refusal; enough to see the mistake, short enough to read."""

# ---------------------------------------------------------------- room names

# One pass tells the whole grammar but for the length in bytes, which differs
# from the length in characters only outside ASCII.
_ROOM = re.compile(r"[^\x00-\x1f\x7f-\x9f*\ud800-\udfff]{1,200}").fullmatch
_PATTERN = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,200}").fullmatch
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]").search
_SURROGATE = re.compile(r"[\ud800-\udfff]").search


def valid_room(name: str) -> bool:
    """Whether ``name`` fits the grammar: 1 to 200 bytes of UTF-8, no control characters, no ``*``."""
    if _ROOM(name) is None:
        return False
    return name.isascii() or len(name.encode()) <= MAX_ROOM_BYTES


def check_room(name: str) -> None:
    """Raise ``bad_room`` with the reason, unless ``name`` is a room's name.

    The name itself is not repeated: it may hold what must not reach a log or
    another client's parser.
    """
    if not valid_room(name):
        raise BrokerError(ErrorCode.BAD_ROOM, f"not a room name: {_what_is_wrong(name)}")


def _what_is_wrong(name: str) -> str:
    if not name:
        return "it is empty"
    if _SURROGATE(name):
        return "it holds half of a surrogate pair, which is not UTF-8"
    if _CONTROL(name):
        return "it holds a control character"
    size = len(name.encode())
    if size > MAX_ROOM_BYTES:
        return f"it is {size} bytes long, at most {MAX_ROOM_BYTES} are allowed"
    return "it holds '*', which only patterns may"


def user_room(user: UserId) -> str:
    """The room that reaches every session of ``user``."""
    return f"{USER_PREFIX}{user}"


def valid_user(user: str) -> bool:
    """Whether ``user`` can be a user id: not empty, and ``user:<id>`` is a room's name."""
    return bool(user) and valid_room(USER_PREFIX + user)


def is_server_room(room: str) -> bool:
    """Whether ``room`` belongs to the server (``all`` and every ``user:`` room)."""
    return room == ALL or room.startswith(USER_PREFIX)


# ------------------------------------------------------------------ patterns


@dataclass(frozen=True, slots=True)
class Patterns:
    """A token's list of rooms, compiled.

    A pattern is literal characters and ``*``, which stands for any run of
    characters, ``:`` included. Wildcards never match a server room; a literal
    name does. Matching is linear in the name for each pattern: a literal part
    is looked for once, from where the last one ended, and never again. Regular
    expressions would need atomic groups to promise that, and compiling one for
    four parts takes 22 µs, where all the rest of an HS256 token takes 32.
    """

    names: tuple[str, ...] = ()
    """The patterns as the token has them."""
    exact: frozenset[str] = frozenset()
    prefixes: tuple[str, ...] = ()
    globs: tuple[tuple[str, ...], ...] = ()
    """Everything else, as the literal parts around the stars."""

    def match(self, room: str) -> bool:
        """Whether any pattern matches ``room``, which must be a room's name."""
        if room in self.exact:
            return True
        if is_server_room(room):
            return False
        if room.startswith(self.prefixes):
            return True
        return any(_matches(parts, room) for parts in self.globs)

    def __str__(self) -> str:
        """What the list names, as the end of a sentence: ``names contact:* only``."""
        if not self.names:
            return "names no room"
        shown = ", ".join(self.names[:_SHOWN_PATTERNS])
        more = len(self.names) - _SHOWN_PATTERNS
        return f"names {shown} and {more} more" if more > 0 else f"names {shown} only"


def _matches(parts: tuple[str, ...], room: str) -> bool:
    """Whether the parts occur in ``room`` in order, the first at its start and the last at its end."""
    first, *middle, last = parts
    end = len(room) - len(last)
    at = len(first)
    if at > end or not room.startswith(first) or not room.endswith(last):
        return False
    for part in middle:
        # The leftmost place leaves the most room for what follows, so no other need be tried.
        at = room.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True


@lru_cache(maxsize=256)  # the tokens of one role share one list, and one compiled object
def compile_patterns(names: tuple[str, ...]) -> Patterns:
    """Compile a list of patterns. Raises :class:`ValueError` with a sentence if one is malformed."""
    if len(names) > MAX_PATTERNS:
        raise ValueError(f"{len(names)} patterns, at most {MAX_PATTERNS} are allowed")
    exact, prefixes, globs = [], [], []
    for number, name in enumerate(names):
        if _PATTERN(name) is None or len(name.encode()) > MAX_ROOM_BYTES:
            problem = _what_is_wrong(name)
            raise ValueError(f"pattern {number + 1} can match no room: {problem}")
        head, star, tail = name.partition("*")
        if not star:
            exact.append(name)
        elif not tail.strip("*"):
            prefixes.append(head)
        else:
            first, *middle, last = name.split("*")
            globs.append((first, *filter(None, middle), last))
    return Patterns(names, frozenset(exact), tuple(prefixes), tuple(globs))


class _RoomsClaim(msgspec.Struct, frozen=True):
    """The token claim ``rooms``. Unknown members are ignored, like all unknown fields."""

    join: tuple[str, ...] = ()
    publish: tuple[str, ...] = ()
    presence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Grants:
    """What a token allows beyond what its rooms' options allow everybody."""

    join: Patterns = field(default_factory=Patterns)
    publish: Patterns = field(default_factory=Patterns)
    presence: Patterns = field(default_factory=Patterns)

    @classmethod
    def from_claim(cls, claim: object) -> Grants:
        """Compile the claim ``rooms`` of a token.

        Raises :class:`ValueError` with a sentence that names the member and
        quotes nothing of it.
        """
        try:
            rooms = msgspec.convert(claim, _RoomsClaim)
        except msgspec.ValidationError as error:
            raise ValueError(f"claim rooms: {error}") from None
        compiled = []
        for member in ("join", "publish", "presence"):
            try:
                compiled.append(compile_patterns(getattr(rooms, member)))
            except ValueError as error:
                raise ValueError(f"claim rooms.{member}: {error}") from None
        return cls(*compiled)


NO_GRANTS: Final = Grants()


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a session is, as its token says.

    ``expires`` is the token's ``exp`` (Unix seconds, ``None`` while anonymous);
    the verifier tolerates ``auth.leeway`` past it. ``info`` is JSON shown in
    presence, to be treated as read-only: sessions of one token share it.
    """

    user: UserId | None
    expires: float | None = None
    info: Any | None = None
    grants: Grants = NO_GRANTS


ANONYMOUS: Final = Identity(None)

# --------------------------------------------------------------------- gates


def may_join(identity: Identity, room: str, options: RoomOptions) -> None:
    """Return if ``identity`` may join and read ``room``; the gate of live events, history and recovery.

    Raises ``forbidden``, or ``unauthenticated`` where a token could help.
    """
    if is_server_room(room):
        _own_room(identity, room)
    else:
        _gate(identity, room, options.join, identity.grants.join, "rooms.join")


def may_publish(identity: Identity, room: str, options: RoomOptions) -> None:
    """Return if ``identity`` may publish to ``room``.

    To a server room only a token that names it literally may.
    Raises ``forbidden``, or ``unauthenticated`` where a token could help.
    """
    access: Access = "token" if is_server_room(room) else options.publish
    _gate(identity, room, access, identity.grants.publish, "rooms.publish")


def may_see_presence(identity: Identity, room: str, options: RoomOptions) -> None:
    """Return if ``identity`` may see who is in ``room``.

    Where the namespace lets everybody (or every user) join, they may look as
    well; elsewhere the token must name the room under ``presence``. Nobody sees
    into another's ``user:`` room, which would tell when they are online.
    Raises ``forbidden``, or ``unauthenticated`` where a token could help.
    """
    if not options.presence:
        raise BrokerError(ErrorCode.FORBIDDEN, f"room {room}: presence is off for its namespace", room=room)
    if room.startswith(USER_PREFIX):
        _own_room(identity, room)
        return
    access: Access = "token" if room == ALL else options.join
    _gate(identity, room, access, identity.grants.presence, "rooms.presence")


def _gate(identity: Identity, room: str, access: Access, named: Patterns, claim: str) -> None:
    if access == "anyone" or (access == "user" and identity.user is not None) or named.match(room):
        return
    if identity.user is None and not is_server_room(room):
        needed = "a token" if access == "user" else f"a token whose {claim} names it"
        raise BrokerError(
            ErrorCode.UNAUTHENTICATED, f"room {room}: this session is anonymous; it takes {needed}", room=room
        )
    if identity.user is None:
        raise BrokerError(
            ErrorCode.FORBIDDEN, f"room {room} belongs to the server; a token must name it", room=room
        )
    rule = " (a pattern never matches a server's room)" if is_server_room(room) else ""
    raise BrokerError(ErrorCode.FORBIDDEN, f"room {room}: your token's {claim} {named}{rule}", room=room)


def _own_room(identity: Identity, room: str) -> None:
    """The rule of server rooms, whatever options, tokens and dev mode say."""
    if room == ALL:
        raise BrokerError(
            ErrorCode.FORBIDDEN, "room all: it reaches every session by itself and is never joined", room=room
        )
    if identity.user is None:
        raise BrokerError(
            ErrorCode.FORBIDDEN, f"room {room}: only that user may; this session is anonymous", room=room
        )
    if room != user_room(identity.user):
        raise BrokerError(
            ErrorCode.FORBIDDEN, f"room {room}: only that user may, and you are {identity.user}", room=room
        )
