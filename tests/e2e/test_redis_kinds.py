"""The whole broker on every kind of Redis: TLS, a Unix socket, Sentinel, a Redis Cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from tests.e2e.harness import token
from tests.e2e.kinds import KINDS, Kind, Pair, joined, operator, pair, until
from tests.e2e.raw_client import RawClient, connected

ROOMS = [f"deal:{number}" for number in range(20)]
"""Enough to be on every shard."""


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    with KINDS[request.param](tmp_path_factory.mktemp(request.param)) as found:
        yield found


async def events(client: RawClient, count: int) -> list[dict[str, Any]]:
    return [await client.event() for _ in range(count)]


async def test_rooms(kind: Kind) -> None:
    """What is stored, what is not, the past, keys, and coming back to the other node."""
    async with (
        pair(kind.url) as nodes,
        connected(nodes.a.client_port) as ann,
        connected(nodes.b.client_port) as bob,
    ):
        for client in (ann, bob):
            await joined(client, "live:1", *ROOMS)
        # Answers come in the order of the questions, wherever the rooms are.
        asked = [(room, number) for number in (1, 2, 3) for room in ROOMS]
        await ann.send(
            *[
                {"op": "publish", "id": index, "room": room, "event": "e", "data": number}
                for index, (room, number) in enumerate(asked)
            ]
        )
        replies: list[dict[str, Any]] = []
        heard: dict[str, list[int]] = {room: [] for room in ROOMS}
        while len(replies) < len(asked):
            message = await ann.next()
            if message["op"] == "event":
                heard[message["room"]].append(message["offset"])
            else:
                replies.append(message)
                # A reply follows its event.
                assert heard[asked[message["id"]][0]][message["offset"] - 1] == message["offset"]
        assert [reply["id"] for reply in replies] == list(range(len(asked)))
        assert [reply["offset"] for reply in replies] == [number for _, number in asked]
        elsewhere: dict[str, list[int]] = {room: [] for room in ROOMS}
        for event in await events(bob, len(asked)):
            assert event["offset"] == event["data"]
            elsewhere[event["room"]].append(event["offset"])
        assert heard == elsewhere == {room: [1, 2, 3] for room in ROOMS}

        await bob.ask("publish", room="live:1", event="e", data="live")
        for client in (ann, bob):
            event = await client.event()
            assert (event["room"], event["data"], "offset" in event) == ("live:1", "live", False)

        # Of one publisher; strangers have names of their own.
        mine = {"token": token("ann")}
        async with (
            connected(nodes.a.client_port, **mine) as here,
            connected(nodes.b.client_port, **mine) as there,
        ):
            first = await here.ask("publish", room="deal:3", event="e", data="kept", key="k")
            again = await there.ask("publish", room="deal:3", event="e", data="dropped", key="k")
            assert (first["epoch"], first["offset"]) == (again["epoch"], again["offset"])
            assert first["offset"] == 4

        epoch = first["epoch"]
        async with connected(nodes.b.client_port) as late:
            back = await late.ask("join", room="deal:3", since={"epoch": epoch, "offset": 1})
            assert (back["recovered"], back["offset"]) == (True, 4)
            assert [event["data"] for event in await events(late, 3)] == [2, 3, "kept"]
        for wanted, offsets in (
            ({"since": {"epoch": epoch, "offset": 2}}, [3, 4]),
            ({"before": 3}, [1, 2]),
            ({"at": 0}, [1, 2, 3, 4]),
        ):
            page = await bob.ask("history", room="deal:3", limit=10, **wanted)
            assert [event["offset"] for event in page["events"]] == offsets
            assert (page["epoch"], page["offset"], page["more"]) == (epoch, 4, False)
        page = await bob.ask("history", room="never:used", before=5, limit=10)
        assert (page["events"], page["offset"]) == ([], 0)


async def test_people(kind: Kind) -> None:
    """Three stories at once, each of people of its own: all of them have to wait a little for the broker."""
    async with pair(kind.url) as nodes, trio.open_nursery() as nursery:
        nursery.start_soon(who_and_what_is_there, nodes)
        nursery.start_soon(users_and_operators, nodes)
        nursery.start_soon(the_lifecycle_feed, kind, nodes)


async def who_and_what_is_there(nodes: Pair) -> None:
    """Presence, states, acknowledged positions, the newest of each slot."""
    async with (
        connected(nodes.a.client_port, token=token("ann")) as ann,
        connected(nodes.b.client_port, token=token("bob")) as bob,
    ):
        await ann.ask("publish", room="deal:1", event="e", data=1)
        await joined(ann, "deal:1", presence=True)
        await joined(bob, "deal:1")
        push = await ann.until("presence")
        assert [member["user"] for member in push["joined"]] == ["bob"]
        listed = await bob.ask("presence", room="deal:1")
        assert {member["user"] for member in listed["members"]} == {"ann", "bob"}
        assert (listed["sessions"], listed["users"]) == (2, 2)
        await bob.ask("state", room="deal:1", state={"typing": True})
        assert [member["state"] for member in (await ann.until("presence"))["changed"]] == [{"typing": True}]
        assert (await bob.ask("ack", room="deal:1", offset=1))["op"] == "ok"
        assert [member["seen"] for member in (await ann.until("presence"))["changed"]] == [1]
        await bob.ask("leave", room="deal:1")
        assert [member["user"] for member in (await ann.until("presence"))["left"]] == ["bob"]

        for room in ("latest:1", "board:1"):
            for slot, value in (("x", 1), ("y", 2), ("x", 3)):
                await ann.ask("publish", room=room, event="e", data=value, slot=slot)
            await joined(bob, room)
            newest: dict[str, Any] = {}
            while len(newest) < 2:
                event = await bob.event()
                if event["room"] == room:  # and not that of all
                    newest[event["slot"]] = event["data"]
            assert newest == {"x": 3, "y": 2}

        # What was acknowledged is in the store before long, and outlives the session.
        async def seen() -> list[Any]:
            return list((await operator(nodes.a, "GET", "/api/rooms/deal:1"))["seen"])

        while not (found := await seen()):  # it is written once a second
            await until(lambda: True)
        assert [(one["who"], one["offset"]) for one in found] == [("bob", 1)]


async def test_backends(kind: Kind) -> None:
    """Any server of a cluster takes PUBLISH; what cannot be used is set aside once."""
    async with (
        pair(kind.url) as nodes,
        connected(nodes.a.client_port) as ann,
        connected(nodes.b.client_port) as bob,
    ):
        for client in (ann, bob):
            await joined(client, "live:1", "latest:1", *ROOMS)
        keys = nodes.keys
        for number, server in enumerate(kind.servers):
            with server.client() as backend:
                backend.publish(keys.backend("live:1"), json.dumps({"event": "said", "data": number}))
        for client in (ann, bob):
            assert sorted(event["data"] for event in await events(client, len(kind.servers))) == list(
                range(len(kind.servers))
            )
        with kind.client() as backend:
            for number in range(60):
                entry = {"room": ROOMS[number % 20], "event": "n", "data": str(number // 20), "user": "zoe"}
                backend.xadd(keys.publish, entry)
            backend.xadd(keys.publish, {"room": "live:1", "event": "stored nowhere", "data": "1"})
            backend.xadd(keys.publish, {"room": "deal:1", "event": "once", "data": "1", "key": "k"})
            backend.xadd(keys.publish, {"room": "deal:1", "event": "once", "data": "2", "key": "k"})
            backend.xadd(keys.publish, {"room": "deal:1", "data": "not JSON"})
            for client in (ann, bob):
                stored: dict[str, list[tuple[int, int]]] = {room: [] for room in ROOMS}
                for event in await events(client, 62):
                    if event["event"] == "n":
                        stored[event["room"]].append((event["offset"], event["data"]))
                        assert event["user"] == "zoe"
                    else:
                        assert (event["room"], event["event"]) in {
                            ("live:1", "stored nowhere"),
                            ("deal:1", "once"),
                        }
                assert stored == {room: [(1, 0), (2, 1), (3, 2)] for room in ROOMS}
            await until(lambda: backend.xlen(keys.publish) == 0)
            assert backend.xlen(keys.rejected) == 1
            backend.publish(keys.backend("deal:1"), "not JSON")
            await until(lambda: backend.xlen(keys.rejected) == 2)
            backend.publish(
                keys.backend("latest:2"), json.dumps({"event": "e", "data": 7, "slot": "x"})
            )  # nobody has it open: gone
            backend.publish(keys.backend("latest:1"), json.dumps({"event": "e", "data": 8, "slot": "x"}))
        for client in (ann, bob):
            assert (await client.event())["data"] == 8


async def users_and_operators(nodes: Pair) -> None:
    """A user's room on every node, the room of all, questions to the other node, orders to it."""
    async with (
        connected(nodes.a.client_port, token=token("una")) as here,
        connected(nodes.b.client_port, token=token("una")) as there,
        connected(nodes.b.client_port, token=token("tom")) as tom,
    ):
        assert set(here.welcome["rooms"]) == {"user:una"}
        said = await operator(nodes.a, "POST", "/api/publish", room="user:una", event="e", data=1)
        for client in (here, there):
            event = await client.event()
            assert (event["room"], event["data"], event["offset"]) == ("user:una", 1, said["offset"])
        await operator(nodes.a, "POST", "/api/publish", room="all", event="e", data=2)
        for client in (here, there, tom):
            event = await client.event()
            assert (event["room"], event["data"]) == ("all", 2)
        await joined(here, "post:1")
        await joined(there, "post:1", "post:2")
        for node in nodes.both:
            assert {info["name"] for info in (await operator(node, "GET", "/api/nodes"))["nodes"]} == {
                "a",
                "b",
            }
            found = await operator(node, "GET", "/api/rooms?prefix=post:")
            assert [(room["room"], room["members"]) for room in found["rooms"]] == [
                ("post:1", 2),
                ("post:2", 1),
            ]
            assert found["partial"] is False
            found = await operator(node, "GET", "/api/users/una")
            assert len(found["sessions"]) == 2
        ended = await operator(nodes.a, "POST", "/api/disconnect", user="tom", code=4403, reason="go")
        assert ended["disconnected"] == 1
        assert (await tom.ended_with())[1] == 4403


