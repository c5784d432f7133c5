"""What backends say is held to exactly what holds for clients."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.backends.said import PUBLISHER, SPELLING, claimed_room, decode_entry, decode_message
from broker.config import RoomOptions
from broker.errors import BrokerError, ErrorCode
from broker.protocol import messages
from broker.protocol.events import Event, make_event
from broker.protocol.filters import check_tags

OPTIONS: Final = RoomOptions(event_bytes=1000)

SCALARS: Final = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["\ud800", "\udc00x", "\x00", "\u2028", "😀", '"', "\\"]),
)
VALUES: Final = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
NUMBERS: Final = b"1e999 -1e999 1e-999 -0 -0.0 01 +1 .5 1. NaN Infinity 1e5 18446744073709551615".split()
BIG: Final = b"18446744073709551616 -9223372036854775808 -9223372036854775809".split()
STRINGS: Final = [
    b'"\\ud800"',
    b'"\\ud83d\\ude00"',
    b'"\\udc00\\ud800"',
    b'"\xff"',
    b'"\xed\xa0\x80"',
    b'"\n"',
]
SHAPES: Final = [b"[1,]", b'{"a":1,"a":2}', b"{1:2}", b"'a'", b"", b" 1 ", b"\xef\xbb\xbf1", b"nul"]
ODD: Final = st.sampled_from([*NUMBERS, *BIG, *STRINGS, *SHAPES])
DEEP: Final = st.integers(min_value=55, max_value=70).map(lambda depth: b"[" * depth + b"]" * depth)
MIXED: Final = st.integers(min_value=28, max_value=36).map(lambda n: b'{"a":[' * n + b"1" + b"]}" * n)


def written(value: Any) -> bytes:
    """JSON as a careless backend writes it: what no encoder of ours would let pass comes through."""
    return json.dumps(value).encode()


JSON: Final = st.one_of(VALUES.map(written), ODD, DEEP, MIXED)


def as_client(data: bytes, tags: bytes | None = None) -> Event | BrokerError:
    """The same from a client: decoded, encoded, checked by what every publish of a client goes through."""
    payload = b'{"op":"publish","room":"deal:1","event":"x","data":%b' % data
    payload += b',"tags":%b}' % tags if tags is not None else b"}"
    (message,) = messages.decode(payload, 1)
    if isinstance(message, messages.Refusal):
        return message.error
    try:
        checked = check_tags(message.tags) if message.tags is not None else None
        return make_event(message.room, message.event, message.data, 1.5, publisher=PUBLISHER, tags=checked)
    except BrokerError as error:
        return error


def attempt(take: Callable[[], Event]) -> Event | BrokerError:
    try:
        return take()
    except BrokerError as error:
        return error


def as_message(data: bytes, tags: bytes | None = None) -> Event | BrokerError:
    payload = b'{"event":"x","data":%b' % data + (b',"tags":%b}' % tags if tags is not None else b"}")
    return attempt(lambda: decode_message("deal:1", payload, OPTIONS, 1.5))


def as_entry(data: bytes, tags: bytes | None = None) -> Event | BrokerError:
    fields = [b"room", b"deal:1", b"event", b"x", b"data", data]
    fields += [b"tags", tags] if tags is not None else []
    return attempt(lambda: decode_entry("7-0", fields, lambda _: OPTIONS, 1.5))


def verdict(outcome: Event | BrokerError) -> bytes | ErrorCode:
    return outcome.code if isinstance(outcome, BrokerError) else outcome.body


@given(JSON)
def test_data_is_judged_as_a_clients(data: bytes) -> None:
    of_client = as_client(data)
    assert verdict(as_message(data)) == verdict(of_client)
    assert verdict(as_entry(data)) == verdict(of_client)


@given(JSON)
def test_tags_are_judged_as_a_clients(tags: bytes) -> None:
    of_client = as_client(b"1", tags)
    assert verdict(as_message(b"1", tags)) == verdict(of_client)
    if tags.strip() != b"null":  # a field of an entry is there or not, and null is no object
        assert verdict(as_entry(b"1", tags)) == verdict(of_client)


@given(JSON)
def test_what_passes_every_strict_parser_can_read(data: bytes) -> None:
    outcome = as_message(data)
    if isinstance(outcome, Event):
        assert outcome.body.decode("utf-8")
        message = orjson.loads(outcome.body)
        assert orjson.loads(orjson.dumps(message)) == message


@given(st.binary(max_size=60))
def test_any_bytes_are_an_event_or_a_refusal(payload: bytes) -> None:
    refused = {ErrorCode.BAD_MESSAGE, ErrorCode.BAD_ROOM}
    for outcome in (
        attempt(lambda: decode_message("deal:1", payload, OPTIONS, 1.5)),
        attempt(lambda: decode_entry("7-0", [payload, payload], lambda _: OPTIONS, 1.5)),
        as_entry(payload),
        as_entry(b"1", payload),
    ):
        assert isinstance(outcome, Event) or outcome.code in refused


def test_a_message_becomes_the_event_of_a_client() -> None:
    payload = b'{"event":"x","data":{"a":[1]},"tags":{"r":1},"slot":"s","more":[],"user":"anna","key":"k"}'
    event = decode_message("deal:1", payload, OPTIONS, 1.5)
    assert orjson.loads(event.body) == {
        "op": "event",
        "room": "deal:1",
        "event": "x",
        "data": {"a": [1]},
        "ts": 1.5,
        "slot": "s",
        "tags": {"r": 1},
    }
    assert (event.slot, event.tags, event.key, event.publisher) == ("s", {"r": 1}, None, PUBLISHER)


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", "bad_message"),
        (b"[]", "bad_message"),
        (b'{"event":"x"}', "bad_message"),
        (b'{"data":1}', "bad_message"),
        (b'{"event":"","data":1}', "bad_message"),
        (b'{"event":1,"data":1}', "bad_message"),
        (b'{"event":"x","data":1,"slot":""}', "bad_message"),
        (b'{"event":"x","data":1,"tags":{"a":[]}}', "bad_message"),
        (b'{"event":"x","data":1}{}', "bad_message"),
        (b'{"event":"x","data":"%b"}' % (b"x" * 1000), "too_large"),
        (b" " * (SPELLING * 1000) + b'{"event":"x","data":1}', "too_large"),
    ],
)
def test_what_is_no_event_is_refused(payload: bytes, code: str) -> None:
    with pytest.raises(BrokerError) as caught:
        decode_message("deal:1", payload, OPTIONS, 1.5)
    assert caught.value.code == code


def test_the_longest_spelling_of_what_fits_is_read() -> None:
    data = "\\u0061" * 900
    event = decode_message("deal:1", b'{"event":"x","data":"%b"}' % data.encode(), OPTIONS, 1.5)
    assert orjson.loads(event.body)["data"] == "a" * 900


def test_a_room_that_is_none_is_refused() -> None:
    with pytest.raises(BrokerError) as caught:
        decode_message("a*", b'{"event":"x","data":1}', OPTIONS, 1.5)
    assert caught.value.code is ErrorCode.BAD_ROOM


def test_an_entry_without_a_key_has_its_id_for_one_unseen_by_clients() -> None:
    fields = [b"room", b"deal:1", b"event", b"x", b"data", b"1"]
    one = decode_entry("7-0", fields, lambda _: OPTIONS, 1.5)
    assert one.key == "7-0"
    assert "key" not in orjson.loads(one.body)
    two = decode_entry("7-0", [*fields, b"key", b"k"], lambda _: OPTIONS, 1.5)
    assert two.key == "k"
    assert orjson.loads(two.body)["key"] == "k"


def test_a_broken_entry_still_names_its_room() -> None:
    assert claimed_room([b"room", b"a\xff", b"x", b"y"]) == "a\\xff"
    assert claimed_room([b"x", b"y"]) == ""
