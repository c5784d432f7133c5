"""The engine of a cluster against the contract, and what only many nodes can go through."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from broker.engine.base import HistoryQuery, Retention, Seen
from broker.errors import BrokerError
from broker.protocol.events import Position, SessionId, make_event
from broker.streams.repairs import PAGE
from tests.engine.contract import ALL, KEEP, START, EngineContract
from tests.link.linked import until
from tests.redis_server import RedisServer
from tests.streams.linked_engine import RedisHarness, ShardLink, redis_of, together


class TestRedis(EngineContract):
    @pytest.fixture
    def harness(self, redis_at: RedisServer) -> RedisHarness:
        return RedisHarness(redis_at)


@pytest.fixture
def harness(redis_at: RedisServer) -> RedisHarness:
    return RedisHarness(redis_at)


# Two nodes


async def test_what_one_node_stores_both_deliver(harness: RedisHarness) -> None:
    async with together(harness) as [one, two]:
        tops = [await rig.engine.open("deal:1", KEEP) for rig in (one, two)]
        assert tops[0] == tops[1]
        replies = [rig.publish("deal:1", number) for number in range(50) for rig in (one, two)]
        for reply in replies:
            await reply.position()
        for rig in (one, two):
            await rig.caught_up("deal:1", 100)
            assert rig.offsets("deal:1") == list(range(1, 101))
        assert [event.wire for event in one.delivered] == [event.wire for event in two.delivered]
        assert one.moves == two.moves == []


async def test_a_received_event_is_whole(harness: RedisHarness) -> None:
    async with together(harness) as [one, two]:
        await two.engine.open("deal:1", KEEP)
        session = SessionId("s1")
        await one.publish("deal:1", {"a": 1}, slot="card", tags={"n": 1}, exclude=session).position()
        await one.publish("deal:1").position()
        await two.caught_up("deal:1", 2)
        for event in (two.delivered[0], (await two.history("deal:1", ALL)).events[0]):
            assert (event.wire, event.ts) == (one.delivered[0].wire, one.delivered[0].ts)
            assert (event.slot, event.tags, event.exclude) == ("card", {"n": 1}, session)
        assert two.delivered[1].exclude is None


async def test_a_node_that_opens_a_room_gets_what_follows(harness: RedisHarness) -> None:
    """Publishing goes on while the other opens, closes and opens again: no event is missed after a top."""
    async with together(harness) as [one, two]:
        stop = False

        async def publish() -> None:
            while not stop:
                await one.publish("deal:1").position()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish)
            for _ in range(20):
                two.delivered.clear()
                top = await two.engine.open("deal:1", KEEP)
                after = top.offset
                await two.caught_up("deal:1", after + 3)
                offsets = [offset for offset in two.offsets("deal:1") if offset > after]
                assert offsets == list(range(after + 1, after + 1 + len(offsets)))
                two.engine.close("deal:1")
            stop = True


async def test_a_key_is_stored_once_whichever_node_it_comes_to(harness: RedisHarness) -> None:
    async with together(harness) as [one, two]:
        await two.engine.open("deal:1", KEEP)
        replies = [rig.publish("deal:1", number, key="k") for number in range(5) for rig in (one, two)]
        positions = {await reply.position() for reply in replies}
        assert {position.offset for position in positions} == {1}
        await two.caught_up("deal:1", 1)
        await two.publish("deal:1").position()
        assert two.offsets("deal:1") == [1, 2]
        assert one.count("duplicates") + two.count("duplicates") == 9


async def test_a_key_counts_for_as_long_as_its_publisher_wants(redis_at: RedisServer) -> None:
    async with together(RedisHarness(redis_at, key_windows={"backend": 86_400.0}), 1) as [rig]:
        for expected, passed in ((1, 0), (1, 80_000), (2, 10_000)):
            rig.clock.now += passed
            assert (await rig.publish("deal:1", key="k", publisher="backend").position()).offset == expected
        rig.clock.now += 1000
        assert (await rig.publish("deal:1", key="k", publisher="backend").position()).offset == 2
        for expected in (3, 4):
            assert (await rig.publish("deal:1", key="k", publisher="ann").position()).offset == expected
            rig.clock.now += 1000


async def test_a_client_that_knows_more_than_this_node_is_not_told_that_it_lost_anything(
    harness: RedisHarness,
) -> None:
    async with together(harness) as [one, two]:
        await two.engine.open("deal:1", KEEP)
        two.engine.hears = lambda _room, _head: False
        top = [await one.publish("deal:1").position() for _ in range(3)][-1]
        assert two.engine.history_nowait("deal:1", HistoryQuery(5, since=top)) is None
        page = await two.engine.history("deal:1", HistoryQuery(5, since=top), KEEP)
        assert (page.recovered, page.events, page.top) == (True, [], top)


async def test_reads_that_are_the_same_are_two_at_most(harness: RedisHarness) -> None:
    async with together(harness, 1) as [rig]:
        await rig.fill("deal:1", 20)
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(rig.engine.history, "deal:1", ALL, KEEP)
        assert rig.count("reads") == 1
        assert rig.count("shared_reads") == 49


async def test_a_reader_who_gives_up_does_not_end_the_others_read(harness: RedisHarness) -> None:
    async with together(harness, 1) as [rig]:
        await rig.fill("deal:1", 20)
        pages = []

        async def read(*, task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED) -> None:
            with trio.CancelScope() as scope:
                task_status.started(scope)
                pages.append(await rig.engine.history("deal:1", ALL, KEEP))

        async with trio.open_nursery() as nursery:
            first = await nursery.start(read)
            nursery.start_soon(read)
            first.cancel()
        assert [len(page.events) for page in pages] == [20]


# Lost messages


async def test_a_lost_message_is_read_from_the_stream(harness: RedisHarness) -> None:
    async with together(harness) as [one, two]:
        await two.engine.open("deal:1", KEEP)
        two.engine.hears = lambda _room, head: head.words[1] not in {"3", "4", "9"}
        await one.fill("deal:1", 12)
        await two.caught_up("deal:1", 12)
        assert two.offsets("deal:1") == list(range(1, 13))
        assert two.count("repaired_events") >= 1
        assert two.count("holes") >= 1
        assert two.moves == []


async def test_the_last_message_is_missed_by_the_sweep(harness: RedisHarness) -> None:
    async with together(harness, sweep_interval=0.05) as [one, two]:
        await two.engine.open("deal:1", KEEP)
        two.engine.hears = lambda _room, _head: False
        await one.fill("deal:1", 3)
        await two.caught_up("deal:1", 3)
        assert two.offsets("deal:1") == [1, 2, 3]
        assert two.count("behind") >= 1


async def test_own_events_wait_for_those_before_them(harness: RedisHarness) -> None:
    async with together(harness) as [one, two]:
        await two.engine.open("deal:1", KEEP)
        two.engine.hears = lambda _room, _head: False
        await one.fill("deal:1", 3)
        delivered_at_done: list[list[int]] = []

        def done(answer: Position | BrokerError) -> None:
            assert isinstance(answer, Position)
            delivered_at_done.append(two.offsets("deal:1"))

        two.engine.publish(make_event("deal:1", "said", None, two.clock.now), KEEP, done)
        await until(lambda: delivered_at_done)
        assert delivered_at_done == [[1, 2, 3, 4]]


async def test_a_long_absence_is_read_in_pages(harness: RedisHarness) -> None:
    keep = Retention(2000, 3600.0)
    async with together(harness) as [one, two]:
        await two.engine.open("deal:1", keep)
        two.engine.hears = lambda _room, _head: False
        await one.fill("deal:1", PAGE * 2 + 10, retention=keep)
        two.engine.reconnected()
        await two.caught_up("deal:1", PAGE * 2 + 10)
        assert two.offsets("deal:1") == list(range(1, PAGE * 2 + 11))


async def test_what_was_trimmed_before_it_could_be_read_is_told(harness: RedisHarness) -> None:
    keep = Retention(1, 3600.0)
    async with together(harness) as [one, two]:
        top = await two.engine.open("deal:1", keep)
        two.engine.hears = lambda _room, _head: False
        await one.fill("deal:1", 450, retention=keep)
        with redis_of(two) as client:
            kept = int(client.xinfo_stream(two.engine.keys.stream("deal:1"))["first-entry"][0].split(b"-")[0])
        assert kept > 1
        two.engine.reconnected()
        await two.caught_up("deal:1", 450)
        assert two.moves == [("deal:1", Position(top.epoch, kept - 1))]
        assert two.offsets("deal:1") == list(range(kept, 451))


async def test_a_lost_stream_leaves_a_gap_without_an_event(harness: RedisHarness) -> None:
    async with together(harness) as [one, two]:
        top = await two.engine.open("deal:1", KEEP)
        two.engine.hears = lambda _room, _head: False
        await one.fill("deal:1", 5)
        with redis_of(two) as client:
            client.delete(two.engine.keys.stream("deal:1"))
        two.engine.reconnected()
        await until(lambda: two.moves)
        assert two.moves == [("deal:1", Position(top.epoch, 5))]
        page = await two.history("deal:1", HistoryQuery(9, since=Position(top.epoch, 3)))
        assert (page.recovered, page.events) == (False, [])
        assert (await two.publish("deal:1").position()).offset == 6
        assert two.offsets("deal:1") == [6]


async def test_a_message_that_cannot_be_read_costs_nothing_else(harness: RedisHarness) -> None:
    async with together(harness) as [one, two]:
        top = await two.engine.open("deal:1", KEEP)
        with redis_of(two) as client:
            for words in (b"d", b"d a b c d e f", f"d {top.epoch} 1 - 1 x y".encode()):
                client.publish(two.engine.keys.live("deal:1"), words + b"\nnot JSON")
        await one.fill("deal:1", 2)
        await two.caught_up("deal:1", 2)
        assert two.offsets("deal:1") == [1, 2]
        assert two.count("bad_messages") == 3


async def test_an_entry_that_cannot_be_read_is_a_gap(harness: RedisHarness) -> None:
    async with together(harness, 1) as [rig]:
        top = await rig.publish("deal:1").position()
        keys = rig.engine.keys
        with redis_of(rig) as client:
            client.xadd(keys.stream("deal:1"), {"ts": "1", "body": "not JSON"}, id="2-0")
            client.hset(keys.meta("deal:1"), "offset", 2)
        assert (await rig.publish("deal:1").position()).offset == 3
        page = await rig.history("deal:1", HistoryQuery(9, since=Position(top.epoch, 0)))
        assert ([event.offset for event in page.events], page.recovered) == ([1, 3], False)
        assert rig.count("unreadable") >= 1


# A store that is not what it was


async def test_flushall_is_another_epoch(harness: RedisHarness) -> None:
    async with together(harness, sweep_interval=0.05) as rigs:
        one, two = rigs
        for rig in rigs:
            await rig.engine.open("deal:1", KEEP)
            await rig.engine.open("deal:2", KEEP)
        before = await one.fill("deal:1", 5)
        await two.caught_up("deal:1", 5)
        with redis_of(one) as client:
            client.flushall()
        await until(lambda: all(len(rig.moves) == 2 for rig in rigs))
        assert sorted(one.moves) == sorted(two.moves)
        (_, top), _ = sorted(one.moves)
        assert (top.offset, top.epoch != before.epoch) == (0, True)
        assert await two.publish("deal:1").position() == Position(top.epoch, 1)
        await one.caught_up("deal:1", 1)
        assert one.offsets("deal:1") == [1, 2, 3, 4, 5, 1]
        page = await one.history("deal:1", HistoryQuery(9, since=Position(before.epoch, 3)))
        assert (page.recovered, page.top) == (False, Position(top.epoch, 1))
        assert one.count("generations") == 1


async def test_an_event_stored_after_flushall_is_answered_when_the_room_has_moved(
    harness: RedisHarness,
) -> None:
    async with together(harness) as [one, two]:
        for rig in (one, two):
            await rig.engine.open("deal:1", KEEP)
        await one.fill("deal:1", 5)
        await two.caught_up("deal:1", 5)
        with redis_of(one) as client:
            client.flushall()
        position = await one.publish("deal:1").position()
        assert position.offset == 1
        assert one.moves == [("deal:1", position)]
        await until(lambda: two.moves)
        assert two.moves == [("deal:1", position)]
        assert one.engine.position("deal:1") == two.engine.position("deal:1") == position


async def test_an_evicted_meta_is_another_epoch_and_never_has_old_events(harness: RedisHarness) -> None:
    async with together(harness, 1) as [rig]:
        before = await rig.fill("deal:1", 5)
        with redis_of(rig) as client:
            client.delete(rig.engine.keys.meta("deal:1"))
        after = await rig.publish("deal:1").position()
        assert (after.offset, after.epoch != before.epoch) == (1, True)
        assert len((await rig.history("deal:1", ALL)).events) == 1
        with redis_of(rig) as client:
            client.delete(rig.engine.keys.meta("deal:1"))
        page = await rig.history("deal:1", ALL)
        assert (page.events, page.top.offset) == ([], 0)
        assert page.top.epoch not in {before.epoch, after.epoch}


async def test_acknowledged_positions_do_not_outlive_their_stream(harness: RedisHarness) -> None:
    async with together(harness, 1) as [rig]:
        await rig.fill("deal:1", 5)
        rig.engine.acknowledge("deal:1", "ann", 4, START)
        await until(lambda: rig.count("acknowledgements"))
        assert await rig.engine.acknowledgements("deal:1") == [Seen("ann", 4, START)]
        with redis_of(rig) as client:
            client.delete(rig.engine.keys.meta("deal:1"))
        assert await rig.engine.acknowledgements("deal:1") == []
        await rig.publish("deal:1").position()
        rig.engine.acknowledge("deal:1", "bob", 1, START)
        await until(lambda: rig.count("acknowledgements") == 2)
        assert await rig.engine.acknowledgements("deal:1") == [Seen("bob", 1, START)]


async def test_an_evicted_stream_goes_on_counting(harness: RedisHarness) -> None:
    async with together(harness, 1) as [rig]:
        before = await rig.fill("deal:1", 5)
        with redis_of(rig) as client:
            client.delete(rig.engine.keys.stream("deal:1"))
        assert await rig.publish("deal:1").position() == Position(before.epoch, 6)
        page = await rig.history("deal:1", HistoryQuery(9, since=before))
        assert ([event.offset for event in page.events], page.recovered) == ([6], True)
        page = await rig.history("deal:1", HistoryQuery(9, since=Position(before.epoch, 4)))
        assert ([event.offset for event in page.events], page.recovered) == ([6], False)


async def test_a_stream_ahead_of_its_meta_belongs_to_another_life(harness: RedisHarness) -> None:
    async with together(harness, 1) as [rig]:
        before = await rig.fill("deal:1", 5)
        with redis_of(rig) as client:
            client.hset(rig.engine.keys.meta("deal:1"), "offset", 2)
        after = await rig.publish("deal:1").position()
        assert (after.offset, after.epoch != before.epoch) == (3, True)
        assert [event.offset for event in (await rig.history("deal:1", ALL)).events] == [3]


async def test_a_tail_that_vanished_is_told_before_its_offsets_come_again(harness: RedisHarness) -> None:
    """A backup put back under the nodes' feet: the count falls, and every room has another epoch."""
    async with together(harness, sweep_interval=0.05) as rigs:
        one, two = rigs
        for rig in rigs:
            await rig.engine.open("deal:1", KEEP)
        await one.fill("deal:1", 5)
        keys = [one.engine.keys.store, one.engine.keys.meta("deal:1"), one.engine.keys.stream("deal:1")]
        with redis_of(one) as client:
            backup = {key: client.dump(key) for key in keys}
            before = await one.fill("deal:1", 3)
            await two.caught_up("deal:1", 8)
            with client.pipeline(transaction=True) as pipe:
                for key, value in backup.items():
                    assert isinstance(value, bytes)
                    pipe.restore(key, 0, value, replace=True)
                pipe.execute()
        await until(lambda: all(rig.moves for rig in rigs))
        [(_, top)] = one.moves
        assert two.moves == one.moves
        assert (top.offset, top.epoch != before.epoch) == (5, True)
        assert await one.publish("deal:1").position() == Position(top.epoch, 6)
        await two.caught_up("deal:1", 6)
        assert one.offsets("deal:1") == two.offsets("deal:1") == [*range(1, 9), 6]
        page = await two.history("deal:1", HistoryQuery(9, since=before))
        assert not page.recovered


