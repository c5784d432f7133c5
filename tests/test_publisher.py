"""The publisher for Python backends: what it sends is what the broker takes, in threads and awaited."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

import orjson
import pytest
import redis
import trio
from hypothesis import given
from hypothesis import strategies as st

from broker import publisher as publisher_module
from broker import publisher_commands as commands
from broker.auth.permissions import MAX_ROOM_BYTES, valid_room, valid_user
from broker.backends.said import decode_entry, decode_message
from broker.config import RoomOptions
from broker.errors import BrokerError
from broker.protocol import filters
from broker.protocol.messages import MAX_DEPTH
from broker.publisher import AsyncPublisher, Publisher, PublishError, Sent
from broker.publisher_commands import Options, compose
from tests.redis_server import RedisServer, redis_server

OPTIONS: Final = RoomOptions(event_bytes=100_000)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with server.client(decode_responses=True) as connection:
        connection.flushall()
        yield connection


@pytest.fixture
def publisher(server: RedisServer) -> Iterator[Publisher]:
    with Publisher(server.url) as one:
        yield one


def entries(client: redis.Redis) -> list[tuple[str, dict[str, str]]]:
    found: Any = client.xrange("broker:publish")
    return list(found)


def say_together(publisher: Publisher, said: list[tuple[str, Options]]) -> None:
    with publisher.batch() as batch:
        for room, options in said:
            batch.to_room(room, "x", 1, **options)


class Listener:
    """Hears what is published, like a node that has the rooms."""

    def __init__(self, client: redis.Redis, *rooms: str) -> None:
        untyped: Any = client
        self._pubsub = untyped.pubsub(ignore_subscribe_messages=True)
        self._pubsub.subscribe(*(f"broker:room:{room}" for room in rooms))
        for _ in rooms:
            self._pubsub.get_message(timeout=10)

    def next(self) -> tuple[str, Any]:
        message = self._pubsub.get_message(timeout=10)
        assert message is not None
        return message["channel"], orjson.loads(message["data"])

    def close(self) -> None:
        self._pubsub.close()


@pytest.fixture
def listener(client: redis.Redis) -> Iterator[Listener]:
    one = Listener(client, "deal:1", "user:42", "all")
    yield one
    one.close()


# -- what is sent ---------------------------------------------------------------


def test_an_ephemeral_event_is_heard(publisher: Publisher, listener: Listener) -> None:
    assert publisher.to_room("deal:1", "moved", {"x": 1}) == Sent(heard=1)
    assert listener.next() == ("broker:room:deal:1", {"event": "moved", "data": {"x": 1}})
    publisher.to_user("42", "hello", None, slot="s", tags={"region": "EMEA", "amount": 1.5})
    told = {"event": "hello", "data": None, "slot": "s", "tags": {"region": "EMEA", "amount": 1.5}}
    assert listener.next() == ("broker:room:user:42", told)
    publisher.broadcast("maintenance", "soon")
    assert listener.next() == ("broker:room:all", {"event": "maintenance", "data": "soon"})
    assert publisher.to_room("nobody", "moved", 1) == Sent(heard=0)


def test_a_durable_event_is_an_entry(publisher: Publisher, client: redis.Redis) -> None:
    first = publisher.to_room("deal:1", "won", {"by": "anna"}, durable=True)
    second = publisher.to_user("42", "paid", [1], durable=True, key="k", slot="s", tags={"a": 1}, user="anna")
    assert entries(client) == [
        (first.entry, {"room": "deal:1", "event": "won", "data": '{"by":"anna"}'}),
        (
            second.entry,
            {"room": "user:42", "event": "paid", "data": "[1]", "key": "k", "slot": "s"}
            | {"user": "anna", "tags": '{"a":1}'},
        ),
    ]


def test_what_orjson_can_say_may_be_said(publisher: Publisher, client: redis.Redis) -> None:
    publisher.to_room("deal:1", "x", {"at": datetime(2026, 1, 2, tzinfo=UTC)}, durable=True)
    assert entries(client)[0][1]["data"] == '{"at":"2026-01-02T00:00:00+00:00"}'


def test_another_prefix(server: RedisServer, client: redis.Redis) -> None:
    with Publisher(server.url, "other:") as publisher:
        publisher.to_room("deal:1", "x", 1, durable=True)
    assert client.xlen("other:publish") == 1


def test_a_client_of_ones_own_stays_open(client: redis.Redis) -> None:
    with Publisher(client=client) as publisher:
        sent = publisher.to_room("deal:1", "x", 1, durable=True)
    assert entries(client)[0][0] == sent.entry


# -- many at once -----------------------------------------------------------------


def test_a_batch_goes_together_and_in_order(
    publisher: Publisher, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "TRIP", 7)
    with publisher.batch() as batch:
        for number in range(20):
            batch.to_room("deal:1", "n", number, durable=True)
        batch.broadcast("x", 1)
        batch.to_user("42", "x", 1)
        assert entries(client) == []
        assert batch.sent == []
    assert [fields["data"] for _, fields in entries(client)] == [str(number) for number in range(20)]
    assert [sent.entry for sent in batch.sent[:20]] == [identifier for identifier, _ in entries(client)]
    assert batch.sent[20:] == [Sent(heard=0), Sent(heard=0)]


def test_a_batch_that_raises_sends_nothing(publisher: Publisher, client: redis.Redis) -> None:
    with pytest.raises(ValueError, match="room"):
        say_together(publisher, [("deal:1", {"durable": True}), ("", {"durable": True})])
    assert entries(client) == []


@pytest.mark.parametrize("recipient", ["", None, 42, "*"])
def test_what_is_no_user_is_told_where_it_is_said(publisher: Publisher, recipient: Any) -> None:
    with pytest.raises(ValueError, match=r"recipient: .* is not a name"):
        publisher.to_user(recipient, "x", 1)


def test_an_empty_batch_is_nothing(publisher: Publisher) -> None:
    with publisher.batch() as batch:
        pass
    assert batch.sent == []


def test_threads_share_a_publisher(publisher: Publisher, client: redis.Redis) -> None:
    def work(number: int) -> None:
        for count in range(20):
            publisher.to_room(f"deal:{number}", "n", count, durable=True)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        told = [int(fields["data"]) for _, fields in entries(client) if fields["room"] == f"deal:{number}"]
        assert told == list(range(20))


# -- awaited ------------------------------------------------------------------------


async def say_some(url: str) -> list[Sent]:
    async with AsyncPublisher(url) as publisher:
        sent = [await publisher.to_room("deal:1", "x", 1, durable=True)]
        async with publisher.batch() as batch:
            batch.to_room("deal:1", "x", 2, durable=True)
            batch.to_user("42", "x", 3, durable=True)
        with pytest.raises(ValueError, match="room"):
            publisher.to_room("*", "x", 1)
        return sent + batch.sent


def check_some(client: redis.Redis, sent: list[Sent]) -> None:
    assert [identifier for identifier, _ in entries(client)] == [one.entry for one in sent]
    assert [fields["data"] for _, fields in entries(client)] == ["1", "2", "3"]


async def test_under_trio(server: RedisServer, client: redis.Redis) -> None:
    check_some(client, await say_some(server.url))


def test_under_asyncio(server: RedisServer, client: redis.Redis) -> None:
    check_some(client, asyncio.run(say_some(server.url)))


async def test_giving_up_the_wait_breaks_nothing(server: RedisServer, client: redis.Redis) -> None:
    async with AsyncPublisher(server.url) as publisher:
        client.client_pause(200)
        with trio.move_on_after(0.01) as scope:
            await publisher.to_room("deal:1", "x", 1, durable=True)
        assert scope.cancelled_caught
        await publisher.to_room("deal:1", "x", 2, durable=True)
    assert {fields["data"] for _, fields in entries(client)} >= {"2"}


# -- Redis is away --------------------------------------------------------------------


def test_nothing_is_repeated_without_a_key(server: RedisServer, client: redis.Redis) -> None:
    with Publisher(server.url, timeout=0.05) as publisher:
        publisher.to_room("deal:1", "x", 0, durable=True)
        client.client_pause(300)
        with pytest.raises(PublishError) as caught:
            publisher.to_room("deal:1", "x", 1, durable=True)
        assert caught.value.uncertain
        client.client_unpause()
        publisher.to_room("deal:1", "x", 2, durable=True)
    assert [fields["data"] for _, fields in entries(client)] in (["0", "1", "2"], ["0", "2"])


def test_a_durable_event_with_a_key_is_tried_again(
    server: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "ATTEMPTS", 50)
    monkeypatch.setattr(publisher_module, "FIRST_PAUSE", 0.001)
    with Publisher(server.url, timeout=0.05) as publisher:
        publisher.to_room("deal:1", "x", 0, durable=True)
        client.client_pause(120)
        publisher.to_room("deal:1", "x", 1, durable=True, key="k")
    keys = [fields.get("key") for _, fields in entries(client)]
    assert keys[0] is None
    assert set(keys[1:]) == {"k"}  # perhaps more than once: the broker stores it once


def test_a_batch_is_tried_again_only_if_all_of_it_may_be(
    server: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "ATTEMPTS", 50)
    monkeypatch.setattr(publisher_module, "FIRST_PAUSE", 0.001)
    with Publisher(server.url, timeout=0.05) as publisher:
        publisher.broadcast("x", 0)
        client.client_pause(120)
        with publisher.batch() as batch:
            batch.to_room("deal:1", "x", 1, durable=True, key="k")
        client.client_pause(300)
        with pytest.raises(PublishError):
            say_together(publisher, [("r", {"durable": True, "key": "k"}), ("r", {"durable": True})])
        client.client_unpause()


def test_nobody_there() -> None:
    with (
        Publisher("redis://127.0.0.1:1/0") as publisher,
        pytest.raises(PublishError, match="did not take it"),
    ):
        publisher.broadcast("x", 1)


def test_what_redis_refuses_is_told_and_the_rest_is_sent(publisher: Publisher, client: redis.Redis) -> None:
    client.set("broker:publish", "no stream")
    with pytest.raises(PublishError, match="WRONGTYPE") as caught:
        say_together(publisher, [("all", {}), ("deal:1", {"durable": True})])
    assert not caught.value.uncertain
    assert caught.value.sent == [Sent(heard=0), None]


# -- what is no event -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "event", "data", "options", "reason"),
    [
        ("", "x", 1, {}, "room: '' is not a name"),
        ("a*", "x", 1, {}, "room"),
        ("é" * 101, "x", 1, {}, "room"),
        (None, "x", 1, {}, "room: None"),
        ("r", "", 1, {}, "event: must be a string of 1 to 128"),
        ("r", "x" * 129, 1, {}, "event"),
        ("r", "\ud800", 1, {}, "event: JSON cannot say it"),
        ("r", "x", object(), {}, "data: JSON cannot say it"),
        ("r", "x", 2**64, {}, "data: JSON cannot say it"),
        ("r", "x", [math.nan], {}, "data: a number must be finite"),
        ("r", "x", {"a": (math.inf,)}, {}, "data: a number must be finite"),
        ("r", "x", {"a": "\udc00"}, {}, "data: JSON cannot say it"),
        ("r", "x", {1: 2}, {}, "data: JSON cannot say it"),
        ("r", "x", 1, {"key": "k"}, "give durable=True"),
        ("r", "x", 1, {"user": "u"}, "give durable=True"),
        ("r", "x", 1, {"durable": True, "key": ""}, "key"),
        ("r", "x", 1, {"slot": "x" * 129}, "slot"),
        ("r", "x", 1, {"durable": True, "user": ""}, "user"),
        ("r", "x", 1, {"durable": True, "user": "a*"}, "user"),
        ("r", "x", 1, {"tags": {"a": True}}, "tags: a: must be a string or a number, not True"),
        ("r", "x", 1, {"tags": {"a": None}}, "tags: a"),
        ("r", "x", 1, {"tags": {"a": math.inf}}, "tags: a number must be finite"),
        ("r", "x", 1, {"tags": {"a": 2**64}}, "tags: JSON"),
        ("r", "x", 1, {"tags": {"": 1}}, "tags: a name has 1 to 64"),
        ("r", "x", 1, {"tags": {"a": "x" * 257}}, "tags: a: a string has at most 256"),
        ("r", "x", 1, {"tags": {f"t{n}": n for n in range(33)}}, "tags: at most 32"),
    ],
)
def test_a_mistake_is_told_where_it_is_made(
    room: Any, event: Any, data: Any, options: Options, reason: str
) -> None:
    with pytest.raises(ValueError, match=r".*") as caught:
        compose("broker:", room, event, data, options)
    assert reason in str(caught.value)


def nest(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_as_deep_as_the_broker_takes() -> None:
    compose("broker:", "r", "x", nest(63), {})
    compose("broker:", "r", "x", ["[" * 100, "]"], {})
    with pytest.raises(ValueError, match="nested deeper than 63"):
        compose("broker:", "r", "x", nest(64), {})


def test_the_limits_are_the_brokers() -> None:
    assert commands.ROOM_BYTES == MAX_ROOM_BYTES
    assert commands.DEPTH == MAX_DEPTH - 1
    assert (commands.TAGS, commands.TAG_NAME, commands.TAG_STRING) == (
        filters.MAX_TAGS,
        filters.MAX_NAME,
        filters.MAX_STRING,
    )


TEXTS: Final = st.text(max_size=6) | st.sampled_from(
    ["a*", "\x00", "\x85", "\ud800", "é" * 100, "x" * 201, "a:b"]
)
SCALARS: Final = st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | TEXTS
VALUES: Final = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
)


@given(TEXTS)
def test_names_are_judged_as_the_broker_does(name: str) -> None:
    def accepted(room: str, options: Options) -> bool:
        try:
            compose("broker:", room, "x", 1, options)
        except ValueError:
            return False
        return True

    assert accepted(name, {}) == valid_room(name)
    assert accepted("r", {"durable": True, "user": name}) == valid_user(name)


@given(VALUES, st.none() | st.dictionaries(TEXTS, SCALARS, max_size=3), TEXTS, st.booleans())
def test_whatever_passes_here_passes_there(data: Any, tags: Any, slot: str, durable: bool) -> None:
    try:
        command = compose("b:", "deal:1", "x", data, {"tags": tags, "slot": slot, "durable": durable})
    except ValueError:
        with pytest.raises((BrokerError, ValueError)):
            refused_there(data, tags, slot)
        return
    name, key, *arguments = command.arguments
    if durable:
        assert (name, key) == ("XADD", "b:publish")
        fields = [part if isinstance(part, bytes) else part.encode() for part in arguments[1:]]
        event = decode_entry("1-0", fields, lambda _: OPTIONS, 1.5)
    else:
        assert (name, key) == ("PUBLISH", "b:room:deal:1")
        assert isinstance(arguments[0], bytes)
        event = decode_message("deal:1", arguments[0], OPTIONS, 1.5)
    message = orjson.loads(event.body)
    assert message["data"] == orjson.loads(orjson.dumps(data))
    assert (event.slot, event.tags) == (slot, tags)


def refused_there(data: Any, tags: Any, slot: str) -> None:
    """The same said by a backend that checks nothing."""
    import json

    message = {"event": "x", "data": data, "tags": tags, "slot": slot}
    decode_message("deal:1", json.dumps(message).encode(), OPTIONS, 1.5)


# -- what it loads ------------------------------------------------------------------


def test_it_loads_nothing_else_of_the_broker() -> None:
    program = (
        "import sys, broker.publisher\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in"
        " {'broker', 'trio', 'msgspec', 'structlog', 'trio_asyncio'}))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.strip() == str(["broker", "broker.publisher", "broker.publisher_commands"])
