"""The stream ``publish`` on a real Redis: stored once, in order, whatever fails."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from broker.backends import reader as reader_module
from broker.backends.reader import REMEMBERED, REMEMBERED_AFTER
from broker.backends.said import PUBLISHER
from broker.errors import BrokerError, ErrorCode
from broker.protocol.events import Event
from tests.backends.shelf import KEYS, Shelf, away, body, reading, until
from tests.redis_server import RedisServer, redis_server

LEASE = KEYS.lease(f"{{{KEYS.publish}}}")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again soon."""
    monkeypatch.setattr(reader_module, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(reader_module, "LONGEST_PAUSE", 0.02)


@pytest.fixture
def client(redis_at: RedisServer) -> Iterator[redis.Redis]:
    with redis_at.client(decode_responses=True) as connection:
        yield connection


def add(client: redis.Redis, room: str, data: str, **fields: str) -> str:
    entry: dict[Any, Any] = {"room": room, "event": "changed", "data": data, **fields}
    return str(client.xadd(KEYS.publish, entry))


def rejected(client: redis.Redis) -> list[dict[str, str]]:
    entries: Any = client.xrange(KEYS.rejected)
    return [fields for _, fields in entries]


def left(client: redis.Redis) -> int:
    return int(client.xlen(KEYS.publish))


# -- what becomes of an entry ---------------------------------------------------


async def test_an_entry_is_stored_and_removed(redis_at: RedisServer, client: redis.Redis) -> None:
    shelf = Shelf()
    first = add(client, "deal:1", '{"stage":"won"}')
    async with reading(redis_at, shelf) as reader:
        await until(lambda: shelf.data("deal:1") and not left(client))
        more = {"key": "k1", "slot": "s", "tags": '{"region":"EMEA"}', "user": "anna", "other": "ignored"}
        second = add(client, "deal:1", "null", **more)
        await until(lambda: len(shelf.data("deal:1")) == 2 and not left(client))
        assert reader.statistics()["stored"] == 2
    one, two = shelf.rooms["deal:1"]
    assert body(one) == {"op": "event", "room": "deal:1", "event": "changed", "data": {"stage": "won"}}
    assert (one.key, one.publisher, one.ts) == (first, PUBLISHER, 1000.0)
    assert body(two) == {
        "op": "event",
        "room": "deal:1",
        "event": "changed",
        "data": None,
        "key": "k1",
        "slot": "s",
        "tags": {"region": "EMEA"},
        "user": "anna",
    }
    assert (two.key, two.slot, two.tags) == ("k1", "s", {"region": "EMEA"})
    assert second != two.key


async def test_many_entries_keep_their_order(redis_at: RedisServer, client: redis.Redis) -> None:
    shelf = Shelf()
    with client.pipeline(transaction=False) as pipeline:
        for number in range(3000):
            pipeline.xadd(KEYS.publish, {"room": f"deal:{number % 7}", "event": "n", "data": str(number)})
        pipeline.execute()
    async with reading(redis_at, shelf):
        await until(lambda: not left(client))
    for room in range(7):
        assert shelf.data(f"deal:{room}") == list(range(room, 3000, 7))


async def test_one_entry_of_a_room_is_on_its_way_at_a_time(
    redis_at: RedisServer, client: redis.Redis
) -> None:
    shelf = Shelf()
    shelf.holding = True
    for number in range(3):
        add(client, "deal:1", str(number))
        add(client, "deal:2", str(number))
    async with reading(redis_at, shelf):
        for _ in range(3):
            await until(lambda: shelf.held == 2)
            shelf.answer()
        await until(lambda: not left(client))
    assert shelf.data("deal:1") == shelf.data("deal:2") == [0, 1, 2]


async def test_a_room_without_history_is_told_once(redis_at: RedisServer, client: redis.Redis) -> None:
    shelf = Shelf()
    async with reading(redis_at, shelf, "one"), reading(redis_at, shelf, "two"):
        for number in range(20):
            add(client, "news", str(number))
        add(client, "all", '"everybody"')
        await until(lambda: len(shelf.told) == 21)
        await until(lambda: not left(client))
    assert [body(event)["data"] for event in shelf.told if event.room == "news"] == list(range(20))
    assert not shelf.rooms


def _forgets_soon(client: redis.Redis, mark: str) -> bool:
    return int(client.ttl(mark)) <= REMEMBERED_AFTER


async def test_keys_are_not_remembered_for_a_day_once_their_entries_are_gone(
    redis_at: RedisServer, client: redis.Redis
) -> None:
    shelf = Shelf()
    entry = add(client, "deal:1", "1")
    add(client, "deal:1", "2", key="named")
    marks = [KEYS.once("deal:1", PUBLISHER, key) for key in (entry, "named")]
    for mark in marks:
        client.set(mark, "as the engine does", ex=int(REMEMBERED))
    async with reading(redis_at, shelf):
        await until(lambda: not left(client))
        for mark in marks:
            await until(partial(_forgets_soon, client, mark))


# -- entries that nobody can use --------------------------------------------------

GOOD = {"room": "deal:1", "event": "changed", "data": "1"}


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"event": "x", "data": "1"}, "bad_message", "`room`"),
        ({"room": "deal:1", "data": "1"}, "bad_message", "`event`"),
        ({"room": "deal:1", "event": "x"}, "bad_message", "`data`"),
        ({**GOOD, "event": ""}, "bad_message", "length >= 1"),
        ({**GOOD, "event": "x" * 129}, "bad_message", "length <= 128"),
        ({**GOOD, "key": "x" * 129}, "bad_message", "length <= 128"),
        ({**GOOD, "slot": ""}, "bad_message", "length >= 1"),
        ({**GOOD, "data": "won"}, "bad_message", "data: JSON is malformed"),
        ({**GOOD, "data": ""}, "bad_message", "data: "),
        ({**GOOD, "data": "1 2"}, "bad_message", "data: JSON is malformed"),
        ({**GOOD, "data": "NaN"}, "bad_message", "data: JSON is malformed"),
        ({**GOOD, "data": '"\\ud800"'}, "bad_message", "data: "),
        ({**GOOD, "data": "18446744073709551616"}, "bad_message", "64-bit"),
        ({**GOOD, "data": "[" * 64 + "]" * 64}, "bad_message", "data: JSON nested deeper than 64"),
        ({**GOOD, "data": b"\xff"}, "bad_message", "not UTF-8"),
        ({**GOOD, "tags": "[]"}, "bad_message", "tags: must be an object"),
        ({**GOOD, "tags": '{"a":true}'}, "bad_message", "tags.a"),
        ({**GOOD, "tags": "{"}, "bad_message", "tags: "),
        ({**GOOD, "user": ""}, "bad_message", "user: "),
        ({**GOOD, "user": "a*"}, "bad_message", "user: "),
        ({**GOOD, "room": "deal:*"}, "bad_room", "'*'"),
        ({**GOOD, "room": ""}, "bad_room", "empty"),
        ({**GOOD, "room": "small:1", "data": f'"{"x" * 200}"'}, "too_large", "the room takes 200"),
        ({**GOOD, "room": "small:1", "data": " " * 2000 + "1"}, "too_large", "the room takes 200"),
    ],
)
async def test_a_malformed_entry_is_set_aside(
    redis_at: RedisServer, client: redis.Redis, fields: dict[Any, Any], code: str, reason: str
) -> None:
    shelf = Shelf()
    identifier = str(client.xadd(KEYS.publish, fields))
    add(client, "deal:1", '"after"')
    async with reading(redis_at, shelf):
        await until(lambda: not left(client))
    assert shelf.data("deal:1") == ["after"]
    (told,) = rejected(client)
    assert told["code"] == code
    assert reason in told["reason"]
    assert (told["source"], told["id"]) == ("publish", identifier)
    assert told["room"] == fields.get("room", "")
    assert len(told["payload"]) <= 1024
    assert "changed" in told["payload"] or "x" in told["payload"] or "deal:1" in told["payload"]


