"""What happens under the whole broker when a Redis Cluster or a primary behind Sentinel changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import redis
import trio
from redis.crc import key_slot

from tests.e2e.harness import token
from tests.e2e.kinds import Pair, joined, kind_of, pair, until
from tests.e2e.raw_client import RawClient, connected
from tests.link.sharded import Node, Sharded, sharded
from tests.link.test_sentinel import guarded
from tests.redis_server import RedisServer

ROOMS = [f"long:{number}" for number in range(12)]
"""Enough to be on every shard."""


class Publisher:
    """Publishes to all rooms in turn, and repeats what is refused, with its key."""

    def __init__(self, client: RawClient, rooms: list[str]) -> None:
        self._client = client
        self._rooms = rooms
        self.acknowledged: dict[str, dict[int, int]] = {room: {} for room in rooms}
        """Room → number → offset."""
        self.refused = 0
        self._stopping = False
        self._stopped = trio.Event()

    async def run(self) -> None:
        """Publish until :meth:`stop`."""
        number = 0
        while not self._stopping:
            for room in self._rooms:
                number += 1
                await self.publish(room, number)
        self._stopped.set()

    async def stop(self) -> None:
        """End with a whole turn."""
        self._stopping = True
        await self._stopped.wait()

    async def publish(self, room: str, number: int) -> None:
        while True:
            answer = await self._client.ask("publish", room=room, event="n", data=number, key=f"{number}")
            if answer["op"] == "ok":
                self.acknowledged[room][number] = answer["offset"]
                return
            assert (answer["code"], answer["retry"]) == ("unavailable", True), answer
            self.refused += 1
            await trio.sleep(0.02)

    @property
    def count(self) -> int:
        return sum(map(len, self.acknowledged.values()))

    async def reaches(self, count: int) -> None:
        await until(lambda: self.count >= count)


class Reader:
    """Reads what comes, and checks that nothing is missing between two events of a room.

    Joins a room again, from where it is now, when it is told that something is lost.
    """

    def __init__(self, client: RawClient) -> None:
        self._client = client
        self.heard: dict[str, dict[int, Any]] = {}
        """Room → offset → number, of rooms with history."""
        self.said: list[Any] = []
        self.told: dict[str, str] = {}
        """Room → why it was ``lost``."""
        self.back: set[str] = set()
        """Lost rooms that were joined again."""

    async def run(self) -> None:
        while True:
            message = await self._client.next()
            if message["op"] == "lost":
                room = message["room"]
                self.told[room] = message["reason"]
                since = {"epoch": message["epoch"], "offset": message["offset"]}
                await self._client.send({"op": "join", "id": room, "room": room, "since": since})
            elif message["op"] == "event" and "offset" in message:
                room, offset = message["room"], message["offset"]
                assert offset == max(self.heard.setdefault(room, {}), default=0) + 1, message
                self.heard[room][offset] = message["data"]
            elif message["op"] == "event":
                self.said.append(message["data"])
            elif message["op"] == "ok":
                assert message["recovered"] is False
                self.heard[message["room"]] = {message["offset"]: None}
                self.back.add(message["room"])
            elif message["op"] == "error":  # there is nobody to ask yet
                assert message["retry"], message
                await self._client.send({"op": "join", "id": message["id"], "room": message["id"]})

    async def reaches(self, room: str, offset: int) -> None:
        """Return once the room is there."""
        await until(lambda: max(self.heard.get(room, {}), default=0) >= offset)

    async def has(self, acknowledged: dict[str, dict[int, int]]) -> None:
        """Return once everything acknowledged has been heard, each once."""
        for room, sent in acknowledged.items():
            await self.reaches(room, max(sent.values()))
            if room not in self.told:
                assert self.heard[room] == {offset: number for number, offset in sent.items()}


async def test_slots_that_move_take_everything_along() -> None:
    with sharded() as cluster:
        kind = kind_of(cluster)
        async with (
            pair(cluster.url) as nodes,
            connected(nodes.a.client_port, token=token("ann")) as ann,
            connected(nodes.b.client_port, token=token("bob")) as bob,
            trio.open_nursery() as nursery,
        ):
            await joined(bob, "live:1", *ROOMS, "deal:stream")
            publisher, reader = Publisher(ann, ROOMS), Reader(bob)
            nursery.start_soon(publisher.run)
            nursery.start_soon(reader.run)
            handed_in = 0
            keys = nodes.keys
            names = [keys.meta(room) for room in ROOMS[:3]] + [
                keys.publish,
                keys.leases,
                keys.lifecycle,
                keys.live("live:1"),
            ]
            with kind.client() as backend:
                for name in names:
                    slot = key_slot(name.encode())
                    owner = cluster.owner(slot)
                    target = next(node for node in cluster.primaries if node is not owner)
                    await trio.to_thread.run_sync(cluster.move, slot, target)
                    for _ in range(5):
                        handed_in += 1
                        backend.xadd(
                            keys.publish, {"room": "deal:stream", "event": "n", "data": str(handed_in)}
                        )
                    await publisher.reaches(publisher.count + 3 * len(ROOMS))
            await publisher.stop()
            await until(lambda: all(link["up"] for link in nodes.link()))
            await until(lambda: len(reader.heard.get("deal:stream", {})) == handed_in)
            assert list(reader.heard["deal:stream"].values()) == list(range(1, handed_in + 1))
            await reader.has(publisher.acknowledged)
            assert reader.told == {}
            await says_everywhere(nodes, cluster.primaries, ann, reader)
            assert [info.name for info in nodes.a.peers.nodes()] == ["a", "b"]
            nursery.cancel_scope.cancel()


async def says_everywhere(nodes: Pair, living: Sequence[Node], ann: RawClient, reader: Reader) -> None:
    """What is not stored is heard again, from the other node and from any node of Redis."""
    await until(lambda: all(link["up"] for link in nodes.link()))
    before = len(reader.said)
    await ann.ask("publish", room="live:1", event="e", data="other node")
    for node in living:
        node.order(
            "PUBLISH", nodes.keys.backend("live:1"), json.dumps({"event": "e", "data": node.server.port})
        )
    await until(lambda: len(reader.said) == before + 1 + len(living))
    assert set(reader.said[before:]) == {"other node", *(node.server.port for node in living)}


async def replicated(*servers: RedisServer) -> None:
    """Return once the replica of each has everything."""
    for server in servers:
        with server.client() as client:

            def whole(client: redis.Redis = client) -> bool:
                said = client.info("replication")
                return bool(said["slave0"]["offset"] == said["master_repl_offset"])

            await until(whole)


@pytest.fixture(scope="module")
def six() -> Iterator[Sharded]:
    """Primaries with replicas. Each test may kill a primary of its own."""
    with sharded(replicas=True) as cluster:
        yield cluster


def rooms_of(cluster: Sharded, nodes: Pair, node: Node) -> list[str]:
    """Those of :data:`ROOMS` that live there."""
    return [room for room in ROOMS if cluster.owner(key_slot(nodes.keys.meta(room).encode())) is node]


async def promoted(node: Node) -> None:
    """Return once it is a primary."""
    await until(lambda: "role:master" in node.order("INFO", "replication"))


async def test_what_replicas_have_survives_the_primary(six: Sharded) -> None:
    """With ``redis.replicas`` nothing acknowledged is lost, though the primary dies in full flight."""
    dying, heir = six.primaries[1], six.replicas[1]
    async with (
        pair(six.url, replicas=1) as nodes,
        connected(nodes.a.client_port, token=token("ann")) as ann,
        connected(nodes.b.client_port, token=token("bob")) as bob,
        trio.open_nursery() as nursery,
    ):
        assert rooms_of(six, nodes, dying)
        await joined(bob, "live:1", *ROOMS)
        publisher, reader = Publisher(ann, ROOMS), Reader(bob)
        nursery.start_soon(publisher.run)
        nursery.start_soon(reader.run)
        await publisher.reaches(5 * len(ROOMS))
        dying.server.kill()
        await promoted(heir)
        # Until there is a replica again, nothing is acknowledged there.
        await trio.to_thread.run_sync(dying.server.start)
        await publisher.reaches(publisher.count + 5 * len(ROOMS))
        await publisher.stop()
        await reader.has(publisher.acknowledged)
        assert set(reader.told) <= set(rooms_of(six, nodes, heir))
        assert publisher.refused
        await says_everywhere(nodes, [six.primaries[0], heir, six.primaries[2]], ann, reader)
        for room, sent in publisher.acknowledged.items():
            page = await ann.ask("history", room=room, at=0, limit=1000)
            kept = {event["data"]: event["offset"] for event in page["events"]}
            assert len(kept) == len(page["events"])
            assert sent.items() <= kept.items()
        nursery.cancel_scope.cancel()


async def test_a_tail_that_a_cluster_lost_is_told(six: Sharded) -> None:
    """Even where the offsets have been given to other events before anybody looked."""
    dying, heir = six.primaries[2], six.replicas[2]
    async with (
        pair(six.url) as nodes,
        connected(nodes.a.client_port, token=token("ann")) as ann,
        connected(nodes.b.client_port, token=token("bob")) as bob,
        trio.open_nursery() as nursery,
    ):
        rooms = rooms_of(six, nodes, dying)
        others = [room for room in ROOMS if room not in rooms]
        assert rooms
        assert others
        await joined(bob, *ROOMS)
        publisher, reader = Publisher(ann, ROOMS), Reader(bob)
        nursery.start_soon(reader.run)
        for number, room in enumerate(ROOMS):
            await publisher.publish(room, number)
        await replicated(dying.server)
        cut_off(dying.server)
        for number, room in enumerate(rooms, 100):
            await publisher.publish(room, number)
        await reader.has(publisher.acknowledged)
        dying.server.kill()
        await promoted(heir)
        again = Publisher(ann, ROOMS)
        for _ in range(3):
            for room in ROOMS:
                await again.publish(room, 200 + again.count)
        await until(lambda: reader.back == set(rooms))
        assert set(reader.told.values()) == {"epoch"}
        for number, room in enumerate(ROOMS, 300):
            await again.publish(room, number)
        await reader.has(
            again.acknowledged
            | {room: publisher.acknowledged[room] | again.acknowledged[room] for room in others}
        )
        assert set(reader.told) == set(rooms)
        nursery.cancel_scope.cancel()


def cut_off(server: RedisServer) -> None:
    """Let its replica get nothing more."""
    with server.client() as client:
        client.acl_setuser("default", commands=["-psync", "-sync"])
        client.client_kill_filter(_type="replica")


async def test_a_primary_behind_sentinel_that_dies_is_replaced() -> None:
    """Both ways at once, each with servers of its own: most of it is waiting for Sentinel."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow_to_the_replica, True)
        nursery.start_soon(follow_to_the_replica, False)


