"""The link on a Redis that behaves."""

from __future__ import annotations

import pytest
import trio

from broker.link.base import Link, LinkDown, LinkError
from broker.link.lane import LIMIT
from tests.link.linked import APPEND, ECHO, OWN, build, linked, order, until
from tests.redis_server import RedisServer, redis_server


async def test_commands_are_answered_in_order(redis_at: RedisServer) -> None:
    async with linked(redis_at.url) as here:
        link: Link = here.link
        replies: list[object] = []
        for number in range(1000):
            link.send(replies.append, "list", "RPUSH", "list", number)
        assert await here.send("list", "LLEN", "list") == 1000
        assert replies == list(range(1, 1001))
        with redis_at.client() as client:
            assert client.lrange("list", 0, -1) == [b"%d" % number for number in range(1000)]


async def test_an_error_reaches_its_command_and_no_other(redis_at: RedisServer) -> None:
    async with linked(redis_at.url) as here:
        replies: list[object] = []
        here.link.send(replies.append, "a", "SET", "a", "text")
        here.link.send(replies.append, "a", "INCR", "a")
        assert await here.send("a", "GET", "a") == b"text"
        assert replies[0] == b"OK"
        assert isinstance(replies[1], LinkError)
        assert not isinstance(replies[1], LinkDown)
        assert str(replies[1]).startswith("ERR ")
        assert here.link.up
        assert here.link.statistics()["error_replies"] == 1


async def test_scripts_survive_their_flush_in_order(redis_at: RedisServer) -> None:
    async with linked(redis_at.url) as here:
        with redis_at.client() as client:
            for round_ in range(3):
                client.script_flush()
                replies: list[object] = []
                for number in range(200):
                    here.link.send_script(replies.append, APPEND, ["list"], round_ * 200 + number)
                    if number % 50 == 0:
                        await trio.lowlevel.checkpoint()  # some go out while others fail
                await until(lambda: len(replies) == 200)  # noqa: B023
                assert replies == list(range(round_ * 200 + 1, round_ * 200 + 201))
            assert client.lrange("list", 0, -1) == [b"%d" % number for number in range(600)]
        assert here.link.statistics()["reloads"] >= 3


async def test_calls_wait_for_their_answers_and_survive_a_flush(redis_at: RedisServer) -> None:
    async with linked(redis_at.url) as here:
        assert await here.link.call("k", "SET", "k", b"\x00\xff") == b"OK"
        with redis_at.client() as client:
            client.script_flush()
        assert await here.link.call_script(ECHO, ["k"], b"\r\n") == b"\r\n"
        with pytest.raises(LinkError, match="WRONGTYPE"):
            await here.link.call("k", "LLEN", "k")
        assert here.link.statistics()["call_failures"] == 1


async def test_many_calls_share_few_connections(redis_at: RedisServer) -> None:
    async with linked(redis_at.url) as here:
        answers: dict[int, object] = {}

        async def call(number: int) -> None:
            answers[number] = await here.link.call_script(ECHO, ["k"], number)

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(call, number)
        assert answers == {number: b"%d" % number for number in range(100)}
        with redis_at.client() as client:
            names = [one["name"] for one in client.client_list()]
        assert 1 <= names.count(f"{OWN}/calls") <= 6
        assert names.count(f"{OWN}/commands") == names.count(f"{OWN}/subscriber") == 1


async def test_a_slow_call_holds_up_neither_lane_nor_other_calls(redis_at: RedisServer) -> None:
    async with linked(redis_at.url, answer_timeout=20) as here, trio.open_nursery() as nursery:
        waiting = trio.Event()

        async def slow() -> None:
            waiting.set()
            assert await here.link.call("q", "BLPOP", "q", 15) == [b"q", b"done"]

        nursery.start_soon(slow)
        await waiting.wait()
        assert await here.link.call("q", "PING") == b"PONG"
        assert await here.send("q", "RPUSH", "q", "done") == 1


async def test_a_cancelled_call_leaves_no_answer_to_the_next(redis_at: RedisServer) -> None:
    async with linked(redis_at.url, answer_timeout=20) as here:
        for number in range(20):
            with trio.CancelScope() as scope:
                scope.cancel()
                await here.link.call("q", "PING")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(here.link.call, "q", "BLPOP", "q", 10)
                await trio.sleep(0.001 * (number % 4))
                nursery.cancel_scope.cancel()
            assert await here.link.call_script(ECHO, ["q"], number) == b"%d" % number


async def test_a_call_without_an_answer_ends_in_time(redis_at: RedisServer) -> None:
    async with linked(redis_at.url, answer_timeout=0.1) as here:
        with pytest.raises(LinkDown, match=r"no answer within 0\.1 s"):
            await here.link.call("q", "BLPOP", "q", 5)
        assert await here.link.call("q", "PING") == b"PONG"


async def test_channels_are_heard_once_confirmed_and_messages_keep_their_order(redis_at: RedisServer) -> None:
    async with linked(redis_at.url) as here:
        assert not here.link.hears("a")
        here.link.subscribe(["a", "b"], sharded=True)
        assert await here.link.heard("a")
        assert await here.link.heard("b")
        for number in range(3000):
            here.link.send(lambda _: None, "a", "PUBLISH", "ab"[number % 2], number)
        await until(lambda: len(here.messages) == 3000)
        assert here.messages == [("ab"[number % 2], b"%d" % number) for number in range(3000)]


