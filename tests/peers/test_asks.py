"""Questions to all nodes, answered, refused, or left without an answer."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from broker.engine.peers import Answer
from broker.errors import BrokerError, ErrorCode
from broker.link import wire
from broker.peers import asks
from tests.peers.company import Fellow, company, until
from tests.redis_server import RedisServer, redis_server


def serve_name(*fellows: Fellow) -> None:
    """Each answers with its name and what it was asked."""

    def handler(fellow: Fellow) -> Any:
        async def answer(parameters: Any) -> Any:
            await trio.lowlevel.checkpoint()
            return [fellow.name, parameters]

        return answer

    for fellow in fellows:
        fellow.peers.serve("name", handler(fellow))


async def test_all_others_answer(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there, third = await nodes.start_all("here", "there", "third")
        serve_name(here, there, third)
        assert list(await here.peers.ask("name", {"a": None})) == [
            Answer("there", ["there", {"a": None}]),
            Answer("third", ["third", {"a": None}]),
        ]
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(here.peers.ask, "name", 1)
                nursery.start_soon(there.peers.ask, "name", 2)
        assert third.count("questions") == 41
        assert here.count("unanswered_asks") == here.count("late_answers") == 0


async def test_nobody_is_asked_where_nobody_is(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        (here,) = await nodes.start_all("here")
        serve_name(here)
        assert list(await here.peers.ask("name", None)) == []


async def test_refusals_come_back_with_their_code(
    redis_at: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asks, "ANSWER_BYTES", 1000)

    async def refuse(_parameters: Any) -> Any:
        await trio.lowlevel.checkpoint()
        raise BrokerError(ErrorCode.CONFLICT, "not so")

    async def crash(_parameters: Any) -> Any:
        await trio.lowlevel.checkpoint()
        raise RuntimeError("secret")

    async def much(_parameters: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return "x" * 1001

    async def odd(_parameters: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return object()

    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        for handler in (refuse, crash, much, odd):
            there.peers.serve(handler.__name__, handler)
        found = {}
        for method in ("refuse", "crash", "much", "odd", "unknown"):
            (found[method],) = await here.peers.ask(method, None)
        assert [found[method].error for method in ("refuse", "crash", "odd")] == [
            "conflict: not so",
            "internal: it could not be answered",
            "internal: it could not be answered",
        ]
        assert found["much"].error is not None
        assert found["much"].error.startswith("too_large: ")
        assert found["unknown"].error == "not_found: nobody answers 'unknown' here"
        assert {answer.node for answer in found.values()} == {"there"}
        assert there.count("failed_answers") == 5


async def test_a_dead_node_gives_no_answer(redis_at: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with company(redis_at, lease=600.0) as nodes:
        here, there, dead = await nodes.start_all("here", "there", "dead")
        serve_name(there)
        dead.die()
        monkeypatch.setattr(asks, "PATIENCE", 0.2)
        assert list(await here.peers.ask("name", 1)) == [
            Answer("dead", None, "no answer"),
            Answer("there", ["there", 1]),
        ]
        assert here.count("unanswered_asks") == 1


async def test_who_thinks_too_long_gives_up(redis_at: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    async def think(_parameters: Any) -> Any:
        try:
            await trio.sleep_forever()
        finally:
            ended.append("")

    async with company(redis_at, lease=600.0) as nodes:
        here, there = await nodes.start_all("here", "there")
        there.peers.serve("think", think)
        serve_name(there)
        monkeypatch.setattr(asks, "PATIENCE", 0.2)
        monkeypatch.setattr(asks, "WAITING", asks.ANSWERING)
        async with trio.open_nursery() as nursery:
            for _ in range(asks.ANSWERING):
                nursery.start_soon(here.peers.ask, "think", None)
            await until(lambda: there.count("questions") == asks.ANSWERING)
            (answer,) = await here.peers.ask("name", None)
            assert answer.error == "unavailable: too many questions wait"
        await until(lambda: len(ended) == asks.ANSWERING)
        monkeypatch.setattr(asks, "PATIENCE", 30.0)
        assert list(await here.peers.ask("name", 2)) == [Answer("there", ["there", 2])]


async def test_asking_can_be_given_up(redis_at: RedisServer) -> None:
    async with company(redis_at, lease=600.0) as nodes:
        here, there = await nodes.start_all("here", "there")

        async def leave(_parameters: Any) -> Any:
            await trio.lowlevel.checkpoint()
            scope.cancel()

        there.peers.serve("leave", leave)
        with trio.CancelScope() as scope:
            await here.peers.ask("leave", None)
        assert scope.cancelled_caught
        await until(lambda: here.count("late_answers") == 1)


async def test_what_cannot_be_read_is_answered_or_counted(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")

        async def spoil(_parameters: Any) -> Any:
            bad = wire.pack(wire.ANSWER, there.peers.id, 1, body=b"{")
            await trio.to_thread.run_sync(publish, nodes.keys.node(here.peers.id), bad)

        def publish(channel: str, message: bytes) -> None:
            with nodes.client() as client:
                client.publish(channel, message)

        there.peers.serve("spoil", spoil)
        (answer,) = await here.peers.ask("spoil", None)
        assert answer.error is not None
        assert answer.error.startswith("the answer cannot be read")
        publish(nodes.keys.everybody, wire.pack(wire.ASK, "other", 7, body=b"{"))
        await until(lambda: here.count("bad_messages") == 2 and there.count("bad_messages") == 1)


async def test_without_redis_nobody_answers() -> None:
    with redis_server() as server:
        async with company(server) as nodes:
            here, _there = await nodes.start_all("here", "there")
            server.kill()
            await until(lambda: not here.link.up)
            (answer,) = await here.peers.ask("name", None)
            assert answer.error is not None
            assert answer.error.startswith("no answer: the question could not be sent")
