"""Rules on a running broker: who gets copies, who is told what, and what a restart keeps."""

from __future__ import annotations

from pathlib import Path

import httpx

from broker.config import Admin, Route
from tests.e2e.harness import config, running, token
from tests.e2e.raw_client import connected

WON = Route(source=("deal:*",), event=("won",), to=("activity", "user:{data.owner}"), data=("id", "owner"))
LIVE = Route(source=("live:*",), to=("deal:{id}",), rename="seen")


async def test_one_publish_reaches_the_stream_of_activity_and_the_owner() -> None:
    """Also where the publisher could publish to neither: that right is the configuration's."""
    settings = config(routes=(WON,))
    async with (
        running(settings) as broker,
        connected(broker.client_port, token=token("42")) as owner,
        connected(broker.client_port) as watcher,
        connected(broker.client_port) as seller,
    ):
        await watcher.ask("join", room="activity")
        reply = await seller.ask("publish", room="deal:7", event="won", data={"owner": 42, "id": 7, "x": 1})
        assert (reply["op"], reply["offset"]) == ("ok", 1)
        for client, room in ((owner, "user:42"), (watcher, "activity")):
            event = await client.event()
            assert (event["room"], event["event"], event["offset"]) == (room, "won", 1)
            assert event["data"] == {"owner": 42, "id": 7}
        past = await seller.ask("history", room="activity", at=0)
        assert len(past["events"]) == 1
        assert broker.hub.statistics()["routed"] == 2


async def test_replies_keep_their_order_where_an_ephemeral_event_has_copies_to_be_stored() -> None:
    async with running(config(routes=(LIVE,))) as broker, connected(broker.client_port) as client:
        await client.ask("join", room="deal:7")
        await client.send(
            {"op": "publish", "id": 1, "room": "live:7", "event": "a", "data": 1},
            {"op": "publish", "id": 2, "room": "quiet:7", "event": "b", "data": 2},
            {"op": "ping", "id": 3},
            {"op": "publish", "id": 4, "room": "live:7", "event": "c", "data": 4},
        )
        messages = await client.take(6)
        replies = [message for message in messages if message["op"] == "ok"]
        assert [reply["id"] for reply in replies] == [1, 2, 3, 4]
        assert set(replies[0]) == {"op", "id"}, "the room has no position"
        events = [message for message in messages if message["op"] == "event"]
        assert [(event["event"], event["data"]) for event in events] == [("seen", 1), ("seen", 4)]
        assert messages.index(events[0]) < messages.index(replies[0])


async def test_too_many_copies_are_refused_and_the_session_goes_on() -> None:
    rule = Route(source=("deal:*", "live:*"), to=("user:{data.to}",))
    async with running(config(routes=(rule,))) as broker, connected(broker.client_port) as client:
        data = {"to": list(range(101))}
        for room in ("deal:1", "live:1"):
            assert await client.refusal("publish", room=room, event="e", data=data) == "limit_exceeded"
        assert (await client.ask("publish", room="deal:1", event="e", data={"to": 1}))["offset"] == 1


async def test_operators_wait_for_the_copies_too(tmp_path: Path) -> None:
    settings = config(
        routes=(LIVE,), store={"data": str(tmp_path)}, admin=Admin(port=0, open_on_loopback=True)
    )
    async with running(settings) as broker, httpx.AsyncClient() as http:
        url = f"http://127.0.0.1:{broker.admin_port}/api/publish"
        answer = await http.post(url, json={"room": "live:7", "event": "e", "data": 1, "key": "k"})
        assert answer.status_code == 200
        answer = await http.post(url, json={"room": "live:7", "event": "e", "data": 1, "key": "k"})
        assert answer.status_code == 200
        async with connected(broker.client_port) as client:
            past = await client.ask("history", room="deal:7", at=0)
            assert [event["event"] for event in past["events"]] == ["seen"], "once, for the key"
