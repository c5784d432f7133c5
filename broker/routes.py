"""Routing rules: which events are copied into which other rooms. Checked and compiled once; no IO.

A rule is a ``[[routes]]`` table of the configuration (``docs/event-bus.md``).
:func:`mistakes` is for whoever checks the settings, :func:`compile_rule` for
:mod:`broker.router`, which applies the rules. What a copy reaches is not routed
again, and a rule whose copies could come from its own rooms is refused, so
there is no way to build a circle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Final

import msgspec

from broker.auth.permissions import ALL, USER_PREFIX, Patterns, compile_patterns, is_server_room, valid_room
from broker.config import Route
from broker.errors import BrokerError
from broker.protocol.filters import Filter, compile_filter

MAX_EVENT: Final = 128
"""Characters of an event's name, as in ``publish``."""

_FIELD = re.compile(r"\{([^{}]*)\}")
_FIELDS: Final = "{room}, {id}, {event}, {user} and {data.KEY}"
_PLAIN: Final = frozenset({"room", "id", "event", "user"})

Data = Mapping[str, msgspec.Raw]
"""An event's ``data``, if it is an object: its members, each still JSON."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a template may say of an event. ``data`` is only filled in for rules that look at it."""

    room: str
    event: str
    user: str | None
    data: Data


@dataclass(frozen=True, slots=True)
class Field:
    """A place in a template, such as ``{data.owner.id}``: ``name`` and the ``path`` below it."""

    name: str
    path: tuple[str, ...] = ()

    def values(self, facts: Facts) -> list[str]:
        """What is filled in; several for a list, none where there is nothing to fill in."""
        match self.name:
            case "room":
                return [facts.room]
            case "event":
                return [facts.event]
            case "user":
                return [facts.user] if facts.user is not None else []
            case "id":
                _, _, identifier = facts.room.partition(":")
                return [identifier] if identifier else []
            case _:
                found = _look_up(facts.data, self.path)
                return (
                    [text for one in found for text in _scalar(one)]
                    if isinstance(found, list)
                    else (_scalar(found))
                )


def _look_up(data: Data, path: tuple[str, ...]) -> Any:
    raw = data.get(path[0])
    found = msgspec.json.decode(raw) if raw is not None else None
    for key in path[1:]:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _scalar(value: object) -> list[str]:
    """Strings and whole numbers name things; nothing else does."""
    if isinstance(value, str):
        return [value] if value else []
    return [str(value)] if isinstance(value, int) and not isinstance(value, bool) else []


@dataclass(frozen=True, slots=True)
class Target:
    """A room, or a template of rooms, as literal texts and fields."""

    text: str
    pieces: tuple[str | Field, ...]

    @property
    def needs_data(self) -> bool:
        """Whether an event's data must be read to fill it in."""
        return any(isinstance(piece, Field) and piece.path for piece in self.pieces)

    def rooms(self, facts: Facts) -> Iterator[str]:
        """Every way to fill it in; none if something is missing. The names are not checked."""
        values = [[piece] if isinstance(piece, str) else piece.values(facts) for piece in self.pieces]
        return map("".join, product(*values))

    def may_reach(self, room: str) -> bool:
        """Whether ``room`` is a room's name, and no server's room unless the template says so itself."""
        if not valid_room(room):
            return False
        return not is_server_room(room) or self.text == ALL or self.text.startswith(USER_PREFIX)


@dataclass(frozen=True, slots=True)
class Rule:
    """One ``[[routes]]`` table, compiled. ``number`` is its place, from 0."""

    number: int
    rooms: Patterns
    names: frozenset[str]
    beginnings: tuple[str, ...]
    filter: Filter | None
    targets: tuple[Target, ...]
    rename: str | None
    keep: tuple[str, ...] | None
    needs_data: bool

    def wants(self, name: str) -> bool:
        """Whether events of this name are copied."""
        if not self.names and not self.beginnings:
            return True
        return name in self.names or name.startswith(self.beginnings)


# -- from the settings ------------------------------------------------------------


class BadRoute(ValueError):  # noqa: N818 - says what it is about
    """A mistake in a rule: ``at`` is the place below its table, such as ``.to[1]``."""

    def __init__(self, at: str, problem: str, mend: str) -> None:
        super().__init__(f"{at}: {problem}; {mend}")
        self.at = at
        self.problem = problem
        self.mend = mend


