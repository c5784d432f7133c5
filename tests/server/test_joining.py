"""Joins that must wait, fail, or meet each other."""

from __future__ import annotations

from typing import Any

import trio
from trio.testing import wait_all_tasks_blocked

from broker.errors import BrokerError, ErrorCode
from tests.e2e.harness import running, until
from tests.e2e.raw_client import connected
from tests.server.held_engine import HeldEngine


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
