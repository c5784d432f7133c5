"""The embedded engine: the contract, on disk and in memory, and what only it promises."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from broker.engine.base import Engine
from broker.engine.embedded import EmbeddedEngine
from tests.engine.contract import EngineContract, Harness, ManualClock


class DiskHarness:
    """Engines over one directory."""

    survives = True

    def __init__(self, path: Path) -> None:
        self.clock = ManualClock()
        self.path = path

    def engine(self, *, ring_events: int = 4) -> EmbeddedEngine:
        return EmbeddedEngine(self.path, ring_events=ring_events, clock=self.clock)

    def fresh(self) -> Harness:
        return DiskHarness(Path(tempfile.mkdtemp(dir=self.path)))


class MemoryHarness:
    """Engines without a directory."""

    survives = False

    def __init__(self) -> None:
        self.clock = ManualClock()

    def engine(self, *, ring_events: int = 4) -> Engine:
        return EmbeddedEngine(None, ring_events=ring_events, clock=self.clock)

    def fresh(self) -> Harness:
        return MemoryHarness()


class TestOnDisk(EngineContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Harness:
        return DiskHarness(tmp_path)


class TestInMemory(EngineContract):
    @pytest.fixture
    def harness(self) -> Harness:
        return MemoryHarness()