async def follow_to_the_replica(clean: bool) -> None:
    """Sessions stay. What is gone is told once to everybody; where nothing is gone, nobody is told."""
    with guarded(1) as here:
        async with (
            pair(here.url) as nodes,
            connected(nodes.a.client_port, token=token("ann")) as ann,
            connected(nodes.b.client_port, token=token("bob")) as bob,
            trio.open_nursery() as nursery,
        ):
            await joined(bob, "live:1", *ROOMS)
            publisher, reader = Publisher(ann, ROOMS), Reader(bob)
            nursery.start_soon(reader.run)
            for number, room in enumerate(ROOMS):
                await publisher.publish(room, number)
            epoch = (await ann.ask("history", room=ROOMS[0], at=0, limit=1))["epoch"]
            await replicated(here.primary)
            if not clean:
                cut_off(here.primary)
                await publisher.publish(ROOMS[0], 100)
            await reader.has(publisher.acknowledged)
            here.primary.kill()
            for number, room in enumerate(ROOMS, 200):
                await publisher.publish(room, number)
            if not clean:
                await until(lambda: reader.back == {*ROOMS, "user:bob"})
            await reader.has(publisher.acknowledged)
            since = {"epoch": epoch, "offset": 1}
            async with connected(nodes.a.client_port) as late:
                assert (await late.ask("join", room=ROOMS[0], since=since))["recovered"] is clean
            assert set(reader.told.values()) == (set() if clean else {"epoch"})
            assert nodes.generations() == (0 if clean else 2)
            with here.replica.client() as backend:
                backend.publish(nodes.keys.backend("live:1"), json.dumps({"event": "e", "data": "heir"}))
                await until(lambda: reader.said == ["heir"])
                assert backend.zcard(nodes.keys.leases) == 2
            nursery.cancel_scope.cancel()
