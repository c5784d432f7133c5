"""Batch windows on a whole broker: the task that drives rounds wakes when one ends."""

from __future__ import annotations

import msgspec
from trio.testing import wait_all_tasks_blocked

from tests.e2e.harness import OPEN, config, jump, running
from tests.e2e.raw_client import connected

WINDOW = 0.9
ROOMS = {
    "slow": msgspec.structs.replace(OPEN, history=0, presence=False, batch_window=WINDOW),
    "kept": msgspec.structs.replace(OPEN, presence=False, batch_window=WINDOW),
}


async def test_a_window_ends_by_itself_and_its_events_come_as_one_frame() -> None:
    async with running(config(rooms=ROOMS)) as broker, connected(broker.client_port) as client:
        await client.ask("join", room="slow:1")
        frames = len(client.batches)
        for number in range(3):
            reply = await client.ask("publish", room="slow:1", event="e", data=number)
            assert "offset" not in reply
        await wait_all_tasks_blocked(0.005)
        assert len(client.batches) == frames + 3, "nothing but the replies"
        jump(WINDOW)
        events = await client.take(3)
        assert [event["data"] for event in events] == [0, 1, 2]
        assert len(client.batches) == frames + 4


async def test_a_window_in_a_room_with_history_ends_before_its_publisher_is_answered() -> None:
    async with running(config(rooms=ROOMS)) as broker, connected(broker.client_port) as client:
        await client.ask("join", room="kept:1")
        await client.send({"op": "publish", "id": 1, "room": "kept:1", "event": "e", "data": "mine"})
        event, reply = await client.take(2)
        assert (event["op"], reply["op"]) == ("event", "ok")
        assert event["offset"] == reply["offset"] == 1
