"""A backend that hands events in at the store, without a broker: ``XADD broker:publish``.

One entry after the other, each again, with its key, until Redis has taken it;
so the order of its entries in a room is known, and the ledger holds the room
against it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Final

import orjson
import redis
import trio

from tests.faults.load import AGAIN, HISTORY_ROOMS, Load, digest
from tests.redis_server import RedisServer

RATE: Final = 20.0
"""Entries a second."""
ANSWER: Final = 2.0
"""Seconds to wait for Redis."""
STREAM: Final = "broker:publish"


class Backend:
    """``store`` says which Redis takes writes now; asked again for each attempt, in a thread."""

    def __init__(self, load: Load, store: Callable[[], RedisServer | None]) -> None:
        self._load = load
        self._store = store
        self._random = Random(f"{load.seed} backend")
        self._made = 0

    async def run(self) -> None:
        """Hand in until cancelled, while the load is on."""
        while True:
            await self._load.flowing.wait()
            await trio.sleep(self._random.expovariate(RATE))
            if self._load.flowing.is_set():
                await self._hand_in()

    async def _hand_in(self) -> None:
        self._made += 1
        room, key = self._random.choice(HISTORY_ROOMS), f"b-{self._made}"
        data = {"key": key}
        entry = {"room": room, "event": "e", "data": orjson.dumps(data).decode(), "key": key}
        while True:
            self._load.ledger.sends(room, key, digest(data), trio.current_time(), by_backend=True)
            if await trio.to_thread.run_sync(self._add, entry):
                self._load.ledger.accepted(key)
                return
            await trio.sleep(self._random.uniform(*AGAIN))

    def _add(self, entry: dict[str, str]) -> bool:
        """Whether Redis says that it has it."""
        server = self._store()
        if server is None:
            return False
        try:
            with server.client(socket_timeout=ANSWER, socket_connect_timeout=ANSWER) as client:
                client.xadd(STREAM, dict(entry))
        except redis.RedisError:
            return False
        return True
