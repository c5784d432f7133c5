"""The engine on a real Redis Cluster: the contract, and what only slots and shards can do to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.contract import EngineContract
from tests.link.sharded import Sharded, sharded
from tests.streams.linked_engine import RedisHarness


@pytest.fixture(scope="module")
def three() -> Iterator[Sharded]:
    with sharded() as cluster:
        yield cluster


@pytest.fixture
def harness(three: Sharded) -> RedisHarness:
    return RedisHarness(three.primaries[0].server, url=three.url)


class TestRedisCluster(EngineContract):
    @pytest.fixture
    def harness(self, harness: RedisHarness) -> RedisHarness:
        return harness
