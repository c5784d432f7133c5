"""Rooms as clients see them: join, publish, order, the past, filters, slots."""

from __future__ import annotations

import json

import msgspec
import pytest

from broker.hub.hub import LINGER
from tests.e2e.harness import OPEN, config, jump, running, token, until
from tests.e2e.raw_client import connected


async def test_two_clients_see_each_other() -> None:
    async with running() as broker, connected(broker.client_port) as a, connected(broker.client_port) as b:
        joined = await a.ask("join", room="deal:7")
        assert joined["recovered"] is False
        assert joined["offset"] == 0
        await b.ask("join", room="deal:7")
        stored = await b.ask("publish", room="deal:7", event="won", data={"by": "b"}, tags={"n": 1})
        assert (stored["epoch"], stored["offset"]) == (joined["epoch"], 1)
        event = await a.next()
        assert event.pop("ts") > 1.7e9
        wanted = {"op": "event", "room": "deal:7", "event": "won", "data": {"by": "b"}, "tags": {"n": 1}}
        assert event == wanted | {"offset": 1}
        assert (await b.next())["offset"] == 1


async def test_welcome_says_what_the_contract_says() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        welcome = client.welcome
        assert welcome["op"] == "welcome"
        assert welcome["protocol"] == 1
        assert welcome["user"] is None
        assert welcome["expires"] is None
        assert welcome["node"] == "here"
        assert welcome["ping"] == 25.0
        assert set(welcome["limits"]) == {"message", "batch", "rooms", "state", "filter"}
        assert welcome["session"]
        assert welcome["rooms"] == {}


@pytest.mark.parametrize("room", ["deal:1", "live:1"])
async def test_messages_are_answered_in_order(room: str) -> None:
    """Publishes to a disk, publishes to memory, refusals and joins, in one packet and in one array."""
    messages = [
        {"op": "publish", "id": 1, "room": "deal:1", "event": "e", "data": 1},
        {"op": "publish", "id": 2, "room": "live:1", "event": "e", "data": 2},
        {"op": "publish", "id": 3, "room": "bad*room", "event": "e", "data": 3},
        {"op": "nonsense", "id": 4},
        {"op": "publish", "id": 5, "room": "deal:2", "event": "e", "data": 5},
        {"op": "ping", "id": 6},
        {"op": "publish", "id": 7, "room": room, "event": "e", "data": 7},
        {"op": "join", "id": 8, "room": room},
        {"op": "publish", "id": 9, "room": "deal:1", "event": "e", "data": 9},
        {"op": "leave", "id": 10, "room": room},
        {"op": "publish", "id": 11, "room": "deal:1", "event": 5, "data": 11},
        {"op": "join", "id": 12, "room": "new:room"},
        {"op": "presence", "id": 13, "room": "new:room"},
    ]
    async with running() as broker, connected(broker.client_port) as client:
        await client.send(*messages)
        seen = [message["id"] for message in await client.take(13 + (room == "deal:1")) if "id" in message]
        assert seen == list(range(1, 14))
        await client.send_text(json.dumps(messages))
        seen = [message["id"] for message in await client.take(13 + (room == "deal:1")) if "id" in message]
        assert seen == list(range(1, 14))


@pytest.mark.parametrize("room", ["deal:1", "live:1"])
async def test_a_reply_follows_the_rooms_events(room: str) -> None:
    async with running() as broker, connected(broker.client_port) as client:
        await client.ask("join", room=room)
        await client.send(
            *[{"op": "publish", "id": n, "room": room, "event": "e", "data": n} for n in range(20)]
        )
        events = replies = 0
        while replies < 20:
            message = await client.next()
            if message["op"] == "event":
                events += 1
            else:
                assert message["id"] == replies
                replies += 1
                assert events >= message.get("offset", replies)


async def test_a_message_without_an_id_is_answered_only_if_it_fails() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        await client.send(
            {"op": "publish", "room": "deal:1", "event": "e", "data": None},
            {"op": "leave", "room": "deal:1"},
            {"op": "ping"},
        )
        error = await client.next()
        assert error["op"] == "error"
        assert error["code"] == "not_joined"
        assert "id" not in error
        assert "leave" in error.values()
        assert (await client.ask("ping"))["ts"] > 1.7e9


