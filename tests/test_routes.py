"""Routing rules: what is refused, what a template becomes, and that no rule feeds itself."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.auth.permissions import compile_patterns
from broker.config import Route
from broker.routes import BadRoute, Facts, Target, compile_rule, mistakes


def rule(to: str | tuple[str, ...] = "activity", source: str = "deal:*", **fields: Any) -> Route:
    targets = (to,) if isinstance(to, str) else to
    return Route(source=(source,), to=targets, **fields)


def facts(data: Any, *, room: str = "deal:7", event: str = "won", user: str | None = "ada") -> Facts:
    raw = msgspec.json.decode(orjson.dumps(data), type=dict[str, msgspec.Raw])
    return Facts(room, event, user, raw)


def rooms(template: str, found: Facts) -> list[str]:
    (target,) = compile_rule(rule(template), 0).targets
    return list(target.rooms(found))


# --- What is refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "at", "problem"),
    [
        (Route(source=(), to=("a",)), ".from", "names no room"),
        (Route(source=("a",), to=()), ".to", "names no room"),
        (rule(source="deal:\n*"), ".from", "pattern 1 can match no room: it holds a control character"),
        (rule(source="x" * 201), ".from", "pattern 1 can match no room: it is 201 bytes long"),
        (rule(event=("won", "d*l")), ".event[1]", "has a * that is not its end"),
        (rule(event=("x" * 129,)), ".event[0]", "has 129 characters"),
        (rule(filter={"like": ["a", 1]}), ".filter", "unknown operator"),
        (rule(filter={"and": [{"eq": ["a"]}]}), ".filter.and[0].eq", "must be a list of a tag and a value"),
        (rule(("b", "")), ".to[1]", "can be no room's name"),
        (rule("a*"), ".to[0]", "can be no room's name"),
        (rule("x" * 201), ".to[0]", "can be no room's name"),
        (rule("user:{data.owner"), ".to[0]", "has a brace without its other half"),
        (rule("user:data.owner}"), ".to[0]", "has a brace without its other half"),
        (rule("user:{owner}"), ".to[0]", "has a field that no event has"),
        (rule("user:{}"), ".to[0]", "has a field that no event has"),
        (rule("user:{data}"), ".to[0]", "has a field that no event has"),
        (rule("user:{data..x}"), ".to[0]", "has a field that no event has"),
        (rule("user:{room.x}"), ".to[0]", "has a field that no event has"),
    ],
)
def test_mistakes(route: Route, at: str, problem: str) -> None:
    found = [mistake for mistake in mistakes(route) if mistake.at == at]
    assert found
    assert found[0].problem.startswith(problem)
    assert found[0].mend
    with pytest.raises(BadRoute):
        compile_rule(route, 0)


@pytest.mark.parametrize(
    ("source", "to"),
    [
        ("deal:7", "deal:7"),
        ("deal:*", "deal:all"),
        ("deal:*", "{room}"),
        ("deal:*", "{room}:log"),
        ("deal:*", "{data.room}"),
        ("deal:*", "deal{data.rest}"),
        ("*", "activity"),
        ("*:log", "{room}:log"),
        ("user:7", "user:{data.owner}"),
        ("all", "all"),
    ],
)
def test_a_rule_that_may_feed_itself_is_refused(source: str, to: str) -> None:
    (mistake,) = mistakes(rule(to, source))
    assert mistake.at == ".to[0]"
    assert mistake.problem.startswith("may reach a room that the rule copies from")


@pytest.mark.parametrize(
    ("source", "to"),
    [
        ("deal:*", "activity"),
        ("deal:*", "log:{room}"),
        ("deal:*", "contact:{id}"),
        ("deal:7", "deal:8"),
        ("*", "user:{data.owner}"),
        ("*", "all"),
        ("user:7", "all"),
        ("*:log", "log:{id}:x"),
        ("deal:*", "a{event}-{user}-{data.a.b.c}"),
    ],
)
def test_sound_rules(source: str, to: str) -> None:
    assert not list(mistakes(rule(to, source)))


NAMES = st.text("ab:", min_size=1, max_size=4)
PATTERNS = st.text("ab:*", min_size=1, max_size=5)
TEMPLATES = st.lists(st.sampled_from(["a", "b", ":", "{id}", "{event}"]), min_size=1, max_size=4).map("".join)


@given(PATTERNS, TEMPLATES, st.lists(NAMES, min_size=4, max_size=4))
def test_what_a_sound_template_reaches_is_never_where_it_came_from(
    pattern: str, template: str, values: list[str]
) -> None:
    """Whatever is filled in."""
    if next(mistakes(rule(template, pattern)), None) is not None:
        return
    rest = iter(values)
    room = re.sub(r"\{\w+\}", lambda _: next(rest), template)
    assert not compile_patterns((pattern,)).match(room)


# --- What is filled in ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("activity", ["activity"]),
        ("log:{room}", ["log:deal:7"]),
        ("contact:{id}", ["contact:7"]),
        ("by:{user}:{event}", ["by:ada:won"]),
        ("user:{data.owner}", ["user:42"]),
        ("user:{data.number}", ["user:-3"]),
        ("user:{data.many}", ["user:1", "user:b"]),
        ("user:{data.deep.er}", ["user:x"]),
        ("t:{data.many}:{data.owner}", ["t:1:42", "t:b:42"]),
        ("t:{data.many}{data.many}", ["t:11", "t:1b", "t:b1", "t:bb"]),
        ("user:{data.none}", []),
        ("user:{data.null}", []),
        ("user:{data.yes}", []),
        ("user:{data.half}", []),
        ("user:{data.empty}", []),
        ("user:{data.nothing}", []),
        ("user:{data.deep}", []),
        ("user:{data.deep.none}", []),
        ("user:{data.owner.name}", []),
    ],
)
def test_templates(template: str, expected: list[str]) -> None:
    data = {
        "owner": "42", "number": -3, "many": [1, "b", None, True, {}], "deep": {"er": "x"}, "null": None,
        "yes": True, "half": 0.5, "empty": "", "nothing": [],
    }  # fmt: skip
    assert rooms(template, facts(data)) == expected


def test_what_an_event_does_not_have() -> None:
    assert rooms("by:{user}", facts({}, user=None)) == []
    assert rooms("contact:{id}", facts({}, room="deals")) == []
    assert rooms("contact:{id}", facts({}, room="deal:7:8")) == ["contact:7:8"]


@pytest.mark.parametrize(
    ("text", "room", "may"),
    [
        ("user:{data.owner}", "user:7", True),
        ("u{data.rest}", "user:7", False),
        ("u{data.rest}", "urgent", True),
        ("all", "all", True),
        ("a{data.rest}", "all", False),
        ("t:{data.x}", "t:a*", False),
        ("t:{data.x}", "t:a\x00", False),
        ("t:{data.x}", "t:" + "x" * 200, False),
    ],
)
def test_only_a_template_that_says_so_reaches_a_servers_room(text: str, room: str, may: bool) -> None:
    assert Target(text, (text,)).may_reach(room) is may


def test_names_of_events() -> None:
    some = compile_rule(rule(event=("won", "deal-*")), 0)
    assert [some.wants(name) for name in ("won", "won2", "deal-", "deal-x", "deal")] == [
        True, False, True, True, False,
    ]  # fmt: skip
    every = compile_rule(rule(), 0)
    assert every.wants("anything")
    assert compile_rule(rule(event=("*",)), 0).wants("anything")
