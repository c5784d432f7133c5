"""A process that publishes until it is killed: ``python -m tests.engine.crash_publisher DIRECTORY ROUND``.

It prints one line for every acknowledged event: epoch, room, offset, key.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import trio

from broker.engine.base import Retention
from broker.engine.embedded import EmbeddedEngine
from broker.errors import BrokerError
from broker.protocol.events import Event, Position, make_event

KEEP = Retention(1_000_000, 86_400.0)
ROOMS = ("deal:1", "deal:2", "user:7")
PUBLISHERS = 16


def deliver(_events: Sequence[Event]) -> None:
    """Nobody listens."""


def acknowledged(room: str, key: str, answered: trio.Event, answer: Position | BrokerError) -> None:
    """Say so at once, in one write, so that the line is out if the next moment kills us."""
    assert isinstance(answer, Position)
    print(answer.epoch, room, answer.offset, key, flush=True)
    answered.set()


async def publish_for_ever(engine: EmbeddedEngine, name: str) -> None:
    """One event after the other, each with a key."""
    number = 0
    while True:
        number += 1
        room, key = ROOMS[number % len(ROOMS)], f"{name}-{number}"
        event = make_event(room, "said", key, time.time(), publisher="p", key=key)
        answered = trio.Event()
        engine.publish(event, KEEP, functools.partial(acknowledged, room, key, answered))
        await answered.wait()


async def main(directory: Path, turn: str) -> None:
    """Publish from several tasks."""
    engine = EmbeddedEngine(directory, ring_events=8)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run, deliver)
        for number in range(PUBLISHERS):
            nursery.start_soon(publish_for_ever, engine, f"{turn}-{number}")


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2])
