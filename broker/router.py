"""The router: applies routing rules to what is published, before the hub takes it. No IO.

One per node, made by the application where there are rules, asked by
:class:`~broker.hub.hub.Hub` for each event that is published here. Events that
other nodes published were routed there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
import orjson

from broker.config import RoomOptions, Route
from broker.errors import BrokerError, ErrorCode
from broker.logs import Throttle, get_logger
from broker.protocol.events import Event, make_event
from broker.routes import Data, Facts, Rule, Target, compile_rule

log = get_logger(__name__)

MAX_COPIES: Final = 100
"""Copies of one event. Each costs a publish, and who may name them in data decides how many there are."""

MAX_ROOMS: Final = 10_000
"""Rooms whose rules are remembered, at about 150 bytes each; then looking starts anew."""

_NO_DATA: Final[Data] = {}
_data = msgspec.json.Decoder(dict[str, msgspec.Raw])


class _Said(msgspec.Struct):
    """What an event's body says that rules look at; ``data`` stays JSON until one needs it."""

    event: str
    data: msgspec.Raw
    user: str | None = None


_said = msgspec.json.Decoder(_Said)


class Router:
    """The rules of a configuration, compiled. ``options`` are those of a room's namespace."""

    def __init__(self, routes: Sequence[Route], options: Callable[[str], RoomOptions]) -> None:
        self._rules = [compile_rule(route, number) for number, route in enumerate(routes)]
        self._options = options
        self._by_room: dict[str, tuple[Rule, ...]] = {}
        self._throttle = Throttle()
        self._copied = 0
        self._missing = 0
        self._misfits = 0
        self._refused = 0

    def may_store(self, room: str) -> bool:
        """Whether an event of ``room`` may be copied, and so be acknowledged later than elsewhere."""
        return bool(self._rules_of(room))

    def copies(self, event: Event) -> Sequence[Event]:
        """The copies to be published once ``event`` is, in the order of the rules; they are not routed again.

        A target that cannot be filled in, or that is no room's name then, or
        whose room takes no event as large, is left out, counted and logged.
        Raises ``limit_exceeded`` for an event that asks for more than
        :data:`MAX_COPIES`: nothing of it should be published.

        Measured with 200 B events: 0.1 µs where no rule is for the room, 0.5 µs where one is for
        events of another name, 3 µs for a copy, 4.5 µs for one with ``{data.…}`` and a projection.
        """
        rules = self._rules_of(event.room)
        if not rules:
            return ()
        made: list[Event] = []
        said: _Said | None = None
        data: Data | None = None
        for rule in rules:
            if rule.filter is not None and not rule.filter(event.tags):
                continue
            if said is None:
                said = _said.decode(event.body)
            if not rule.wants(said.event):
                continue
            if rule.needs_data and data is None:
                data = _members(said.data)
            facts = Facts(event.room, said.event, said.user, data if data is not None else _NO_DATA)
            for room in self._targets(rule, facts):
                copy = _copy(event, said, rule, facts, room)
                if len(copy.body) <= self._options(room).event_bytes:
                    made.append(copy)
                else:
                    self._leave_out(rule, room, "larger than the room takes")
            if len(made) > MAX_COPIES:
                raise self._too_many(event.room)
        self._copied += len(made)
        return made

    def _rules_of(self, room: str) -> tuple[Rule, ...]:
        rules = self._by_room.get(room)
        if rules is None:
            if len(self._by_room) >= MAX_ROOMS:
                self._by_room.clear()
            rules = self._by_room[room] = tuple(rule for rule in self._rules if rule.rooms.match(room))
        return rules

    def _targets(self, rule: Rule, facts: Facts) -> Iterable[str]:
        """Rooms that get a copy, each once."""
        found: dict[str, None] = {}
        tried = 0
        for target in rule.targets:
            before = tried
            for room in target.rooms(facts):
                tried += 1
                if tried > MAX_COPIES:  # also of those that are no rooms: lists in data may be long
                    raise self._too_many(facts.room)
                if target.may_reach(room):
                    found[room] = None
                else:
                    self._leave_out(rule, target.text, "no room that it may reach")
            if tried == before:
                self._miss(rule, target)
        return found

    def _too_many(self, room: str) -> BrokerError:
        self._refused += 1
        problem = f"rules would copy this event more than {MAX_COPIES} times"
        return BrokerError(ErrorCode.LIMIT_EXCEEDED, problem, room=room)

    def _miss(self, rule: Rule, target: Target) -> None:
        self._missing += 1
        self._tell(rule, target.text, "the event lacks what it is filled in with")

    def _leave_out(self, rule: Rule, target: str, reason: str) -> None:
        self._misfits += 1
        self._tell(rule, target, reason)

    def _tell(self, rule: Rule, target: str, reason: str) -> None:
        suppressed = self._throttle.admit((rule.number, reason))
        if suppressed is not None:
            log.warning("not copied", route=rule.number, target=target, reason=reason, suppressed=suppressed)

    def statistics(self) -> Mapping[str, int]:
        """Counters by name."""
        return {
            "routed": self._copied,
            "route_missing": self._missing,
            "route_misfits": self._misfits,
            "route_refused": self._refused,
        }


def _members(data: msgspec.Raw) -> Data:
    """The members of ``data``; none if it is no object."""
    try:
        return _data.decode(data)
    except msgspec.ValidationError:
        return _NO_DATA


COPY: Final = "*copy"
"""Sets the keys of copies apart from those of their publishers, which no name can do that holds no ``*``."""


def _copy(event: Event, said: _Said, rule: Rule, facts: Facts, room: str) -> Event:
    """The event as ``rule`` says it in ``room``.

    Its key names rule and room of origin, besides the publisher's own key: two rooms
    may use the same one, and their copies may meet in one room.
    """
    data: Any = orjson.Fragment(bytes(said.data))
    if rule.keep is not None:
        data = {key: orjson.Fragment(bytes(facts.data[key])) for key in rule.keep if key in facts.data}
    key = None
    if event.key is not None:
        key = f"route:{rule.number}:{len(event.room)}:{event.room}:{event.key}"
    return make_event(
        room,
        rule.rename or said.event,
        data,
        event.ts,
        user=said.user,
        publisher=event.publisher + COPY,
        key=key,
        slot=event.slot,
        tags=event.tags,
    )
