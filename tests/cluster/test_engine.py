"""The engine of a cluster against the contract, and what only many nodes can go through."""

from __future__ import annotations

import pytest

from tests.cluster.linked_engine import RedisHarness
from tests.engine.contract import EngineContract
from tests.redis_server import RedisServer


class TestRedis(EngineContract):
    @pytest.fixture
    def harness(self, redis_at: RedisServer) -> RedisHarness:
        return RedisHarness(redis_at)