async def test_what_was_missed_follows_a_join_with_since() -> None:
    async with running() as broker, connected(broker.client_port) as a, connected(broker.client_port) as b:
        await a.ask("join", room="deal:1")
        for n in range(5):
            stored = await a.ask("publish", room="deal:1", event="e", data=n)
        joined = await b.ask("join", room="deal:1", since={"epoch": stored["epoch"], "offset": 2})
        assert joined["recovered"] is True
        assert [event["data"] for event in await b.take(3)] == [2, 3, 4]
        await a.ask("publish", room="deal:1", event="e", data="live")
        assert (await b.next())["data"] == "live"


async def test_a_since_of_another_epoch_or_beyond_the_top_is_not_recovered() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        stored = await client.ask("publish", room="deal:1", event="e", data=1)
        for since in ({"epoch": "other", "offset": 0}, {"epoch": stored["epoch"], "offset": 99}):
            joined = await client.ask("join", room="deal:1", since=since)
            assert joined["recovered"] is False
            assert joined["offset"] == 1
        joined = await client.ask("join", room="deal:1", since={"epoch": "other", "offset": 0}, tail=1)
        assert joined["recovered"] is False
        assert (await client.event())["offset"] == 1


async def test_a_past_that_is_gone_is_not_recovered() -> None:
    few = config(rooms={"few": msgspec.structs.replace(OPEN, history=3)})
    async with running(few) as broker, connected(broker.client_port) as client:
        for n in range(10):
            stored = await client.ask("publish", room="few:1", event="e", data=n)
        epoch = stored["epoch"]
        assert not (await client.ask("join", room="few:1", since={"epoch": epoch, "offset": 6}))["recovered"]
        assert (await client.ask("join", room="few:1", since={"epoch": epoch, "offset": 7}))["recovered"]
        assert [event["offset"] for event in await client.take(3)] == [8, 9, 10]


async def test_tail_gives_the_last_events() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        for n in range(6):
            await client.ask("publish", room="deal:1", event="e", data=n)
        joined = await client.ask("join", room="deal:1", tail=2)
        assert joined["offset"] == 6
        assert [event["offset"] for event in await client.take(2)] == [5, 6]


async def test_filters_hide_events_and_positions_tell_so() -> None:
    async with running() as broker, connected(broker.client_port) as a, connected(broker.client_port) as b:
        await a.ask("join", room="deal:1", filter={"eq": ["region", "EMEA"]})
        for region in ("EMEA", "APAC", "EMEA", "APAC"):
            stored = await b.ask("publish", room="deal:1", event="e", data=region, tags={"region": region})
        assert [event["offset"] for event in await a.take(2)] == [1, 3]
        jump(5.5)
        position = await a.next()
        assert position == {"op": "position", "room": "deal:1", "epoch": stored["epoch"], "offset": 4}
        recovered = await a.ask(
            "join", room="deal:1", since={"epoch": stored["epoch"], "offset": 1}, filter={"gt": ["n", 3]}
        )
        assert recovered["recovered"] is True


async def test_no_echo_if_none_is_wanted() -> None:
    async with running() as broker, connected(broker.client_port) as a, connected(broker.client_port) as b:
        await a.ask("join", room="deal:1")
        await b.ask("join", room="deal:1")
        await a.ask("publish", room="deal:1", event="quiet", data=1, echo=False)
        await a.ask("publish", room="deal:1", event="loud", data=2)
        assert (await a.event())["event"] == "loud"
        assert [event["event"] for event in await b.take(2)] == ["quiet", "loud"]


async def test_a_key_is_stored_once() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        await client.ask("join", room="deal:1")
        first = await client.ask("publish", room="deal:1", event="e", data=1, key="k")
        again = await client.ask("publish", room="deal:1", event="e", data="other", key="k")
        assert (first["epoch"], first["offset"]) == (again["epoch"], again["offset"])
        page = await client.ask("history", room="deal:1", before=100)
        assert [event["data"] for event in page["events"]] == [1]


