"""kill -9 loses nothing that was acknowledged."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from broker.engine.base import HistoryQuery
from broker.protocol.events import Position
from tests.engine.contract import Rig, running
from tests.engine.crash_publisher import KEEP, ROOMS
from tests.engine.test_embedded import DiskHarness

PROJECT = Path(__file__).parents[2]
KILLS = 4
"""Deaths of one store, one after the other."""


class Acknowledged(NamedTuple):
    epoch: str
    room: str
    offset: int
    key: str


def lines(process: subprocess.Popen[str]) -> Iterator[Acknowledged]:
    """What the publisher says; the line that death has torn does not count."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.endswith("\n"):
            epoch, room, offset, key = line.split()
            yield Acknowledged(epoch, room, int(offset), key)


def publish_and_kill(directory: Path, turn: int, after: int) -> list[Acknowledged]:
    """Let the publisher run until it has had ``after`` answers, then kill it at whatever it does."""
    command = [sys.executable, "-m", "tests.engine.crash_publisher", str(directory), str(turn)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT) as process:
        heard = []
        try:
            for said in lines(process):
                heard.append(said)
                if len(heard) == after:
                    process.kill()  # and go on reading what it had said by then
        finally:
            process.kill()
    assert process.returncode == -9
    return heard


class Body(msgspec.Struct):
    offset: int
    data: str
    key: str


async def stored(rig: Rig, room: str) -> tuple[Position, dict[int, str]]:
    """Everything in the room: its top, and the key at each offset."""
    top = await rig.engine.open(room, KEEP)
    page = await rig.engine.history(room, HistoryQuery(top.offset, since=Position(top.epoch, 0)), KEEP)
    assert page.recovered
    assert [event.offset for event in page.events] == list(range(1, top.offset + 1))
    bodies = [msgspec.json.decode(event.wire, type=Body) for event in page.events]
    assert all(body.offset == event.offset for body, event in zip(bodies, page.events, strict=True))
    return top, {body.offset: body.key for body in bodies}


@pytest.mark.parametrize("seed", [1, 2])
async def test_kill_9_loses_nothing_acknowledged(tmp_path: Path, seed: int) -> None:
    moments = random.Random(seed)
    acknowledged: list[Acknowledged] = []
    for turn in range(KILLS):
        acknowledged += publish_and_kill(tmp_path, turn, after=moments.randint(1, 600))
        harness = DiskHarness(tmp_path)
        async with running(harness) as rig:
            for room in ROOMS:
                top, keys = await stored(rig, room)
                assert len(set(keys.values())) == len(keys), "stored once"
                mine = [said for said in acknowledged if said.room == room]
                assert {said.epoch for said in mine} <= {top.epoch}
                for said in mine:
                    assert keys[said.offset] == said.key
