"""How Hypothesis runs, and one redis-server for all tests that ask for it.

Hypothesis has no deadline, since machines are shared; with ``CI`` set, the same examples always.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.redis_server import RedisServer, redis_server

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# A shell that starts a job in the background has it ignore Ctrl-C, and every child inherits
# that; some tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