async def test_a_count_that_falls_is_noticed_by_an_answer(harness: RedisHarness) -> None:
    async with together(harness, 1, sweep_interval=60.0) as [rig]:
        await rig.engine.open("deal:1", KEEP)
        before = await rig.fill("deal:1", 5)
        with redis_of(rig) as client:
            client.hset(rig.engine.keys.store, "commits", 2)
        await rig.publish("deal:1").position()
        await until(lambda: rig.moves)
        assert rig.moves[0][1].epoch != before.epoch


async def test_one_room_that_lost_its_tail_is_enough(harness: RedisHarness) -> None:
    async with together(harness, 1, sweep_interval=0.05) as [rig]:
        await rig.engine.open("deal:1", KEEP)
        before = await rig.fill("deal:1", 5)
        with redis_of(rig) as client:
            client.hset(rig.engine.keys.meta("deal:1"), "offset", 4)
        await until(lambda: rig.moves)
        [(_, top)] = rig.moves
        assert (top.offset, top.epoch != before.epoch) == (4, True)
        assert rig.count("tails_lost") >= 1


# A Redis Cluster, as far as the engine knows one: nothing is shared between rooms


async def test_in_a_redis_cluster_each_room_has_its_own_epoch(redis_at: RedisServer) -> None:
    harness = RedisHarness(redis_at, link=ShardLink, sweep_interval=0.05)
    async with together(harness) as [one, two]:
        for room in ("deal:1", "deal:2"):
            await two.engine.open(room, KEEP)
        positions = [await one.publish(f"deal:{number}", key="k").position() for number in (1, 2)]
        assert positions[0].epoch != positions[1].epoch
        assert await two.publish("deal:1", key="k").position() == positions[0]
        assert await two.publish("deal:1").position() == Position(positions[0].epoch, 2)
        assert two.offsets("deal:1") == [1, 2]
        await two.caught_up("deal:2", 1)
        page = await two.history("deal:1", HistoryQuery(9, since=Position(positions[0].epoch, 1)))
        assert (page.recovered, len(page.events)) == (True, 1)
        with redis_of(one) as client:
            assert client.exists(one.engine.keys.store) == 0
            with client.pubsub(ignore_subscribe_messages=True) as listener:
                listener.ssubscribe(one.engine.keys.live("deal:1"))
                await one.publish("deal:1").position()
                messages: list[Any] = []

                def heard() -> bool:
                    messages.append(listener.get_sharded_message())
                    return messages[-1] is not None

                await until(heard)
        assert messages[-1]["data"].startswith(b"d %b 3 - 0 " % positions[0].epoch.encode())


async def test_in_a_redis_cluster_a_room_that_lost_its_tail_is_renewed(redis_at: RedisServer) -> None:
    harness = RedisHarness(redis_at, link=ShardLink, sweep_interval=0.05)
    async with together(harness, 1) as [rig]:
        for room in ("deal:1", "deal:2"):
            await rig.engine.open(room, KEEP)
        before = await rig.fill("deal:1", 5)
        other = await rig.fill("deal:2", 5)
        with redis_of(rig) as client:
            client.hset(rig.engine.keys.meta("deal:1"), "offset", 4)
        await until(lambda: rig.moves)
        [(room, top)] = rig.moves
        assert (room, top.offset, top.epoch != before.epoch) == ("deal:1", 4, True)
        assert rig.engine.position("deal:2") == other
