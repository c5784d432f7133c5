"""The parts together: what comes in finds its part, and what goes out is told to whom it concerns."""

from __future__ import annotations

import trio

from broker.engine.peers import Peers
from broker.link import wire
from broker.peers.graves import BATCH
from broker.protocol.events import SessionId, UserId, make_event
from tests.peers.company import company, until
from tests.peers.fakes import FakeFeed, FakeMember
from tests.redis_server import RedisServer


async def test_it_is_peers(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        peers: Peers = (await nodes.start("here")).peers
        assert [info.name for info in peers.nodes()] == ["here"]


async def test_bad_messages_are_counted(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        (here,) = await nodes.start_all("here")
        await here.peers.attach("r")
        live, node = nodes.keys.live("r"), nodes.keys.node(here.peers.id)
        with nodes.client() as client:
            client.publish(live, wire.pack(wire.EPHEMERAL, "x", "y"))
            client.publish(live, wire.pack(wire.PRESENCE, "x"))
            client.publish(live, wire.pack(wire.PRESENCE, "x", "one"))
            client.publish(live, wire.pack(b"z", "x", 1))
            client.publish(node, wire.pack(b"z", "x", 1))
            client.publish(node, wire.pack(wire.ANSWER, "x"))
            client.publish(node, wire.pack(wire.ASK, "x", "-1"))
        await until(lambda: here.count("bad_messages") == 7)
        client.publish(node, wire.pack(wire.ANSWER, "x", 1, body=b"{}"))
        await until(lambda: here.count("late_answers") == 1)
        assert here.hub.received == []


async def test_what_happens_before_it_runs_is_told_when_it_does(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        there = await nodes.start("there")
        await there.peers.attach("r")
        early = nodes.build("early")
        early.come("r", "s1")
        early.peers.take_live("r", wire.Head(wire.EPHEMERAL, ["x"], b"{}"))
        early.peers.take_node(wire.Head(wire.ASK, ["x", "1"], b"{}"))
        early.peers.relay(make_event("r", "e", None, 1.0))
        assert early.count("not_relayed") == 1
        await nodes.run(early)
        await until(lambda: there.sees("r") == {"s1"})


async def test_the_feed_hears_who_comes_and_goes(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        feed = FakeFeed()
        here = await nodes.start("here", feed=feed)
        await until(lambda: feed.told == ["write all"])
        feed.told.clear()
        session, user = SessionId("s1"), UserId("u1")
        here.peers.appeared(session, None)
        here.peers.touch("r", session, None, FakeMember("s1"))
        here.peers.touch("r", session, None, FakeMember("s1", state=1))
        here.peers.appeared(session, user)
        here.peers.touch("r", session, user, FakeMember("s1", "u1"))
        here.peers.touch("r", session, user, None)
        here.peers.touch("r", session, user, None)
        here.peers.vanished(session, user)
        assert feed.told == [
            "appeared s1 None", "came r s1 None", "appeared s1 u1", "went r s1 None", "came r s1 u1",
            "went r s1 u1", "vanished s1 u1",
        ]  # fmt: skip


async def test_who_leaves_while_the_node_drains_is_told_to_the_feed_alone(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        feed = FakeFeed()
        there = await nodes.start("there")
        here = await nodes.start("here", feed=feed)
        await there.peers.attach("r")
        here.come("r", "s1", "u1")
        await until(lambda: there.sees("r") == {"s1"})
        await here.peers.part()
        here.go("r", "s1")
        here.come("r", "s2", "u2")
        here.go("r", "s2")  # of whom nobody else has heard
        here.come("r", "s3", "u3")
        await until(lambda: there.sees("r") == {"s1", "s3"})
        assert feed.told[-4:] == ["went r s1 u1", "came r s2 u2", "went r s2 u2", "came r s3 u3"]


async def test_a_node_that_drains_without_members_is_not_waited_for_long(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        empty, full = await nodes.start_all("empty", "full")
        full.come("r", "s1")
        for node in (empty, full):
            await node.peers.part()
        with nodes.client() as client:
            await nodes.look_until(
                lambda: all(info.draining for one in nodes.fellows for info in one.peers.nodes())
            )
            leases = {node: client.zscore(nodes.keys.leases, node.peers.id) or 0.0 for node in (empty, full)}
        assert leases[full] - leases[empty] > 30_000


async def test_cleaning_up_takes_as_many_goes_as_it_needs(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, dead = await nodes.start_all("here", "dead")
        rooms = 2 * BATCH + 10
        for number in range(rooms):
            dead.come(f"room:{number}", "s1")
        await until(lambda: dead.count("told_changes") == rooms)
        dead.die()
        nodes.expire(dead)
        nodes.look()
        await until(lambda: here.count("cleaned_rooms") == rooms)
        assert nodes.left_of(dead) == []


async def test_cleaning_up_is_repeated_until_redis_lets_it(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, dead = await nodes.start_all("here", "dead")
        dead.come("r", "s1")
        await until(lambda: dead.count("told_changes") == 1)
        dead.die()
        with nodes.client() as client:
            client.rename(nodes.keys.member_rooms(dead.peers.id), "aside")
            client.set(nodes.keys.member_rooms(dead.peers.id), "of the wrong type")
            nodes.expire(dead)
            nodes.look()
            await until(lambda: here.count("failed_cleanings") == 1)
            client.rename("aside", nodes.keys.member_rooms(dead.peers.id))
        await until(lambda: nodes.left_of(dead) == [])


async def test_nothing_runs_after_the_end(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        here.die()
        await until(lambda: not here.link.up)
        here.peers.take_node(wire.Head(wire.ASK, [there.peers.id, "1"], b'{"method":"x"}'))
        assert here.count("questions") == 0
        here.come("r", "s1")
        here.peers.relay(make_event("r", "e", None, 1.0))
        assert here.count("relay_waiting") == 0
        with trio.fail_after(10):
            await here.peers.attach("r")
