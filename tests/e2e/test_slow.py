"""Clients that do not read: memory stays bounded, each policy does what it says, nobody else waits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from broker.app import Broker
from tests.e2e.harness import CONFIG, OPEN, config, jump, running, until
from tests.e2e.raw_client import RawClient, connected, request

OUTBOX = 64 * 1024
SMALL = config(limits={"outbox_bytes": OUTBOX})
BIG = "x" * 8000
SLACK = 16 * 1024
"""One frame and what a control frame needs: an outbox that is full may have taken one more."""


@asynccontextmanager
async def deaf(broker: Broker, room: str, **options: str) -> AsyncIterator[RawClient]:
    """A client in ``room`` that will not read, with a small window so that this shows soon."""
    sock = trio.socket.socket()
    sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4096)
    await sock.connect(("127.0.0.1", broker.client_port))
    async with trio.SocketStream(sock) as stream:
        client = RawClient(stream)
        headers = [("Sec-WebSocket-Protocol", name) for name in options.values()]
        assert await client.upgrade(request(headers=headers)) == 101
        client.welcome = await client.next()
        assert (await client.ask("join", room=room))["op"] == "ok"
        yield client


async def fill(broker: Broker, talker: RawClient, room: str, **fields: object) -> None:
    """Publish until the deaf client's outbox is full, and some more."""

    async def say(number: int) -> None:
        answer = await talker.ask("publish", room=room, event="e", data=[number, BIG], **fields)
        assert answer["op"] == "ok"
        assert broker.traffic.queued <= OUTBOX + SLACK

    number = 0
    while not broker.traffic.refused and not broker.hub.slow.superseded:
        await say(number)
        number += 1
        assert number < 5000, "the kernel cannot hold this much"
    for more in range(20):
        await say(number + more)


@pytest.mark.parametrize("room", ["deal:1", "live:1"])
async def test_policy_disconnect(room: str) -> None:
    async with running(SMALL) as broker, connected(broker.client_port) as talker:
        async with deaf(broker, room) as client:
            await fill(broker, talker, room)
            session = broker.context.registry.sessions.get(client.welcome["session"])
            assert session is None or session.ending == 4508
            # What it had before the verdict may still be read, then the verdict.
            bye, code = await client.ended_with()
            assert code == 4508
            assert bye is not None
            assert bye["retry_after"] > 0
        await until(lambda: broker.context.registry.closes.get(4508) == 1)


async def test_policy_disconnect_gives_up_on_who_never_reads() -> None:
    async with running(SMALL) as broker, connected(broker.client_port) as talker, deaf(broker, "live:1"):
        await fill(broker, talker, "live:1")
        jump(CONFIG.server.close_timeout + 0.1)
        await until(lambda: broker.context.registry.connections == 1)
        assert broker.traffic.queued == 0


async def test_policy_drop() -> None:
    """Without history live events go on after ``lost``, and every missing one is in its count."""
    async with running(SMALL) as broker, connected(broker.client_port) as talker:
        async with deaf(broker, "drop:1") as client:
            await fill(broker, talker, "drop:1")
            seen, lost = 0, None
            while lost is None:
                message = await client.next()
                if message["op"] == "event":
                    assert message["data"][0] == seen
                    seen += 1
                else:
                    lost = message
            assert (lost["op"], lost["room"], lost["reason"]) == ("lost", "drop:1", "slow")
            await talker.ask("publish", room="drop:1", event="e", data=["after"])
            following = await client.event()
            # The count tells exactly how many lie between what was seen and what follows.
            assert seen + lost["count"] + 1 == broker.hub.published
            assert following["data"] == ["after"]
            await client.close()
        assert broker.hub.slow.dropped == lost["count"]


async def test_policy_drop_with_history_says_where_to_go_on() -> None:
    stored = config(
        limits={"outbox_bytes": OUTBOX},
        rooms={"patient": msgspec.structs.replace(OPEN, slow="drop", history=5000)},
    )
    async with (
        running(stored) as broker,
        connected(broker.client_port) as talker,
        deaf(broker, "patient:1") as client,
    ):
        await fill(broker, talker, "patient:1")
        seen = 0
        while (message := await client.next())["op"] == "event":
            seen += 1
            assert message["offset"] == seen
        assert message["op"] == "lost"
        assert message["offset"] == seen
        since = {"epoch": message["epoch"], "offset": seen}
        joined = await client.ask("join", room="patient:1", since=since)
        assert joined["recovered"] is True
        while seen < joined["offset"]:
            seen += 1
            assert (await client.event())["offset"] == seen
        await client.close()


