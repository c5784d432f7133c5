"""Ephemeral events from node to node, and the slots that are remembered."""

from __future__ import annotations

import orjson
import trio

from broker.link import wire
from broker.peers import relay
from broker.protocol.events import Event, make_event
from tests.peers.company import SLOTS, company, until
from tests.redis_server import RedisServer, redis_server


def event(number: int, room: str = "r", slot: str | None = None, size: int = 0) -> Event:
    return make_event(room, "e", {"n": number, "pad": "x" * size}, 1.5 + number, slot=slot)


def numbers(events: list[Event]) -> list[int]:
    return [orjson.loads(one.body)["data"]["n"] for one in events]


async def test_an_event_arrives_elsewhere_as_it_was_and_not_at_home(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        for node in (here, there):
            await node.peers.attach("r")
        said = make_event("r", "e", {"a": 1}, 12.25, user="u", slot="s", tags={"k": "v", "n": 2})
        here.peers.relay(said)
        await until(lambda: there.hub.received)
        (heard,) = there.hub.received
        assert (heard.room, heard.body, heard.wire, heard.ts) == ("r", said.body, said.body, 12.25)
        assert (heard.slot, heard.tags, heard.position) == ("s", {"k": "v", "n": 2}, None)
        there.peers.relay(event(2))
        await until(lambda: here.hub.received)
        assert len(there.hub.received) == 1
        assert here.count("relayed") == there.count("received") == 1


async def test_order_is_kept_and_events_of_one_room_travel_together(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        for room in ("r", "s"):
            await there.peers.attach(room)
        for number in range(500):
            here.peers.relay(event(number, "r"))
            here.peers.relay(event(number, "s"))
        await until(lambda: len(there.hub.received) == 1000)
        for room in ("r", "s"):
            assert numbers([one for one in there.hub.received if one.room == room]) == list(range(500))
        assert here.count("relay_messages") == there.hub.batches == 2
        for number in range(100):
            here.peers.relay(event(number))
            await trio.lowlevel.checkpoint()
        await until(lambda: len(there.hub.received) == 1100)
        assert numbers(there.hub.received[1000:]) == list(range(100))


async def test_no_message_grows_much_beyond_its_bound(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        await there.peers.attach("r")
        for number in range(20):
            here.peers.relay(event(number, size=relay.MESSAGE_BYTES // 2))
        await until(lambda: len(there.hub.received) == 20)
        assert numbers(there.hub.received) == list(range(20))
        assert here.count("relay_messages") == 10


async def test_white_space_in_a_body_does_not_divide_it(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        await there.peers.attach("r")
        here.peers.relay(Event("r", b'{\n"op":"event",\n"ts":1,"data":"a\\nb"\n}', 1.0))
        await until(lambda: there.hub.received)
        assert orjson.loads(there.hub.received[0].body) == {"op": "event", "ts": 1, "data": "a\nb"}


async def test_what_cannot_be_read_is_counted_and_costs_only_itself(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        (there,) = await nodes.start_all("there")
        await there.peers.attach("r")
        bad = [b"", b"{", b"\xff", b"[]", b'{"ts":"x"}', b'{"ts":1,"tags":[]}']
        lines = [event(1).body, *bad, event(2).body]
        with nodes.client() as client:
            client.publish(nodes.keys.live("r"), wire.pack(wire.EPHEMERAL, "x", body=b"\n".join(lines)))
        await until(lambda: there.hub.received)
        assert numbers(there.hub.received) == [1, 2]
        assert there.count("bad_messages") == len(bad)


async def test_the_newest_of_each_slot_is_remembered_in_order(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        assert list(await there.peers.attach("r", slots=True)) == []
        for number, slot in enumerate(("a", "b", "a", None)):
            here.peers.relay(event(number, slot=slot), remember=60.0)
        await until(lambda: len(there.hub.received) == 4)
        assert numbers(there.hub.received) == [0, 1, 2, 3]
        recalled = list(await there.peers.attach("r", slots=True))
        assert [one.slot for one in recalled] == ["b", "a"]
        assert numbers(recalled) == [1, 2]
        for number, slot in enumerate(("c", "d", "b"), start=10):  # a is the oldest of four
            here.peers.relay(event(number, slot=slot), remember=60.0)
            await until(lambda number=number: here.count("relayed") == number - 5)  # type: ignore[misc]
        recalled = list(await there.peers.attach("r", slots=True))
        assert [one.slot for one in recalled] == ["c", "d", "b"]
        assert len(recalled) == SLOTS
        with nodes.client() as client:
            for key in (nodes.keys.slots("r"), nodes.keys.slots_order("r")):
                assert 0 < client.pttl(key) <= 60_000


async def test_what_every_node_has_heard_is_remembered_and_not_told_again(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        await there.peers.attach("r")
        here.peers.remember(event(1, slot="a"), 60.0)
        here.peers.remember(event(2), 60.0)
        here.peers.relay(event(3, slot="b"), remember=60.0)
        await until(lambda: there.hub.received)
        assert numbers(there.hub.received) == [3]
        assert numbers(list(await there.peers.attach("r", slots=True))) == [1, 3]


async def test_events_without_a_slot_or_not_to_be_kept_leave_nothing(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        (here,) = await nodes.start_all("here")
        here.peers.relay(event(1), remember=60.0)
        here.peers.relay(event(2, slot="a"))
        await until(lambda: here.count("relayed") == 2)
        assert list(await here.peers.attach("r", slots=True)) == []


async def test_a_slot_that_cannot_be_read_is_left_out(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        (here,) = await nodes.start_all("here")
        for number, slot in enumerate("abc"):
            here.peers.relay(event(number, slot=slot), remember=60.0)
        await until(lambda: here.count("relayed") == 3)
        with nodes.client() as client:
            client.hset(nodes.keys.slots("r"), "a", "{")
            client.hdel(nodes.keys.slots("r"), "b")
        assert numbers(list(await here.peers.attach("r", slots=True))) == [2]
        with nodes.client() as client:
            client.delete(nodes.keys.slots("r"), nodes.keys.slots_order("r"))
            client.set(nodes.keys.slots_order("r"), "of the wrong type")
        assert list(await here.peers.attach("r", slots=True)) == []
        assert here.count("failed_recalls") == 1


async def test_slots_of_which_redis_has_evicted_a_part_begin_anew(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        (here,) = await nodes.start_all("here")
        with nodes.client() as client:
            for number, key in enumerate((nodes.keys.slots("r"), nodes.keys.slots_order("r"))):
                for slot in "ab":
                    here.peers.relay(event(number, slot=slot), remember=60.0)
                await until(lambda number=number: here.count("relayed") == 3 * number + 2)  # type: ignore[misc]
                client.delete(key)
                here.peers.relay(event(9, slot="c"), remember=60.0)
                await until(lambda number=number: here.count("relayed") == 3 * number + 3)  # type: ignore[misc]
                assert client.hkeys(nodes.keys.slots("r")) == [b"c"]
                assert numbers(list(await here.peers.attach("r", slots=True))) == [9]


async def test_what_is_not_relayed_is_counted() -> None:
    with redis_server() as server:
        async with company(server) as nodes:
            (here,) = await nodes.start_all("here")
            server.kill()
            await until(lambda: not here.link.up)
            here.peers.relay(event(1))
            assert here.count("not_relayed") == 1
            server.start()
            await until(lambda: here.link.up)
            with nodes.client() as client:
                client.set(nodes.keys.slots("r"), "of the wrong type")
            here.peers.relay(event(2, slot="a"), remember=60.0)
            here.peers.relay(event(3, slot="b"), remember=60.0)
            await until(lambda: here.count("not_relayed") == 3)
            here.peers.relay(event(4, "s"))
            await until(lambda: here.count("relayed") == 1)
