"""The link on a Redis Cluster: real nodes, slots that move, nodes that die."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import trio
from redis.crc import key_slot

from broker.errors import ConfigurationError
from broker.link.base import LinkDown, LinkError
from tests.link.linked import APPEND, ECHO, PATIENCE, Recorder, build, linked, until
from tests.link.sharded import Sharded, sharded
from tests.redis_server import RedisServer

QUICK: dict[str, Any] = {
    "connect_timeout": 1.0,
    "answer_timeout": 0.5,
    "probe_after": 0.8,
    "probe_timeout": 0.5,
}

ROOMS = [f"broker:{{room{number}}}:live" for number in range(40)]
"""Enough to be on every shard."""


@pytest.fixture(scope="module")
def three() -> Iterator[Sharded]:
    with sharded() as cluster:
        yield cluster


async def test_every_key_finds_its_shard(three: Sharded) -> None:
    async with linked(three.url) as here:
        assert here.link.clustered
        assert here.link.statistics()["shards"] == 3
        for number, room in enumerate(ROOMS):
            assert await here.send(room, "SET", room, number) == b"OK"
            replies: list[Any] = []
            here.link.send_script(replies.append, ECHO, [room], room)
            await until(lambda: replies)  # noqa: B023
            assert replies == [room.encode()]
            assert await here.link.call(room, "GET", room) == b"%d" % number
            assert await here.link.call_script(ECHO, [room], "x") == b"x"
        assert len(here.run_ids[0].split(",")) == 3


async def test_sharded_and_plain_channels_are_heard(three: Sharded) -> None:
    async with linked(three.url) as here:
        here.link.subscribe(ROOMS, sharded=True)
        here.link.subscribe(["plain"], sharded=False)
        for room in (*ROOMS, "plain"):
            assert await here.link.heard(room)
        for room in ROOMS:
            assert await here.send(room, "SPUBLISH", room, "live") == 1
        await until(lambda: len(here.messages) == len(ROOMS))
        assert set(here.messages) == {(room, b"live") for room in ROOMS}
        for node in three.primaries:
            node.order("PUBLISH", "plain", f"from {node.server.port}")
        await until(lambda: len(here.messages) == len(ROOMS) + 3)
        here.link.unsubscribe(ROOMS[:1])
        assert not here.link.hears(ROOMS[0])
        await until_unheard(here, ROOMS[0])


async def until_unheard(here: Recorder, room: str) -> None:
    with trio.fail_after(PATIENCE):
        while await here.send(room, "SPUBLISH", room, "x") != 0:
            pass


async def test_a_slot_that_moves_takes_its_commands_and_channels_along(three: Sharded) -> None:
    room = "broker:{moving}:live"
    slot = key_slot(room.encode())
    async with linked(three.url, **QUICK) as here:
        here.link.subscribe([room], sharded=True)
        assert await here.link.heard(room)
        replies: list[Any] = []
        sent = 0

        async def publish() -> None:
            nonlocal sent
            while True:
                for _ in range(5):
                    sent += 1
                    here.link.send_script(replies.append, APPEND, ["broker:{moving}:list"], sent)
                await until(lambda: len(replies) >= sent - 50)  # noqa: B023

        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish)
            await until(lambda: len(replies) > 50)
            target = next(node for node in three.primaries if node is not three.owner(slot))
            await trio.to_thread.run_sync(three.move, slot, target)
            await until(lambda: here.ups >= 2 and here.link.up)
            ahead = sent
            await until(lambda: len(replies) > ahead + 50)
            nursery.cancel_scope.cancel()
        await until(lambda: len(replies) == sent)
        assert [reply for reply in replies if isinstance(reply, LinkError)] == []
        stored = await here.link.call("broker:{moving}:list", "LRANGE", "broker:{moving}:list", 0, -1)
        assert stored == [b"%d" % number for number in range(1, sent + 1)], "in order, each once"
        assert here.link.hears(room)
        assert await here.send(room, "SPUBLISH", room, "here") == 1
        await until(lambda: (room, b"here") in here.messages)
        assert len(here.run_ids) == 1, "no primary has changed"


async def test_a_slot_on_its_way_is_asked_for_at_both_ends(three: Sharded) -> None:
    key = "broker:{halfway}:k"
    slot = key_slot(key.encode())
    async with linked(three.url, **QUICK) as here:
        target = next(node for node in three.primaries if node is not three.owner(slot))
        three.begin_move(slot, target)
        assert await here.send(key, "SET", key, "1") == b"OK"
        assert await here.send(key, "INCR", key) == 2
        assert await here.link.call(key, "INCR", key) == 3
        assert await here.link.call(key, "GET", "broker:{halfway}:none") is None
        three.end_move(slot, target)
        assert await here.send(key, "INCR", key) == 4
        assert await here.link.call(key, "INCR", key) == 5


async def test_a_node_that_dies_is_replaced_by_its_replica() -> None:
    with sharded(replicas=True) as cluster:
        async with linked(cluster.url, **QUICK) as here:
            here.link.subscribe(ROOMS, sharded=True)
            here.link.subscribe(["plain"], sharded=False)
            await until(lambda: all(map(here.link.hears, [*ROOMS, "plain"])))
            cluster.primaries[0].server.kill()
            await until(lambda: here.downs)
            await until(lambda: here.link.up)
            assert len(set(here.run_ids)) == 2
            for room in (*ROOMS, "plain"):
                assert here.link.hears(room)
            for room in ROOMS:
                answer = await here.send(room, "SPUBLISH", room, "after")
                assert answer == 1, room
            await until(lambda: len(here.messages) == len(ROOMS))


async def test_the_wrong_scheme_ends_the_start_with_a_mend(three: Sharded, redis_at: RedisServer) -> None:
    for url, scheme in (
        (three.primaries[0].server.url, r"redis\+cluster://"),
        (f"redis+cluster://127.0.0.1:{redis_at.port}", "redis://"),
    ):
        here = build(url)
        with pytest.raises(ConfigurationError, match=scheme), trio.fail_after(PATIENCE):
            await here.link.run()


async def test_without_a_cluster_the_broker_starts_and_waits() -> None:
    here = build("redis+cluster://127.0.0.1:1", **{**QUICK, "connect_timeout": 0.2})
    async with trio.open_nursery() as nursery:
        await nursery.start(here.link.run)
        assert not here.link.up
        assert isinstance(await here.send("k", "PING"), LinkDown)
        with pytest.raises(LinkDown):
            await here.link.call("k", "PING")
        here.link.subscribe(ROOMS, sharded=True)
        assert not await here.link.heard(ROOMS[0])
        nursery.cancel_scope.cancel()