async def test_the_past_by_pages() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        for n in range(10):
            stored = await client.ask("publish", room="deal:1", event="e", data=n)
        epoch = stored["epoch"]
        page = await client.ask("history", room="deal:1", since={"epoch": epoch, "offset": 4}, limit=3)
        assert [event["offset"] for event in page["events"]] == [5, 6, 7]
        assert page["more"] is True
        assert (page["epoch"], page["offset"]) == (epoch, 10)
        page = await client.ask("history", room="deal:1", before=4, limit=10)
        assert [event["offset"] for event in page["events"]] == [1, 2, 3]
        assert page["more"] is False
        page = await client.ask("history", room="deal:1", at=page["events"][0]["ts"], limit=2)
        assert [event["offset"] for event in page["events"]] == [1, 2]


async def test_a_snapshot_of_the_newest_values_follows_a_join() -> None:
    for room in ("latest:1", "board:1"):
        async with (
            running() as broker,
            connected(broker.client_port) as a,
            connected(broker.client_port) as b,
        ):
            await a.ask("join", room=room)
            for n in range(3):
                await a.ask("publish", room=room, event="card", data=n, slot="x")
                await a.ask("publish", room=room, event="card", data=n, slot="y")
            await b.ask("join", room=room)
            snapshot = {event["slot"]: event["data"] for event in await b.take(2)}
            assert snapshot == {"x": 2, "y": 2}


async def test_presence_is_listed_pushed_and_gathered() -> None:
    async with running() as broker, connected(broker.client_port) as a:
        joined = await a.ask("join", room="deal:1", presence=True)
        assert [member["session"] for member in joined["members"]] == [a.welcome["session"]]
        async with connected(broker.client_port) as b:
            await b.ask("join", room="deal:1")
            pushed = await a.until("presence")
            assert [member["session"] for member in pushed["joined"]] == [b.welcome["session"]]
            await b.ask("state", room="deal:1", state={"typing": True})
            await b.ask("state", room="deal:1", state={"typing": False})
            pushed = await a.until("presence")
            assert pushed["changed"][-1]["state"] in ({"typing": True}, {"typing": False})
            listed = await b.ask("presence", room="deal:1")
            assert (listed["sessions"], listed["users"]) == (2, 0)
            assert set(listed["members"][0]) == {"user", "session", "info", "state", "joined_at", "seen"}
        pushed = await a.until("presence")
        while "left" not in pushed:
            pushed = await a.until("presence")
        assert [member["session"] for member in pushed["left"]] == [b.welcome["session"]]


async def test_acknowledged_offsets_are_shown() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        await client.ask("join", room="deal:1")
        await client.ask("publish", room="deal:1", event="e", data=1)
        assert (await client.ask("ack", room="deal:1", offset=1))["op"] == "ok"
        listed = await client.ask("presence", room="deal:1")
        assert listed["members"][0]["seen"] == 1
        assert [seen.offset for seen in await broker.hub.seen("deal:1")] == [1]


async def test_who_comes_back_has_seen_what_they_had_seen() -> None:
    async with running(config(server={"query_token": True})) as broker:
        path = f"/ws?token={token('42')}"
        async with connected(broker.client_port, path=path) as client:
            await client.ask("join", room="deal:1")
            for number in range(3):
                await client.ask("publish", room="deal:1", event="e", data=number)
            await client.ask("ack", room="deal:1", offset=2)
        async with connected(broker.client_port, path=path) as client:
            joined = await client.ask("join", room="deal:1", presence=True)
            assert [member["seen"] for member in joined["members"]] == [2]
        jump(LINGER + 1)
        await until(lambda: "deal:1" not in broker.hub.rooms)  # now only the store knows
        async with connected(broker.client_port, path=path) as client:
            joined = await client.ask("join", room="deal:1", presence=True)
            assert [member["seen"] for member in joined["members"]] == [2]


async def test_a_second_join_replaces_the_first() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        await client.ask("join", room="deal:1", filter={"exists": "n"})
        await client.ask("join", room="deal:1")
        await client.ask("publish", room="deal:1", event="e", data=1)
        assert (await client.event())["offset"] == 1
        assert broker.hub.rooms["deal:1"].members == 1
        await client.ask("leave", room="deal:1")
        assert broker.hub.rooms["deal:1"].members == 0
