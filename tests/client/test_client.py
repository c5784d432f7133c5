"""The verbs: what goes out, and what comes back."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from broker.client import Event, History, Member, Members, Presence, RequestError, connect
from broker.protocol.events import Position
from tests.client.scripted_server import URL, ScriptedServer, client_of, event, performing


async def test_publish_says_only_what_was_given(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        plain = await peer.receive()
        assert plain == {"op": "publish", "id": 1, "room": "a", "event": "e", "data": None}
        await peer.ok(plain)
        full = await peer.receive()
        given = {"key": "k", "slot": "s", "tags": {"region": "EMEA"}, "echo": False}
        assert full == {"op": "publish", "id": 2, "room": "a", "event": "e", "data": [1]} | given
        await peer.ok(full, epoch="x", offset=9)
        await peer.gone()

    async with client_of(script) as (client, _):
        assert await client.publish("a", "e") is None
        position = await client.publish("a", "e", [1], key="k", slot="s", tags={"region": "EMEA"}, echo=False)
        assert position == Position("x", 9)


async def test_a_refusal_tells_everything(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        publish = await peer.expect("publish")
        await peer.refuse(publish, "rate_limited", retry=True, retry_after=1.5, room="a", message="slower")
        await peer.gone()

    async with client_of(script) as (client, _):
        with pytest.raises(RequestError, match="rate_limited: slower") as caught:
            await client.publish("a", "e")
        error = caught.value
        assert (error.code, error.message, error.retry, error.retry_after, error.room) == (
            "rate_limited",
            "slower",
            True,
            1.5,
            "a",
        )


@pytest.mark.parametrize(
    ("query", "sent"),
    [
        ({"since": Position("e", 3)}, {"since": {"epoch": "e", "offset": 3}, "limit": 100}),
        ({"before": 9, "limit": 5}, {"before": 9, "limit": 5}),
        ({"at": 12.5}, {"at": 12.5, "limit": 100}),
    ],
)
async def test_history(autojump_clock: MockClock, query: dict[str, object], sent: dict[str, object]) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        history = await peer.receive()
        assert history == {"op": "history", "id": 1, "room": "a"} | sent
        await peer.ok(history, events=[event("a", 4)], epoch="e", offset=7, more=True)
        await peer.gone()

    async with client_of(script) as (client, _):
        page = await client.history("a", **query)  # type: ignore[arg-type]  # one of three keywords
        expected = Event(room="a", name="e", data=None, ts=1.5, offset=4, epoch="e")
        assert page == History(events=(expected,), position=Position("e", 7), more=True)


async def test_presence_state_and_acknowledgements(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        ask = await peer.expect("presence", room="a")
        await peer.ok(ask, members=[{"session": "s", "user": "42", "seen": 3}], sessions=1, users=1)
        await peer.ok(await peer.expect("state", room="a", state={"typing": True}))
        await peer.ok(await peer.expect("ack", room="a", offset=3))
        await peer.gone()

    async with client_of(script) as (client, _):
        who = await client.presence("a")
        assert who == Members((Member(session="s", user="42", seen=3),), sessions=1, users=1)
        await client.set_state("a", {"typing": True})  # in a room that was not joined: not set again
        await client.ack("a", 3)


async def test_a_call_and_its_result(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        call = await peer.expect("call", method="broker.ping", params={"x": 1}, supersede="search")
        await peer.ok(call, result=[1])
        await peer.refuse(await peer.expect("call", params=None), "superseded")
        await peer.gone()

    async with client_of(script) as (client, _):
        assert await client.call("broker.ping", {"x": 1}, supersede="search") == [1]
        with pytest.raises(RequestError, match="superseded"):
            await client.call("broker.ping")


async def test_a_call_given_up_is_cancelled_at_the_broker(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        for _ in range(2):
            call = await peer.expect("call")
            await peer.expect("cancel", call=call["id"])
            await peer.refuse(call, "cancelled")
        await peer.gone()

    async with client_of(script) as (client, _):
        with trio.move_on_after(1) as scope:
            await client.call("slow")
        assert scope.cancelled_caught
        with pytest.raises(RequestError, match="timeout"):
            await client.call("slow", timeout=2)
        await trio.sleep(1)


async def test_replies_may_come_in_any_order_and_batches(autojump_clock: MockClock) -> None:
    answers: dict[str, object] = {}

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        calls = [await peer.expect("call") for _ in range(3)]
        replies = [{"op": "ok", "id": call["id"], "result": call["method"]} for call in reversed(calls)]
        await peer.send(*replies, event("elsewhere"))
        await peer.gone()

    async with client_of(script) as (client, _):

        async def ask(method: str) -> None:
            answers[method] = await client.call(method)

        async with trio.open_nursery() as nursery:
            for method in ("one", "two", "three"):
                nursery.start_soon(ask, method)
    assert answers == {"one": "one", "two": "two", "three": "three"}


async def test_requests_that_gather_share_a_frame_within_the_brokers_limits(
    autojump_clock: MockClock,
) -> None:
    frames: list[int] = []

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(limits={"message": 400, "batch": 3})
        for _ in range(2):
            count = 0
            while count < 7:
                frame = await peer.next_frame()
                frames.append(len(frame))
                count += len(frame)
                await peer.send(*({"op": "ok", "id": message["id"], "ts": 1} for message in frame))
        await peer.gone()

    async with client_of(script) as (client, _):
        async with trio.open_nursery() as nursery:
            for _ in range(7):
                nursery.start_soon(client.ping)
        async with trio.open_nursery() as nursery:
            for _ in range(7):
                nursery.start_soon(client.publish, "a", "e", "x" * 200)
    assert sum(frames) == 14
    assert max(frames[:-7]) == 3  # small ones travel together, three at most
    assert frames[-7:] == [1] * 7  # two large ones do not fit into 400 bytes


async def test_presence_keeps_the_members(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a", members=[{"session": "s1", "user": "1"}])
        change = {"op": "presence", "room": "a", "joined": [{"session": "s2"}], "left": [{"session": "s1"}]}
        await peer.send(
            change, {"op": "presence", "room": "a", "changed": [{"session": "s2", "state": {"x": 1}}]}
        )
        await peer.send({"op": "presence", "room": "unknown", "joined": []})
        await peer.gone()

    async with client_of(script) as (client, _):
        room = await client.join("a", presence=True)
        assert set(room.members) == {"s1"}
        items = room.items()
        first = await anext(items)
        assert isinstance(first, Presence)
        assert [member.session for member in first.joined] == ["s2"]
        await anext(items)
        assert room.members == {"s2": Member(session="s2", state={"x": 1})}
        assert client.rooms == {"a": room}
        assert "'a'" in repr(room)


async def test_positions_advance_without_events(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a", offset=5)
        moved = {"op": "position", "room": "a", "epoch": "e", "offset": 9}
        await peer.send(moved, moved | {"offset": 7}, moved | {"room": "unknown"})
        await peer.ok(await peer.expect("ping"), ts=1)
        await peer.send(moved | {"epoch": "new", "offset": 2})
        await peer.ok(await peer.expect("ping"), ts=1)
        await peer.gone()

    async with client_of(script) as (client, _):
        room = await client.join("a")
        await client.ping()
        assert room.position == Position("e", 9)
        await client.ping()
        assert room.position == Position("new", 2)


async def test_older_events_come_but_move_nothing_back(autojump_clock: MockClock) -> None:
    # The snapshot of a room with last_value.
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a", offset=50)
        await peer.send(event("a", 3), event("a", 51))
        await peer.drop()
        peer = await server.accept()
        await peer.expect("join", since={"epoch": "e", "offset": 51})
        await peer.gone()

    async with client_of(script) as (client, _):
        room = await client.join("a")
        assert [(await anext(room)).offset for _ in range(2)] == [3, 51]
        await trio.sleep(5)


async def test_since_continues_a_former_life(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a", offset=50, recovered=True)
        await peer.drop()
        peer = await server.accept()
        await peer.expect("join", since={"epoch": "e", "offset": 40})  # nothing came since
        await peer.gone()

    async with client_of(script) as (client, _):
        room = await client.join("a", since=Position("e", 40))
        assert room.recovered
        assert room.position == Position("e", 40)
        await trio.sleep(5)


async def test_a_second_join_ends_the_first_handle(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a", offset=1)
        await peer.send(event("a", 2))
        await peer.join("a", offset=2)
        await peer.send(event("a", 3))
        assert await peer.gone() == 1000  # leaving the ended handle says nothing to the broker

    async with client_of(script) as (client, _):
        first = await client.join("a")
        second = await client.join("a")
        assert [item.offset async for item in first] == [2]
        assert (await anext(second)).offset == 3
        await first.leave()
        assert client.rooms == {"a": second}


async def test_statistics(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a")
        await peer.send(event("a", 1), event("a", 2))
        await peer.ok(await peer.expect("ping"), ts=1)
        await peer.gone()

    async with client_of(script) as (client, _):
        await client.join("a")
        await client.ping()
        before = client.statistics()
        assert (before.connections, before.frames, before.events, before.waiting_items) == (1, 4, 2, 2)
        assert before.received_bytes > 300
        assert not before.stalled
    after = client.statistics()
    assert (after.frames, after.received_bytes) == (before.frames, before.received_bytes)


async def test_a_refused_join_leaves_nothing(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.refuse(await peer.expect("join"), "forbidden", room="a")
        await peer.gone()

    async with client_of(script) as (client, _):
        with pytest.raises(RequestError, match="forbidden"):
            await client.join("a")
        assert not client.rooms


async def test_a_join_given_up_is_undone(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        join = await peer.expect("join", room="a")
        await trio.sleep(5)
        await peer.ok(join, room="a", epoch="e", offset=0, recovered=False)
        await peer.expect("leave", room="a")
        await peer.join("b")
        again = await peer.expect("join", room="b")
        await trio.sleep(5)
        await peer.ok(again, room="b", epoch="e", offset=0, recovered=False)
        assert await peer.gone() == 1000  # the first handle of b still stands

    async with client_of(script) as (client, _):
        with trio.move_on_after(1):
            await client.join("a")
        await trio.sleep(10)
        room = await client.join("b")
        with trio.move_on_after(1):
            await client.join("b")
        await trio.sleep(10)
        assert client.rooms == {"b": room}


@pytest.mark.parametrize("url", ["http://broker.test/ws", "broker.test", "ws://", "ws:///ws"])
async def test_a_wrong_url_is_a_value_error(url: str) -> None:

    with pytest.raises(ValueError, match="not a ws"):
        async with connect(url):
            pass


async def test_two_clients_at_once(autojump_clock: MockClock) -> None:

    async def script(server: ScriptedServer) -> None:
        for _ in range(2):
            await server.accept()

    async with (
        performing(script) as server,
        connect(URL, open_stream=server.open_stream) as one,
        connect(URL, open_stream=server.open_stream) as two,
    ):
        assert {one.session, two.session} == {"s1", "s2"}
