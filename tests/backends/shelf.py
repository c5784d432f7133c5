"""For tests of what backends say: a link, a store that fails when told to, a hub that only listens."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import orjson
import trio
from trio.testing import wait_all_tasks_blocked

from broker.backends.leases import LEASE
from broker.backends.reader import READ_STREAM, Reader
from broker.backends.rejected import REJECT, Rejected
from broker.config import Config, Redis, RoomOptions
from broker.engine.base import Done
from broker.engine.peers import Mate
from broker.errors import BrokerError, ErrorCode
from broker.link.base import Message
from broker.link.bridge import RedisLink
from broker.link.keys import Keys
from broker.protocol.events import Event, Position, SessionId
from tests.redis_server import RedisServer

PATIENCE: Final = 20.0
"""Seconds until a test gives up; nothing here takes one."""

KEYS: Final = Keys("broker:")
CONFIG: Final = Config(
    rooms={"deal": RoomOptions(history=100), "small": RoomOptions(history=100, event_bytes=200)}
)


async def until(condition: Callable[[], object]) -> None:
    """Wait until ``condition`` holds."""
    with trio.fail_after(PATIENCE):
        while not condition():
            await wait_all_tasks_blocked(0.002)


@asynccontextmanager
async def linked(
    settings: Redis, name: str = "one", on_messages: Callable[[list[Message]], None] = lambda _: None
) -> AsyncIterator[RedisLink]:
    """A link that is up."""

    async def greet(_run: str) -> None:
        """Every Redis will do."""

    link = RedisLink(
        settings,
        scripts=[REJECT, LEASE, READ_STREAM],
        own_channel=KEYS.node(name),
        on_messages=on_messages,
        greet=greet,
        on_up=lambda: None,
        on_down=lambda _: None,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(link.run)
        await until(lambda: link.up)
        yield link
        nursery.cancel_scope.cancel()


def body(event: Event) -> Any:
    """What clients get, without its time."""
    message = orjson.loads(event.body)
    del message["ts"]
    return message


class Ear:
    """A hub that only remembers what it received."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.calls = 0

    def receive(self, events: Sequence[Event]) -> None:
        self.events += events
        self.calls += 1

    def know_mates(self, room: str, node: str, mates: Any) -> None:
        raise AssertionError

    def change_mates(
        self, room: str, node: str, came: Sequence[Mate], changed: Sequence[Mate], went: Sequence[SessionId]
    ) -> None:
        raise AssertionError

    def part_mates(self, node: str) -> None:
        raise AssertionError


class Shelf:
    """A store of all nodes together: rooms in memory, keys remembered.

    ``judge`` says of each event, before it is stored, what goes wrong, if
    anything. While ``holding``, answers wait for :meth:`answer`.
    """

    def __init__(self) -> None:
        self.rooms: dict[str, list[Event]] = {}
        self.told: list[Event] = []
        self.duplicates = 0
        self.attempts: Counter[str] = Counter()
        self.judge: Callable[[Event], BrokerError | None] = lambda _: None
        self.holding = False
        self._keys: dict[tuple[str, str, str | None], Position] = {}
        self._held: list[Callable[[], None]] = []

    def publish(self, event: Event, done: Done) -> None:
        if self.holding:
            self._held.append(lambda: self._store(event, done))
        else:
            self._store(event, done)

    def tell(self, event: Event) -> None:
        self.told.append(event)

    @property
    def held(self) -> int:
        """Publishes on their way."""
        return len(self._held)

    def answer(self) -> None:
        """Store and answer what was held, in order."""
        held, self._held = self._held, []
        for store in held:
            store()

    def data(self, room: str) -> list[Any]:
        """What was stored in a room, in order."""
        return [orjson.loads(event.body)["data"] for event in self.rooms.get(room, [])]

    def _store(self, event: Event, done: Done) -> None:
        self.attempts[event.room] += 1
        error = self.judge(event)
        if error is not None:
            done(error)
            return
        name = (event.room, event.publisher, event.key)
        if name in self._keys:
            self.duplicates += 1
        else:
            stored = self.rooms.setdefault(event.room, [])
            stored.append(event)
            self._keys[name] = Position("e", len(stored))
        done(self._keys[name])


def away(room: str) -> BrokerError:
    """The store cannot be reached."""
    return BrokerError(ErrorCode.UNAVAILABLE, "not now", room=room)


@asynccontextmanager
async def reading(
    server: RedisServer, shelf: Shelf, name: str = "one", *, lease: float = 3.0, clock: float = 1000.0
) -> AsyncIterator[Reader]:
    """One node that reads, until the block ends; then it goes as a node does that is told to."""
    settings = Redis(url=server.url, reader_lease=lease)
    async with linked(settings, name) as link:
        rejected = Rejected(link, KEYS, 1000)
        reader = Reader(
            link,
            KEYS,
            rejected,
            CONFIG.options,
            node=name,
            settings=settings,
            publish=shelf.publish,
            tell=shelf.tell,
            clock=lambda: clock,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(reader.run)
            yield reader
            nursery.cancel_scope.cancel()
