"""Where asyncio meets Trio: the parts of trio-asyncio that the bridge uses.

Both loops run on one thread. What asyncio calls (a protocol, a transport) runs
inside some Trio task and may set Trio events; what Trio calls may write to an
asyncio transport. Only coroutines of asyncio need :func:`run_in_asyncio`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar, cast

# Without annotations of its own, so their types are given here.
import trio_asyncio  # type: ignore[import-untyped]

_Result = TypeVar("_Result")


class EventLoop(Protocol):
    """As much of the loop as anybody outside asyncio needs."""

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> object:
        """Run ``callback`` in the loop's next turn."""


def open_loop() -> AbstractAsyncContextManager[EventLoop]:
    """Run an asyncio loop inside of the block. An error that nobody in asyncio caught comes out of it."""
    return cast("AbstractAsyncContextManager[EventLoop]", trio_asyncio.open_loop())


async def run_in_asyncio(function: Callable[..., Awaitable[_Result]], *args: Any) -> _Result:
    """Await ``function(*args)`` in asyncio. Only from tasks that were started inside of :func:`open_loop`."""
    return cast("_Result", await trio_asyncio.aio_as_trio(function)(*args))
