"""A read that several callers share."""

from __future__ import annotations

from typing import Any

import trio

from broker.engine.batch import unavailable


class Flight:
    """A read that was asked for. Until it has landed it counts as failed, with ``failure`` as the reason."""

    __slots__ = ("done", "failure", "result")

    def __init__(self, failure: str) -> None:
        self.done = trio.Event()
        self.failure: str | None = failure
        self.result: Any = None

    async def landed(self) -> Any:
        """Wait for the result. Raises ``unavailable`` if there is none."""
        await self.done.wait()
        if self.failure is not None:
            raise unavailable(self.failure)
        return self.result
