"""The engine while Redis is killed, frozen, refuses, forgets, or loses its tail."""

from __future__ import annotations

import random
from typing import Any

import pytest
import redis
import trio
from trio.testing import wait_all_tasks_blocked

from broker.engine.base import HistoryQuery, Seen
from broker.errors import BrokerError, ErrorCode
from broker.protocol.events import Position
from tests.engine.contract import ALL, KEEP, Reply
from tests.link.linked import until
from tests.redis_server import RedisServer, redis_server
from tests.streams.linked_engine import ClusterRig, RedisHarness, redis_of, refusal, together

ALWAYS: dict[str, Any] = {"appendonly": "yes", "appendfsync": "always"}
QUICK: dict[str, Any] = {"answer_timeout": 0.3, "probe_after": 0.3, "probe_timeout": 0.3}
"""Settings of the link that make a fault short."""


async def back(*rigs: ClusterRig, ups: int = 2) -> None:
    """Wait until every engine was told that its link is up again."""
    await until(lambda: all(rig.engine.ups >= ups and rig.engine.link.up for rig in rigs))


async def test_a_kill_with_every_write_synced_is_told_to_nobody() -> None:
    with redis_server(**ALWAYS) as server:
        async with together(RedisHarness(server)) as rigs:
            one, two = rigs
            for rig in rigs:
                await rig.engine.open("deal:1", KEEP)
            before = await one.fill("deal:1", 5)
            server.kill()
            server.start()
            await back(*rigs)
            after = await two.publish("deal:1").position()
            assert after == Position(before.epoch, 6)
            for rig in rigs:
                await rig.caught_up("deal:1", 6)
                assert rig.offsets("deal:1") == [1, 2, 3, 4, 5, 6]
                assert rig.moves == []
            page = await two.engine.history("deal:1", HistoryQuery(9, since=Position(before.epoch, 2)), KEEP)
            assert (page.recovered, [event.offset for event in page.events]) == (True, [3, 4, 5, 6])


async def test_a_kill_without_persistence_is_another_epoch() -> None:
    with redis_server() as server:
        async with together(RedisHarness(server)) as rigs:
            one, two = rigs
            for rig in rigs:
                await rig.engine.open("deal:1", KEEP)
            before = await one.fill("deal:1", 5)
            server.kill()
            server.start()
            await until(lambda: all(rig.moves for rig in rigs))
            [(_, top)] = one.moves
            assert two.moves == one.moves
            assert (top.offset, top.epoch != before.epoch) == (0, True)
            assert not (await one.history("deal:1", HistoryQuery(9, since=before))).recovered
            assert await one.publish("deal:1").position() == Position(top.epoch, 1)


@pytest.mark.parametrize("survivor", [0, 1], ids=["publisher", "subscriber"])
async def test_a_kill_that_loses_the_tail_is_told_by_whoever_has_seen_it(survivor: int) -> None:
    """The node that stored the lost events knows it, and so does one that only delivered them."""
    with redis_server() as server:
        harness = RedisHarness(server)
        async with together(harness) as rigs:
            for rig in rigs:
                await rig.engine.open("deal:1", KEEP)
            await rigs[0].fill("deal:1", 5)
            with server.client() as client:
                client.save()
            before = await rigs[0].fill("deal:1", 3)
            await rigs[1].caught_up("deal:1", 8)
            rig = rigs[survivor]
            rigs[1 - survivor].alone.cancel()
            server.kill()
            server.start()
            await until(lambda: rig.moves)
            [(_, top)] = rig.moves
            assert (top.offset, top.epoch != before.epoch) == (5, True)
            assert await rig.publish("deal:1").position() == Position(top.epoch, 6)
            assert not (await rig.history("deal:1", HistoryQuery(9, since=before))).recovered


async def test_a_kill_that_loses_the_tail_together_with_those_who_saw_it_is_told_too() -> None:
    with redis_server() as server:
        harness = RedisHarness(server, patience=0.2)
        async with together(harness) as [one, two]:
            with server.client() as client:
                client.zadd(one.engine.keys.leases, {one.engine.name: 1, two.engine.name: 1})
                client.save()
            await two.engine.open("deal:2", KEEP)
            before = await one.fill("deal:1", 3)
            assert two.engine.generation.commits == 0  # the other knows nothing of it
            one.alone.cancel()
            server.kill()
            server.start()
            await until(lambda: two.moves)
            page = await two.history("deal:1", HistoryQuery(9, since=before))
            assert not page.recovered
            assert page.top.epoch != before.epoch