async def test_policy_latest() -> None:
    """Of each slot only the newest, once there is room again."""
    async with (
        running(SMALL) as broker,
        connected(broker.client_port) as talker,
        deaf(broker, "latest:1") as client,
    ):
        for slot in ("x", "y"):
            await fill(broker, talker, "latest:1", slot=slot)
        await talker.ask("publish", room="latest:1", event="e", data="newest x", slot="x")
        await talker.ask("publish", room="latest:1", event="e", data="newest y", slot="y")
        newest: dict[str, object] = {}
        while list(newest.values()) != ["newest x", "newest y"]:
            event = await client.event()
            newest.pop(event["slot"], None)
            newest[event["slot"]] = event["data"]
        assert broker.hub.slow.superseded > 0
        await client.close()


async def test_a_backlog_that_does_not_move_ends_at_the_write_deadline() -> None:
    patient = config(limits={"outbox_bytes": OUTBOX}, server={"ping_interval": 3600.0})
    async with running(patient) as broker, connected(broker.client_port) as talker, deaf(broker, "live:1"):
        while not broker.traffic.queued:
            await talker.ask("publish", room="live:1", event="e", data=BIG)
        await wait_all_tasks_blocked(0.01)
        for _ in range(3):
            jump(CONFIG.server.write_timeout / 2)
            await wait_all_tasks_blocked(0.01)
        jump(CONFIG.server.close_timeout + 1)
        await until(lambda: broker.context.registry.closes == {4508: 1})


async def test_who_asks_and_does_not_read_piles_nothing_up() -> None:
    """Found by reading: one frame could ask for 256 long answers, all held at once."""
    async with running(SMALL) as broker, connected(broker.client_port) as talker:
        for _ in range(30):
            await talker.ask("publish", room="deal:1", event="e", data=BIG)
        async with deaf(broker, "live:1") as client:
            question = {"op": "history", "room": "deal:1", "before": 1000, "id": 1}
            await client.send_text(msgspec.json.encode([question] * 250))
            for _ in range(20):
                await wait_all_tasks_blocked(0.002)
                assert broker.traffic.queued <= OUTBOX + 160 * 1024, "one answer, and what was queued"
            answered = 0
            while answered < 250:
                message = await client.next()
                assert message["op"] == "ok", message
                answered += 1
            await client.close()


async def test_a_paused_client_is_not_taken_for_dead() -> None:
    """It is not read while its inbox is full, so its pongs cannot be heard."""
    async with running(SMALL) as broker, connected(broker.client_port) as talker:
        for _ in range(30):
            await talker.ask("publish", room="deal:1", event="e", data=BIG)
        async with deaf(broker, "live:1") as client:
            question = {"op": "history", "room": "deal:1", "before": 1000, "id": 1}
            await client.send_text(msgspec.json.encode([question] * 250))
            await until(lambda: broker.traffic.queued)
            for _ in range(250):
                assert (await client.next())["op"] == "ok"
            await client.close()


async def test_the_budget_of_the_process() -> None:
    tight = config(limits={"process_outbox_bytes": 32 * 1024})
    async with (
        running(tight) as broker,
        connected(broker.client_port) as talker,
        deaf(broker, "live:1"),
        deaf(broker, "live:1"),
    ):
        for _ in range(5000):
            await talker.ask("publish", room="live:1", event="e", data=BIG)
            assert broker.traffic.queued <= 2 * (32 * 1024 + SLACK)
            if broker.traffic.refused:
                break
        assert broker.traffic.refused
        jump(CONFIG.server.close_timeout + 0.1)


async def test_one_deaf_client_delays_nobody() -> None:
    async with (
        running(SMALL) as broker,
        connected(broker.client_port) as talker,
        deaf(broker, "drop:1") as client,
        connected(broker.client_port) as good,
    ):
        await good.ask("join", room="drop:1")
        for number in range(300):
            await talker.ask("publish", room="drop:1", event="e", data=[number, BIG])
            assert (await good.event())["data"][0] == number
        assert broker.traffic.queued
        del client


async def test_tiny_outboxes_lose_nothing_in_silence() -> None:
    """Found by reading: a join at once did not look whether its events were taken."""
    tiny = config(limits={"outbox_bytes": 64}, rooms={"many": msgspec.structs.replace(OPEN, history=1000)})
    async with running(tiny) as broker, connected(broker.client_port) as talker:
        for number in range(200):
            stored = await talker.ask("publish", room="many:1", event="e", data=[number, "y" * 2000])
        async with deaf(broker, "live:1") as client:
            since = {"epoch": stored["epoch"], "offset": 0}
            seen, lost = 0, 0
            await client.send({"op": "join", "room": "many:1", "since": since, "id": "j"})
            while seen < 200:
                message = await client.next()
                if message["op"] == "event":
                    seen += 1
                    assert message["offset"] == seen
                elif message["op"] == "lost":
                    lost += 1
                    assert message["offset"] == seen
                    since = {"epoch": stored["epoch"], "offset": seen}
                    await client.send({"op": "join", "room": "many:1", "since": since, "id": f"j{lost}"})
                else:
                    assert message["op"] == "ok"
                    assert message["recovered"] is True
            await client.close()
