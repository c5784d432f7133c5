"""Events that operators and backends publish over HTTP, through the same gate as clients' own."""

from __future__ import annotations

from typing import Any, Final

import trio

from broker.admin.models import RoomResult
from broker.admin.node import Node
from broker.auth.permissions import check_room
from broker.errors import BrokerError, ErrorCode
from broker.protocol.events import Event, Position, Tags, make_event
from broker.protocol.filters import check_tags
from broker.protocol.messages import MAX_DEPTH

WAVE: Final = 64
"""Rooms of a broadcast on their way to the store at once: one group commit, and bounded memory."""


class Content:
    """What is to be said, whatever the room. Raises ``bad_message`` for what clients could not read."""

    def __init__(
        self, event: str, data: Any, key: str | None, slot: str | None, tags: dict[str, Any] | None
    ) -> None:
        if _deeper_than(data, MAX_DEPTH - 1):  # the body around it is one level, as in a client's message
            raise BrokerError(ErrorCode.BAD_MESSAGE, f"JSON nested deeper than {MAX_DEPTH}")
        self._event = event
        self._data = data
        self._key = key
        self._slot = slot
        self._tags: Tags | None = check_tags(tags) if tags is not None else None

    def for_room(self, node: Node, room: str) -> Event:
        """The event in ``room``. Raises ``bad_room``, ``bad_message``, ``too_large``."""
        check_room(room)
        event = make_event(
            room,
            self._event,
            self._data,
            node.context.wall(),
            key=self._key,
            slot=self._slot,
            tags=self._tags,
        )
        limit = node.context.config.options(room).event_bytes
        if len(event.body) > limit:
            raise BrokerError(
                ErrorCode.TOO_LARGE, f"{len(event.body)} bytes; the room takes {limit}", room=room
            )
        return event


class Outcome:
    """What becomes of one event: told once it and its copies are stored, as far as they will be."""

    def __init__(self, node: Node, event: Event) -> None:
        self._event = trio.Event()
        self._result: Position | BrokerError | None = None
        self._context = node.context
        self._started = node.context.monotonic()
        options = node.context.config.options(event.room)
        copying = node.context.hub.publish(event, options, self._stored)
        if copying is not None:
            copying.then(self._copied)
        elif not options.history:
            self._event.set()

    def _stored(self, result: Position | BrokerError) -> None:
        self._context.stages.commit.observe(self._context.monotonic() - self._started)
        self._result = result
        self._event.set()

    def _copied(self, error: BrokerError | None) -> None:
        self._result = error
        self._event.set()

    async def wait(self) -> Position | None:
        """The position, ``None`` in an ephemeral room. Raises ``unavailable``."""
        await self._event.wait()
        if isinstance(self._result, BrokerError):
            raise self._result
        return self._result


async def publish(node: Node, room: str, content: Content) -> Position | None:
    """Publish in one room and wait until it is stored. Giving up the wait does not take it back."""
    return await Outcome(node, content.for_room(node, room)).wait()


async def broadcast(node: Node, rooms: list[str], content: Content) -> list[RoomResult]:
    """Publish in each room; a room that refuses does not keep the others from it."""
    results: list[RoomResult] = []
    for start in range(0, len(rooms), WAVE):
        wave = [(room, _attempt(node, room, content)) for room in rooms[start : start + WAVE]]
        for room, outcome in wave:
            results.append(await _result(room, outcome))
        await trio.lowlevel.checkpoint()
    return results


def _attempt(node: Node, room: str, content: Content) -> Outcome | BrokerError:
    try:
        return Outcome(node, content.for_room(node, room))
    except BrokerError as error:
        return error


async def _result(room: str, outcome: Outcome | BrokerError) -> RoomResult:
    try:
        if isinstance(outcome, BrokerError):
            raise outcome
        position = await outcome.wait()
    except BrokerError as error:
        return RoomResult(room=room, ok=False, code=error.code, message=error.message)
    if position is None:
        return RoomResult(room=room, ok=True)
    return RoomResult(room=room, ok=True, epoch=position.epoch, offset=position.offset)


def _deeper_than(value: Any, depth: int) -> bool:
    """Whether arrays and objects are nested more than ``depth`` deep."""
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return any(isinstance(inner, (dict, list)) for inner in level)
