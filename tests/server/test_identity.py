"""What an identity brings with it, where the end-to-end tests do not look: races of limits and rooms."""

from __future__ import annotations

import msgspec

from broker.server.identity import count_server_rooms
from tests.e2e.harness import config, jump, running, token, until
from tests.e2e.raw_client import connected, opened
from tests.server.held_engine import HeldEngine


async def test_sessions_of_a_user_that_come_at_once_respect_the_limit() -> None:
    """All wait for the user's room to open; only so many have a place when it is."""
    few = config(limits={"sessions_per_user": 2})
    async with running(few) as broker:
        held = HeldEngine(broker.engine)
        held.hold("open")
        user = token("42")
        async with (
            opened(broker.client_port, token=user) as a,
            opened(broker.client_port, token=user) as b,
            opened(broker.client_port, token=user) as c,
        ):
            await until(lambda: len(broker.context.registry.sessions) == 3)
            await held.entered.wait()
            held.release()
            first = [(await client.next())["op"] for client in (a, b, c)]
            assert sorted(first) == ["bye", "welcome", "welcome"]
            for client in (a, b, c):
                await client.close()


async def test_rooms_of_the_server_are_counted_apart() -> None:
    async with running() as broker:
        async with connected(broker.client_port):
            (session,) = broker.context.registry.sessions.values()
            assert count_server_rooms(session) == 1
        async with connected(broker.client_port, token=token("42")) as client:
            await client.ask("join", room="deal:1")
            (session,) = (s for s in broker.context.registry.sessions.values() if s.user)
            assert count_server_rooms(session) == 2
    async with running(config(auth={"anonymous": False})) as broker, connected(broker.client_port):
        (session,) = broker.context.registry.sessions.values()
        assert count_server_rooms(session) == 0


async def test_a_users_room_stays_for_a_reconnect() -> None:
    async with running() as broker:
        async with connected(broker.client_port, token=token("42")) as client:
            position = client.welcome["rooms"]["user:42"]
        jump(3)
        async with connected(broker.client_port, token=token("42")) as client:
            assert client.welcome["rooms"]["user:42"] == position


async def test_a_refusal_is_held_back_but_not_past_the_deadline() -> None:
    """After it the session would be closed with 4408, as if no token had come."""
    async with running(config(auth={"anonymous": False}, server={"auth_timeout": 3.0})) as broker:
        failures = broker.context.failures
        address = "127.0.0.1"
        for _ in range(20):
            failures.failed(address, broker.context.monotonic())
        async with connected(broker.client_port) as client:
            await client.send({"op": "auth", "id": 1, "token": "a.b.c"})
            await until(lambda: len(failures) and failures.delay(address, broker.context.monotonic()) > 3)
            jump(2.6)
            assert (await client.end()).code == 4401


async def test_development_holds_nothing_back() -> None:
    async with running(msgspec.structs.replace(config(), dev=True)) as broker:
        async with connected(broker.client_port) as client:
            for _ in range(20):
                assert await client.refusal("auth", token="a.b.c") == "unauthenticated"
        assert len(broker.context.failures) == 0
