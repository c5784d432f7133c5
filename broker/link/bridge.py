"""The link to Redis: :class:`RedisLink`.

redis-py speaks asyncio, the broker speaks Trio; they meet here, in one event
loop of trio-asyncio that runs inside the task that owns the link. Both run on
the same thread, so callbacks need no hand-over. An error that nobody in asyncio
caught ends that loop and everything in it, and nothing else: it is started again.

From nothing to up::

    lanes      found, connected, primary, scripts loaded      (each shard for itself)
    greeted    greet() has agreed to the primaries' run ids   commands are taken from here on
    up         everything wanted is heard                     on_up()

A lane that breaks leads back to the first line, a subscriber that breaks only
to the second: commands go on while channels are subscribed to again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Final

import trio

from broker.config import Redis
from broker.errors import ConfigurationError
from broker.link.backoff import Backoff
from broker.link.base import Argument, Done, LinkDown, LinkError, Message, Reply, Script
from broker.link.counts import Counts
from broker.link.dial import Dialer, Refused
from broker.link.event_loop import EventLoop, open_loop
from broker.link.lane import ELSEWHERE, TRIES, Lane, Moved, Packed, pack, pack_script
from broker.link.layout import read_redirection
from broker.link.routes import Routes
from broker.link.sentinel import Sentinels
from broker.link.shard import ENDED, Events, Shard, Terms
from broker.link.sharded import Cluster
from broker.link.subscriber import Subscriber
from broker.link.target import Address, parse
from broker.logs import Throttle, get_logger

log = get_logger(__name__)

AWAY: Final = "Redis is away"

ASKING: Final = pack("ASKING")
"""Before a command that a node of a cluster sent us here with."""

_greeting: ContextVar[bool] = ContextVar("greeting", default=False)
"""Whether the task is inside of ``greet``, which may call before anybody else."""


class RedisLink:
    """Commands, scripts and subscriptions, as :class:`broker.link.base.Link` has them.

    ``on_messages`` gets all messages of one read of the socket, in order.
    ``greet`` is awaited with the primary's run id after every connect, before
    commands are taken, and may use ``call`` and ``call_script``; a
    :class:`LinkError` from it makes the attempt fail. ``on_up`` and ``on_down``
    take turns; ``on_down`` gets the reason, and is also called when the link ends.

    Raises :class:`ConfigurationError` when ``settings.url`` cannot be understood.
    """

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
        assert settings.url is not None, "a node without redis.url has no link"
        self._settings = settings
        self._target = parse(settings.url)
        self._greet = greet
        self._on_up = on_up
        self._on_down = on_down
        self._own = own_channel
        self._counts = Counts()
        self._terms = Terms(
            settings,
            Dialer(self._target, settings.connect_timeout),
            scripts,
            own_channel,
            self._counts,
            Throttle(),
            self._target.kind == "cluster",
        )
        self._events = Events(
            ready=self._shard_ready,
            lost=self._shard_lost,
            settled=self._shard_settled,
            refused=self._shard_refused,
            moved=self._shard_moved,
            unheard=self._shard_unheard,
            messages=on_messages,
        )
        self._routes = Routes(own_channel, clustered=self._terms.clustered)
        self._cluster: Cluster | None = None
        self._waiters: dict[str, trio.Event] = {}
        self._lanes: list[Lane | None] = [None] * len(self._routes.table)
        """By slot, as the table of the routes. Filled while commands are taken."""
        self._greeted = False
        self._up = False
        self._news = trio.Event()
        self._decided = trio.Event()
        """Set when the link has been up once, or was refused."""
        self._refusal: Refused | None = None
        self.loop: EventLoop | None = None

    # -- state ------------------------------------------------------------------------

    @property
    def up(self) -> bool:
        """Whether commands are answered and everything wanted is heard, as far as anybody can know now."""
        return self._up

    @property
    def clustered(self) -> bool:
        """Whether this is a Redis Cluster."""
        return self._routes.clustered

    def statistics(self) -> dict[str, int]:
        """Counters and sizes."""
        lanes = [shard.lane for shard in self._routes.shards if shard.lane is not None]
        return {
            "up": int(self._up),
            "shards": len(self._routes.shards),
            "channels": len(self._routes.wanted),
            "pending": sum(lane.pending for lane in lanes),
            **self._counts.as_dict(),
        }

    # -- commands ---------------------------------------------------------------------

    def send(self, done: Done, key: str, *command: Argument) -> None:
        """See :class:`broker.link.base.Link`. Taken as soon as greeted, a moment before ``up``."""
        slot = self._routes.slot(key)
        lane = self._lanes[slot]
        if lane is None:
            done(LinkDown(AWAY))
            return
        self._counts.commands += 1
        lane.send(done, pack(*command), slot)

    def send_script(self, done: Done, script: Script, keys: Sequence[str], *arguments: Argument) -> None:
        """See :class:`broker.link.base.Link`."""
        slot = self._routes.slot(keys[0])
        lane = self._lanes[slot]
        if lane is None:
            done(LinkDown(AWAY))
            return
        self._counts.commands += 1
        lane.send(done, pack_script(script, keys, arguments), slot)

    async def call(self, key: str, *command: Argument) -> Reply:
        """See :class:`broker.link.base.Link`."""
        return await self._call(key, pack(*command))

    async def call_script(self, script: Script, keys: Sequence[str], *arguments: Argument) -> Reply:
        """See :class:`broker.link.base.Link`. A script that Redis has forgotten is loaded again."""
        return await self._call(keys[0], pack_script(script, keys, arguments))

    async def _call(self, key: str, packed: Packed) -> Reply:
        if not (self._greeted or _greeting.get()):
            raise LinkDown(AWAY)
        self._counts.calls += 1
        limit = self._settings.answer_timeout + self._settings.connect_timeout
        try:
            with trio.fail_after(limit):
                reply = await self._ask(key, packed)
        except trio.TooSlowError:
            self._counts.call_failures += 1
            raise LinkDown(f"no answer within {limit:g} s") from None
        except LinkDown:
            self._counts.call_failures += 1
            raise
        if isinstance(reply, LinkError):
            self._counts.call_failures += 1
            raise reply
        return reply

    async def _ask(self, key: str, packed: Packed) -> Reply | LinkError:
        """Ask whoever has ``key``, and in a cluster whoever it turns out to be."""
        slot = self._routes.slot(key)
        for attempt in range(TRIES):
            shard = self._routes.table[slot]
            if shard is None:
                raise LinkDown(AWAY)
            [reply] = await shard.pool.ask(packed)
            code = reply.code if isinstance(reply, LinkError) else ""
            if code not in ELSEWHERE or self._cluster is None:
                return reply
            there = self._routes.at(read_redirection(str(reply), shard.address))
            if code == "ASK" and there is not None:
                _, reply = await there.pool.ask(ASKING, packed)
                return reply
            if attempt < TRIES - 1:
                await self._cluster.refreshed()
        return reply

    def _send_again(self, moved: list[Moved]) -> None:
        """Send by the table of now what was refused or has waited by that of before."""
        for entry, error in moved:
            lane = self._lanes[entry.slot]
            if error.startswith("ASK "):
                shard = self._routes.at(read_redirection(error, None))
                lane = shard.lane if shard is not None and lane is not None else lane
                if lane is not None:
                    lane.send(_ignore, ASKING)
            if lane is None:
                entry.done(LinkDown(AWAY))
            else:
                lane.send(entry.done, entry.packed, entry.slot, entry.tries)

    # -- subscriptions ------------------------------------------------------------------

    def subscribe(self, channels: Iterable[str], *, sharded: bool) -> None:
        """See :class:`broker.link.base.Link`."""
        self._routes.want(channels, sharded=sharded)

    def unsubscribe(self, channels: Iterable[str]) -> None:
        """See :class:`broker.link.base.Link`."""
        old = [channel for channel in channels if channel != self._own]
        self._routes.drop(old)
        for channel in old:
            self._wake(channel)

    def hears(self, channel: str) -> bool:
        """See :class:`broker.link.base.Link`."""
        subscriber = self._subscriber_of(channel)
        return subscriber is not None and subscriber.hears(channel)

    async def heard(self, channel: str) -> bool:
        """See :class:`broker.link.base.Link`. False as well when Redis refuses the channel."""
        while self._up:
            subscriber = self._subscriber_of(channel)
            if subscriber is None or subscriber.denied(channel):
                return False
            if subscriber.hears(channel):
                return True
            event = self._waiters.get(channel)
            if event is None:
                event = self._waiters[channel] = trio.Event()
            await event.wait()
        return False

    def _subscriber_of(self, channel: str) -> Subscriber | None:
        shard = self._routes.hearing(channel)
        return None if shard is None else shard.subscriber

    def _wake(self, channel: str) -> None:
        event = self._waiters.pop(channel, None)
        if event is not None:
            event.set()

    # -- life -----------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the link until cancelled.

        Started when it is up, or after ``connect_timeout``: then the broker
        begins without Redis. Raises :class:`ConfigurationError` when Redis
        answers before that and will not have us.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._supervise)
            with trio.move_on_after(self._settings.connect_timeout):
                await self._decided.wait()
            if self._refusal is None:
                if not self._up:
                    log.warning("starting without redis", redis=str(self._target))
                task_status.started()
                await trio.sleep_forever()
            nursery.cancel_scope.cancel()
        assert self._refusal is not None
        raise ConfigurationError("configuration", "redis.url", self._refusal.problem, self._refusal.mend)

    async def _supervise(self) -> None:
        backoff = Backoff()
        while True:
            try:
                async with open_loop() as loop:
                    self.loop = loop
                    backoff.succeeded()
                    await self._live()
            except* Exception:
                # Whatever it was, it was in the bridge or in a callback of the broker's: sockets live on.
                log.exception("redis bridge failed")
                self._counts.restarts += 1
            finally:
                self.loop = None
            await backoff.pause()

    async def _live(self) -> None:
        """Connect all shards and keep them."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_greeted)
            match self._target.kind:
                case "cluster":
                    self._cluster = Cluster(
                        self._terms,
                        self._events,
                        self._routes,
                        self._target.addresses,
                        is_up=lambda: self._up,
                        changed=self._shards_changed,
                        send_again=self._send_again,
                    )
                    nursery.start_soon(self._cluster.run)
                case "sentinel":
                    sentinels = Sentinels(self._target, self._terms.dialer, self._settings.answer_timeout)
                    shard = self._only_shard(sentinels.find)
                    nursery.start_soon(sentinels.watch, lambda: shard.address, shard.move)
                    nursery.start_soon(shard.run)
                case "server" | "unix":
                    nursery.start_soon(self._only_shard(self._find_server).run)

    def _only_shard(self, find: Callable[[], Awaitable[Address | None]]) -> Shard:
        shard = Shard(self._terms, self._events, find, {})
        self._routes.assign([shard], [shard])
        return shard

    async def _find_server(self) -> Address | None:
        return self._target.addresses[0] if self._target.addresses else None

    async def _keep_greeted(self) -> None:
        """Greet whenever all lanes are ready, and let the subscribers connect."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            lanes = [shard.lane for shard in self._routes.shards]
            if self._greeted or not lanes or None in lanes:
                continue
            try:
                await self._introduce(",".join(sorted(shard.run_id for shard in self._routes.shards)))
            except LinkError as error:
                self._counts.connect_failures += 1
                if (missed := self._terms.throttle.admit(("greet", str(error)))) is not None:
                    log.warning("redis cannot be used", why=str(error), suppressed=missed)
                for lane in lanes:
                    if lane is not None:
                        lane.close(str(error))
                continue
            if lanes != [shard.lane for shard in self._routes.shards]:
                self._news.set()  # one broke meanwhile; its successor is greeted again
                continue
            self._greeted = True
            self._open_lanes()
            for shard in self._routes.shards:
                shard.hear()
            self._shard_settled()

    async def _introduce(self, run_ids: str) -> None:
        token = _greeting.set(True)
        try:
            await self._greet(run_ids)
        finally:
            _greeting.reset(token)

    def _open_lanes(self) -> None:
        """Take commands, for each slot on its lane."""
        self._lanes = [None if shard is None else shard.lane for shard in self._routes.table]

    # -- what shards tell ---------------------------------------------------------------------

    def _shard_ready(self) -> None:
        self._news.set()

    def _shard_lost(self, why: str) -> None:
        self._counts.losses += 1
        self._fall(why)

    def _shard_unheard(self) -> None:
        """A slot has gone elsewhere with its channels. What is said there meanwhile is not heard: a hole."""
        self._fall("a channel lives elsewhere now")
        self._shard_moved()

    def _shards_changed(self) -> None:
        """The cluster has another layout."""
        self._fall("the cluster has changed")
        if self._greeted:
            self._open_lanes()
        self._news.set()
        self._shard_settled()  # perhaps no channel of ours has moved, so that nobody will confirm any

    def _fall(self, why: str) -> None:
        """Be down until everything is heard again; with a lane missing, until greeted again as well."""
        shards = self._routes.shards
        if not shards or any(shard.lane is None for shard in shards):
            self._greeted = False
            self._lanes = [None] * len(self._routes.table)
        if not self._up:
            return
        self._up = False
        waiters, self._waiters = self._waiters, {}
        for event in waiters.values():
            event.set()
        if why != ENDED:
            log.warning("redis is down", why=why)
        self._on_down(why)

    def _shard_settled(self) -> None:
        for channel in [channel for channel in self._waiters if self._is_decided(channel)]:
            self._wake(channel)
        if not self._up and self._greeted and all(shard.settled for shard in self._routes.shards):
            self._up = True
            self._decided.set()
            log.info("redis is up", redis=str(self._target))
            self._on_up()

    def _is_decided(self, channel: str) -> bool:
        """Whether Redis has said something about ``channel``."""
        subscriber = self._subscriber_of(channel)
        return subscriber is not None and (subscriber.hears(channel) or subscriber.denied(channel))

    def _shard_refused(self, refusal: Refused) -> None:
        if not self._decided.is_set():
            self._refusal = refusal
            self._decided.set()

    def _shard_moved(self) -> None:
        if self._cluster is not None:
            self._cluster.refresh()


def _ignore(_: object) -> None:
    """``ASKING`` has no answer worth reading: that of the command behind it tells."""
