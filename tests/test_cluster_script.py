"""``make cluster``: one command, three nodes, and nothing left after Ctrl-C."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import redis
import trio

from tests.e2e.harness import ROOT, environment
from tests.e2e.raw_client import connected
from tests.redis_server import free_port

PATIENCE = 60.0
"""Seconds of real time after which a test that hangs fails."""
LAST_WORDS = "Ctrl-C ends all."


@asynccontextmanager
async def started(first_port: int) -> AsyncIterator[tuple[trio.Process, str]]:
    """The script, once it has said how to try it; and what it said."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "config/cluster.py", str(first_port)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        said = ""
        while LAST_WORDS not in said:
            data = await process.stdout.receive_some()
            assert data, f"it ended after saying {said!r}"
            said += data.decode()
        yield process, said
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)  # it ends its children, which a kill would leave behind
        with trio.CancelScope(shield=True):
            await process.wait()
        await process.stdout.aclose()


def a_row_of_ports() -> int:
    """A port such that those of the other nodes are free as well, as far as one can tell."""
    while (first := free_port()) > 65535 - 30:
        pass
    return first


async def test_three_nodes_in_one_command() -> None:
    first = a_row_of_ports()
    with trio.fail_after(PATIENCE):
        async with started(first) as (process, said):
            assert said.count("ready ws://") == 3
            assert f"ws://127.0.0.1:{first + 20}/ws" in said
            (port,) = set(re.findall(r"redis-cli -p (\d+)", said))
            async with connected(first + 20) as listener, connected(first) as publisher:
                assert (await listener.ask("join", room="deal:7"))["op"] == "ok"
                await publisher.ask("publish", room="deal:7", event="hello", data={"from": "node 1"})
                assert (await listener.event())["data"] == {"from": "node 1"}
                with redis.Redis(port=int(port)) as backend:
                    backend.publish("broker:room:deal:7", '{"event": "hello", "data": {"from": "a backend"}}')
                assert (await listener.event())["data"] == {"from": "a backend"}
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 0
    for left in (first, first + 10, first + 20, int(port)):
        try:
            stream = await trio.open_tcp_stream("127.0.0.1", left)
        except OSError:
            continue
        await stream.aclose()
        raise AssertionError(f"somebody still listens on {left}")
