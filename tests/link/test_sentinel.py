"""The link behind sentinels: real servers, real failovers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import trio

from broker.errors import ConfigurationError
from broker.link.base import LinkDown, LinkError
from tests.link.linked import Recorder, build, linked, order, until
from tests.redis_server import STARTUP, RedisServer, free_port, redis_server

DOWN_AFTER = 500
"""Milliseconds of silence after which a sentinel takes the primary for dead."""

QUICK: dict[str, Any] = {
    "connect_timeout": 1.0,
    "answer_timeout": 0.3,
    "probe_after": 0.4,
    "probe_timeout": 0.3,
}


class SentinelServer:
    """One redis-sentinel process."""

    def __init__(self, directory: Path, primary: int, quorum: int) -> None:
        self.port = free_port()
        self._directory = directory
        (directory / "sentinel.conf").write_text(
            f"port {self.port}\n"
            "bind 127.0.0.1\n"
            f"dir {directory}\n"
            f"sentinel monitor main 127.0.0.1 {primary} {quorum}\n"
            f"sentinel down-after-milliseconds main {DOWN_AFTER}\n"
            "sentinel failover-timeout main 3000\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("redis-server")
        assert program is not None
        with (self._directory / "sentinel.log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, str(self._directory / "sentinel.conf"), "--sentinel"],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, decode_responses=True)

    def knows(self, replicas: int, sentinels: int) -> bool:
        """Whether it has found everybody."""
        with contextlib.suppress(redis.ConnectionError), self.client() as client:
            facts = order(client, "SENTINEL", "MASTER", "main")
            found = (
                dict(facts) if isinstance(facts, dict) else dict(zip(facts[::2], facts[1::2], strict=True))
            )
            return (int(found["num-slaves"]), int(found["num-other-sentinels"])) == (replicas, sentinels - 1)
        return False

    def freeze(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Guarded:
    """A primary, a replica, and sentinels."""

    def __init__(self, primary: RedisServer, replica: RedisServer, sentinels: list[SentinelServer]) -> None:
        self.primary = primary
        self.replica = replica
        self.sentinels = sentinels
        hosts = ",".join(f"127.0.0.1:{one.port}" for one in sentinels)
        self.url = f"redis+sentinel://{hosts}/main/0"


@contextmanager
def guarded(count: int) -> Iterator[Guarded]:
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(redis_server())
        replica = stack.enter_context(redis_server(replicaof=["127.0.0.1", primary.port]))
        sentinels = []
        for _ in range(count):
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sentinel-")))
            sentinel = SentinelServer(directory, primary.port, count // 2 + 1)
            sentinel.start()
            stack.callback(sentinel.stop)
            sentinels.append(sentinel)
        end = time.monotonic() + 2 * STARTUP
        while not all(one.knows(1, count) for one in sentinels):
            assert time.monotonic() < end, "the sentinels have not found each other"
            time.sleep(0.05)
        yield Guarded(primary, replica, sentinels)


async def answered(here: Recorder, *command: str) -> object:
    """Send until there is an answer, for as long as ``until`` has patience."""
    answers: list[object] = []

    async def once() -> None:
        answer = await here.send("k", *command)
        if not isinstance(answer, LinkError):
            answers.append(answer)

    with trio.fail_after(30):
        while not answers:
            await until(lambda: here.link.up)
            await once()
    return answers[0]


async def test_a_killed_primary_is_followed_to_the_replica() -> None:
    with guarded(3) as here, here.replica.client() as replica:
        replica.ping()
        async with linked(here.url, **QUICK) as link:
            link.link.subscribe(["a"], sharded=False)
            assert await link.link.heard("a")
            assert await link.send("k", "SET", "k", "before") == b"OK"
            here.primary.kill()
            await until(lambda: link.downs)
            await until(lambda: link.link.up)
            assert await answered(link, "SET", "k", "after") == b"OK"
            assert len(set(link.run_ids)) == 2
            assert replica.get("k") == b"after"
            assert link.link.hears("a")
            assert replica.publish("a", "x") == 1, "the subscriber is on the new primary, too"
            await until(lambda: ("a", b"x") in link.messages)


async def test_a_primary_that_lives_on_is_left_for_the_newer_one() -> None:
    """An orderly failover: the old primary stays and becomes a replica."""
    with guarded(1) as here, here.replica.client() as replica, here.sentinels[0].client() as sentinel:
        replica.ping()
        sentinel.ping()
        async with linked(here.url, **QUICK) as link:
            order(sentinel, "SENTINEL", "FAILOVER", "main")
            await until(lambda: link.downs)
            assert await answered(link, "SET", "k", "after") == b"OK"
            assert replica.get("k") == b"after"


async def test_sentinels_that_are_gone_or_silent_do_not_matter_while_one_answers() -> None:
    with guarded(3) as here:
        here.sentinels[0].stop()
        here.sentinels[1].freeze()
        async with linked(here.url, **QUICK) as link:
            assert await link.send("k", "PING") == b"PONG"


async def test_a_service_that_no_sentinel_knows_is_an_attempt_that_fails() -> None:
    with guarded(1) as here:
        link = build(here.url.replace("/main/", "/other/"), **{**QUICK, "connect_timeout": 0.3})
        async with trio.open_nursery() as nursery:
            await nursery.start(link.link.run)
            assert link.link.statistics()["connect_failures"] >= 1
            with pytest.raises(LinkDown):
                await link.link.call("k", "PING")
            nursery.cancel_scope.cancel()


async def test_credentials_of_sentinels_are_their_own() -> None:
    with guarded(1) as here, here.sentinels[0].client() as sentinel:
        order(sentinel, "ACL", "SETUSER", "watcher", "on", ">hush", "allchannels", "+@all")
        order(sentinel, "ACL", "SETUSER", "default", "off")
        link = build(here.url)
        with pytest.raises(ConfigurationError, match="sentinel"):
            await link.link.run()
        url = f"{here.url}?sentinel_username=watcher&sentinel_password=hush"
        async with linked(url, **QUICK) as second:
            assert await second.send("k", "PING") == b"PONG"