async def test_what_is_wanted_no_more_is_not_heard(redis_at: RedisServer) -> None:
    async with linked(redis_at.url) as here:
        here.link.subscribe(["a", "b"], sharded=False)
        assert await here.link.heard("a")
        here.link.unsubscribe(["a", "unknown"])
        assert not here.link.hears("a")
        assert not await here.link.heard("a")
        with redis_at.client() as client:
            await until(
                lambda: (
                    client.pubsub_channels() == [b"b", OWN.encode()] or client.pubsub_numsub("a")[0][1] == 0
                )
            )
            client.publish("a", "x")
        await here.round_trip("after")
        assert [one for one in here.messages if one[0] == "a"] == []


async def test_a_channel_that_flaps_ends_as_it_is_wanted(redis_at: RedisServer) -> None:
    async with linked(redis_at.url) as here:
        for _ in range(50):
            here.link.subscribe(["a"], sharded=False)
            here.link.unsubscribe(["a"])
            await trio.lowlevel.checkpoint()
            here.link.subscribe(["a"], sharded=False)
            await trio.lowlevel.checkpoint()
            here.link.unsubscribe(["a"])
            here.link.subscribe(["a"], sharded=False)
        assert await here.link.heard("a")
        with redis_at.client() as client:
            assert client.publish("a", "x") == 1
        await until(lambda: ("a", b"x") in here.messages)


async def test_who_waits_for_a_channel_is_told_when_it_is_given_up(redis_at: RedisServer) -> None:
    async with linked(redis_at.url) as here, trio.open_nursery() as nursery:
        answers: list[bool] = []

        async def wait() -> None:
            answers.append(await here.link.heard("a"))

        here.link.subscribe(["a"], sharded=False)
        nursery.start_soon(wait)
        await trio.lowlevel.checkpoint()
        here.link.unsubscribe(["a"])
        await until(lambda: answers)
        assert answers in ([False], [True])  # Redis may have been faster


async def test_ten_thousand_channels_are_subscribed_in_batches(redis_at: RedisServer) -> None:
    channels = [f"room:{number}" for number in range(10_000)]
    async with linked(redis_at.url) as here:
        with redis_at.client() as client:
            client.config_resetstat()
        here.link.subscribe(channels, sharded=False)
        assert await here.link.heard(channels[-1])
        await until(lambda: all(map(here.link.hears, channels)))
        with redis_at.client() as client:
            calls = client.info("commandstats")["cmdstat_subscribe"]["calls"]
            assert calls <= 20
            order(client, "CLIENT", "KILL", "TYPE", "pubsub")
        await until(lambda: here.ups == 2)
        assert all(map(here.link.hears, channels))


async def test_probes_are_not_handed_on(redis_at: RedisServer) -> None:
    async with linked(redis_at.url, probe_after=0.05) as here:
        await until(lambda: here.link.statistics()["probes"] >= 3)
        await here.round_trip("word")
        assert here.messages == [(OWN, b"word")]
        assert (here.ups, here.downs) == (1, [])


async def test_the_greeting_comes_first_and_may_call(redis_at: RedisServer) -> None:
    here = build(redis_at.url)
    seen: list[object] = []

    async def greet() -> None:
        seen.append(await here.link.call_script(ECHO, ["k"], "hello"))
        seen.append(here.link.up)
        seen.append(isinstance(await here.send("k", "PING"), LinkDown))

    async def stranger() -> None:
        with pytest.raises(LinkDown):
            await here.link.call("k", "PING")

    here.greet = greet
    await stranger()
    async with trio.open_nursery() as nursery:
        await nursery.start(here.link.run)
        assert seen == [b"hello", False, True]
        with redis_at.client() as client:
            assert here.run_ids == [client.info("server")["run_id"]]
        nursery.cancel_scope.cancel()
    assert here.downs == ["the link has ended"]
    await stranger()


async def test_a_greeting_that_fails_is_tried_again(redis_at: RedisServer) -> None:
    here = build(redis_at.url)

    async def greet() -> None:
        if len(here.run_ids) < 3:
            raise LinkError("ERR not yet")

    here.greet = greet
    async with trio.open_nursery() as nursery:
        await nursery.start(here.link.run)
        await until(lambda: here.link.up)
        assert len(here.run_ids) == 3
        nursery.cancel_scope.cancel()


async def test_too_many_waiting_commands_are_refused_and_counted(redis_at: RedisServer) -> None:
    async with linked(redis_at.url) as here:
        replies: list[object] = []
        for _ in range(LIMIT + 10):
            here.link.send(replies.append, "k", "PING")
        refused = list(replies)
        assert len(refused) == 10
        assert all(isinstance(reply, LinkDown) for reply in refused)
        await until(lambda: len(replies) == LIMIT + 10)
        assert replies[10:] == [b"PONG"] * LIMIT
        assert here.link.statistics()["overflows"] == 10


async def test_a_unix_socket_and_another_database(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("socket") / "redis.sock"
    with redis_server(unixsocket=str(path)) as server:
        async with linked(f"unix://{path}?db=3") as here:
            assert await here.send("k", "SET", "k", "v") == b"OK"
            await here.round_trip("word")
        with server.client(db=3) as client:
            assert client.get("k") == b"v"


async def test_what_is_in_flight_when_the_link_ends_is_answered(redis_at: RedisServer) -> None:
    replies: list[object] = []
    async with linked(redis_at.url) as here:
        for _ in range(10):
            here.link.send(replies.append, "k", "PING")
    assert len(replies) == 10
    assert all(reply == b"PONG" or isinstance(reply, LinkDown) for reply in replies)
    here.link.send(replies.append, "k", "PING")
    assert isinstance(replies[-1], LinkDown)
