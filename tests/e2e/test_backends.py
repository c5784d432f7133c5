"""What backends say through Redis reaches the clients of every node, also when the node that reads dies."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from broker.publisher import AsyncPublisher
from tests.e2e.harness import KEY, BrokerProcess, serving, token, until
from tests.e2e.raw_client import RawClient, connected
from tests.redis_server import RedisServer, redis_server

DURABLE = 120


@asynccontextmanager
async def node(
    redis: RedisServer, directory: Path, open_to: str = "dev = true"
) -> AsyncIterator[BrokerProcess]:
    """A node of the cluster on ``redis``."""
    file = directory / "broker.toml"
    file.write_text(
        f'{open_to}\n[redis]\nurl = "{redis.url}"\nreader_lease = 1.0\n'
        "[rooms.deal]\nhistory = 1000\n[rooms.news]\nhistory = 0\n"
    )
    async with serving("--config", str(file)) as broker:
        yield broker


async def numbers(client: RawClient, count: int) -> list[Any]:
    return [(await client.event())["data"] for _ in range(count)]


async def test_clients_of_every_node_hear_backends(tmp_path: Path) -> None:
    with redis_server() as redis:
        async with (
            node(redis, tmp_path) as one,
            node(redis, tmp_path) as two,
            connected(one.port) as ann,
            connected(two.port) as bob,
            AsyncPublisher(redis.url) as backend,
        ):
            for client in (ann, bob):
                await client.ask("join", room="news:1")
                await client.ask("join", room="deal:1")
            assert (await backend.to_room("news:1", "x", 1)).heard == 2
            for client in (ann, bob):
                event = await client.event()
                assert (event["room"], event["data"]) == ("news:1", 1)
                assert "offset" not in event
            await backend.to_room("deal:1", "x", 2, durable=True, user="zoe")
            for client in (ann, bob):
                event = await client.event()
                assert (event["room"], event["data"], event["offset"]) == ("deal:1", 2, 1)
                assert event["user"] == "zoe"


async def test_the_stream_goes_on_when_the_reader_is_killed(tmp_path: Path) -> None:
    """Stored once and in order, though a node dies with entries in hand."""
    with redis_server() as redis, redis.client() as client:
        async with AsyncPublisher(redis.url) as backend, node(redis, tmp_path) as one:
            await until(lambda: client.exists("broker:lease:{broker:publish}") == 1)
            async with node(redis, tmp_path) as two, connected(two.port) as reader:
                joined = await reader.ask("join", room="deal:1")
                assert joined["offset"] == 0
                for number in range(DURABLE):
                    await backend.to_room("deal:1", "n", number, durable=True)
                    if number == DURABLE // 2:
                        one.process.send_signal(signal.SIGKILL)
                assert await numbers(reader, DURABLE) == list(range(DURABLE))
                since = {"epoch": joined["epoch"], "offset": 0}
                past = await reader.ask("history", room="deal:1", since=since, limit=1000)
                assert [event["offset"] for event in past["events"]] == list(range(1, DURABLE + 1))


async def test_what_was_said_while_no_node_ran_is_not_lost(tmp_path: Path) -> None:
    with redis_server() as redis:
        async with AsyncPublisher(redis.url) as backend, backend.batch() as batch:
            for number in range(10):
                batch.to_room("deal:1", "n", number, durable=True)
        async with node(redis, tmp_path) as one, connected(one.port) as client:
            with redis.client() as connection:
                await until(lambda: connection.xlen("broker:publish") == 0)
            past = await client.ask("history", room="deal:1", at=0)
            assert [event["data"] for event in past["events"]] == list(range(10))


async def test_who_never_authenticated_is_nobody_to_backends(tmp_path: Path) -> None:
    closed = f'[[auth.keys]]\nalgorithm = "HS256"\nsecret = "{KEY.secret}"'
    with redis_server() as redis, redis.client(decode_responses=True) as client:

        def told() -> list[tuple[str, str]]:
            entries: Any = client.xrange("broker:lifecycle")
            return [(fields["event"], fields.get("user", "")) for _, fields in entries]

        async with node(redis, tmp_path, closed) as one:
            async with connected(one.port) as stranger, connected(one.port) as ann:
                assert await stranger.refusal("join", room="deal:1") == "unauthenticated"
                await ann.ask("auth", token=token("ann"))
                await until(told)
                async with connected(one.port, token=token("bob")):
                    await until(lambda: len(told()) >= 2)
            assert told() == [("connected", "ann"), ("connected", "bob")]
