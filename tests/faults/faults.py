"""The faults: each one function that breaks something, lets the load feel it, and mends it.

``@fault`` says in which house it happens and what it excuses: whether sessions
may be told that events are gone, and whether their sockets may be closed. What
is excused of neither must pass unnoticed by everybody but the publishers, who
are told to wait. What goes on in a fault is drawn from the ``Random`` it is
given, so that the same seed breaks the same things.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final, TypeVar

import redis
import trio

from broker.link.keys import Keys
from tests.faults.houses import (
    DURABLE,
    EVERY_SECOND,
    Alone,
    Cluster,
    Divided,
    House,
    Proxied,
    Strict,
    Watched,
    caught_up,
    role_of,
)
from tests.faults.load import HISTORY_ROOMS, LIVE_ROOMS, until
from tests.redis_server import RedisServer

FROZEN: Final = 8.0
"""Seconds for which Redis stands still: longer than a node needs to notice (4 + 3)."""
FENCED: Final = 14.0
"""Seconds for which a node stands still: longer than its lease (10)."""
AWAY: Final = (0.5, 3.0)
"""Seconds, drawn between the two, for which something is not there."""
BURST: Final = 600
"""Messages of :data:`BURST_BYTES` at once, which no buffer of :data:`SMALL_BUFFER` holds."""
BURST_BYTES: Final = 1000
SMALL_BUFFER: Final = 65536
KEYS: Final = Keys("broker:")

AnyHouse = TypeVar("AnyHouse", bound=House)


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """One way to break a house."""

    name: str
    house: type[House]
    what: str
    """A sentence for people."""
    tells: bool
    """Sessions may be told that events are gone."""
    closes: bool
    """Sockets may be closed."""
    keeps: bool
    """Everything acknowledged is in the store afterwards."""
    happen: Callable[[Any, Random], Awaitable[None]]


CATALOGUE: Final[dict[str, Fault]] = {}


def fault(
    house: type[AnyHouse], *, tells: bool = False, closes: bool = False, keeps: bool | None = None
) -> Callable[[Callable[[AnyHouse, Random], Awaitable[None]]], None]:
    """Enter a function into the catalogue. Where nothing may be told, everything must be kept."""

    def enter(function: Callable[[AnyHouse, Random], Awaitable[None]]) -> None:
        name = function.__name__.replace("_", "-")
        what = (function.__doc__ or "").partition("\n")[0]
        CATALOGUE[name] = Fault(
            name, house, what, tells, closes, not tells if keeps is None else keeps, function
        )

    return enter


async def a_while(random: Random) -> None:
    """Let the load feel it."""
    await trio.sleep(random.uniform(*AWAY))


# -- a broker alone -----------------------------------------------------------------------------


@fault(Alone, closes=True)
async def broker_killed(house: Alone, random: Random) -> None:
    """kill -9 of the only broker; started again on the same directory."""
    (node,) = house.nodes
    await node.kill()
    await a_while(random)
    await node.start()


@fault(Alone, closes=True)
async def broker_restarted(house: Alone, random: Random) -> None:
    """SIGTERM while the load runs; started again on the same directory."""
    (node,) = house.nodes
    assert await node.drain() == 0
    await a_while(random)
    await node.start()


# -- nodes --------------------------------------------------------------------------------------


@fault(Cluster, closes=True)
async def node_killed(house: Cluster, random: Random) -> None:
    """kill -9 of a node; its sessions move to the others; later it comes back."""
    node = random.choice(house.nodes)
    await node.kill()
    await a_while(random)
    await node.start()


@fault(Cluster, closes=True)
async def nodes_drained(house: Cluster, random: Random) -> None:
    """SIGTERM to two of three nodes at once, as in a hurried deploy; later they come back."""
    leaving = random.sample(house.nodes, 2)
    codes: list[int] = []

    async def drain(index: int) -> None:
        codes.append(await leaving[index].drain())

    async with trio.open_nursery() as nursery:
        for index in range(2):
            nursery.start_soon(drain, index)
    assert codes == [0, 0], f"nodes ended with {codes}"
    await a_while(random)
    await house.start()


@fault(Cluster, closes=True)
async def node_frozen(house: Cluster, random: Random) -> None:
    """A node stands still until the others have declared it dead; then it wakes up."""
    node = random.choice(house.nodes)
    node.signal(signal.SIGSTOP)
    try:
        await trio.sleep(FENCED)
    finally:
        node.signal(signal.SIGCONT)


# -- Redis and its memory ----------------------------------------------------------------------------


@fault(Cluster)
async def redis_killed(house: Cluster, random: Random) -> None:
    """kill -9 of a Redis that writes to disk before it answers; started again."""
    house.redis.kill()
    await a_while(random)
    await in_thread(house.redis.start)


@fault(Cluster, tells=True)
async def power_cut(house: Cluster, random: Random) -> None:
    """Redis writes to disk once a second, and what it wrote last is gone; started again."""
    with house.redis.client() as client:
        client.config_set("appendfsync", "everysec")
    log = appended(house.redis.directory)
    size = log.stat().st_size
    await trio.sleep(random.uniform(0.3, 1.0))
    house.redis.kill()
    os.truncate(log, random.randint(size, max(size, log.stat().st_size - 1)))
    await a_while(random)
    await in_thread(partial(house.relaunch, **EVERY_SECOND))
    with house.redis.client() as client:
        client.config_set("appendfsync", "always")


def appended(directory: Path) -> Path:
    """The file that Redis appends to."""
    return max((directory / "appendonlydir").glob("*.incr.aof"), key=lambda path: path.stat().st_mtime)


@fault(Cluster, tells=True)
async def redis_emptied(house: Cluster, random: Random) -> None:
    """kill -9 of Redis, which comes back with nothing, as one that keeps nothing on disk would."""
    house.redis.kill()
    shutil.rmtree(house.redis.directory / "appendonlydir")
    await a_while(random)
    await in_thread(partial(house.relaunch, **DURABLE))


@fault(Cluster, tells=True)
async def everything_flushed(house: Cluster, _random: Random) -> None:
    """FLUSHALL."""
    with house.redis.client() as client:
        client.flushall()


@fault(Cluster, tells=True)
async def rooms_evicted(house: Cluster, random: Random) -> None:
    """One room's stream is deleted, and another's record of where it is."""
    first, second = random.sample(HISTORY_ROOMS, 2)
    with house.redis.client() as client:
        client.delete(KEYS.stream(first))
        client.delete(KEYS.meta(second))


@fault(Cluster)
async def memory_full(house: Cluster, random: Random) -> None:
    """Redis may not store any more for a while (OOM)."""
    with house.redis.client() as client:
        client.config_set("maxmemory", "1mb")
        try:
            await a_while(random)
        finally:
            client.config_set("maxmemory", "0")


@fault(Cluster)
async def scripts_flushed(house: Cluster, _random: Random) -> None:
    """SCRIPT FLUSH: Redis forgets the scripts that nodes have loaded."""
    with house.redis.client() as client:
        client.script_flush()


# -- Redis and its time ---------------------------------------------------------------------------


@fault(Cluster)
async def redis_frozen(house: Cluster, _random: Random) -> None:
    """Redis stands still for 8 s, and no connection is closed."""
    house.redis.freeze()
    try:
        await trio.sleep(FROZEN)
    finally:
        house.redis.thaw()


@fault(Cluster)
async def redis_hiccup(house: Cluster, random: Random) -> None:
    """Redis stands still for less than a second, a few times."""
    for _ in range(3):
        house.redis.freeze()
        try:
            await trio.sleep(random.uniform(0.2, 0.9))
        finally:
            house.redis.thaw()
        await trio.sleep(random.uniform(0.2, 0.9))


@fault(Cluster)
async def redis_paused(house: Cluster, random: Random) -> None:
    """CLIENT PAUSE: commands wait, for longer than their senders do."""
    with house.redis.client() as client:
        milliseconds = random.randint(2000, 4000)
        client.client_pause(milliseconds)
    await trio.sleep(milliseconds / 1000)


# -- Redis and its connections ----------------------------------------------------------------------


@fault(Cluster)
async def clients_killed(house: Cluster, random: Random) -> None:
    """CLIENT KILL of every connection that commands go over, a few times."""
    await kill_clients(house, random, "normal")


@fault(Cluster)
async def subscribers_killed(house: Cluster, random: Random) -> None:
    """CLIENT KILL of every connection that messages come over, a few times."""
    await kill_clients(house, random, "pubsub")


async def kill_clients(house: Cluster, random: Random, kind: str) -> None:
    """All of one type but ours."""
    with house.redis.client() as client:
        assert client.client_kill_filter(_type=kind, skipme=True) >= len(house.nodes)
        for _ in range(2):
            await trio.sleep(random.uniform(0.1, 1.0))
            client.client_kill_filter(_type=kind, skipme=True)


@fault(Cluster)
async def buffers_overrun(house: Cluster, random: Random) -> None:
    """Nodes are sent more than Redis wants to buffer for them, so it cuts them off."""
    flood = (
        "for number = 1, tonumber(ARGV[1]) do"
        " redis.call('PUBLISH', KEYS[1], ARGV[2] .. string.format('%d', number) .. ARGV[3]) end"
    )
    with house.redis.client() as client:
        before = client.config_get("client-output-buffer-limit")["client-output-buffer-limit"]
        subscribers = subscribed(client)
        client.config_set("client-output-buffer-limit", f"pubsub {SMALL_BUFFER} {SMALL_BUFFER} 1")
        try:
            for turn, room in enumerate(LIVE_ROOMS):
                line = f"flood.{turn}.{random.randrange(1 << 30)}"
                head = f'{{"event": "e", "data": {{"line": "{line}", "number": '
                tail = f', "pad": "{"x" * BURST_BYTES}"}}}}'
                client.eval(flood, 1, KEYS.backend(room), BURST, head, tail)
            await a_while(random)
            assert not subscribers & subscribed(client), "everybody was cut off"
        finally:
            client.config_set("client-output-buffer-limit", before)


async def in_thread(function: Callable[[], object]) -> None:
    """Run what blocks (starting a Redis) beside the load."""
    await trio.to_thread.run_sync(function)


def subscribed(client: redis.Redis) -> set[str]:
    """Ids of the connections that messages come over."""
    return {one["id"] for one in client.client_list(_type="pubsub")}


# -- the way to Redis -------------------------------------------------------------------------------


@fault(Proxied)
async def redis_slow(house: Proxied, random: Random) -> None:
    """Redis answers 50 ms later than usual."""
    for proxy in house.proxies:
        proxy.faults.requests.delay = proxy.faults.replies.delay = 0.025
    await trio.sleep(random.uniform(3, 6))
    for proxy in house.proxies:
        proxy.heal()


@fault(Proxied)
async def replies_cut(house: Proxied, random: Random) -> None:
    """Connections to Redis break in the middle of an answer, again and again."""
    for _ in range(5):
        for proxy in house.proxies:
            proxy.faults.replies.cut_after = random.randint(1, 20_000)
            proxy.drop()
        await trio.sleep(random.uniform(0.2, 1.0))
    for proxy in house.proxies:
        proxy.heal()
        proxy.drop()


@fault(Proxied)
async def answers_held(house: Proxied, random: Random) -> None:
    """One way only: Redis hears a node, but the node does not hear Redis; nothing is closed."""
    random.choice(house.proxies).faults.replies.frozen = True
    await hold_then_heal(house)


@fault(Proxied)
async def requests_held(house: Proxied, random: Random) -> None:
    """One way only: a node hears Redis, but Redis does not hear the node; nothing is closed."""
    random.choice(house.proxies).faults.requests.frozen = True
    await hold_then_heal(house)


async def hold_then_heal(house: Proxied) -> None:
    """Bytes are held, never lost: that is what TCP makes of a path that comes back."""
    await trio.sleep(FROZEN)
    for proxy in house.proxies:
        proxy.heal()


@fault(Divided)
async def node_cut_off(house: Divided, random: Random) -> None:
    """The network between one node and Redis is gone for 8 s, in silence."""
    await pull(house, [random.randrange(len(house.nodes))])


@fault(Divided)
async def all_cut_off(house: Divided, _random: Random) -> None:
    """The network between Redis and every node is gone for 8 s, in silence."""
    await pull(house, range(len(house.nodes)))


async def pull(house: Divided, cables: Iterable[int]) -> None:
    """Pull cables, and plug them in again."""
    chosen = list(cables)
    for number in chosen:
        house.network.pull(number)
    try:
        await trio.sleep(FROZEN)
    finally:
        for number in chosen:
            house.network.plug(number)


# -- failover ---------------------------------------------------------------------------------------


@fault(Watched)
async def failover_clean(house: Watched, _random: Random) -> None:
    """kill -9 of a primary whose replica has everything: nothing may be said to be gone."""
    with house.primary().client() as client:
        client.client_pause(60_000, all=False)  # writes; it is killed before they go on
        await until(lambda: replicated(client.info("replication")))
    await fail_over(house)


@fault(Watched, tells=True)
async def failover(house: Watched, _random: Random) -> None:
    """kill -9 of the primary in full flight."""
    await fail_over(house)


@fault(Strict, tells=True, keeps=True)
async def failover_strict(house: Strict, _random: Random) -> None:
    """The same where acknowledged means on two: all that was acknowledged must be there."""
    await fail_over(house)


@fault(Strict)
async def replica_away(house: Strict, random: Random) -> None:
    """The only replica is gone for a while: nothing can be acknowledged, and nothing is."""
    replica = house.replica()
    replica.kill()
    await a_while(random)
    await house.returns_as_replica(replica)


async def fail_over(house: Watched) -> None:
    """Kill the primary, wait for the other one, bring it back as its replica."""
    primary, replica = house.primary(), house.replica()
    primary.kill()
    await promoted(replica)
    await house.returns_as_replica(primary)


@fault(Watched, tells=True)
async def failover_behind(house: Watched, random: Random) -> None:
    """The replica has missed the last events when the primary dies: offsets are issued again."""
    with house.primary().client() as client:
        # It cannot come back. (redis-py's acl_setuser would turn everybody's user off besides.)
        client.execute_command("ACL SETUSER", "default", "-psync", "-sync")
        client.client_kill_filter(_type="replica")
        await trio.sleep(random.uniform(0.3, 1.0))
    await fail_over(house)


@fault(Watched, tells=True)
async def split_brain(house: Watched, _random: Random) -> None:
    """The primary stands still until another has taken its place, and then goes on as if nothing were."""
    primary, replica = house.primary(), house.replica()
    primary.freeze()
    try:
        await promoted(replica)
    finally:
        primary.thaw()
    await caught_up(primary)


def replicated(said: dict[str, Any]) -> bool:
    """Whether the replica has everything that the primary has."""
    return bool(said["slave0"]["offset"] == said["master_repl_offset"])


async def promoted(replica: RedisServer) -> None:
    """Return once it is the primary; whoever calls has the deadline."""
    await until(lambda: role_of(replica)["role"] == "master")
