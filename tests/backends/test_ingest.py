"""Ephemeral events of backends: given to the hub in bulk, or set aside once by all nodes together."""

from __future__ import annotations

from typing import Any

import orjson
from redis.crc import key_slot

from broker.backends.ingest import Ingest
from broker.backends.rejected import PAYLOAD_BYTES, Rejected
from broker.config import Redis, RoomOptions
from broker.link.base import Message
from broker.protocol.events import Event
from tests.backends.shelf import CONFIG, KEYS, Ear, body, linked, until
from tests.redis_server import RedisServer, redis_server

GOOD = b'{"event":"deal-updated","data":{"stage":"won"}}'


def forget(_event: Event, _ttl: float) -> None:
    """No room here remembers the newest of its slots."""


async def test_the_newest_of_each_slot_is_remembered_where_rooms_do(redis_at: RedisServer) -> None:
    kept: list[tuple[str, str | None, float]] = []
    rooms = {
        "board": RoomOptions(last_value=True, history_ttl=60.0),
        "told": RoomOptions(),
        "stored": RoomOptions(last_value=True, history=10),  # where the stream tells
    }

    def keep(event: Event, ttl: float) -> None:
        kept.append((event.room, event.slot, ttl))

    async with linked(Redis(url=redis_at.url)) as link:
        ingest = Ingest(Ear(), Rejected(link, KEYS, 10), rooms.__getitem__, keep)
        for room in rooms:
            ingest.take([(room, b'{"event":"x","data":1,"slot":"s"}'), (room, GOOD)])
    assert kept == [("board", "s", 60.0)]


async def test_what_backends_publish_reaches_the_hub(redis_at: RedisServer) -> None:
    ear = Ear()
    heard: list[Message] = []
    settings = Redis(url=redis_at.url)
    channels = {KEYS.backend(room): room for room in ("deal:1", "news")}
    async with linked(settings, on_messages=heard.extend) as link:
        ingest = Ingest(ear, Rejected(link, KEYS, 10), CONFIG.options, forget, clock=lambda: 5.0)
        link.subscribe(channels, sharded=False)
        for channel in channels:
            assert await link.heard(channel)
        with redis_at.client() as client:
            for number in range(20):
                client.publish("broker:room:deal:1", b'{"event":"n","data":%d}' % number)
            client.publish("broker:room:news", GOOD)
        await until(lambda: len(heard) == 21)
        ingest.take([(channels[channel], payload) for channel, payload in heard])
        assert ingest.statistics() == {"published": 21, "refused": 0}
    assert ear.calls == 1
    assert [body(event)["data"] for event in ear.events[:20]] == list(range(20))
    assert body(ear.events[20]) == {"op": "event", "room": "news", **orjson.loads(GOOD)}
    assert ear.events[20].ts == 5.0
    assert ear.events[20].position is None


async def test_the_same_bad_message_is_set_aside_once_by_all_nodes(redis_at: RedisServer) -> None:
    settings = Redis(url=redis_at.url)
    async with linked(settings, "one") as one, linked(settings, "two") as two:
        refusals = [Rejected(link, KEYS, 10) for link in (one, two)]
        ears = [Ear(), Ear()]
        for ear, rejected in zip(ears, refusals, strict=True):
            ingest = Ingest(ear, rejected, CONFIG.options, forget)
            ingest.take([("deal:1", b'{"event":"x"}'), ("deal:2", b'{"event":"x"}'), ("deal:1", GOOD)])
            assert ingest.statistics() == {"published": 1, "refused": 2}
            assert rejected.statistics() == {"rejected": 2, "rejected_bad_message": 2, "unrecorded": 0}
        with redis_at.client(decode_responses=True) as client:
            await until(lambda: client.xlen(KEYS.rejected) == 2)
            marks: Any = client.keys("broker:rejected:{broker:rejected}:*")
            assert {key_slot(mark.encode()) for mark in marks} == {key_slot(KEYS.rejected.encode())}
            await one.call("x", "PING")
            await two.call("x", "PING")
            entries: Any = client.xrange(KEYS.rejected)
    assert sorted(fields["room"] for _, fields in entries) == ["deal:1", "deal:2"]
    for _, fields in entries:
        assert "`data`" in fields.pop("reason")
        del fields["room"]
        assert fields == {"code": "bad_message", "source": "room", "id": "", "payload": '{"event":"x"}'}
    assert [len(ear.events) for ear in ears] == [1, 1]


async def test_of_a_long_message_the_beginning_is_kept(redis_at: RedisServer) -> None:
    async with linked(Redis(url=redis_at.url)) as link:
        ingest = Ingest(Ear(), Rejected(link, KEYS, 10), CONFIG.options, forget)
        ingest.take([("deal:1", b"\xff" * 5000), ("deal:1", "é".encode() * 5000)])
        with redis_at.client(decode_responses=True) as client:
            await until(lambda: client.xlen(KEYS.rejected) == 2)
            entries: Any = client.xrange(KEYS.rejected)
    payloads = [fields["payload"] for _, fields in entries]
    assert payloads[0] == "\\xff" * (PAYLOAD_BYTES // 4)
    assert payloads[1] == "é" * (PAYLOAD_BYTES // 2)


async def test_the_stream_of_rejected_is_capped(redis_at: RedisServer) -> None:
    async with linked(Redis(url=redis_at.url)) as link:
        rejected = Rejected(link, KEYS, 100)
        ingest = Ingest(Ear(), rejected, CONFIG.options, forget)
        ingest.take([("deal:1", b"%d" % number) for number in range(2000)])
        with redis_at.client() as client:
            await until(lambda: client.exists(KEYS.rejected))
            await until(lambda: client.xinfo_stream(KEYS.rejected)["entries-added"] == 2000)
            assert 100 <= int(client.xlen(KEYS.rejected)) < 400  # trimmed by whole nodes of its tree


async def test_what_cannot_be_set_aside_is_counted() -> None:
    with redis_server() as server:
        async with linked(Redis(url=server.url)) as link:
            rejected = Rejected(link, KEYS, 100)
            server.kill()
            await until(lambda: not link.up)
            Ingest(Ear(), rejected, CONFIG.options, forget).take([("deal:1", b"")])
            await until(lambda: rejected.statistics()["unrecorded"] == 1)
