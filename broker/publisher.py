"""Publish from a Python backend, through Redis: :class:`Publisher`, and :class:`AsyncPublisher`.

Needs redis-py and orjson, and nothing else of the broker, so that a Django or
Flask process loads no more than it uses::

    from broker.publisher import Publisher

    publisher = Publisher("redis://127.0.0.1:6379/0")
    publisher.to_room("deal:42", "deal-updated", {"stage": "won"})
    publisher.to_user("42", "order-paid", {"order": 7}, durable=True, key="order-7-paid")

``docs/backends.md`` says what each way promises. Nothing is sent twice unless
it may be: when a connection breaks, nobody knows what was executed, so only
durable events with a ``key`` are tried again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Final, NamedTuple, Self, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from broker.publisher_commands import Command, Ways

try:
    from sniffio import current_async_library
except ImportError:  # it comes with Trio; where it is missing there is only asyncio

    def current_async_library() -> str:
        """The only one there can be."""
        return "asyncio"


__all__ = ["AsyncPublisher", "Batch", "PublishError", "Publisher", "Sent"]

URL: Final = "redis://127.0.0.1:6379/0"
PREFIX: Final = "broker:"

TIMEOUT: Final = 2.0
"""Seconds for a connection, and for an answer."""

ATTEMPTS: Final = 4
"""How often a durable event with a key is tried before it counts as failed."""

FIRST_PAUSE: Final = 0.1
"""Seconds before the second attempt; doubled for each further one, and jittered."""

TRIP: Final = 500
"""Events of a batch that travel together: the answers to many more would pile up in Redis."""

_Result = TypeVar("_Result")


class Sent(NamedTuple):
    """What Redis said to one event."""

    entry: str | None = None
    """Id of the entry in the stream, of a durable event."""
    heard: int | None = None
    """Nodes that heard an ephemeral one; 0 when nobody is in the room. In a Redis Cluster only those count
    that are connected to the same server."""


class PublishError(Exception):
    """Redis did not take an event, or did not say so.

    ``uncertain``: it may have been published all the same. ``sent``: of a
    batch, what Redis said to each event, ``None`` where it said nothing good.
    """

    def __init__(self, message: str, *, uncertain: bool, sent: Sequence[Sent | None] = ()) -> None:
        super().__init__(message)
        self.uncertain = uncertain
        self.sent = list(sent)


class Batch(Ways[None]):
    """Events that are gathered, then sent together. Made by ``publisher.batch()``."""

    def __init__(self, prefix: str) -> None:
        super().__init__(prefix)
        self.commands: list[Command] = []
        self.sent: list[Sent] = []
        """One for each event, in order; filled at the end of the ``with`` block."""

    def _say(self, command: Command) -> None:
        self.commands.append(command)


class Publisher(Ways[Sent]):
    """Publishes, and waits for Redis. May be used by many threads, and before or after a fork.

    ``url``: ``redis://``, ``rediss://`` or ``unix://``. For anything else
    (Sentinel, a Redis Cluster) give ``client``, a redis-py client without
    retries of its own; closing it stays your business. Raises
    :class:`PublishError`, and :class:`ValueError` for what is no event.
    """

    def __init__(
        self,
        url: str = URL,
        prefix: str = PREFIX,
        *,
        client: redis.Redis | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        super().__init__(prefix)
        self._own = client is None
        self._client = client or redis.Redis.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),  # redis-py would repeat writes by itself
        )

    def _say(self, command: Command) -> Sent:
        (sent,) = self._send([command])
        return sent

    @contextmanager
    def batch(self) -> Iterator[Batch]:
        """Gather events in a ``with`` block; they are sent at its end, unless it raised."""
        batch = Batch(self._prefix)
        yield batch
        batch.sent = self._send(batch.commands)

    def close(self) -> None:
        """Close the connections."""
        if self._own:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, commands: Sequence[Command]) -> list[Sent]:
        """Send all, :data:`TRIP` at a time, in order."""
        sent: list[Sent | None] = []
        problems: list[Exception] = []
        for start in range(0, len(commands), TRIP):
            trip = commands[start : start + TRIP]
            try:
                replies = self._insist(trip)
            except redis.RedisError as error:
                uncertain = isinstance(error, redis.ConnectionError | redis.TimeoutError)
                raise PublishError(_text(error), uncertain=uncertain, sent=sent) from error
            problems += [reply for reply in replies if isinstance(reply, Exception)]
            sent += [_sent(reply) for reply in replies]
        if problems:
            raise PublishError(_text(problems[0]), uncertain=False, sent=sent) from problems[0]
        return [one for one in sent if one is not None]

    def _insist(self, trip: Sequence[Command]) -> list[Any]:
        """Send one trip, again after a broken connection if that does no harm."""
        attempts = ATTEMPTS if all(command.repeatable for command in trip) else 1
        for attempt in range(1, attempts):
            try:
                return self._travel(trip)
            except (redis.ConnectionError, redis.TimeoutError):
                time.sleep(random.uniform(0.5, 1.0) * FIRST_PAUSE * 2 ** (attempt - 1))
        return self._travel(trip)

    def _travel(self, trip: Sequence[Command]) -> list[Any]:
        pipeline: Any = self._client.pipeline(transaction=False)  # redis-py types only the named commands
        with pipeline:
            for command in trip:
                pipeline.execute_command(*command.arguments)
            replies: list[Any] = pipeline.execute(raise_on_error=False)
        return replies


class AsyncPublisher(Ways[Awaitable[Sent]]):
    """The same to ``await``, under asyncio and under Trio.

    A :class:`Publisher` works in a thread, so that both worlds get the same,
    and a cancelled wait breaks no connection: the event is then sent all the
    same, or fails, and nobody hears of it.
    """

    def __init__(
        self,
        url: str = URL,
        prefix: str = PREFIX,
        *,
        client: redis.Redis | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        super().__init__(prefix)
        self._publisher = Publisher(url, prefix, client=client, timeout=timeout)

    def _say(self, command: Command) -> Awaitable[Sent]:
        return _in_thread(partial(self._publisher._say, command))

    @asynccontextmanager
    async def batch(self) -> AsyncIterator[Batch]:
        """Gather events in an ``async with`` block; they are sent at its end, unless it raised."""
        batch = Batch(self._prefix)
        yield batch
        batch.sent = await _in_thread(partial(self._publisher._send, batch.commands))

    async def aclose(self) -> None:
        """Close the connections."""
        await _in_thread(self._publisher.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def _in_thread(work: Callable[[], _Result]) -> _Result:
    if current_async_library() == "trio":
        import trio  # noqa: PLC0415 - it runs already

        return await trio.to_thread.run_sync(work, abandon_on_cancel=True)
    return await asyncio.to_thread(work)


def _sent(reply: Any) -> Sent | None:
    if isinstance(reply, Exception):
        return None
    if isinstance(reply, int):
        return Sent(heard=reply)
    return Sent(entry=reply if isinstance(reply, str) else reply.decode())


def _text(error: Exception) -> str:
    return f"Redis did not take it: {error}"
