"""Joins that must wait, fail, or meet each other."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from broker.errors import BrokerError, ErrorCode
from broker.hub.hub import LINGER
from broker.protocol.events import make_event
from tests.e2e.harness import jump, running, until
from tests.e2e.raw_client import connected
from tests.server.held_engine import HeldEngine
from tests.server.held_peers import HeldPeers


async def test_pages_of_the_past_and_live_events_meet_without_a_hole() -> None:
    """Publishing goes on while a client catches up page by page."""
    async with (
        running() as broker,
        connected(broker.client_port) as talker,
        connected(broker.client_port) as reader,
    ):
        stored: dict[str, Any] = {}
        for number in range(90):
            stored = await talker.ask("publish", room="deal:1", event="e", data=["x" * 8_000, number])
        held = HeldEngine(broker.engine)
        held.blind()
        since = {"epoch": stored["epoch"], "offset": 0}
        await reader.send({"op": "join", "room": "deal:1", "since": since, "id": 1})
        async with trio.open_nursery() as nursery:

            async def go_on() -> None:
                for number in range(90, 190):
                    await talker.ask("publish", room="deal:1", event="e", data=["y", number])

            nursery.start_soon(go_on)
            assert (await reader.next())["recovered"] is True
            for number in range(190):
                event = await reader.event()
                assert (event["data"][1], event["offset"]) == (number, number + 1)


async def test_a_read_that_fails_halfway_is_told_as_lost() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        stored: dict[str, Any] = {}
        for number in range(80):
            stored = await client.ask("publish", room="deal:1", event="e", data=["x" * 9_000, number])
        held = HeldEngine(broker.engine)
        held.blind()
        history = broker.engine.history
        reads = 0

        async def failing(*arguments: Any) -> Any:
            nonlocal reads
            reads += 1
            if reads == 1:
                page = await history(*arguments)
                return page._replace(events=page.events[:20], more=True)
            raise BrokerError(ErrorCode.UNAVAILABLE, "the disk is gone")

        broker.engine.history = failing  # type: ignore[assignment, method-assign]
        since = {"epoch": stored["epoch"], "offset": 0}
        joined = await client.ask("join", room="deal:1", since=since)
        assert joined["recovered"] is True
        for number in range(20):
            assert (await client.next())["offset"] == number + 1
        lost = await client.next()
        assert (lost["op"], lost["reason"], lost["offset"]) == ("lost", "gap", 20)
        broker.engine.history = history  # type: ignore[method-assign]
        since["offset"] = 20
        assert (await client.ask("join", room="deal:1", since=since))["recovered"] is True
        assert (await client.event())["offset"] == 21


async def test_who_opens_with_somebody_that_fails_is_not_harmed() -> None:
    """Found by reading: a stream closed by the one would have been dead for the other."""
    async with running() as broker, connected(broker.client_port) as a, connected(broker.client_port) as b:
        engine = broker.engine
        acknowledgements, opened = engine.acknowledgements, engine.open
        opens = 0
        fail, go = trio.Event(), trio.Event()

        async def counted(*arguments: Any) -> Any:
            nonlocal opens
            opens += 1
            return await opened(*arguments)

        async def meeting(*arguments: Any) -> Any:
            if not fail.is_set():
                fail.set()
                await go.wait()
                raise BrokerError(ErrorCode.UNAVAILABLE, "the disk is gone")
            if not go.is_set():
                await go.wait()
                await wait_all_tasks_blocked()
            return await acknowledgements(*arguments)

        engine.open = counted  # type: ignore[assignment, method-assign]
        engine.acknowledgements = meeting  # type: ignore[assignment, method-assign]
        await a.send({"op": "join", "room": "cold:1", "id": 1})
        await fail.wait()
        await b.send({"op": "join", "room": "cold:1", "id": 2})
        await until(lambda: opens == 2)
        go.set()
        assert (await a.next())["code"] == "unavailable"
        assert (await b.next())["op"] == "ok"
        assert opens == 2
        await a.ask("publish", room="cold:1", event="e", data=1)
        assert (await b.event())["offset"] == 1


async def test_a_stream_that_was_closed_meanwhile_is_opened_again() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        engine = broker.engine
        acknowledgements = engine.acknowledgements
        closed = 0

        async def closing(room: str) -> Any:
            nonlocal closed
            if not closed:
                closed += 1
                engine.close(room)
            return await acknowledgements(room)

        engine.acknowledgements = closing  # type: ignore[method-assign]
        assert (await client.ask("join", room="cold:1"))["offset"] == 0
        assert closed
        await client.send({"op": "publish", "room": "cold:1", "event": "e", "data": 1})
        assert (await client.event())["offset"] == 1


async def test_a_snapshot_may_be_large() -> None:
    async with running() as broker, connected(broker.client_port) as a, connected(broker.client_port) as b:
        for number in range(50):
            await a.ask("publish", room="latest:1", event="e", data="x" * 20_000, slot=f"s{number}")
        await b.ask("join", room="latest:1")
        assert {event["slot"] for event in await b.take(50)} == {f"s{number}" for number in range(50)}


# -- other nodes --------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ["live:1", "deal:1"])
async def test_ok_of_a_join_means_that_other_nodes_are_heard(room: str) -> None:
    async with running() as broker, connected(broker.client_port) as client:
        held = HeldPeers(broker.peers)
        await client.send({"op": "join", "room": room, "id": 1}, {"op": "ping", "id": 2})
        await until(lambda: held.asked == [(room, False)])
        await wait_all_tasks_blocked()
        assert room not in broker.hub.rooms
        held.release()
        assert [(await client.next())["id"] for _ in range(2)] == [1, 2]
        broker.hub.receive([make_event(room, "e", "from elsewhere", 0.0)])
        assert (await client.event())["data"] == "from elsewhere"
        assert held.attachments == {room}


async def test_who_comes_while_a_room_is_opened_waits_with_the_first() -> None:
    async with running() as broker, connected(broker.client_port) as a, connected(broker.client_port) as b:
        held = HeldPeers(broker.peers)
        for client in (a, b):
            await client.send({"op": "join", "room": "latest:1", "id": 1})
        await until(lambda: held.asked == [("latest:1", True)] * 2)
        held.slots = [make_event("latest:1", "e", number, 0.0, slot=str(number)) for number in range(2)]
        broker.hub.receive([make_event("latest:1", "e", "newer", 0.0, slot="1")])
        held.release()
        for client in (a, b):
            assert (await client.next())["op"] == "ok"
            assert [(await client.event())["data"] for _ in range(2)] == [0, "newer"]


async def test_a_room_that_cannot_be_opened_is_heard_of_no_more() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        peers, engine = HeldPeers(broker.peers), HeldEngine(broker.engine)
        engine.fail("open")
        peers.release()
        await client.send({"op": "join", "room": "cold:1", "id": 1})
        await engine.entered.wait()
        assert peers.attachments == {"cold:1"}
        engine.release()
        assert (await client.next())["code"] == "unavailable"
        assert peers.attachments == set()


async def test_a_room_that_is_opened_when_the_node_ends_is_heard_of_no_more() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        held = HeldPeers(broker.peers)
        await client.send({"op": "join", "room": "live:1", "id": 1})
        await until(lambda: held.attachments)
        broker.stop()
        assert (await client.next())["code"] == 4503
        jump(broker.config.server.drain_timeout + broker.config.server.close_timeout)
        await until(lambda: not held.attachments)
        assert "live:1" not in broker.hub.rooms


async def test_who_is_gone_when_the_room_is_there_is_not_in_it() -> None:
    async with running() as broker:
        held = HeldPeers(broker.peers)
        held.attachments.add("all")
        async with connected(broker.client_port) as client:
            await client.send({"op": "join", "room": "live:1", "id": 1})
            await until(lambda: ("live:1", False) in held.asked)
            (session,) = broker.context.registry.sessions.values()
        await until(lambda: session.ending is not None)
        held.release()
        await until(lambda: "live:1" in broker.hub.rooms)
        assert broker.hub.rooms["live:1"].members == 0
        await until(lambda: not broker.context.registry.sessions)
        jump(LINGER + 1)
        await until(lambda: "live:1" not in held.attachments)
