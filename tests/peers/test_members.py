"""Members told from node to node: seen once, in every case in which something gets lost."""

from __future__ import annotations

import trio
import trio.lowlevel

from broker.link.wire import PRESENCE
from broker.peers import members
from tests.peers.company import Company, Fellow, company, until
from tests.redis_server import RedisServer


def hears(there: Fellow, room: str, *sessions: str) -> bool:
    return there.sees(room) == set(sessions)


async def pair(nodes: Company) -> tuple[Fellow, Fellow]:
    """One that has members in ``r``, and one that watches."""
    here, there = await nodes.start_all("here", "there")
    await there.peers.attach("r")
    return here, there


async def test_a_member_is_seen_to_come_change_and_go_once_each(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await pair(nodes)
        here.come("r", "s1", "u1")
        await until(lambda: hears(there, "r", "s1"))
        here.come("r", "s1", "u1", {"typing": True})
        await until(lambda: b"typing" in there.hub.mates("r")["s1"])
        here.go("r", "s1")
        await until(lambda: hears(there, "r"))
        here.come("r", "s1")
        await until(lambda: hears(there, "r", "s1"))
        assert there.hub.told == [
            ("came", "r", "s1"), ("changed", "r", "s1"), ("went", "r", "s1"), ("came", "r", "s1"),
        ]  # fmt: skip
        assert there.count("versions_missed") == 0
        assert here.hub.told == []


async def test_many_changes_are_one_telling(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await pair(nodes)
        for state in range(100):
            here.come("r", "s1", "u1", state)
            here.come("r", "s2", "u2", state)
        here.come("r", "passing")
        here.go("r", "passing")
        here.come("elsewhere", "passing")
        here.go("elsewhere", "passing")
        await until(lambda: hears(there, "r", "s1", "s2"))
        assert here.count("told_changes") == 1
        assert there.hub.told == [("came", "r", "s1"), ("came", "r", "s2")]
        await until(lambda: here.count("member_rooms") == 1)
        here.go("r", "s1")
        here.come("r", "s1", "u1")
        await until(lambda: there.hub.told[2:] == [("changed", "r", "s1")])


async def test_nothing_stays_in_redis_of_a_room_that_everybody_has_left(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await pair(nodes)
        here.come("r", "s1")
        await until(lambda: hears(there, "r", "s1"))
        assert nodes.left_of(here)
        here.go("r", "s1")
        await until(lambda: hears(there, "r") and nodes.left_of(here) == ["lease"])
        assert here.count("member_rooms") == 0


async def test_a_change_that_was_missed_is_read(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await pair(nodes)
        here.come("r", "s1")
        await until(lambda: hears(there, "r", "s1"))
        there.deaf.add(PRESENCE)
        here.come("r", "s2")
        here.go("r", "s1")
        await until(lambda: here.count("told_changes") == 2)
        there.deaf.clear()
        here.come("r", "s3")
        await until(lambda: hears(there, "r", "s2", "s3"))
        assert there.count("versions_missed") == 1
        assert sorted(there.hub.told) == [
            ("came", "r", "s1"), ("came", "r", "s2"), ("came", "r", "s3"), ("went", "r", "s1"),
        ]  # fmt: skip


async def test_a_going_that_was_missed_is_noticed_by_the_next_coming(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await pair(nodes)
        here.come("r", "s1")
        await until(lambda: hears(there, "r", "s1"))
        there.deaf.add(PRESENCE)
        here.go("r", "s1")
        await until(lambda: here.count("member_rooms") == 0)
        there.deaf.clear()
        here.come("r", "s2")
        await until(lambda: hears(there, "r", "s2"))


async def test_what_redis_has_lost_is_told_anew(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await pair(nodes)
        here.come("r", "s1")
        here.come("r", "s2")
        await until(lambda: hears(there, "r", "s1", "s2"))
        with nodes.client() as client:
            client.flushall()
        here.come("r", "s3")
        await until(lambda: hears(there, "r", "s1", "s2", "s3"))
        await nodes.look_until(lambda: len(here.names()) == len(there.names()) == 2)
        await nodes.settle()
        late = await nodes.start("late")
        await late.peers.attach("r")
        await until(lambda: hears(late, "r", "s1", "s2", "s3"))
        assert sorted(there.hub.told) == [("came", "r", "s1"), ("came", "r", "s2"), ("came", "r", "s3")]


async def test_what_redis_has_evicted_is_told_anew(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await pair(nodes)
        here.come("r", "s1")
        await until(lambda: hears(there, "r", "s1"))
        with nodes.client() as client:
            client.delete(nodes.keys.members("r", here.peers.id))
        here.come("r", "s2")
        await until(lambda: hears(there, "r", "s1", "s2"))
        assert here.count("lost_members") == 1


async def test_versions_that_redis_has_evicted_are_told_anew(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await pair(nodes)
        here.come("r", "s1")
        await until(lambda: hears(there, "r", "s1"))
        with nodes.client() as client:
            client.delete(nodes.keys.member_nodes("r"))
        here.come("r", "s2")
        await until(lambda: hears(there, "r", "s1", "s2"))
        assert here.count("lost_members") == 1


async def test_a_sign_of_life_finds_what_redis_has_evicted(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await pair(nodes)
        here.come("r", "s1")
        here.come("kept", "s1")
        await until(lambda: hears(there, "r", "s1") and here.count("told_changes") == 2)
        with nodes.client() as client:
            client.delete(nodes.keys.members("r", here.peers.id))
            for key in (nodes.keys.members("kept", here.peers.id), nodes.keys.member_nodes("kept")):
                client.pexpire(key, 60_000)
        here.peers.refresh_members()
        late = await nodes.start("late")
        await until(lambda: here.count("lost_members") == 1)
        await until(lambda: here.count("told_anew") == 1)
        await late.peers.attach("r")
        await until(lambda: hears(late, "r", "s1"))
        with nodes.client() as client:
            assert client.pttl(nodes.keys.members("kept", here.peers.id)) > 60_000
            assert client.pttl(nodes.keys.member_nodes("kept")) > 60_000


async def test_a_node_that_died_takes_its_members_with_it(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there, dead = await nodes.start_all("here", "there", "dead")
        for watcher in (here, there):
            await watcher.peers.attach("r")
        dead.come("r", "s1")
        dead.come("r", "s2")
        dead.come("elsewhere", "s2")
        here.come("r", "s3")
        await until(lambda: hears(there, "r", "s1", "s2", "s3") and hears(here, "r", "s1", "s2"))
        await until(lambda: dead.count("told_changes") == 2)
        dead.die()
        nodes.expire(dead)
        await nodes.look_until(lambda: hears(here, "r") and hears(there, "r", "s3"))
        await until(lambda: nodes.left_of(dead) == [])
        for watcher in (here, there):
            assert sorted(one for one in watcher.hub.told if one[0] == "went") == [
                ("went", "r", "s1"), ("went", "r", "s2"),
            ]  # fmt: skip


async def test_a_node_taken_for_dead_is_seen_to_go_and_to_come_back(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        frozen, there = await pair(nodes)
        frozen.come("r", "s1")
        await until(lambda: hears(there, "r", "s1"))
        there.hub.told.clear()
        former = frozen.peers.id
        nodes.take_out(frozen)
        await nodes.look_until(lambda: len(there.hub.told) == 2)
        assert there.hub.told == [("went", "r", "s1"), ("came", "r", "s1")]
        assert frozen.peers.id != former
        frozen.go("r", "s1")
        await until(lambda: hears(there, "r"))


async def test_redis_refusing_a_change_only_delays_it(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await pair(nodes)
        with nodes.client() as client:
            client.set(nodes.keys.member_nodes("r"), "of the wrong type")
            here.come("r", "s1")
            await until(lambda: here.count("failed_changes") == 1)
            client.delete(nodes.keys.member_nodes("r"))
        await until(lambda: hears(there, "r", "s1"))


async def test_more_rooms_than_fit_one_go_are_told_one_go_after_the_other(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await pair(nodes)
        rooms = [f"room:{number}" for number in range(2 * members.BATCH + 1)]
        for room in rooms:
            here.come(room, "s1")
        await until(lambda: here.count("told_changes") == len(rooms))
        assert [mate.session for mate in await there.peers.mates(rooms[-1])] == ["s1"]


async def test_members_come_through_a_broken_connection(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await pair(nodes)
        here.come("r", "s1")
        here.come("r", "s2")
        await until(lambda: hears(there, "r", "s1", "s2"))
        with nodes.client() as client:
            for round_ in range(3):
                client.client_kill_filter(_type="pubsub")
                client.client_kill_filter(_type="normal", skipme=True)
                here.come("r", f"new:{round_}")
                await trio.lowlevel.checkpoint()
        here.go("r", "s1")
        await until(lambda: hears(there, "r", "s2", "new:0", "new:1", "new:2"))
        assert len(there.hub.told) == 6, "nobody was seen twice"