async def the_lifecycle_feed(kind: Kind, nodes: Pair) -> None:
    """Who moves to another node has not been away; the rest is told once."""
    async with connected(nodes.b.client_port) as other:
        with kind.client() as backend:

            def told() -> list[tuple[str, ...]]:
                return [
                    tuple(fields[name].decode() for name in (b"event", b"room", b"user") if name in fields)
                    for _, fields in backend.xrange(nodes.keys.lifecycle)
                    if fields.get(b"user") == b"zoe" or fields.get(b"room") == b"live:feed"
                ]

            coming = {("connected", "zoe"), ("joined", "live:feed", "zoe"), ("occupied", "live:feed")}
            async with connected(nodes.a.client_port, token=token("zoe")) as zoe:
                await joined(zoe, "live:feed")
                await until(lambda: set(told()) == coming)
                async with connected(nodes.b.client_port, token=token("zoe")) as again:
                    await joined(again, "live:feed")
                await joined(other, "live:feed")
                stranger = ("joined", "live:feed")
                await until(lambda: stranger in told())  # else the room might be empty for a moment
            going = {("disconnected", "zoe"), ("left", "live:feed", "zoe")}
            await until(lambda: set(told()) == coming | going | {stranger})
            await other.ask("leave", room="live:feed")
            await until(lambda: ("vacated", "live:feed") in told())
            assert sorted(told()) == sorted(
                [*coming, *going, stranger, ("left", "live:feed"), ("vacated", "live:feed")]
            )
