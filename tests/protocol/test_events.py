"""Events: encoded once, placed in a stream, and known again when they come out of a store."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BrokerError, ErrorCode
from broker.protocol.events import Position, SessionId, Tags, make_event, restore

JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=20),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
TAGS = st.dictionaries(
    st.text(max_size=8),
    st.one_of(
        st.text(max_size=8),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
    ),
    max_size=4,
)
NAMES = st.none() | st.text(max_size=10)
OFFSETS = st.integers(0, 2**53 - 1)
STAMPS = st.floats(0, 1e11)


OPTIONS = st.fixed_dictionaries({"user": NAMES, "key": NAMES, "slot": NAMES, "tags": st.none() | TAGS})


@given(st.text(min_size=1, max_size=20), st.text(max_size=20), JSON, STAMPS, OPTIONS)
def test_an_event_says_what_it_was_given_and_comes_back(
    room: str, name: str, data: Any, ts: float, options: dict[str, Any]
) -> None:
    event = make_event(room, name, data, ts, **options)
    wanted = {"op": "event", "room": room, "event": name, "data": data, "ts": ts}
    wanted |= {field: value for field, value in options.items() if value is not None}
    assert json.loads(event.wire) == wanted
    assert event.wire is event.body
    assert (event.position, event.offset) == (None, 0)

    event.place(Position("epoch", 7))
    assert json.loads(event.wire) == wanted | {"offset": 7}
    assert json.loads(event.body) == wanted
    assert event.offset == 7

    again = restore(room, event.wire, Position("epoch", 7))
    for field in ("room", "wire", "ts", "slot", "tags", "position", "offset"):
        assert getattr(again, field) == getattr(event, field), field
    before, after = ((one.tags or {}).values() for one in (event, again))
    assert [type(value) for value in before] == [type(value) for value in after]


@given(OFFSETS, OFFSETS)
def test_placed_again_it_has_one_place(first: int, second: int) -> None:
    event = make_event("a", "e", {"offset": -1}, 1.0)
    event.place(Position("one", first))
    event.place(Position("two", second))
    assert json.loads(event.wire, object_pairs_hook=list)[-1] == ("offset", second)
    assert event.wire.count(b'"offset"') == 2  # its own, and the one in data
    assert event.position == Position("two", second)


def test_what_stays_on_the_server_is_not_told() -> None:
    event = make_event("a", "e", None, 1.0, publisher="42", exclude=SessionId("s1"))
    assert (event.publisher, event.exclude) == ("42", "s1")
    assert set(orjson.loads(event.wire)) == {"op", "room", "event", "data", "ts"}


@pytest.mark.parametrize(
    "data", [2**64, -(2**63) - 1, "\ud800", ["\udfff"], {"\ud800": 1}, {1: 2}, b"bytes", {1, 2}, object()]
)
def test_data_that_not_every_client_can_read_is_refused(data: Any) -> None:
    with pytest.raises(BrokerError) as caught:
        make_event("deal:1", "e", data, 1.0)
    assert (caught.value.code, caught.value.room) == (ErrorCode.BAD_MESSAGE, "deal:1")
    assert "data cannot be encoded" in caught.value.message


def test_data_too_deep_for_the_encoder_is_refused() -> None:
    data: list[Any] = []
    for _ in range(300):
        data = [data]
    with pytest.raises(BrokerError):
        make_event("a", "e", data, 1.0)


def test_fields_within_data_are_not_taken_for_those_of_the_event() -> None:
    inner: dict[str, Any] = {"ts": "late", "slot": 5, "tags": [], "offset": "none"}
    event = make_event("a", "e", inner, 1.0, slot="s")
    event.place(Position("e", 1))
    tags: Tags | None = restore("a", event.wire, Position("e", 1)).tags
    assert (restore("a", event.wire, Position("e", 1)).slot, tags) == ("s", None)
