"""Leases on a real Redis: one holder at a time, by the time of Redis."""

from __future__ import annotations

from broker.backends.leases import Lease, Standing
from broker.config import Redis
from broker.link.base import Link
from tests.backends.shelf import linked, until
from tests.redis_server import RedisServer, redis_server


class Watch:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def held(one: Lease) -> bool:
    """A call, which mypy takes to answer anew each time."""
    return one.held


def lease(link: Link, who: str, duration: float = 10.0, watch: Watch | None = None) -> Lease:
    return Lease(link, "broker:lease:x", who, duration, monotonic=watch or Watch())


async def test_one_holds_it_and_the_other_does_not(redis_at: RedisServer) -> None:
    async with linked(Redis(url=redis_at.url)) as link:
        one, two = lease(link, "one"), lease(link, "two")
        assert await one.hold()
        assert not await two.hold()
        assert await one.hold()
        assert one.statistics() == {"held": 1, "taken_over": 1, "lost": 0}
        assert two.statistics() == {"held": 0, "taken_over": 0, "lost": 0}


async def test_what_is_given_back_is_free_at_once(redis_at: RedisServer) -> None:
    async with linked(Redis(url=redis_at.url)) as link:
        one, two = lease(link, "one"), lease(link, "two")
        assert await one.hold()
        await two.release()  # not theirs to give
        assert not await two.hold()
        await one.release()
        assert not held(one)
        assert await two.hold()


async def test_it_ends_by_itself_in_redis(redis_at: RedisServer) -> None:
    async with linked(Redis(url=redis_at.url)) as link:
        one, two = lease(link, "one", 0.05), lease(link, "two", 10.0)
        assert await one.hold()
        with redis_at.client() as client:
            await until(lambda: not client.exists(one.key))
        assert await two.hold()
        assert not await one.hold()
        assert one.statistics() == {"held": 0, "taken_over": 1, "lost": 1}


async def test_who_was_frozen_does_not_believe_in_it(redis_at: RedisServer) -> None:
    watch = Watch()
    async with linked(Redis(url=redis_at.url)) as link:
        one = lease(link, "one", 10.0, watch)
        assert await one.hold()
        watch.now += 9.9
        assert held(one)
        watch.now += 0.1
        assert not held(one)
        assert await one.hold()  # nobody else wanted it


async def test_it_counts_from_when_it_was_asked_for(redis_at: RedisServer) -> None:
    watch = Watch()
    async with linked(Redis(url=redis_at.url)) as link:
        one = lease(link, "one", 10.0, watch)
        one.learn(Standing.KEPT, 89.0)  # the answer took eleven seconds
        assert not held(one)
        one.learn(Standing.TAKEN, 99.0)
        assert held(one)
        assert one.statistics()["lost"] == 1


async def test_giving_it_back_without_redis_is_no_error() -> None:
    with redis_server() as server:
        async with linked(Redis(url=server.url)) as link:
            one = lease(link, "one")
            assert await one.hold()
            server.kill()
            await until(lambda: not link.up)
            await one.release()
            assert not held(one)
