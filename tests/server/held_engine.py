"""An engine whose answers wait until a test lets them go."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from broker.engine.base import Done, Engine, Retention
from broker.errors import BrokerError, ErrorCode
from broker.protocol.events import Event


class HeldEngine:
    """Stands in front of a running broker's engine, method by method, until :meth:`release`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._publish = engine.publish
        self._published: list[tuple[Event, Retention, Done]] = []
        self._open = trio.Event()
        self.entered = trio.Event()
        """Somebody waits."""
        self.refusing = False
        """Publishes are refused at once, as by a full queue."""

    def hold_publishes(self) -> None:
        """Keep publishes from the store."""
        self._engine.publish = self._keep  # type: ignore[method-assign]

    def hold(self, method: str) -> None:
        """Let calls of an ``async`` method wait."""
        setattr(self._engine, method, self._waiting(getattr(self._engine, method)))

    def fail(self, method: str) -> None:
        """Let calls of an ``async`` method wait, and then find the store unavailable."""

        async def failing(*_arguments: Any) -> None:
            raise BrokerError(ErrorCode.UNAVAILABLE, "the disk is gone")

        setattr(self._engine, method, self._waiting(failing))

    def blind(self) -> None:
        """Let memory answer nothing, so that everything is read from the store."""
        self._engine.history_nowait = lambda *_: None  # type: ignore[method-assign]

    def release(self) -> None:
        """Let everything go, in the order in which it came."""
        self._open.set()
        self._engine.publish = self._publish  # type: ignore[method-assign]
        for event, retention, done in self._published:
            self._publish(event, retention, done)
        self._published.clear()

    def _keep(self, event: Event, retention: Retention, done: Done) -> None:
        if self.refusing:
            done(BrokerError(ErrorCode.UNAVAILABLE, "too many events wait for the disk"))
        else:
            self._published.append((event, retention, done))

    def _waiting(self, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def held(*arguments: Any) -> Any:
            self.entered.set()
            await self._open.wait()
            return await method(*arguments)

        return held
