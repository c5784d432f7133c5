"""An event of a backend as a Redis command, checked where it is said. No IO; used by :mod:`broker.publisher`.

Nodes check the same again, for anybody may write to Redis; here a mistake
becomes a :class:`ValueError` in the line that made it. The rules are written
down a second time rather than imported, so that a Django process loads nothing
of the broker; ``tests/test_publisher.py`` holds both against each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final, Generic, NamedTuple, TypedDict, TypeVar, Unpack, cast

import orjson

Tags = Mapping[str, str | int | float]

ROOM_BYTES: Final = 200
NAME_LENGTH: Final = 128
"""Characters of an event's name, a key, a slot."""
DEPTH: Final = 63
"""Arrays and objects within one another in ``data``; the message around it is one level more."""
TAGS: Final = 32
TAG_NAME: Final = 64
TAG_STRING: Final = 256

_TAG_TYPES: Final = (str, int, float)
_ROOM = re.compile(r"[^\x00-\x1f\x7f-\x9f*\ud800-\udfff]{1,200}").fullmatch
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


class Options(TypedDict, total=False):
    """What may be said besides room, event and data."""

    durable: bool
    """Stored once, with an offset, also while no node runs; else heard by who is there now."""
    key: str | None
    """The same event said twice is stored once. Durable events only."""
    slot: str | None
    """The thing this is the newest value of: a card of a dashboard."""
    tags: Tags | None
    """What clients may filter by."""
    user: str | None
    """Who did it, for clients to show. Durable events only."""


class Command(NamedTuple):
    """One event as a Redis command."""

    arguments: tuple[str | bytes, ...]
    repeatable: bool
    """Sending it twice stores it once."""


def compose(prefix: str, room: str, event: str, data: Any, options: Options) -> Command:
    """The command that publishes an event. Raises :class:`ValueError` for what is none."""
    key, slot, tags, user = options.get("key"), options.get("slot"), options.get("tags"), options.get("user")
    _check_room("room", room)
    _check_name("event", event)
    payload = _encode("data", data)
    encoded_tags = _encode_tags(cast("Mapping[object, object]", tags)) if tags is not None else None
    for what, name in (("key", key), ("slot", slot)):
        if name is not None:
            _check_name(what, name)
    if user is not None:
        _check_room("user", f"user:{user}" if user else "")
    if options.get("durable"):
        fields: list[Any] = ["room", room, "event", event, "data", payload]
        optional = {"key": key, "slot": slot, "tags": encoded_tags, "user": user}
        for what, value in optional.items():
            if value is not None:
                fields += [what, value]
        return Command(("XADD", f"{prefix}publish", "*", *fields), repeatable=key is not None)
    if key is not None or user is not None:
        raise ValueError("key and user belong to durable events: give durable=True")
    message: dict[str, Any] = {"event": event, "data": orjson.Fragment(payload)}
    if slot is not None:
        message["slot"] = slot
    if encoded_tags is not None:
        message["tags"] = orjson.Fragment(encoded_tags)
    return Command(("PUBLISH", f"{prefix}room:{room}", orjson.dumps(message)), repeatable=False)


Outcome_co = TypeVar("Outcome_co", covariant=True)


class Ways(Generic[Outcome_co]):
    """To whom an event may go; what becomes of it is the business of who inherits."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def to_room(self, room: str, event: str, data: Any, **options: Unpack[Options]) -> Outcome_co:
        """Say ``event`` with ``data`` (anything that JSON can say) in ``room``.

        Options: ``durable``, ``key``, ``slot``, ``tags``, ``user`` (see
        :class:`Options`). Raises :class:`ValueError`.
        """
        return self._say(compose(self._prefix, room, event, data, options))

    def to_user(self, recipient: str, event: str, data: Any, **options: Unpack[Options]) -> Outcome_co:
        """The same to all sessions of one user; if durable, also to those that come later."""
        _check_room("recipient", recipient)
        return self.to_room(f"user:{recipient}", event, data, **options)

    def broadcast(self, event: str, data: Any, **options: Unpack[Options]) -> Outcome_co:
        """The same to every session there is now."""
        return self.to_room("all", event, data, **options)

    def _say(self, command: Command) -> Outcome_co:
        raise NotImplementedError


def _check_room(what: str, room: object) -> None:
    if not isinstance(room, str) or _ROOM(room) is None or len(room.encode()) > ROOM_BYTES:
        raise ValueError(
            f"{what}: {_shown(room)} is not a name: 1 to {ROOM_BYTES} bytes, no control characters, no '*'"
        )


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not 1 <= len(name) <= NAME_LENGTH:
        raise ValueError(f"{what}: must be a string of 1 to {NAME_LENGTH} characters, not {_shown(name)}")
    _encode(what, name)  # finds half a surrogate pair


def _encode_tags(tags: Mapping[object, object]) -> bytes:
    if len(tags) > TAGS:
        raise ValueError(f"tags: at most {TAGS}, not {len(tags)}")
    for name, value in tags.items():
        if not isinstance(name, str) or not 1 <= len(name) <= TAG_NAME:
            raise ValueError(f"tags: a name has 1 to {TAG_NAME} characters, not {_shown(name)}")
        if type(value) not in _TAG_TYPES:  # by exact type: a bool is an int to isinstance
            raise ValueError(f"tags: {name}: must be a string or a number, not {_shown(value)}")
        if isinstance(value, str) and len(value) > TAG_STRING:
            raise ValueError(f"tags: {name}: a string has at most {TAG_STRING} characters")
    return _encode("tags", dict(tags))


def _encode(what: str, value: Any) -> bytes:
    try:
        encoded = orjson.dumps(value)
    except TypeError as error:
        raise ValueError(f"{what}: JSON cannot say it: {error}") from None
    if b"null" in encoded and _not_finite(value):
        raise ValueError(f"{what}: a number must be finite")  # orjson writes null
    if encoded.count(b"[") + encoded.count(b"{") > DEPTH and _depth(encoded) > DEPTH:
        raise ValueError(f"{what}: nested deeper than {DEPTH}")
    return encoded


def _not_finite(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, dict):
        return any(map(_not_finite, value.values()))
    return isinstance(value, list | tuple) and any(map(_not_finite, value))


def _depth(encoded: bytes) -> int:
    depth = deepest = 0
    for byte in _STRING.sub(b"", encoded):
        depth += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, depth)
    return deepest


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
