"""Connecting, coming back, and giving up, under virtual time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from broker.client import (
    Backoff,
    Client,
    Closed,
    ConnectFailed,
    ConnectionLost,
    Rejoined,
    RequestError,
    RoomClosed,
    connect,
)
from broker.client.life import CLOSE_GRACE
from broker.protocol.events import Position
from tests.client.scripted_server import (
    URL,
    WAITS,
    DeafServer,
    ScriptedServer,
    client_of,
    event,
    failure,
    no_script,
    performing,
)

# --------------------------------------------------------------- connecting


async def test_connects_and_says_who_it_is(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(user="42", session="abc")
        assert peer.headers["authorization"] == "Bearer T"
        assert peer.headers["x-trace"] == "1"
        assert peer.websocket.subprotocol == "broker.v1.zstd"
        assert await peer.gone() == 1000

    async with client_of(script, token="T", headers={"X-Trace": "1"}, zstd=True) as (client, _):
        assert (client.state, client.session, client.user, client.welcome.node) == (
            "connected",
            "abc",
            "42",
            "n1",
        )
    assert client.state == "closed"
    assert client.closed is not None
    assert client.closed.code == 1000


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_the_token_may_be_fetched(autojump_clock: MockClock, asynchronous: bool) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        assert peer.headers["authorization"] == "Bearer fetched"
        await peer.gone()

    async def fetch() -> str:
        await trio.sleep(1)
        return "fetched"

    async with client_of(script, token=fetch if asynchronous else lambda: "fetched"):
        pass


async def test_nobody_there(autojump_clock: MockClock) -> None:
    async with performing(no_script) as server:
        server.unreachable = True
        with pytest.raises(ConnectFailed, match="nobody there"):
            async with connect(URL, open_stream=server.open_stream):
                raise AssertionError("connected")


async def test_a_peer_that_hangs_up_during_the_upgrade(autojump_clock: MockClock) -> None:
    # trio-websocket alone would wait for ever.
    async def script(server: ScriptedServer) -> None:
        stream = await server.stream()
        await stream.receive_some()
        await stream.aclose()

    error = await failure(script)
    assert isinstance(error, ConnectFailed)
    assert "hung up" in str(error)


async def test_a_peer_that_says_nothing(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        await server.stream()

    started = trio.current_time()
    error = await failure(script)
    assert isinstance(error, ConnectFailed)
    assert "no welcome within 10 s" in str(error)
    assert trio.current_time() - started == 10


async def test_a_peer_that_does_not_greet(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(welcome=False)
        await peer.send({"op": "hello"})
        await peer.gone()

    error = await failure(script)
    assert isinstance(error, ConnectFailed)
    assert "no welcome" in str(error)


async def test_a_peer_that_closes_before_the_welcome(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(welcome=False)
        await peer.close(1011, "broken")

    error = await failure(script)
    assert isinstance(error, ConnectFailed)
    assert "1011 broken" in str(error)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Fine\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnope",
    ],
)
async def test_a_peer_that_is_no_broker(autojump_clock: MockClock, answer: bytes) -> None:
    async def script(server: ScriptedServer) -> None:
        stream = await server.stream()
        await stream.receive_some()
        await stream.send_all(answer)
        await stream.receive_some()

    error = await failure(script)
    assert isinstance(error, ConnectFailed)


async def test_a_refused_upgrade_tells_its_status(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        await (await server.request()).reject(403, body=b"origin")

    error = await failure(script)
    assert isinstance(error, ConnectFailed)
    assert error.status == 403


async def test_a_refused_token_is_final(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(welcome=False)
        await peer.bye(4401, "no such key")

    error = await failure(script, token="T")
    assert isinstance(error, Closed)
    assert "4401 no such key" in str(error)


async def test_errors_of_the_block_come_out_as_they_are(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        assert await peer.gone() == 1000

    async with performing(script) as server:
        with pytest.raises(LookupError) as caught:
            async with connect(URL, open_stream=server.open_stream):
                raise LookupError("mine")
        assert caught.value.__context__ is None


async def test_closing_takes_no_longer_than_the_handshake(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        assert await peer.gone() == 1000

    async with performing(script) as server:
        async with connect(URL, open_stream=server.open_stream):
            leaving = trio.current_time()
        assert trio.current_time() == leaving


async def test_closing_waits_for_a_deaf_broker_only_so_long(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        await DeafServer.greet(await server.stream(), {"op": "welcome", "session": "s"})

    async with performing(script) as server:
        async with connect(URL, open_stream=server.open_stream):
            leaving = trio.current_time()
        assert trio.current_time() == leaving + CLOSE_GRACE


async def test_cancellation_leaves_nothing(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a")
        assert await peer.gone() in {1000, 1006}  # no time to wait for the answer to a good-bye

    async with performing(script) as server:
        with trio.move_on_after(5) as scope:
            async with connect(URL, open_stream=server.open_stream) as client:
                async for _ in await client.join("a"):
                    pass
        assert scope.cancelled_caught
        assert client.state == "closed"


# -------------------------------------------------------------- coming back


async def test_returns_after_growing_waits_and_counts_anew_once_stable(autojump_clock: MockClock) -> None:
    done = trio.Event()

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        server.unreachable = True
        await peer.drop()
        await trio.sleep(10)
        server.unreachable = False
        peer = await server.accept()
        await trio.sleep(WAITS.stable)
        await peer.drop()
        peer = await server.accept()
        done.set()
        await peer.gone()

    async with client_of(script) as (client, server):
        assert client.state == "connected"
        await done.wait()
        at = [when - server.dialled_at[0] for when in server.dialled_at]
        assert at == [0, 1, 3, 7, 15, 26]
        await trio.testing.wait_all_tasks_blocked()
        assert client.statistics().connections == 3


async def test_being_thrown_out_at_once_is_no_fresh_start(autojump_clock: MockClock) -> None:
    done = trio.Event()

    async def script(server: ScriptedServer) -> None:
        for _ in range(4):
            await (await server.accept()).drop()
        peer = await server.accept()
        done.set()
        await peer.gone()

    async with client_of(script) as (_, server):
        await done.wait()
        assert [b - a for a, b in zip(server.dialled_at, server.dialled_at[1:], strict=False)] == [1, 2, 4, 8]


async def test_jitter_spreads_over_the_whole_range(autojump_clock: MockClock) -> None:
    done = trio.Event()

    async def script(server: ScriptedServer) -> None:
        await (await server.accept()).drop()
        peer = await server.accept()
        done.set()
        await peer.gone()

    expected = random.Random(5).uniform(0, 1)
    async with client_of(script, backoff=Backoff(base=1, rng=random.Random(5))) as (_, server):
        await done.wait()
        assert server.dialled_at[1] - server.dialled_at[0] == pytest.approx(expected)


async def test_honours_retry_after(autojump_clock: MockClock) -> None:
    done = trio.Event()

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.bye(4503, "draining", retry_after=7.5)
        request = await server.request()
        await request.reject(503, extra_headers=[(b"Retry-After", b"3")])
        peer = await server.accept()
        done.set()
        await peer.gone()

    async with client_of(script) as (_, server):
        await done.wait()
        assert [when - server.dialled_at[0] for when in server.dialled_at] == [0, 7.5, 10.5]


async def test_a_bye_counts_even_without_its_close_frame(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.send({"op": "bye", "code": 4403, "reason": "blocked", "retry_after": None})
        await peer.drop()

    async with client_of(script) as (client, _):
        with pytest.raises(Closed, match="4403 blocked"):
            await client.ping()


@pytest.mark.parametrize(("code", "retry_after"), [(4401, None), (4403, 5.0), (4499, None), (1000, None)])
async def test_some_closes_are_final(autojump_clock: MockClock, code: int, retry_after: float | None) -> None:
    go = trio.Event()

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a")
        await go.wait()
        await peer.bye(code, "out", retry_after)
        await trio.sleep(100)
        assert len(server.dialled_at) == 1

    async with client_of(script) as (client, _):
        room = await client.join("a")
        go.set()
        with pytest.raises(Closed) as caught:
            async for _ in room:
                pass
        assert (caught.value.code, caught.value.reason) == (code, "out")
        assert client.state == "closed"
        assert client.closed is not None
        with pytest.raises(Closed):
            await client.publish("a", "e")
        with pytest.raises(Closed):
            client.events()


async def test_an_upgrade_refused_for_good_ends_the_client(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        await (await server.accept()).drop()
        await (await server.request()).reject(502)
        await (await server.request()).reject(403)

    async with client_of(script) as (client, _):
        with pytest.raises(Closed, match="403"):
            await client.ping()


async def test_an_expired_token_is_fetched_anew(autojump_clock: MockClock) -> None:
    tokens = iter(["one", "two"])

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        assert peer.headers["authorization"] == "Bearer one"
        await peer.bye(4501, "expired", retry_after=0.0)
        peer = await server.accept()
        assert peer.headers["authorization"] == "Bearer two"
        await peer.ok(await peer.expect("ping"), ts=3)
        await peer.gone()

    async with client_of(script, token=lambda: next(tokens)) as (client, _):
        await trio.testing.wait_all_tasks_blocked()
        assert await client.ping() == 3


async def test_a_fixed_token_that_expired_is_final(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        await (await server.accept()).bye(4501, "expired", retry_after=0.0)

    async with client_of(script, token="T") as (client, _):
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Closed, match="4501"):
            await client.ping()


async def test_a_token_function_may_fail_while_away(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    answers: Iterator[str | OSError] = iter(["one", OSError("identity provider down"), "two"])

    def fetch() -> str:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    async def script(server: ScriptedServer) -> None:
        await (await server.accept()).drop()
        peer = await server.accept()
        assert peer.headers["authorization"] == "Bearer two"
        await peer.ok(await peer.expect("ping"), ts=3)
        await peer.gone()

    async with client_of(script, token=fetch) as (client, _):
        await trio.testing.wait_all_tasks_blocked()
        assert await client.ping() == 3
    assert "identity provider down" in caplog.text


async def test_a_token_function_that_fails_at_first_is_the_callers_error(autojump_clock: MockClock) -> None:
    def fetch() -> str:
        raise LookupError("no user")

    error = await failure(no_script, token=fetch)
    assert isinstance(error, LookupError)
    assert "no user" in str(error)


# ------------------------------------------------------- rooms come back too


async def test_recovers_what_was_missed(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        first = await peer.join("deal:7", offset=10, members=[])
        assert (first["tail"], first["filter"], first["presence"]) == (3, {"exists": "x"}, True)
        await peer.send(event("deal:7", 11), event("deal:7", 12))
        await peer.drop()
        peer = await server.accept()
        again = await peer.expect("join", room="deal:7", since={"epoch": "e", "offset": 12})
        assert (again["tail"], again["filter"], again["presence"]) == (3, {"exists": "x"}, True)
        reply = {"op": "ok", "id": again["id"], "room": "deal:7", "epoch": "e", "offset": 14}
        await peer.send(reply | {"recovered": True}, event("deal:7", 13), event("deal:7", 14))
        await peer.gone()

    async with client_of(script) as (client, _):
        room = await client.join("deal:7", tail=3, filter={"exists": "x"}, presence=True)
        first_recovered = room.recovered
        items = room.items()
        seen = [await anext(items) for _ in range(5)]
        assert [getattr(item, "offset", item) for item in seen] == [
            11,
            12,
            Rejoined(room="deal:7", reason="reconnect", recovered=True, position=Position("e", 14)),
            13,
            14,
        ]
        assert (first_recovered, room.recovered) == (False, True)
        assert room.position == Position("e", 14)


async def test_tells_when_recovery_failed(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a", offset=5)
        await peer.drop()
        peer = await server.accept()
        await peer.join("a", epoch="new", offset=2)
        await peer.send(event("a", 3))
        await peer.drop()
        peer = await server.accept()
        await peer.expect("join", room="a", since={"epoch": "new", "offset": 3})
        await peer.gone()

    async with client_of(script) as (client, _):
        room = await client.join("a")
        items = room.items()
        notice = await anext(items)
        assert isinstance(notice, Rejoined)
        assert (notice.recovered, notice.position) == (False, Position("new", 2))
        assert (await anext(room)).position == Position("new", 3)
        await trio.sleep(5)


async def test_a_tail_that_never_came_is_asked_for_again(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a", offset=100)
        await peer.drop()
        peer = await server.accept()
        await peer.expect("join", room="a", since={"epoch": "e", "offset": 90}, tail=10)
        await peer.gone()

    async with client_of(script) as (client, _):
        await client.join("a", tail=10)
        await trio.sleep(5)


async def test_ephemeral_rooms_are_joined_again_without_a_position(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        for number in range(2):
            peer = await server.accept()
            join = await peer.expect("join", room="live:x")
            assert "since" not in join
            await peer.ok(join, room="live:x", recovered=False)
            await peer.send(event("live:x", data=number))
            if not number:
                await peer.drop()
        await peer.gone()

    async with client_of(script) as (client, _):
        room = await client.join("live:x")
        assert [(await anext(room)).data for _ in range(2)] == [0, 1]
        assert room.position is None


async def test_a_room_that_cannot_be_joined_again_closes(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a")
        await peer.drop()
        peer = await server.accept()
        await peer.refuse(await peer.expect("join"), "unavailable", retry=True)
        await peer.refuse(await peer.expect("join"), "rate_limited", retry=True, retry_after=3)
        await peer.refuse(await peer.expect("join"), "forbidden")
        await peer.gone()

    async with client_of(script) as (client, server):
        room = await client.join("a")
        with pytest.raises(RoomClosed, match="a: forbidden"):
            await anext(room)
        assert trio.current_time() - server.dialled_at[1] == 1 + 3
        assert not client.rooms
    assert "cannot return to a" in caplog.text


async def test_presence_state_is_set_again(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a")
        await peer.ok(await peer.expect("state", room="a", state={"cursor": 3}))
        await peer.drop()
        peer = await server.accept()
        await peer.join("a")
        await peer.ok(await peer.expect("state", room="a", state={"cursor": 3}))
        await peer.gone()

    async with client_of(script) as (client, _):
        await client.join("a")
        await client.set_state("a", {"cursor": 3})
        await trio.sleep(5)


async def test_a_room_that_was_left_is_not_joined_again(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a")
        await peer.ok(await peer.expect("leave", room="a"))
        await peer.join("b")
        await peer.drop()
        peer = await server.accept()
        await peer.join("b")
        assert await peer.gone() == 1000

    async with client_of(script) as (client, _):
        room = await client.join("a")
        await room.leave()
        await room.leave()
        assert [item async for item in room] == []
        await client.join("b")
        await trio.sleep(5)


async def test_a_connection_that_breaks_while_leaving(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a")
        await peer.expect("leave")
        await peer.drop()
        peer = await server.accept()
        assert await peer.gone() == 1000

    async with client_of(script) as (client, _):
        await (await client.join("a")).leave()
        await trio.sleep(5)


# ------------------------------------------------ requests across connections


async def test_a_request_waits_for_the_connection(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        await (await server.accept()).drop()
        peer = await server.accept()
        await peer.ok(await peer.expect("publish", data=3), epoch="e", offset=1)
        await peer.gone()

    async with client_of(script) as (client, _):
        await trio.testing.wait_all_tasks_blocked()
        assert client.state == "connecting"
        assert await client.publish("a", "e", 3) == Position("e", 1)


async def test_a_request_does_not_wait_for_ever(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        server.unreachable = True
        await peer.drop()

    async with client_of(script) as (client, _):
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionLost, match="not connected for 4 s"):
            await client.publish("a", "e", timeout=4)


async def test_a_publish_without_a_key_is_not_repeated(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(user="42")
        await peer.expect("publish")
        await peer.drop()
        peer = await server.accept(user="42")
        assert await peer.gone() == 1000

    async with client_of(script) as (client, _):
        with pytest.raises(ConnectionLost):
            await client.publish("a", "e")
        await trio.sleep(5)


async def test_a_publish_with_a_key_is_repeated(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        for _ in range(2):
            peer = await server.accept(user="42")
            await peer.expect("publish", key="k")
            await peer.drop()
        peer = await server.accept(user="42")
        await peer.ok(await peer.expect("publish", key="k"), epoch="e", offset=4)
        await peer.gone()

    async with client_of(script) as (client, _):
        assert await client.publish("a", "e", key="k") == Position("e", 4)


@pytest.mark.parametrize("user", [None, "42"])
async def test_keys_do_not_help_anonymous_clients_nor_ephemeral_rooms(
    autojump_clock: MockClock, user: str | None
) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(user=user)
        await peer.ok(await peer.expect("join"), room="a", recovered=False)
        await peer.expect("publish", key="k")
        await peer.drop()

    async with client_of(script) as (client, _):
        await client.join("a")
        with pytest.raises(ConnectionLost):
            await client.publish("a", "e", key="k")


async def test_a_reply_that_never_comes(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        ping = await peer.expect("ping")
        await trio.sleep(11)
        await peer.ok(ping, ts=1)  # nobody waits for it any more
        await peer.refuse(ping, "internal")
        await peer.gone()

    async with client_of(script) as (client, _):
        with pytest.raises(RequestError) as caught:
            await client.ping()
        assert (caught.value.code, caught.value.retry) == ("timeout", True)
        await trio.sleep(5)
        assert client.state == "connected"


async def test_closing_ends_what_waits(autojump_clock: MockClock) -> None:
    errors: list[Exception] = []
    seen: list[object] = []

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a")
        await peer.expect("ping")
        await peer.gone()

    async def ping(client: Client) -> None:
        try:
            await client.ping()
        except Closed as error:
            errors.append(error)

    async def iterate(room: Any) -> None:
        seen.extend([item async for item in room])

    async with trio.open_nursery() as outside, client_of(script) as (client, _):
        outside.start_soon(iterate, await client.join("a"))
        outside.start_soon(ping, client)
        await trio.testing.wait_all_tasks_blocked()
    assert [type(error) for error in errors] == [Closed]
    assert seen == []
