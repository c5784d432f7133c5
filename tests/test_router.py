"""The router: what is copied where and how, what is left out, and what is refused."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from broker.config import Config, RoomOptions, Route
from broker.errors import BrokerError, ErrorCode
from broker.protocol.events import Event, make_event
from broker.router import MAX_COPIES, MAX_ROOMS, Router

CONFIG = Config(rooms={"default": RoomOptions(), "small": RoomOptions(event_bytes=120)})


def router(*routes: Route) -> Router:
    return Router(routes, CONFIG.options)


def event(name: str = "won", data: Any = None, *, room: str = "deal:7", **fields: Any) -> Event:
    return make_event(room, name, data, 12.5, **fields)


def said(events: Any) -> list[dict[str, Any]]:
    return [orjson.loads(one.body) for one in events]


def to(*rooms: str, **fields: Any) -> Route:
    return Route(source=("deal:*",), to=rooms, **fields)


def test_a_copy_is_the_event_in_another_room() -> None:
    original = event(data={"a": [1, {"b": None}]}, user="ada", slot="card", tags={"region": "EMEA"})
    (copy,) = router(to("activity")).copies(original)
    assert orjson.loads(copy.body) == orjson.loads(original.body) | {"room": "activity"}
    assert (copy.room, copy.ts, copy.slot, copy.tags) == ("activity", 12.5, "card", {"region": "EMEA"})
    assert copy.key is None


def test_who_asked_for_no_echo_still_gets_the_copy() -> None:
    original = event(data=1, exclude="s1")
    (copy,) = router(to("activity")).copies(original)
    assert (original.exclude, copy.exclude) == ("s1", None)


def test_keys_tell_rules_and_rooms_of_origin_apart() -> None:
    """Two rooms may use one key, and their copies meet in one room: neither may be taken for the other."""
    rules = router(to("activity"), to("activity", rename="x"))
    keys = {
        copy.key
        for room, key in (("deal:1", "k"), ("deal:1:k", "k"), ("deal:1", "k:k"), ("deal:2", "k"))
        for copy in rules.copies(event(room=room, key=key, publisher="ada"))
    }
    assert len(keys) == 8
    (first, _) = rules.copies(event(room="deal:1", key="k", publisher="ada"))
    (again, _) = rules.copies(event(data="other", room="deal:1", key="k", publisher="ada"))
    assert (first.key, first.publisher) == (again.key, again.publisher) == ("route:0:6:deal:1:k", "ada*copy")


def test_rooms_names_and_filters_choose() -> None:
    rules = router(
        to("a", event=("won", "lost-*")),
        to("b", filter={"gte": ["value", 10]}),
        Route(source=("contact:*", "deal:9"), to=("c",)),
    )

    def reached(*args: Any, **fields: Any) -> list[str]:
        return [copy.room for copy in rules.copies(event(*args, **fields))]

    assert reached("won") == ["a"]
    assert reached("lost-early", tags={"value": 10}) == ["a", "b"]
    assert reached("other", tags={"value": 9}) == []
    assert reached("won", room="contact:1") == ["c"]
    assert reached("x", room="deal:9") == ["c"]
    assert reached("won", room="user:deal") == []
    assert [rules.may_store(room) for room in ("deal:1", "contact:1", "x")] == [True, True, False]


def test_renamed_and_cut_down() -> None:
    rules = router(to("activity", rename="deal-closed", data=("owner", "absent", "title")))
    (copy,) = said(rules.copies(event(data={"title": "ü", "owner": 2**63, "secret": 1})))
    assert (copy["event"], copy["data"]) == ("deal-closed", {"title": "ü", "owner": 2**63})
    (copy,) = said(rules.copies(event(data=[1, 2])))
    assert copy["data"] == {}, "what is no object has no keys to keep"
    (copy,) = said(router(to("activity", data=())).copies(event(data={"a": 1})))
    assert copy["data"] == {}


def test_one_copy_for_each_value_and_room() -> None:
    rules = router(to("user:{data.owners}", "user:{data.creator}"))
    found = rules.copies(event(data={"owners": ["1", 2, "1"], "creator": 2}))
    assert [copy.room for copy in found] == ["user:1", "user:2"]
    assert rules.statistics()["routed"] == 2


def test_what_cannot_be_filled_in_is_counted() -> None:
    rules = router(to("user:{data.owner}", "by:{user}", "activity"))
    assert [copy.room for copy in rules.copies(event(data="text"))] == ["activity"]
    assert rules.statistics() == {"routed": 1, "route_missing": 2, "route_misfits": 0, "route_refused": 0}


def test_what_becomes_no_name_or_too_large_is_counted() -> None:
    rules = router(to("t:{data.a}", "u{data.b}", "small:1"))
    assert not rules.copies(event(data={"a": "x*", "b": "ser:7", "c": "x" * 120}))
    assert rules.statistics() == {"routed": 0, "route_missing": 0, "route_misfits": 3, "route_refused": 0}
    assert [copy.room for copy in rules.copies(event(data={"a": 1, "b": 2}))] == ["t:1", "u2", "small:1"]


@pytest.mark.parametrize(
    "template", ["user:{data.a}", "t:{data.a}{data.a}{data.a}{data.a}", "bad*".replace("*", "{data.stars}")]
)
def test_an_event_that_asks_for_too_many_copies_is_refused(template: str) -> None:
    """Also where the product of its lists would never end, and where none of the names is one."""
    rules = router(to(template))
    data = {"a": list(range(MAX_COPIES + 1)), "stars": ["*"] * (MAX_COPIES + 1)}
    with pytest.raises(BrokerError, match="more than 100 times") as caught:
        rules.copies(event(data=data))
    assert (caught.value.code, caught.value.room) == (ErrorCode.LIMIT_EXCEEDED, "deal:7")
    assert rules.statistics()["route_refused"] == 1
    assert rules.statistics()["routed"] == 0


def test_several_rules_together_are_bounded_too() -> None:
    rules = router(to("a:{data.a}"), to("b:{data.a}"))
    assert len(rules.copies(event(data={"a": list(range(MAX_COPIES // 2))}))) == MAX_COPIES
    with pytest.raises(BrokerError):
        rules.copies(event(data={"a": list(range(MAX_COPIES // 2 + 1))}))


def test_remembering_rooms_is_bounded() -> None:
    rules = router(to("activity"))
    for number in range(MAX_ROOMS + 10):
        assert len(rules.copies(event(room=f"deal:{number}"))) == 1
    assert len(rules._by_room) == 10
