"""The link on a Redis that is killed, frozen, cut off, full, or forgetful."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import pytest
import redis
import trio

from broker.errors import ConfigurationError
from broker.link.base import LinkDown, LinkError
from tests.link.linked import ECHO, OWN, PATIENCE, Recorder, build, descriptors, linked, order, until
from tests.link.proxy import Proxy, proxy_to
from tests.redis_server import RedisServer, redis_server

QUICK: dict[str, Any] = {
    "connect_timeout": 1.0,
    "answer_timeout": 0.3,
    "probe_after": 0.4,
    "probe_timeout": 0.3,
}
"""Shorter than anybody would run with, so that tests are short; nothing is asserted about them."""


@contextmanager
def served(**options: Any) -> Iterator[tuple[RedisServer, redis.Redis]]:
    """A server to be mistreated, and a client that is connected already."""
    with redis_server(**options) as server, server.client() as client:
        client.ping()
        yield server, client


@asynccontextmanager
async def through_proxy(port: int, **settings: Any) -> AsyncIterator[tuple[Recorder, Proxy]]:
    async with proxy_to(port) as proxy:
        async with linked(proxy.url, **settings) as here:
            yield here, proxy
        await until(lambda: proxy.open == 0)


async def works(here: Recorder, key: str = "k") -> None:
    """Commands, calls, scripts and messages do."""
    await until(lambda: here.link.up)
    # A fault may have reached it between two looks, so what fails is asked again.
    with trio.fail_after(30):
        while True:
            text = f"word {trio.current_time()}"
            answer = await here.send(key, "ECHO", text)
            if answer == text.encode():
                break
            assert isinstance(answer, LinkDown), answer
            await until(lambda: here.link.up)
    await here.round_trip(text)
    assert await here.link.call_script(ECHO, [key], "1") == b"1"


async def test_a_killed_redis_is_found_again_with_another_run_id() -> None:
    with served() as (server, _):
        async with linked(server.url, **QUICK) as here:
            here.link.subscribe(["a"], sharded=False)
            assert await here.link.heard("a")
            server.kill()
            await until(lambda: not here.link.up)
            assert isinstance(await here.send("k", "PING"), LinkDown)
            with pytest.raises(LinkDown):
                await here.link.call("k", "PING")
            assert not here.link.hears("a")
            assert not await here.link.heard("a")
            server.start()
            await works(here)
            assert here.link.hears("a")
            assert len(set(here.run_ids)) == 2
            assert (here.ups, len(here.downs)) == (2, 1)


async def test_a_frozen_redis_is_noticed_and_nothing_is_repeated() -> None:
    with served() as (server, _):
        async with linked(server.url, **QUICK) as here:
            assert await here.send("n", "INCR", "n") == 1
            server.freeze()
            answer = await here.send("n", "INCR", "n")
            assert isinstance(answer, LinkDown)
            assert "no answer" in str(answer)
            await until(lambda: not here.link.up)
            server.thaw()
            await works(here)
            with server.client() as client:
                assert client.get("n") in (b"1", b"2")  # executed once or never, not twice
            assert here.link.statistics()["unanswered"] >= 1


async def test_a_frozen_redis_is_noticed_without_any_command() -> None:
    with served() as (server, _):
        async with linked(server.url, **QUICK) as here:
            server.freeze()
            await until(lambda: not here.link.up)
            assert here.link.statistics()["silences"] >= 1
            server.thaw()
            await works(here)


async def test_our_own_standstill_is_not_held_against_redis(redis_at: RedisServer) -> None:
    async with linked(redis_at.url, **QUICK) as here:
        replies: list[object] = []
        for _ in range(3):
            here.link.send(replies.append, "k", "PING")
            await trio.lowlevel.checkpoint()
            # Everything stands still for longer than any timeout, as under SIGSTOP.
            signal.sigtimedwait([], 0.7)
        await works(here)
        assert replies == [b"PONG"] * 3
        assert (here.ups, here.downs) == (1, [])


@pytest.mark.parametrize("kind", ["normal", "pubsub"])
async def test_killed_connections_are_replaced(redis_at: RedisServer, kind: str) -> None:
    async with linked(redis_at.url, **QUICK) as here:
        here.link.subscribe(["a"], sharded=False)
        assert await here.link.heard("a")
        with redis_at.client() as client:
            for round_ in range(3):
                order(client, "CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
                await until(lambda: here.ups == round_ + 2)  # noqa: B023
                assert here.link.hears("a")
        await works(here)
        assert len(here.run_ids) == (4 if kind == "normal" else 1), "only a lane is greeted"


async def test_commands_go_on_while_only_the_subscriber_is_gone(redis_at: RedisServer) -> None:
    async with linked(redis_at.url, **QUICK) as here:
        answers = []
        with redis_at.client() as client:
            order(client, "CLIENT", "KILL", "TYPE", "pubsub")
            while here.ups == 1:
                answers.append(await here.send("k", "PING"))
        assert set(answers) == {b"PONG"}


async def test_a_client_pause_shorter_than_the_timeout_is_sat_out(redis_at: RedisServer) -> None:
    async with linked(redis_at.url) as here:
        with redis_at.client() as client:
            order(client, "CLIENT", "PAUSE", 300, "ALL")
        assert await here.send("k", "PING") == b"PONG"
        assert here.downs == []


async def test_a_client_pause_longer_than_the_timeout_is_a_loss(redis_at: RedisServer) -> None:
    async with linked(redis_at.url, **QUICK) as here:
        with redis_at.client() as client:
            order(client, "CLIENT", "PAUSE", 1000, "ALL")
        assert isinstance(await here.send("k", "INCR", "k"), LinkDown)
        await works(here)


async def test_a_subscriber_over_the_output_buffer_limit_is_cut_and_comes_back() -> None:
    with served() as (server, client):
        client.config_set("client-output-buffer-limit", "pubsub 256kb 0 0")
        async with proxy_to(server.port) as proxy, linked(proxy.url, connect_timeout=2) as here:
            here.link.subscribe(["a"], sharded=False)
            assert await here.link.heard("a")
            proxy.faults.replies.frozen = True
            for _ in range(400):
                client.publish("a", b"x" * 65536)
            assert client.publish("a", "x") == 0, "Redis has cut it"
            proxy.heal()
            await until(lambda: here.ups == 2)
            await works(here)
            assert here.link.hears("a")


async def test_a_silent_partition_in_either_direction_heals() -> None:
    with served() as (server, _):
        async with through_proxy(server.port, **QUICK) as (here, proxy):
            for name in ("requests", "replies"):
                getattr(proxy.faults, name).lost = True
                await until(lambda: not here.link.up)
                proxy.heal()
                await works(here)


async def test_a_subscriber_that_alone_falls_silent_is_noticed() -> None:
    """Commands go on, its connection stays open, and messages do not come."""
    with served() as (server, _):
        async with through_proxy(server.port, **QUICK) as (here, proxy):
            proxy.faults.mute = f"{OWN}/subscriber".encode()
            await until(lambda: here.downs)
            assert await here.send("k", "PING") == b"PONG"
            assert here.link.statistics()["silences"] == 1
            proxy.heal()
            await works(here)
            assert len(here.run_ids) == 1


async def test_a_reply_cut_at_any_byte_is_never_a_wrong_reply() -> None:
    with served() as (server, client):
        async with through_proxy(server.port, **QUICK) as (here, proxy):
            sent = 0
            for cut in (*range(1, 40), 100, 1000, 5000, 6000, 7000):
                proxy.faults.replies.cut_after = cut
                proxy.drop()
                await until(lambda: not here.link.up or proxy.open == 0)
                replies: dict[int, Any] = {}
                for _ in range(20):
                    sent += 1
                    here.link.send_script(partial(replies.__setitem__, sent), ECHO, ["k"], f"{sent:030d}")
                await until(lambda: len(replies) == 20)  # noqa: B023
                assert all(
                    isinstance(reply, LinkDown) or int(reply) == number for number, reply in replies.items()
                )
            proxy.heal()
            proxy.drop()
            await works(here)
            assert client.ping()


async def test_slow_replies_keep_their_order() -> None:
    with served() as (server, _):
        async with through_proxy(server.port) as (here, proxy):
            proxy.faults.replies.delay = 0.005
            replies: list[object] = []
            for number in range(300):
                here.link.send_script(replies.append, ECHO, ["k"], number)
                if number % 10 == 0:
                    await trio.sleep(0.001)
            await until(lambda: len(replies) == 300)
            assert replies == [b"%d" % number for number in range(300)]


async def test_a_full_redis_is_an_error_for_the_caller_and_no_reconnect() -> None:
    with served() as (server, client):
        async with linked(server.url, **QUICK) as here:
            client.config_set("maxmemory", 1)
            answer = await here.send("k", "SET", "k", "v")
            assert str(answer).startswith("OOM ")
            assert not isinstance(answer, LinkDown)
            client.config_set("maxmemory", 0)
            assert await here.send("k", "SET", "k", "v") == b"OK"
            assert here.downs == []


async def test_a_server_that_has_become_a_replica_is_given_up() -> None:
    with served() as (server, client):
        async with linked(server.url, **QUICK) as here:
            order(client, "REPLICAOF", "127.0.0.1", "1")
            answer = await here.send("k", "SET", "k", "v")
            assert str(answer).startswith("READONLY ")
            await until(lambda: here.link.statistics()["connect_failures"] >= 1)
            assert not here.link.up
            order(client, "REPLICAOF", "NO", "ONE")
            await works(here)


async def test_a_busy_script_is_an_error_or_a_timeout_and_ends() -> None:
    with served(busy_reply_threshold="1") as (server, client):
        async with linked(server.url, **QUICK) as here:

            def block() -> None:
                with pytest.raises(Exception, match="killed"):
                    client.eval("while true do end", 0)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, block)
                with server.client() as other:
                    answer: object = b"PONG"
                    while answer == b"PONG":
                        answer = await here.send("k", "GET", "k") or b"PONG"
                    assert isinstance(answer, LinkError)
                    other.script_kill()
            await works(here)


async def test_too_many_clients_is_a_failed_attempt() -> None:
    with served() as (server, client):
        async with linked(server.url, **QUICK) as here:
            client.config_set("maxclients", 1)
            order(client, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await until(lambda: here.link.statistics()["connect_failures"] >= 2)
            client.config_set("maxclients", 1000)
            await works(here)


async def test_a_changed_acl_is_an_error_and_no_loss() -> None:
    with served() as (server, client):
        async with linked(server.url, **QUICK) as here:
            order(client, "ACL", "SETUSER", "default", "-set")
            answer = await here.send("k", "SET", "k", "v")
            assert str(answer).startswith("NOPERM ")
            order(client, "ACL", "SETUSER", "default", "+set")
            assert await here.send("k", "SET", "k", "v") == b"OK"
            assert here.downs == []


async def test_a_refused_channel_does_not_hold_up_the_others() -> None:
    with served() as (server, client):
        order(client, "ACL", "SETUSER", "default", "resetchannels", "&broker:*", "&open:*")
        async with linked(server.url, **QUICK) as here:
            here.link.subscribe(["open:1", "closed:1", "open:2"], sharded=False)
            assert not await here.link.heard("closed:1")
            assert await here.link.heard("open:1")
            assert await here.link.heard("open:2")
            assert here.link.statistics()["refused_subscriptions"] == 1
            order(client, "CLIENT", "KILL", "TYPE", "pubsub")
            await until(lambda: here.ups == 2)
            assert here.link.hears("open:1")


async def test_a_failure_inside_the_bridge_restarts_it(redis_at: RedisServer) -> None:
    async with linked(redis_at.url, **QUICK) as here:
        here.link.subscribe(["a"], sharded=False)
        assert await here.link.heard("a")

        def fail() -> None:
            raise RuntimeError("nobody in asyncio caught this")

        for round_ in range(2):
            assert here.link.loop is not None
            here.link.loop.call_soon(fail)
            await until(lambda: here.ups == round_ + 2)  # noqa: B023
        await works(here)
        assert here.link.hears("a")
        assert here.link.statistics()["restarts"] == 2


async def test_a_callback_that_fails_costs_a_connection_and_not_the_others_answers(
    redis_at: RedisServer,
) -> None:
    async with linked(redis_at.url, **QUICK) as here:
        replies: list[object] = []

        def fail(_: object) -> None:
            raise RuntimeError("a callback must not do this")

        here.link.send(replies.append, "k", "PING")
        here.link.send(fail, "k", "PING")
        here.link.send(replies.append, "k", "PING")
        await until(lambda: len(replies) == 2)
        assert replies[0] == b"PONG"
        await works(here)
        assert here.link.statistics()["callback_failures"] == 1
        order_of_ends: list[object] = []
        here.link.send(order_of_ends.append, "k", "BLPOP", "nothing", 60)
        here.link.send(fail, "k", "PING")
        here.link.send(order_of_ends.append, "k", "PING")
        await until(lambda: len(order_of_ends) == 2)  # nothing is answered: the lane is given up
        assert all(isinstance(reply, LinkDown) for reply in order_of_ends)
        assert here.link.statistics()["callback_failures"] == 2
        await works(here)


async def test_a_link_that_is_cancelled_at_any_moment_leaves_nothing(redis_at: RedisServer) -> None:
    for number in range(40):
        before = descriptors()
        here = build(redis_at.url)
        here.link.subscribe([f"room:{one}" for one in range(2000)], sharded=False)
        with trio.move_on_after(number * 0.0006):
            async with trio.open_nursery() as nursery:
                await nursery.start(here.link.run)
                nursery.start_soon(here.link.call, "k", "PING")
                nursery.start_soon(here.link.heard, "room:1999")
                here.link.send(lambda _: None, "k", "PING")
        assert not here.link.up
        assert len(here.downs) == here.ups
        await until(lambda: descriptors() <= before)  # noqa: B023


async def test_without_redis_the_broker_starts_and_waits_for_it() -> None:
    with served() as (server, _):
        server.kill()
        here = build(server.url, **{**QUICK, "connect_timeout": 0.1})
        async with trio.open_nursery() as nursery:
            await nursery.start(here.link.run)
            assert not here.link.up
            assert isinstance(await here.send("k", "PING"), LinkDown)
            assert here.downs == []
            server.start()
            await works(here)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("user", "problem"),
    [("", "wants a password"), (":wrong@", "does not accept"), ("nobody:secret@", "does not accept")],
)
async def test_wrong_credentials_end_the_start_with_a_mend(user: str, problem: str) -> None:
    with served() as (server, client):
        client.config_set("requirepass", "right")
        here = build(f"redis://{user}127.0.0.1:{server.port}/0")
        with pytest.raises(ConfigurationError, match=problem) as caught:
            with trio.fail_after(PATIENCE):
                await here.link.run()
        assert caught.value.key == "redis.url"
        assert caught.value.mend
        assert "wrong" not in str(caught.value)
        assert "secret" not in str(caught.value)


async def test_the_right_credentials_are_used_everywhere() -> None:
    with served() as (server, client):
        rules = "~broker:* &broker:* +@all -@dangerous +info"  # as docs/cluster.md has it
        order(client, "ACL", "SETUSER", "broker", "on", ">p@ss/word", *rules.split())
        order(client, "ACL", "SETUSER", "default", "off")
        async with linked(f"redis://broker:p%40ss%2Fword@127.0.0.1:{server.port}/0") as here:
            await works(here, key="broker:{k}:meta")


async def test_missing_permissions_end_the_start_with_a_mend() -> None:
    with served() as (server, client):
        order(client, "ACL", "SETUSER", "default", "-info")
        here = build(server.url)
        with pytest.raises(ConfigurationError, match="NOPERM"):
            with trio.fail_after(PATIENCE):
                await here.link.run()


async def test_credentials_that_are_taken_away_later_do_not_end_anything() -> None:
    with served() as (server, client):
        async with linked(server.url, **QUICK) as here:
            client.config_set("requirepass", "new")
            order(client, "AUTH", "new")
            order(client, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await until(lambda: here.link.statistics()["connect_failures"] >= 2)
            client.config_set("requirepass", "")
            await works(here)


async def test_a_database_that_does_not_exist_is_told() -> None:
    with served() as (server, _):
        here = build(f"redis://127.0.0.1:{server.port}/99")
        with pytest.raises(ConfigurationError, match="DB index"):
            with trio.fail_after(PATIENCE):
                await here.link.run()


async def test_what_is_not_redis_is_an_attempt_that_fails() -> None:
    async def chat(stream: trio.SocketStream) -> None:
        with trio.move_on_after(30):
            await stream.send_all(b"220 mail.example.com ESMTP\r\n")
            async for _ in stream:
                await stream.send_all(b"500 what?\r\n")

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, chat, listeners)
        port = listeners[0].socket.getsockname()[1]
        here = build(f"redis://127.0.0.1:{port}", **{**QUICK, "connect_timeout": 0.2})
        await nursery.start(here.link.run)
        assert not here.link.up
        assert here.link.statistics()["connect_failures"] >= 1
        nursery.cancel_scope.cancel()
