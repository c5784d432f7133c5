"""One redis-server for the whole folder, emptied before every test that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.redis_server import RedisServer, redis_server


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def redis_at(shared_redis: RedisServer) -> RedisServer:
    """The server, empty. Do not kill or freeze this one: start your own with ``redis_server()``."""
    with shared_redis.client() as client:
        client.flushall()
    return shared_redis