async def test_a_giant_entry_is_set_aside_unread(
    redis_at: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "ENTRY_BYTES", 100_000)
    shelf = Shelf()
    add(client, "deal:1", f'"{"x" * 100_000}"')
    add(client, "deal:1", '"after"')
    async with reading(redis_at, shelf):
        await until(lambda: not left(client))
    assert shelf.data("deal:1") == ["after"]
    assert rejected(client)[0]["code"] == "too_large"


async def test_large_entries_come_in_several_reads(
    redis_at: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "READ_BYTES", 10_000)
    shelf = Shelf()
    for _ in range(10):
        add(client, "deal:1", f'"{"x" * 7_000}"')
    async with reading(redis_at, shelf):
        await until(lambda: not left(client))
    assert len(shelf.data("deal:1")) == 10


async def test_an_event_refused_for_good_is_set_aside(redis_at: RedisServer, client: redis.Redis) -> None:
    shelf = Shelf()
    shelf.judge = lambda event: BrokerError(ErrorCode.FORBIDDEN, "never") if event.key == "poison" else None
    add(client, "deal:1", "1")
    add(client, "deal:1", "2", key="poison")
    add(client, "deal:1", "3")
    async with reading(redis_at, shelf):
        await until(lambda: not left(client))
    assert shelf.data("deal:1") == [1, 3]
    assert [(told["code"], told["reason"]) for told in rejected(client)] == [("forbidden", "never")]


