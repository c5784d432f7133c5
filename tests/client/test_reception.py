"""Who gets which item, and how a slow reader holds the broker back."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker.client import Left, Lost, Rejoined
from broker.client.rooms import OVERDRAFT
from broker.protocol.events import Position
from tests.client.scripted_server import Peer, ScriptedServer, client_of, event

FEW = 10
"""Buffer of the clients here (items)."""


class Counter:
    """Sends events one by one, and counts those that the client's side took."""

    def __init__(self) -> None:
        self.sent = 0

    async def pour(self, peer: Peer, count: int, room: str = "a") -> None:
        for _ in range(count):
            await peer.send(event(room, self.sent + 1))
            self.sent += 1


async def test_a_full_room_holds_the_broker_back(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    counter = Counter()

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a")
        await counter.pour(peer, 100)
        await peer.gone()

    async with client_of(script, lockstep=True, buffer=FEW) as (client, _):
        room = await client.join("a")
        await wait_all_tasks_blocked()
        # Beyond the buffer: one in the reader's hand, one in trio-websocket's
        # queue, one it cannot put there, one on the way.
        assert len(room) == FEW
        assert counter.sent <= FEW + 4
        assert client.statistics().stalled
        assert "nobody iterates it" in caplog.text
        assert [(await anext(room)).offset for _ in range(100)] == list(range(1, 101))
        assert not client.statistics().stalled


async def test_a_reader_that_asks_something_is_not_held_back(autojump_clock: MockClock) -> None:
    # The reply stands behind the events that fill the room of the one who waits for it.
    counter = Counter()

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a")
        await counter.pour(peer, 3 * FEW)
        await peer.ok(await peer.expect("ping"), ts=1)
        await peer.gone()

    async with client_of(script, lockstep=True, buffer=FEW) as (client, _):
        room = await client.join("a")
        await anext(room)
        await wait_all_tasks_blocked()
        assert await client.ping() == 1
        assert len(room) == 3 * FEW - 1


async def test_even_then_there_is_a_limit(autojump_clock: MockClock) -> None:
    counter = Counter()

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a")
        ping = await peer.expect("ping")
        await counter.pour(peer, 2 * OVERDRAFT * FEW)
        await peer.ok(ping, ts=1)
        await peer.gone()

    async with client_of(script, lockstep=True, buffer=FEW) as (client, _):
        room = await client.join("a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.ping)
            await wait_all_tasks_blocked()
            assert len(room) == OVERDRAFT * FEW
            for _ in range(2 * OVERDRAFT * FEW):
                await anext(room)


async def test_a_room_left_while_full_lets_go(autojump_clock: MockClock) -> None:
    counter = Counter()

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(counter.pour, peer, 100)
            await peer.ok(await peer.expect("leave"))
        await peer.gone()

    async with client_of(script, lockstep=True, buffer=FEW) as (client, _):
        room = await client.join("a")
        await wait_all_tasks_blocked()
        await room.leave()
        assert [item.offset async for item in room] == list(range(1, FEW + 1))
        await wait_all_tasks_blocked()
        assert counter.sent == 100


async def test_a_stalled_client_does_not_mistake_itself_for_a_dead_broker(autojump_clock: MockClock) -> None:
    counter = Counter()

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(ping=5)
        await peer.join("a")
        await counter.pour(peer, 2 * FEW)
        await peer.gone()

    async with client_of(script, lockstep=True, buffer=FEW) as (client, server):
        room = await client.join("a")
        await trio.sleep(100)
        assert len(server.dialled_at) == 1
        for _ in range(2 * FEW):
            await anext(room)


# -------------------------------------------------------- streams of everything


async def test_events_are_those_of_all_rooms(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(rooms={"all": None, "user:42": {"epoch": "u", "offset": 3}})
        await peer.join("a")
        await peer.send(event("a", 1), event("all"), event("user:42", 4), event("other"))
        await peer.gone()

    async with client_of(script) as (client, _):
        with client.events() as stream:
            await client.join("a")
            seen = [await anext(stream) for _ in range(4)]
        assert [(one.room, one.position) for one in seen] == [
            ("a", Position("e", 1)),
            ("all", None),
            ("user:42", Position("u", 4)),
            ("other", None),
        ]
        assert [item async for item in stream] == []


async def test_a_room_that_is_iterated_gets_its_events_besides(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a")
        await peer.send(event("a", 1))
        ping = await peer.expect("ping")
        await peer.send(event("a", 2))
        await peer.ok(ping, ts=1)
        await peer.gone()

    async with client_of(script) as (client, _):
        room = await client.join("a")
        assert (await anext(room)).offset == 1
        stream = client.events()
        await client.ping()
        assert (await anext(room)).offset == 2
        assert (await anext(stream)).offset == 2


async def test_an_unread_room_keeps_nothing_while_there_is_a_stream_and_says_so(
    autojump_clock: MockClock,
) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a")
        for number in range(1, 4 * FEW):
            await peer.send(event("a", number))
        await peer.drop()
        peer = await server.accept()
        await peer.join("a", recovered=True)
        await peer.send(event("a", 4 * FEW))
        ping = await peer.expect("ping")
        await peer.send(event("a", 4 * FEW + 1))
        await peer.ok(ping, ts=1)
        await peer.gone()

    async with client_of(script, buffer=FEW) as (client, _):
        stream = client.events()
        room = await client.join("a")
        everything = stream.items()
        seen = [await anext(everything) for _ in range(4 * FEW)]
        assert isinstance(seen[-1], Rejoined)
        assert (await anext(stream)).offset == 4 * FEW
        assert await anext(room.items()) == Lost(room="a", reason="unread", count=4 * FEW)
        await client.ping()
        assert (await anext(room)).offset == 4 * FEW + 1


async def test_a_room_with_no_buffer_is_for_presence_only(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a")
        for number in range(1, 5):
            await peer.send(event("a", number))
        await peer.send({"op": "presence", "room": "a", "joined": [{"session": "s"}]})
        await peer.ok(await peer.expect("ping"), ts=1)
        await peer.gone()

    async with client_of(script) as (client, _):
        room = await client.join("a", presence=True, buffer=0)
        await client.ping()
        assert list(room.members) == ["s"]
        assert await anext(room.items()) == Lost(room="a", reason="unread", count=4)


async def test_a_stream_that_nobody_holds_holds_nobody_back(autojump_clock: MockClock) -> None:
    counter = Counter()

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await counter.pour(peer, 100, room="x")
        await peer.gone()

    async with client_of(script, lockstep=True, buffer=FEW) as (client, _):
        async for one in client.events():
            if one.offset == 3:
                break
        gc.collect()
        await wait_all_tasks_blocked()
        assert counter.sent == 100


async def test_even_if_the_reader_was_waiting_for_it(autojump_clock: MockClock) -> None:
    counter = Counter()

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await counter.pour(peer, 100, room="x")
        await peer.gone()

    async with client_of(script, lockstep=True, buffer=FEW) as (client, _):
        stream = client.events()
        await wait_all_tasks_blocked()
        assert client.statistics().stalled
        del stream
        gc.collect()
        await wait_all_tasks_blocked()
        assert counter.sent == 100


# ------------------------------------------------- rooms that the broker joined


async def rejoin_user_room(server: ScriptedServer, offset: int) -> Peer:
    return await server.accept(user="42", rooms={"user:42": {"epoch": "u", "offset": offset}, "all": None})


async def test_missed_events_of_the_users_room_are_recovered(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await rejoin_user_room(server, 3)
        await peer.send(event("user:42", 4))
        await peer.drop()
        peer = await rejoin_user_room(server, 4)  # nothing missed: nothing to do
        await trio.sleep(1)
        await peer.drop()
        peer = await rejoin_user_room(server, 6)
        join = await peer.expect("join", room="user:42", since={"epoch": "u", "offset": 4})
        await peer.ok(join, room="user:42", epoch="u", offset=6, recovered=True)
        await peer.send(event("user:42", 5), event("user:42", 6))
        assert await peer.gone() == 1000

    async with client_of(script) as (client, _):
        items = client.events().items()
        seen = [await anext(items) for _ in range(4)]
        assert [getattr(item, "offset", "rejoined") for item in seen] == [4, "rejoined", 5, 6]


async def test_unless_nobody_wants_them(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        await (await rejoin_user_room(server, 3)).drop()
        peer = await rejoin_user_room(server, 9)
        assert await peer.gone() == 1000

    async with client_of(script):
        await trio.sleep(5)


async def test_the_users_room_may_be_joined_by_hand(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await rejoin_user_room(server, 3)
        await peer.join("user:42", epoch="u", offset=3)
        await peer.send(event("user:42", 4))
        await peer.ok(await peer.expect("ping"), ts=1)
        await peer.drop()
        peer = await rejoin_user_room(server, 5)
        join = await peer.expect("join", room="user:42", since={"epoch": "u", "offset": 4})
        await peer.ok(join, room="user:42", epoch="u", offset=5, recovered=True)
        await peer.send(event("user:42", 5))
        assert await peer.gone() == 1000  # one join, though there is a stream too

    async with client_of(script) as (client, _):
        room = await client.join("user:42")
        assert (await anext(room)).offset == 4
        stream = client.events()
        await client.ping()
        assert (await anext(room)).offset == 5
        assert (await anext(stream)).offset == 5
        await trio.sleep(5)


async def test_a_room_given_and_taken_away_is_told_in_the_stream(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await rejoin_user_room(server, 3)
        await peer.send({"op": "left", "room": "user:42", "code": "forbidden"})
        await peer.gone()

    async with client_of(script) as (client, _):
        stream: Any = client.events()
        assert await anext(stream.items()) == Left(room="user:42", code="forbidden")