def compile_rule(route: Route, number: int) -> Rule:
    """Compile one rule. Raises :class:`BadRoute` with the first thing that is wrong with it."""
    names, beginnings = _names(route)
    targets = tuple(_target(route, index) for index in range(len(route.to)))
    _reaches_somewhere(route)
    return Rule(
        number=number,
        rooms=_rooms(route),
        names=names,
        beginnings=beginnings,
        filter=_filter(route),
        targets=targets,
        rename=route.rename,
        keep=route.data,
        needs_data=route.data is not None or any(target.needs_data for target in targets),
    )


def mistakes(route: Route) -> Iterator[BadRoute]:
    """Everything that is wrong with a rule, at most one mistake for each part of it."""
    parts: list[Callable[[Route], object]] = [_rooms, _names, _filter, _reaches_somewhere]
    parts += [partial(_target, index=index) for index in range(len(route.to))]
    for check in parts:
        try:
            check(route)
        except BadRoute as mistake:
            yield mistake


def _rooms(route: Route) -> Patterns:
    if not route.source:
        raise BadRoute(".from", "names no room", 'write a pattern, such as "deal:*"')
    try:
        return compile_patterns(route.source)
    except ValueError as error:
        raise BadRoute(".from", str(error), 'write rooms or patterns, such as "deal:*"') from None


def _names(route: Route) -> tuple[frozenset[str], tuple[str, ...]]:
    exact: set[str] = set()
    beginnings: list[str] = []
    for index, name in enumerate(route.event):
        if len(name) > MAX_EVENT:
            raise BadRoute(f".event[{index}]", f"has {len(name)} characters", f"give 1 to {MAX_EVENT}")
        head, star, tail = name.partition("*")
        if tail:
            raise BadRoute(
                f".event[{index}]", "has a * that is not its end", 'write a name, or a beginning: "deal-*"'
            )
        if star:
            beginnings.append(head)
        else:
            exact.add(name)
    return frozenset(exact), tuple(beginnings)


def _filter(route: Route) -> Filter | None:
    try:
        return compile_filter(route.filter) if route.filter is not None else None
    except BrokerError as error:
        where, _, problem = error.message.partition(": ")
        # The path is built from operators and numbers, all known; what people wrote is not repeated.
        raise BadRoute(
            f".{where}", problem, 'write a filter as in a join: { eq = ["region", "EMEA"] }'
        ) from None


def _reaches_somewhere(route: Route) -> None:
    if not route.to:
        raise BadRoute(".to", "names no room", 'write a room or a template, such as "user:{data.owner}"')


def _target(route: Route, index: int) -> Target:
    text = route.to[index]
    at = f".to[{index}]"
    literals = _FIELD.split(text)[::2]
    pieces: list[str | Field] = []
    for number, name in enumerate(_FIELD.split(text)):
        if number % 2:
            pieces.append(_field(name, at))
        elif name:
            pieces.append(name)
    if any("{" in literal or "}" in literal for literal in literals):
        raise BadRoute(at, "has a brace without its other half", f"fill in {_FIELDS}")
    if not valid_room("0".join(literals)):
        raise BadRoute(at, "can be no room's name", "give 1 to 200 bytes without * and control characters")
    target = Target(text, tuple(pieces))
    meets = next((pattern for pattern in route.source if _may_come_back(pattern, text)), None)
    if meets is not None:
        raise BadRoute(
            at,
            "may reach a room that the rule copies from, so that events would come twice",
            "let the target begin with a namespace that `from` does not match, or name the rooms in `from`",
        )
    return target


def _field(name: str, at: str) -> Field:
    first, *path = name.split(".")
    if name in _PLAIN:
        return Field(name)
    if first == "data" and path and all(path):
        return Field(first, tuple(path))
    raise BadRoute(at, "has a field that no event has", f"fill in {_FIELDS}")


def _may_come_back(pattern: str, template: str) -> bool:
    """Whether some room fits both the pattern and the template, whatever is filled in."""
    wild = "*" in pattern
    if wild and (template == ALL or template.startswith(USER_PREFIX)):
        return False  # patterns never match a server's room
    return _meet(pattern, _FIELD.sub("*", template))


def _meet(one: str, other: str) -> bool:
    """Whether some text fits both, where ``*`` stands for any characters. Visits pairs of places once."""
    seen: set[tuple[int, int]] = set()
    ahead = [(0, 0)]
    while ahead:
        here = ahead.pop()
        if here in seen:
            continue
        seen.add(here)
        i, j = here
        if i == len(one) and j == len(other):
            return True
        a, b = one[i : i + 1], other[j : j + 1]
        if a == "*":
            ahead.append((i + 1, j))
            if b:
                ahead.append((i, j + 1))
        elif b == "*":
            ahead.append((i, j + 1))
            if a:
                ahead.append((i + 1, j))
        elif a and a == b:
            ahead.append((i + 1, j + 1))
    return False
