"""The link to Redis: :class:`RedisLink`.

redis-py speaks asyncio, the broker speaks Trio; they meet here, in one event
loop of trio-asyncio that runs inside the task that owns the link. Both run on
the same thread, so callbacks need no hand-over.

Two connections: the hot lane for commands and the subscriber. Each is opened
anew when it breaks; the link is up while commands are answered and everything
wanted has been confirmed. A few connections more serve ``call``.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Final

import trio
import trio_asyncio

from broker.cluster import wire
from broker.cluster.bridge_counts import Counts
from broker.cluster.bridge_dial import Dialer
from broker.cluster.bridge_lane import Lane, pack, pack_script
from broker.cluster.bridge_subscriber import Subscriber
from broker.cluster.link import Argument, Done, LinkDown, LinkError, Message, Reply, Script
from broker.config import Redis
from broker.logs import get_logger

log = get_logger(__name__)

FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 2.0
"""Between two attempts to connect (s): full jitter below a bound that doubles from the first to the longest."""

CALL_LANES: Final = 6

_greeting: ContextVar[bool] = ContextVar("greeting", default=False)


class Backoff:
    """Pauses between attempts: random below a bound that doubles."""

    def __init__(self) -> None:
        self._bound = FIRST_PAUSE

    def reset(self) -> None:
        self._bound = FIRST_PAUSE

    async def pause(self) -> None:
        bound, self._bound = self._bound, min(self._bound * 2, LONGEST_PAUSE)
        await trio.sleep(random.uniform(0, bound))


class RedisLink:
    """Commands, scripts and subscriptions on one Redis."""

    def __init__(
        self,
        settings: Redis,
        *,
        scripts: Sequence[Script],
        own_channel: str,
        on_messages: Callable[[list[Message]], None],
        greet: Callable[[str], Awaitable[None]],
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._scripts = scripts
        self._own = own_channel
        self._on_messages = on_messages
        self._greet = greet
        self._on_up = on_up
        self._on_down = on_down
        self._counts = Counts()
        self._dialer = Dialer(settings.url or "", settings.connect_timeout)
        self._wanted: dict[str, bool] = {own_channel: False}
        self._lane: Lane | None = None
        self._subscriber: Subscriber | None = None
        self._idle: list[Lane] = []
        self._callers = trio.CapacityLimiter(CALL_LANES)
        self._loop: trio_asyncio.TrioEventLoop | None = None
        self._up = False
        self._first_up = trio.Event()
        self._lane_up = trio.Event()
        self._waiters: dict[str, list[trio.Event]] = {}
        self._calling = False

    # -- state ------------------------------------------------------------------------

    @property
    def up(self) -> bool:
        """Whether commands are answered and messages come in."""
        return self._up

    @property
    def clustered(self) -> bool:
        """Whether this is a Redis Cluster."""
        return False

    def statistics(self) -> dict[str, int]:
        """Counters and sizes."""
        return self._counts.as_dict()

    # -- commands ---------------------------------------------------------------------

    def send(self, done: Done, key: str, *command: Argument) -> None:
        """See :class:`broker.cluster.link.Link`."""
        lane = self._lane
        if lane is None:
            done(LinkDown("Redis is away"))
            return
        self._counts.commands += 1
        lane.send(done, pack(*command))

    def send_script(self, done: Done, script: Script, keys: Sequence[str], *arguments: Argument) -> None:
        """See :class:`broker.cluster.link.Link`."""
        lane = self._lane
        if lane is None:
            done(LinkDown("Redis is away"))
            return
        self._counts.commands += 1
        lane.send(done, pack_script(script, keys, arguments))

    async def call(self, key: str, *command: Argument) -> Reply:
        """See :class:`broker.cluster.link.Link`."""
        return await self._call(pack(*command))

    async def call_script(self, script: Script, keys: Sequence[str], *arguments: Argument) -> Reply:
        """See :class:`broker.cluster.link.Link`."""
        return await self._call(pack_script(script, keys, arguments))

    async def _call(self, packed: bytes) -> Reply:
        if not (self._up or _greeting.get()):
            raise LinkDown("Redis is away")
        self._counts.calls += 1
        timeout = self._settings.answer_timeout
        async with self._callers:
            lane = self._idle.pop() if self._idle else await self._open_lane("call")
            try:
                return await lane.ask(packed, timeout)
            finally:
                if lane.why is None:
                    self._idle.append(lane)

    # -- subscriptions ------------------------------------------------------------------

    def subscribe(self, channels: Iterable[str], *, sharded: bool) -> None:
        """See :class:`broker.cluster.link.Link`."""
        new = [channel for channel in channels if channel not in self._wanted]
        self._wanted.update(dict.fromkeys(new, sharded))
        if self._subscriber is not None:
            self._subscriber.change(new)

    def unsubscribe(self, channels: Iterable[str]) -> None:
        """See :class:`broker.cluster.link.Link`."""
        old = [channel for channel in channels if channel != self._own and channel in self._wanted]
        for channel in old:
            del self._wanted[channel]
        if self._subscriber is not None:
            self._subscriber.change(old)

    def hears(self, channel: str) -> bool:
        """See :class:`broker.cluster.link.Link`."""
        return self._subscriber is not None and self._subscriber.hears(channel)

    async def heard(self, channel: str) -> bool:
        """See :class:`broker.cluster.link.Link`."""
        while self._up and channel in self._wanted:
            if self.hears(channel):
                return True
            event = trio.Event()
            self._waiters.setdefault(channel, []).append(event)
            await event.wait()
        return False

    # -- life -----------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the link until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._supervise)
            with trio.move_on_after(self._settings.connect_timeout):
                await self._first_up.wait()
            task_status.started()

    async def _supervise(self) -> None:
        backoff = Backoff()
        while True:
            try:
                async with trio_asyncio.open_loop() as loop, trio.open_nursery() as nursery:
                    self._loop = loop
                    nursery.start_soon(self._keep_lane)
                    nursery.start_soon(self._keep_subscriber)
            except* Exception:
                log.exception("redis bridge failed")
                self._counts.restarts += 1
            finally:
                self._down("the bridge ended")
            await backoff.pause()

    async def _keep_lane(self) -> None:
        backoff = Backoff()
        while True:
            try:
                lane = await self._open_lane("commands")
                await self._prepare(lane)
            except LinkError as error:
                self._counts.connect_failures += 1
                log.warning("redis cannot be used", why=str(error))
                await backoff.pause()
                continue
            self._lane = lane
            self._lane_up.set()
            try:
                backoff.reset()
                self._settle()
                await lane.run(self._settings.answer_timeout)
            finally:
                lane.close("ended")
                self._lane = None
                self._lane_up = trio.Event()
                self._down(lane.why or "")

    async def _open_lane(self, name: str) -> Lane:
        lane = Lane(name, self._counts, self._scripts)
        if name == "call":
            assert self._loop is not None
            token = trio_asyncio.current_loop.set(self._loop)
            try:
                await self._dialer.open(lane)
            finally:
                trio_asyncio.current_loop.reset(token)
        else:
            await self._dialer.open(lane)
        return lane

    async def _prepare(self, lane: Lane) -> None:
        timeout = self._settings.answer_timeout
        try:
            info = await lane.ask(pack("INFO", "server"), timeout)
            await lane.load_scripts(timeout)
            run_id = next(line[7:].decode() for line in info.split(b"\r\n") if line.startswith(b"run_id:"))
            token = _greeting.set(True)
            try:
                await self._greet(run_id)
            finally:
                _greeting.reset(token)
        except BaseException:
            lane.close("not prepared")
            raise

    async def _keep_subscriber(self) -> None:
        backoff = Backoff()
        while True:
            await self._lane_up.wait()
            subscriber = Subscriber(
                "subscriber",
                self._counts,
                wanted=self._wanted,
                own_channel=self._own,
                on_messages=self._on_messages,
                on_confirmed=self._settle,
            )
            try:
                await self._dialer.open(subscriber)
            except LinkError as error:
                self._counts.connect_failures += 1
                log.warning("redis cannot be used", why=str(error))
                await backoff.pause()
                continue
            self._subscriber = subscriber
            backoff.reset()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._probe, subscriber)
                    await subscriber.run()
                    nursery.cancel_scope.cancel()
            finally:
                subscriber.close("ended")
                self._subscriber = None
                self._down(subscriber.why or "")

    async def _probe(self, subscriber: Subscriber) -> None:
        number = 0
        while True:
            reads = subscriber.reads
            await trio.sleep(self._settings.probe_after)
            if subscriber.reads != reads:
                continue
            number += 1
            self._counts.probes += 1
            self.send(lambda _: None, self._own, "PUBLISH", self._own, wire.pack(wire.PROBE, number))
            await trio.sleep(self._settings.probe_timeout)
            if subscriber.reads == reads:
                self._counts.silences += 1
                subscriber.close("nothing heard")
                return

    def _settle(self) -> None:
        """A connection came up, or subscriptions were confirmed."""
        waiters = self._waiters
        for channel in [channel for channel in waiters if self.hears(channel)]:
            for event in waiters.pop(channel):
                event.set()
        if not self._up and self._lane is not None and self._subscriber is not None:
            if self._subscriber.settled:
                self._up = True
                self._first_up.set()
                log.info("redis is up")
                self._on_up()

    def _down(self, why: str) -> None:
        if self._up:
            self._up = False
            self._counts.losses += 1
            log.warning("redis is down", why=why)
            waiters, self._waiters = self._waiters, {}
            for events in waiters.values():
                for event in events:
                    event.set()
            for lane in self._idle:
                lane.close(why)
            self._idle.clear()
            self._on_down(why)
