"""``broker serve --workers``: one port, several nodes, one Redis; all of them as processes."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from broker.supervisor import VARIABLE
from tests.e2e.harness import BrokerProcess, serving, until
from tests.e2e.raw_client import RawClient, connected
from tests.redis_server import redis_server

RULE = '[{"from": "deal:*", "event": "won", "to": ["activity", "user:{data.owner}"]}]'
SETTINGS = ("--dev", "--node", "w", "--set", "rooms.deal.history=100", "--set", "rooms.activity.history=100")


def workers(broker: BrokerProcess) -> dict[int, int]:
    """Process ids of the workers that run, by number, as their supervisor told them."""
    threads = Path(f"/proc/{broker.process.pid}/task").glob("*/children")  # any of them may have started one
    found = {}
    for child in [child for thread in threads for child in thread.read_text().split()]:
        with suppress(OSError):  # it has ended meanwhile
            for variable in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                name, _, value = variable.partition(b"=")
                if name.decode() == VARIABLE:
                    found[int(value.split(b":")[0])] = int(child)
    return found


@asynccontextmanager
async def working(*arguments: str) -> AsyncIterator[BrokerProcess]:
    """Two workers on a Redis of their own."""
    with redis_server() as redis:
        async with serving(*SETTINGS, "--redis", redis.url, "--workers", "2", *arguments) as broker:
            yield broker


async def one_of_each(stack: AsyncExitStack, broker: BrokerProcess) -> tuple[RawClient, RawClient]:
    """A client of each worker, the first one's first."""
    found: dict[str, RawClient] = {}
    while len(found) < 2:
        client = await stack.enter_async_context(connected(broker.port))
        found.setdefault(client.welcome["node"], client)
    return found["w-0"], found["w-1"]


async def test_two_workers_are_one_broker() -> None:
    async with working("--routes", RULE) as broker:
        async with AsyncExitStack() as stack:
            first, second = await one_of_each(stack, broker)
            for room in ("deal:7", "live:7", "activity"):
                assert (await second.ask("join", room=room))["op"] == "ok"
            for room in ("deal:7", "live:7"):
                await first.ask("publish", room=room, event="won", data={"owner": 1})
            events = {(event["room"], event.get("offset")) for event in [await second.event() for _ in "123"]}
            assert events == {("deal:7", 1), ("activity", 1), ("live:7", None)}
        assert await broker.stop() == 0
        assert await broker.read_out() == b"", "the ready line is all there is"


async def test_a_worker_that_is_killed_comes_back_and_the_other_serves_on() -> None:
    async with working() as broker:
        async with AsyncExitStack() as stack:
            first, second = await one_of_each(stack, broker)
            await first.ask("join", room="deal:7")
            killed = workers(broker)[1]
            os.kill(killed, signal.SIGKILL)
            await second.end()
            stored = await first.ask("publish", room="deal:7", event="e", data=1)
            assert (await first.event())["offset"] == stored["offset"] == 1
        await until(lambda: workers(broker).get(1, killed) != killed)
        async with AsyncExitStack() as stack:
            _, again = await one_of_each(stack, broker)
            assert (await again.ask("history", room="deal:7", at=0))["offset"] == 1
        assert await broker.stop() == 0


async def test_workers_drain_and_end_when_their_supervisor_is_killed() -> None:
    async with working() as broker:
        async with AsyncExitStack() as stack:
            first, second = await one_of_each(stack, broker)
            pids = workers(broker).values()
            assert len(pids) == 2
            broker.process.kill()
            for client in (first, second):
                bye, code = await client.ended_with()
                assert (bye is not None, code) == (True, 4503)
        await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
