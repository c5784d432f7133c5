"""What happens while a connection lives: renewal, keepalive, losses, dictionaries, nonsense."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
import trio
import trio_websocket
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from broker.client import Backoff, Closed, ConnectionLost, Lost, Rejoined, RequestError, RoomClosed
from broker.protocol.events import Position
from tests.client.scripted_server import DeafServer, ScriptedServer, client_of, event
from tests.client.test_wire import DICTIONARY

# ------------------------------------------------------------------- tokens


async def test_renews_at_four_fifths_of_the_lifetime(autojump_clock: MockClock) -> None:
    tokens = iter(["one", "two", "three"])
    renewed: list[float] = []

    async def script(server: ScriptedServer) -> None:
        start = trio.current_time()
        peer = await server.accept(user="42", expires=time.time() + 100)
        for token in ("two", "three"):
            auth = await peer.expect("auth", token=token)
            renewed.append(trio.current_time() - start)
            expires = time.time() + 50 if token == "two" else None
            await peer.ok(auth, user="42", expires=expires, rooms={"user:42": {"epoch": "e", "offset": 3}})
        await peer.ok(await peer.expect("ping"), ts=1)
        await peer.gone()

    async with client_of(script, token=lambda: next(tokens)) as (client, _):
        await trio.sleep(150)
        await client.ping()
    assert renewed == pytest.approx([80, 120], abs=1)  # wall clocks move on a little, virtual ones do not


async def test_a_failed_renewal_is_tried_again(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    answers: Iterator[str | OSError | None] = iter(["one", OSError("provider down"), "two", "three", None])

    def fetch() -> str | None:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(user="42", expires=time.time() + 100)
        await peer.refuse(await peer.expect("auth", token="two"), "conflict")
        auth = await peer.expect("auth", token="three")
        await peer.ok(auth, user="42", expires=time.time() + 100, rooms={})
        await peer.gone()

    async with client_of(script, token=fetch):
        await trio.sleep(500)
    assert "provider down" in caplog.text
    assert "conflict" in caplog.text


async def test_a_connection_that_breaks_while_renewing(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(user="42", expires=time.time() + 10)
        await peer.expect("auth")
        await peer.drop()
        peer = await server.accept(user="42")
        await peer.gone()

    async with client_of(script, token=lambda: "T"):
        await trio.sleep(50)


# ---------------------------------------------------------------- keepalive

AT_ONCE = Backoff(base=0.0)


async def test_a_silent_broker_is_noticed(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        stream = await server.stream()
        await DeafServer.greet(stream, {"op": "welcome", "session": "s", "ping": 25})
        peer = await server.accept()
        assert server.dialled_at[1] - server.dialled_at[0] == 25 + 10
        await peer.gone()

    async with client_of(script, backoff=AT_ONCE):
        await trio.sleep(100)


async def test_an_idle_broker_is_asked_and_kept(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(ping=25)
        await trio.sleep(90)
        await peer.send({"op": "nothing"})
        await peer.gone()

    async with client_of(script) as (client, server):
        await trio.sleep(200)
        assert client.state == "connected"
        assert len(server.dialled_at) == 1


# ------------------------------------------------------------------- losses


async def test_a_loss_in_a_room_with_history_is_repaired(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a", offset=5)
        lost = {"op": "lost", "room": "a", "reason": "slow", "epoch": "e", "offset": 6, "count": 2}
        await peer.send(event("a", 6), lost, lost)
        again = await peer.expect("join", room="a", since={"epoch": "e", "offset": 6})
        reply = {"op": "ok", "id": again["id"], "room": "a", "epoch": "e", "offset": 8, "recovered": True}
        await peer.send(reply, event("a", 7), event("a", 8))
        assert await peer.gone() == 1000

    async with client_of(script) as (client, _):
        items = (await client.join("a")).items()
        seen = [await anext(items) for _ in range(4)]
        assert [getattr(item, "offset", None) for item in seen] == [6, None, 7, 8]
        assert seen[1] == Rejoined(room="a", reason="slow", recovered=True, position=Position("e", 8))


async def test_a_loss_in_an_ephemeral_room_is_told(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.ok(await peer.expect("join"), room="live:x", recovered=False)
        await peer.send({"op": "lost", "room": "live:x", "reason": "slow", "count": 3}, event("live:x"))
        await peer.send({"op": "lost", "room": "unknown", "reason": "slow"})
        assert await peer.gone() == 1000

    async with client_of(script) as (client, _):
        items = (await client.join("live:x")).items()
        assert await anext(items) == Lost(room="live:x", reason="slow", count=3)
        await anext(items)


async def test_a_break_while_repairing_a_loss(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("a", offset=5)
        await peer.send({"op": "lost", "room": "a", "reason": "gap", "epoch": "e", "offset": 5})
        await peer.expect("join")
        await peer.drop()
        peer = await server.accept()
        await peer.join("a", offset=5, recovered=True)
        await peer.send({"op": "lost", "room": "a", "reason": "gap", "epoch": "e", "offset": 5})
        await peer.join("a", offset=5, recovered=True)
        await peer.gone()

    async with client_of(script) as (client, _):
        items = (await client.join("a")).items()
        reasons = [
            item.reason for item in [await anext(items), await anext(items)] if isinstance(item, Rejoined)
        ]
        assert reasons == ["reconnect", "gap"]


async def test_a_room_taken_away(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(rooms={"all": None})
        await peer.join("a")
        await peer.send(event("a", 1), {"op": "left", "room": "a", "code": "forbidden"}, event("a", 2))
        await peer.send({"op": "left", "room": "a", "code": "forbidden"})
        await peer.send({"op": "left", "room": "all", "code": "forbidden"})
        await peer.gone()

    async with client_of(script) as (client, _):
        room = await client.join("a")
        assert (await anext(room)).offset == 1
        with pytest.raises(RoomClosed, match="a: forbidden"):
            await anext(room)


# ----------------------------------------------------------------- nonsense


words = st.text(max_size=3)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | words,
    lambda children: st.lists(children, max_size=2) | st.dictionaries(words, children, max_size=2),
    max_leaves=4,
)
plausible = st.fixed_dictionaries(
    {},
    optional={
        "op": st.sampled_from(
            ["ok", "error", "welcome", "event", "position", "presence", "lost", "left", "dicts"]
        )
        | json_values,
        "id": st.just(1) | json_values,
        "room": st.sampled_from(["a", "user:42", "b"]) | json_values,
        "event": st.text(max_size=2) | json_values,
        "ts": st.floats(0, 9) | json_values,
        "offset": st.integers(0, 9) | json_values,
        "epoch": st.sampled_from(["e", "f"]) | json_values,
        "recovered": st.booleans() | json_values,
        "reason": st.just("slow") | json_values,
        "code": st.just("internal") | json_values,
        "joined": st.just([{"session": "s"}]) | json_values,
        "members": st.just([{"session": "s"}]) | json_values,
        "dicts": st.just([{"id": 1, "url": "/", "sha256": ""}]) | json_values,
    },
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(plausible, max_size=4), max_size=4))
def test_whatever_a_broker_says_the_client_lives_on(frames: list[list[dict[str, Any]]]) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(rooms={"user:42": {"epoch": "u", "offset": 1}})
        try:
            await peer.join("a")
            for frame in frames:
                await peer.send(*frame)
            await peer.bye(4503, retry_after=0.0)
        except trio_websocket.ConnectionClosed:
            pass  # with 1007, and rightly so
        peer = await server.accept()
        try:
            while True:
                message = await peer.receive()
                if message["op"] == "ping":
                    await peer.ok(message, ts=1)
                else:
                    await peer.refuse(message, "forbidden")
        except trio_websocket.ConnectionClosed:
            pass

    async def main() -> None:
        async with client_of(script) as (client, server):
            stream = client.events()
            await client.join("a")
            await trio.sleep(20)
            assert len(server.dialled_at) == 2
            assert await client.ping() == 1
            assert stream

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize(
    "body", [b"no json", b"{}", b'[{"op":"event","room":"a"}]', b'[{"op":"welcome"},{"op":"bye"}]', b"[1]"]
)
async def test_nonsense_ends_the_connection_and_not_the_client(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, body: bytes
) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.send_raw(body)
        assert await peer.gone() == 1007
        peer = await server.accept()
        await peer.ok(await peer.expect("ping"), ts=1)
        await peer.gone()

    async with client_of(script) as (client, _):
        await trio.sleep(5)
        await client.ping()
    assert "no message" in caplog.text


async def test_a_malformed_reply_fails_its_request(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        call = await peer.expect("call")
        await peer.send({"op": "error", "id": call["id"], "code": 3})
        assert await peer.gone() == 1007
        await (await server.accept()).gone()

    async with client_of(script) as (client, _):
        with pytest.raises(ConnectionLost):
            await client.call("x")
        await trio.sleep(5)


async def test_unknown_ops_fields_and_ids_are_ignored(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(novelty=1)
        await peer.send({"op": "novelty"}, {"nothing": 1}, {"op": "ok", "id": []}, {"op": "ok", "id": 99})
        await peer.send({"op": "error", "op_": "x", "code": "internal"})
        ping = await peer.expect("ping")
        await peer.ok(ping, ts=1, novelty=2)
        await peer.gone()

    async with client_of(script) as (client, _):
        assert await client.ping() == 1


async def test_too_large_a_message_is_not_sent(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(limits={"message": 1000, "batch": 2})
        await peer.gone()

    async with client_of(script) as (client, _):
        with pytest.raises(RequestError, match="too_large"):
            await client.publish("a", "e", "x" * 1000)
        with pytest.raises(TypeError):
            await client.publish("a", "e", object())


# ------------------------------------------------------------- dictionaries


def offer(**changes: Any) -> dict[str, Any]:
    content = DICTIONARY.as_bytes()
    fields = {"id": 7, "url": "/dict/7", "sha256": hashlib.sha256(content).hexdigest(), "rooms": "deal:*"}
    return fields | changes


async def serve_dictionary(server: ScriptedServer, answer: bytes | None = None) -> bytes:
    """Answer one HTTP request; returns it."""
    stream = await server.stream()
    request = bytes(await stream.receive_some())
    content = DICTIONARY.as_bytes()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    await stream.send_all(head + content if answer is None else answer)
    await stream.aclose()
    return request


async def test_dictionaries_are_loaded_once_a_room_wants_them(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(dicts=[offer(), offer(id=9, rooms="other:*")])
        await peer.join("deal:7")
        assert (await serve_dictionary(server)).startswith(b"GET /dict/7 HTTP/1.1\r\nHost: broker.test\r\n")
        await peer.ok(await peer.expect("dict", dict=7))
        peer.compressor = zstandard.ZstdCompressor(level=1, dict_data=DICTIONARY)
        await peer.send(event("deal:7", 1))
        await peer.drop()
        peer = await server.accept(dicts=[offer()])
        # From memory this time, together with the join; a break meanwhile is no matter.
        assert {(await peer.receive())["op"], (await peer.receive())["op"]} == {"join", "dict"}
        await peer.drop()
        peer = await server.accept()
        await peer.join("deal:7")
        await peer.gone()

    async with client_of(script, zstd=True, dictionaries=True) as (client, server):
        room = await client.join("deal:7")
        assert (await anext(room)).offset == 1
        await trio.sleep(20)
        assert len(server.dialled_at) == 4


async def test_dictionaries_announced_later(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("deal:7")
        await peer.send({"op": "dicts", "dicts": [offer()]})
        await serve_dictionary(server)
        await peer.refuse(await peer.expect("dict", dict=7), "not_found")
        await peer.gone()

    async with client_of(script, zstd=True, dictionaries=True) as (client, _):
        await client.join("deal:7")
        await trio.sleep(5)
        assert client.state == "connected"


@pytest.mark.parametrize("options", [{"zstd": False, "dictionaries": True}, {"zstd": True}])
async def test_dictionaries_are_left_alone_unless_wanted(
    autojump_clock: MockClock, options: dict[str, Any]
) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(dicts=[offer(rooms="*")])
        await peer.join("deal:7")
        assert await peer.gone() == 1000

    async with client_of(script, **options) as (client, server):
        await client.join("deal:7")
        await trio.sleep(5)
        assert len(server.dialled_at) == 1


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"sha256": "0" * 64}, None),
        ({"id": 8}, None),
        ({}, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
        ({}, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort"),
        ({}, b"not HTTP\r\n\r\n"),
    ],
)
async def test_a_dictionary_that_cannot_be_had_is_no_matter(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], answer: bytes | None
) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(dicts=[offer(**changes)])
        await peer.join("deal:7")
        await serve_dictionary(server, answer)
        assert await peer.gone() == 1000

    async with client_of(script, zstd=True, dictionaries=True) as (client, _):
        await client.join("deal:7")
        await trio.sleep(5)
        assert client.state == "connected"
    assert "going on without dictionary" in caplog.text


async def test_dictionaries_are_kept_in_bounds(autojump_clock: MockClock) -> None:
    contents = [zstandard.train_dictionary(512, _samples(n), dict_id=n).as_bytes() for n in range(1, 19)]
    offers = [
        offer(id=n, url=f"/dict/{n}", sha256=hashlib.sha256(content).hexdigest())
        for n, content in enumerate(contents, 1)
    ]

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.join("deal:7")
        for one, content in zip(offers, contents, strict=True):
            await peer.send({"op": "dicts", "dicts": [one]})
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            await serve_dictionary(server, head + content)
            await peer.ok(await peer.expect("dict", dict=one["id"]))
        await peer.gone()

    async with client_of(script, zstd=True, dictionaries=True) as (client, _):
        await client.join("deal:7")
        await trio.sleep(5)
        assert len(client._session._dictionaries) == 16


def _samples(seed: int) -> list[bytes | bytearray | memoryview]:
    return [orjson.dumps({"room": f"deal:{seed}", "n": n, "stage": f"stage {n % 7}"}) for n in range(500)]


async def test_closed_is_told_to_every_reader(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await peer.send(event("x"))
        await peer.bye(4403, "blocked")

    async with client_of(script) as (client, _):
        stream = client.events()
        assert (await anext(stream)).room == "x"
        for _ in range(2):
            with pytest.raises(Closed, match="blocked"):
                await anext(stream)
