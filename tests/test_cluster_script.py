"""``make cluster``: one command, three nodes, and nothing left after Ctrl-C."""

from __future__ import annotations

import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import redis
import trio

from tests.e2e.harness import ROOT, environment
from tests.e2e.raw_client import connected

PATIENCE = 60.0
"""Seconds of real time after which a test that hangs fails."""
LAST_WORDS = "Ctrl-C ends all."


@asynccontextmanager
async def started(first_port: int, log: Path) -> AsyncIterator[tuple[trio.Process, str]]:
    """The script, once it has said how to try it; and what it said."""
    with log.open("wb") as errors:
        process = await trio.lowlevel.open_process(
            [sys.executable, "config/cluster.py", str(first_port)],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        said = ""
        while LAST_WORDS not in said:
            data = await process.stdout.receive_some()
            assert data, said + errors_in(log)
            said += data.decode()
        yield process, said
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)  # it ends its children, which a kill would leave behind
        with trio.CancelScope(shield=True):
            await process.wait()
        await process.stdout.aclose()


def errors_in(log: Path) -> str:
    """What it said on standard error."""
    return log.read_text(errors="replace")


def a_row_of_ports() -> int:
    """A first port such that all six are free; below those that the system gives to clients by itself."""
    while True:
        first = random.randrange(20_000, 30_000)
        try:
            for port in (first, first + 1, first + 10, first + 11, first + 20, first + 21):
                with socket.create_server(("127.0.0.1", port)):
                    pass
        except OSError:
            continue
        return first


async def test_three_nodes_in_one_command(tmp_path: Path) -> None:
    first = a_row_of_ports()
    with trio.fail_after(PATIENCE):
        async with started(first, tmp_path / "log") as (process, said):
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