async def test_an_entry_that_breaks_the_broker_is_set_aside(
    redis_at: RedisServer, client: redis.Redis
) -> None:
    shelf = Shelf()

    def judge(event: Event) -> None:
        if event.key == "poison":
            raise ZeroDivisionError

    shelf.judge = judge
    add(client, "deal:1", "1", key="poison")
    add(client, "deal:1", "2")
    async with reading(redis_at, shelf) as reader:
        await until(lambda: not left(client))
        assert reader.statistics()["faults"] == 1
    assert shelf.data("deal:1") == [2]
    assert [told["code"] for told in rejected(client)] == ["internal"]


# -- order when publishing fails --------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_order_survives_failures(redis_at: RedisServer, client: redis.Redis, seed: int) -> None:
    dice = random.Random(seed)
    shelf = Shelf()
    shelf.judge = lambda event: away(event.room) if dice.random() < 0.2 else None
    with client.pipeline(transaction=False) as pipeline:
        for number in range(400):
            pipeline.xadd(KEYS.publish, {"room": f"deal:{number % 5}", "event": "n", "data": str(number)})
        pipeline.execute()
    async with reading(redis_at, shelf) as reader:
        await until(lambda: not left(client))
        assert reader.statistics()["failed"] > 0
        assert reader.statistics()["blocked_rooms"] == 0
    for room in range(5):
        assert shelf.data(f"deal:{room}") == list(range(room, 400, 5))
    assert not rejected(client)


async def test_a_room_that_fails_does_not_hold_up_others(redis_at: RedisServer, client: redis.Redis) -> None:
    shelf = Shelf()
    shelf.judge = lambda event: away(event.room) if event.room == "deal:bad" else None
    with client.pipeline(transaction=False) as pipeline:
        for number in range(2000):  # more than the window holds
            pipeline.xadd(KEYS.publish, {"room": "deal:bad", "event": "n", "data": str(number)})
        pipeline.execute()
    async with reading(redis_at, shelf):
        add(client, "deal:good", "1")
        await until(lambda: shelf.data("deal:good") == [1])
        await until(lambda: shelf.attempts["deal:bad"] > 3)
        shelf.judge = lambda _: None
        await until(lambda: not left(client))
    assert shelf.data("deal:bad") == list(range(2000))


# -- one reader at a time -----------------------------------------------------------


async def test_only_one_of_many_nodes_reads(redis_at: RedisServer, client: redis.Redis) -> None:
    shelf = Shelf()
    async with reading(redis_at, shelf, "one") as one, reading(redis_at, shelf, "two") as two:
        await until(lambda: one.statistics()["reading"] + two.statistics()["reading"] == 1)
        for number in range(50):
            add(client, "deal:1", str(number))
        await until(lambda: not left(client))
        assert sorted([one.statistics()["read"], two.statistics()["read"]]) == [0, 50]
    assert shelf.duplicates == 0


async def test_another_node_goes_on_when_the_reader_leaves(
    redis_at: RedisServer, client: redis.Redis
) -> None:
    shelf = Shelf()
    async with reading(redis_at, shelf, "one") as one:
        await until(lambda: one.statistics()["reading"])
    assert client.get(LEASE) is None
    add(client, "deal:1", "1")
    async with reading(redis_at, shelf, "two"):
        await until(lambda: not left(client))
    assert shelf.data("deal:1") == [1]


async def test_the_lease_of_a_dead_node_ends_by_itself(redis_at: RedisServer, client: redis.Redis) -> None:
    shelf = Shelf()
    client.set(LEASE, "dead", px=300)
    add(client, "deal:1", "1")
    async with reading(redis_at, shelf, lease=0.3) as reader:
        await until(lambda: not left(client))
        assert reader.statistics()["taken_over"] == 1
    assert shelf.data("deal:1") == [1]