async def test_while_redis_is_away_publishers_are_refused_and_then_nothing_is_missing() -> None:
    with redis_server(**ALWAYS) as server:
        async with together(RedisHarness(server)) as rigs:
            one, two = rigs
            for rig in rigs:
                await rig.engine.open("deal:1", KEEP)
            before = await one.fill("deal:1", 2)
            server.kill()
            await until(lambda: not one.engine.link.up)
            await refusal(one.publish("deal:1", key="k"))
            with pytest.raises(BrokerError) as caught:
                await one.engine.open("deal:2", KEEP)
            assert caught.value.code is ErrorCode.UNAVAILABLE
            with pytest.raises(BrokerError):
                await one.engine.history("deal:2", ALL, KEEP)
            assert one.engine.position("deal:1") == before
            assert one.count("failing") == 1
            server.start()
            await back(*rigs)
            await until(lambda: one.count("failing") == 0)
            first = await one.publish("deal:1", key="k").position()
            assert await one.publish("deal:1", key="k").position() == first == Position(before.epoch, 3)
            assert (await one.engine.open("deal:2", KEEP)).offset == 0
            await two.caught_up("deal:1", 3)
            assert one.offsets("deal:1") == two.offsets("deal:1") == [1, 2, 3]


async def test_a_frozen_redis_is_answered_for_and_stores_once() -> None:
    with redis_server() as server:
        async with together(RedisHarness(server, **QUICK)) as rigs:
            one, two = rigs
            for rig in rigs:
                await rig.engine.open("deal:1", KEEP)
            before = await one.fill("deal:1", 2)
            server.freeze()
            try:
                with trio.fail_after(10):  # for ever, if nobody watched
                    await refusal(one.publish("deal:1", "frozen", key="k"))
            finally:
                server.thaw()
            await back(one)  # the other may not have noticed anything
            position = await one.publish("deal:1", "again", key="k").position()
            assert position == Position(before.epoch, 3)
            last = await two.publish("deal:1").position()
            assert last == Position(before.epoch, 4)
            for rig in rigs:
                await rig.caught_up("deal:1", 4)
                assert rig.offsets("deal:1") == [1, 2, 3, 4]
                assert rig.moves == []


async def test_messages_lost_with_the_subscriber_are_read_from_the_stream() -> None:
    with redis_server() as server:
        async with together(RedisHarness(server)) as rigs:
            one, two = rigs
            await two.engine.open("deal:1", KEEP)
            with server.client() as client:
                for _ in range(3):
                    ups = two.engine.ups
                    client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
                    await one.fill("deal:1", 10)
                    await back(two, ups=ups + 1)
            await two.caught_up("deal:1", 30)
            assert two.offsets("deal:1") == list(range(1, 31))


async def test_forgotten_scripts_cost_nothing() -> None:
    with redis_server() as server:
        async with together(RedisHarness(server), 1) as [rig]:
            with server.client() as client:
                replies = []
                for number in range(60):
                    if number % 20 == 10:
                        client.script_flush()
                    replies.append(rig.publish("deal:1", number))
                    await trio.lowlevel.checkpoint()
            assert [(await reply.position()).offset for reply in replies] == list(range(1, 61))
            with server.client() as client:
                client.script_flush()
            assert len((await rig.history("deal:1", ALL)).events) == 60


async def test_a_full_redis_refuses_whole_events() -> None:
    with redis_server() as server:
        async with together(RedisHarness(server), 1) as [rig]:
            await rig.engine.open("deal:1", KEEP)
            await rig.fill("deal:1", 3)
            with server.client() as client:
                client.config_set("maxmemory", 1)
                error = await refusal(rig.publish("deal:1", key="k"))
                assert "OOM" in error.message
                assert rig.count("failing") == 1
                assert rig.count("failed_publishes") == 1
                client.config_set("maxmemory", 0)
            assert (await rig.publish("deal:1", key="k").position()).offset == 4
            assert rig.count("failing") == 0
            assert rig.offsets("deal:1") == [1, 2, 3, 4]


async def test_a_disk_that_cannot_be_written_refuses_whole_events() -> None:
    with redis_server(save="3600 1") as server:
        async with together(RedisHarness(server), 1) as [rig]:
            await rig.fill("deal:1", 3)
            with server.client() as client:
                server.directory.joinpath("dump.rdb").mkdir()
                client.bgsave()
                await until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
                assert "MISCONF" in (await refusal(rig.publish("deal:1"))).message
                client.config_set("stop-writes-on-bgsave-error", "no")
            assert (await rig.publish("deal:1").position()).offset == 4


async def test_a_store_that_takes_events_again_is_noticed_though_nobody_publishes() -> None:
    """Whoever is not ready is sent nobody, so nobody might ever publish again."""
    with redis_server() as server:
        async with together(RedisHarness(server), 1) as [rig]:
            await rig.fill("deal:1", 1)
            with server.client() as client:
                client.config_set("maxmemory", 1)
                await refusal(rig.publish("deal:1"))
                await wait_all_tasks_blocked()
                assert rig.count("failing") == 1
                client.config_set("maxmemory", 0)
            await until(lambda: rig.count("failing") == 0)
            assert rig.count("stored") == 1


async def test_trials_are_not_taken_for_a_store_that_works() -> None:
    with redis_server() as server:
        async with together(RedisHarness(server), 1) as [rig]:
            await rig.fill("deal:1", 1)
            with server.client() as client:
                client.config_resetstat()
                client.config_set("maxmemory", 1)
                await refusal(rig.publish("deal:1"))
                await until(
                    lambda: client.info("commandstats").get("cmdstat_set", {}).get("rejected_calls", 0)
                )
                await wait_all_tasks_blocked()
            assert rig.count("failing") == 1


