"""A link for tests, and what it said."""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from hashlib import sha1
from typing import Any, cast

import redis
import trio

from broker.config import Redis
from broker.link.base import LinkError, Message, Reply, Script
from broker.link.bridge import RedisLink

PATIENCE = 30.0
"""Real seconds after which something that should happen has not: far above what a busy machine needs."""

OWN = "broker:node:test"


def script(name: str, source: str) -> Script:
    return Script(name, source, sha1(source.encode()).hexdigest())


APPEND = script("append", "return redis.call('RPUSH', KEYS[1], ARGV[1])")
ECHO = script("echo", "return ARGV[1]")


def order(client: redis.Redis, *command: str | int) -> Any:
    """Send a command word for word; redis-py has no types for that."""
    return cast("Any", client).execute_command(*command)


async def until(condition: Callable[[], object]) -> None:
    """Wait until ``condition()`` is true."""
    with trio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110 - the world outside sets no event
            await trio.sleep(0.005)


class Recorder:
    """Callbacks that remember."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.run_ids: list[str] = []
        self.ups = 0
        self.downs: list[str] = []
        self.greet: Callable[[], Awaitable[None]] | None = None
        """What a test does while it is greeted."""
        self.link: RedisLink

    async def greeted(self, run_id: str) -> None:
        self.run_ids.append(run_id)
        if self.greet is not None:
            await self.greet()

    def on_up(self) -> None:
        assert self.link.up
        self.ups += 1

    def on_down(self, why: str) -> None:
        assert not self.link.up
        self.downs.append(why)

    async def send(self, key: str, *command: str | bytes | int) -> Reply | LinkError:
        """Send on the hot lane and wait for what comes."""
        return await self.outcome(lambda done: self.link.send(done, key, *command))

    async def outcome(self, send: Callable[[Callable[[Any], None]], None]) -> Reply | LinkError:
        replies: list[Any] = []
        event = trio.Event()

        def done(reply: Any) -> None:
            replies.append(reply)
            event.set()

        send(done)
        with trio.fail_after(PATIENCE):
            await event.wait()
        assert len(replies) == 1
        return replies[0]

    async def round_trip(self, text: str) -> None:
        """Hear what was said after everything that was said before."""
        self.link.send(lambda _: None, OWN, "PUBLISH", OWN, text)
        await until(lambda: (OWN, text.encode()) in self.messages)


def build(url: str, **settings: Any) -> Recorder:
    """A link that does not run yet."""
    recorder = Recorder()
    recorder.link = RedisLink(
        Redis(url=url, **settings),
        scripts=(APPEND, ECHO),
        own_channel=OWN,
        on_messages=recorder.messages.extend,
        greet=recorder.greeted,
        on_up=recorder.on_up,
        on_down=recorder.on_down,
    )
    return recorder


def descriptors() -> int:
    """How many files and sockets this process has open now."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@asynccontextmanager
async def linked(url: str, **settings: Any) -> AsyncIterator[Recorder]:
    """A link that is up; when the block ends, nothing of it is left."""
    before = descriptors()
    recorder = build(url, **settings)
    async with trio.open_nursery() as nursery:
        await nursery.start(recorder.link.run)
        try:
            await until(lambda: recorder.link.up)
            yield recorder
        finally:
            nursery.cancel_scope.cancel()
    await until(lambda: descriptors() <= before)


class RememberingLink:
    """The subscriptions of a link that is not there: what is wanted, and what a test confirmed."""

    def __init__(self) -> None:
        self.up = True
        self.clustered = False
        self.wanted: dict[str, bool] = {}
        self.commands = 0
        self._heard: set[str] = set()
        self._change = trio.Event()

    def subscribe(self, channels: Iterable[str], *, sharded: bool) -> None:
        self.commands += 1
        for channel in channels:
            assert channel not in self.wanted
            self.wanted[channel] = sharded

    def unsubscribe(self, channels: Iterable[str]) -> None:
        self.commands += 1
        for channel in channels:
            del self.wanted[channel]

    def hears(self, channel: str) -> bool:
        return channel in self._heard

    async def heard(self, channel: str) -> bool:
        while self.up and not self.hears(channel):
            await self._change.wait()
        return self.up

    def confirm(self, channel: str) -> None:
        assert channel in self.wanted
        self._heard.add(channel)
        self._tell()

    def fall(self) -> None:
        self.up = False
        self._heard.clear()
        self._tell()

    def _tell(self) -> None:
        change, self._change = self._change, trio.Event()
        change.set()