async def test_entries_that_a_dead_node_had_stored_are_not_stored_again(
    redis_at: RedisServer, client: redis.Redis
) -> None:
    shelf = Shelf()
    identifier = add(client, "deal:1", '"once"')
    async with reading(redis_at, shelf, "one"):
        await until(lambda: not left(client))
    entry: Any = {"room": "deal:1", "event": "changed", "data": '"once"'}
    client.delete(KEYS.publish)
    client.xadd(KEYS.publish, entry, id=identifier)  # as if it had died before removing it
    add(client, "deal:1", '"next"')
    async with reading(redis_at, shelf, "two"):
        await until(lambda: not left(client))
    assert shelf.data("deal:1") == ["once", "next"]
    assert shelf.duplicates == 1


async def test_a_reader_that_lost_its_lease_publishes_no_more(
    redis_at: RedisServer, client: redis.Redis
) -> None:
    shelf = Shelf()
    async with reading(redis_at, shelf, lease=0.6) as reader:
        await until(lambda: reader.statistics()["reading"])
        client.set(LEASE, "another")
        await until(lambda: not reader.statistics()["reading"])
        for number in range(10):
            add(client, "deal:1", str(number))
        reads = reader.statistics()["read"]
        client.delete(LEASE)
        await until(lambda: not left(client))
        assert reads == 0
        assert reader.statistics()["lost"] == 1
    assert shelf.data("deal:1") == list(range(10))


async def test_what_waits_behind_an_entry_is_left_to_the_next_reader(
    redis_at: RedisServer, client: redis.Redis
) -> None:
    shelf = Shelf()
    shelf.holding = True
    for number in range(5):
        add(client, "deal:1", str(number))
    async with reading(redis_at, shelf, "one", lease=0.6) as one:
        await until(lambda: shelf.held == 1)
        client.set(LEASE, "another")
        await until(lambda: not one.statistics()["reading"])
        shelf.answer()
        assert shelf.data("deal:1") == [0]
        assert shelf.held == 0
        await until(lambda: left(client) == 4)
        client.delete(LEASE)
        shelf.holding = False
        await until(lambda: not left(client))
    assert shelf.data("deal:1") == [0, 1, 2, 3, 4]


def test_what_a_script_touches_is_on_one_server_of_a_redis_cluster() -> None:
    assert key_slot(LEASE.encode()) == key_slot(KEYS.publish.encode())


# -- Redis itself ---------------------------------------------------------------------


async def test_ids_that_begin_anew_are_read(redis_at: RedisServer, client: redis.Redis) -> None:
    shelf = Shelf()
    async with reading(redis_at, shelf):
        add(client, "deal:1", "1")
        await until(lambda: shelf.data("deal:1") == [1])
        await until(lambda: not left(client))
        client.flushall()
        entry: Any = {"room": "deal:1", "event": "n", "data": "2"}
        client.xadd(KEYS.publish, entry, id="5-0")
        await until(lambda: shelf.data("deal:1") == [1, 2])


async def test_a_stream_that_is_none_is_told_and_waited_for(
    redis_at: RedisServer, client: redis.Redis
) -> None:
    shelf = Shelf()
    client.set(KEYS.publish, "what is this")
    async with reading(redis_at, shelf) as reader:
        await until(lambda: reader.statistics()["failed"] > 2)
        client.delete(KEYS.publish)
        add(client, "deal:1", "1")
        await until(lambda: shelf.data("deal:1") == [1])


async def test_entries_survive_a_kill_of_redis() -> None:
    shelf = Shelf()
    with redis_server(appendonly="yes", appendfsync="always") as server:
        async with reading(server, shelf, lease=1.0):
            with server.client() as client:
                add(client, "deal:1", "1")
                await until(lambda: not left(client))
                shelf.holding = True
                add(client, "deal:1", "2")
                add(client, "deal:1", "3")
                await until(lambda: shelf.held == 1)
            server.kill()
            shelf.holding = False
            shelf.answer()
            server.start()
            with server.client() as client:
                await until(lambda: shelf.data("deal:1") == [1, 2, 3])
                await until(lambda: not left(client))
    assert shelf.data("deal:1") == [1, 2, 3]


async def test_scripts_that_redis_forgot_are_no_matter(redis_at: RedisServer, client: redis.Redis) -> None:
    shelf = Shelf()
    async with reading(redis_at, shelf):
        client.script_flush()
        add(client, "deal:1", "1")
        client.xadd(KEYS.publish, {"no": "event"})
        await until(lambda: not left(client))
    assert shelf.data("deal:1") == [1]
    assert len(rejected(client)) == 1