# Replicas


def follow(primary: RedisServer, replica: redis.Redis) -> None:
    replica.replicaof("127.0.0.1", primary.port)


async def test_an_event_counts_when_replicas_have_it() -> None:
    with (
        redis_server(repl_diskless_sync_delay="0") as primary,
        redis_server() as other,
        other.client() as replica,
    ):
        async with together(RedisHarness(primary, replicas=1)) as [one, two]:
            await two.engine.open("deal:1", KEEP)
            error = await refusal(one.publish("deal:1", key="k"))
            assert "NOREPLICAS" in error.message
            assert one.offsets("deal:1") == []
            assert one.count("failing") == 1
            await two.caught_up("deal:1", 1)  # it is stored, and told to those who hear of it
            follow(primary, replica)
            await until(lambda: replica.info("replication")["master_link_status"] == "up")
            await until(lambda: one.count("failing") == 0)
            assert (await one.publish("deal:1", key="k").position()).offset == 1
            replies = [one.publish("deal:1", number) for number in range(20)]
            assert [(await reply.position()).offset for reply in replies] == list(range(2, 22))
            assert one.offsets("deal:1") == list(range(2, 22))
            await two.caught_up("deal:1", 21)
            assert one.count("too_few_replicas") == 1
            # Behind a frozen replica, a key that was seen proves nothing.
            other.freeze()
            try:
                await refusal(one.publish("deal:1", key="k"))
            finally:
                other.thaw()


async def test_a_node_that_starts_without_redis_serves_when_it_comes() -> None:
    with redis_server() as server:
        server.kill()
        async with together(RedisHarness(server, connect_timeout=0.1), 1) as [rig]:
            await refusal(rig.publish("deal:1"))
            with pytest.raises(BrokerError):
                await rig.engine.open("deal:1", KEEP)
            assert rig.count("failing") == 1
            server.start()
            await back(rig, ups=1)
            assert (await rig.engine.open("deal:1", KEEP)).offset == 0
            assert (await rig.publish("deal:1").position()).offset == 1


async def test_an_acknowledged_position_outlives_an_outage() -> None:
    with redis_server(**ALWAYS) as server:
        async with together(RedisHarness(server), 1) as [rig]:
            await rig.fill("deal:1", 3)
            server.kill()
            await until(lambda: not rig.engine.link.up)
            rig.engine.acknowledge("deal:1", "ann", 2, 5.0)
            await until(lambda: rig.count("failed_acknowledgements"))
            server.start()
            await until(lambda: rig.count("acknowledgements"))
        async with together(RedisHarness(server, prefix=rig.engine.keys.prefix), 1) as [again]:
            assert await again.engine.acknowledgements("deal:1") == [Seen("ann", 2, 5.0)]


def newest(rig: ClusterRig, room: str) -> int:
    """The newest offset of the room in the store."""
    with redis_of(rig) as client:
        offset: Any = client.hget(rig.engine.keys.meta(room), "offset")
    return int(offset or 0)


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_lost_on_the_way_everything_arrives_once_and_in_order(seed: int) -> None:
    """Three nodes publish, open and close rooms, while messages vanish and connections are cut."""
    rooms = [f"deal:{number}" for number in range(4)]
    dice = random.Random(seed)
    with redis_server() as server, server.client() as client:
        async with together(RedisHarness(server), 3, sweep_interval=0.1) as rigs:
            for rig in rigs:
                rig.engine.hears = lambda _room, _head: dice.random() > 0.2
            tops: dict[tuple[int, str], int] = {}
            starts: dict[tuple[int, str], int] = {}
            replies: list[tuple[str, Reply]] = []
            for _ in range(150):
                number, room = dice.randrange(3), dice.choice(rooms)
                rig, here = rigs[number], (number, room)
                match dice.choices(["publish", "open", "close", "cut"], [20, 4, 1, 0.4])[0]:
                    case "publish":
                        replies += [
                            (room, rig.publish(room, key=str(dice.randrange(50))))
                            for _ in range(dice.randrange(4))
                        ]
                    case "open" if here not in tops:
                        try:
                            top = await rig.engine.open(room, KEEP)
                        except BrokerError:
                            continue  # its connection was cut
                        tops[here] = top.offset
                        starts[here] = len(rig.delivered)
                    case "close" if here in tops:
                        rig.engine.close(room)
                        del tops[here]
                    case "cut":
                        client.execute_command("CLIENT", "KILL", "TYPE", dice.choice(["normal", "pubsub"]))
                await trio.sleep(dice.choice([0, 0, 0.001]))
            for _, reply in replies:
                await reply.answer()
            ends = {room: newest(rigs[0], room) for room in rooms}
            for (number, room), start in tops.items():
                rig = rigs[number]
                await rig.caught_up(room, ends[room])
                offsets = [
                    event.offset
                    for event in rig.delivered[starts[number, room] :]
                    if event.room == room and event.offset > start
                ]
                assert offsets == list(range(start + 1, ends[room] + 1))
                assert rig.moves == []
