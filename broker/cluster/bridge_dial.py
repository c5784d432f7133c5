"""Opening connections: redis-py knows the handshakes, we take over what it has opened."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import trio_asyncio
from redis.asyncio import connection as redis_connection
from redis.exceptions import RedisError

from broker.cluster.bridge_connection import Connection
from broker.cluster.link import LinkDown

_Taken = TypeVar("_Taken", bound=Connection)


class Dialer:
    """Opens connections to one server; ``options`` are those of redis-py's connection class."""

    def __init__(self, url: str, connect_timeout: float) -> None:
        options: dict[str, Any] = dict(redis_connection.parse_url(url))
        self._class = options.pop("connection_class", redis_connection.Connection)
        # RESP2: in RESP3 pub/sub messages may stand between the answers of commands, and
        # the lanes gain nothing by it. Retries stay off: one would repeat a write.
        self._options = options | {
            "socket_connect_timeout": connect_timeout,
            "socket_timeout": connect_timeout,
            "protocol": 2,
            "driver_info": None,
        }
        self._timeout = connect_timeout

    async def open(self, connection: Connection) -> None:
        """Connect, authenticate, and hand over to ``connection``. Raises :class:`LinkDown`."""
        opener = self._class(**self._options)
        try:
            writer = await trio_asyncio.aio_as_trio(self._open)(opener)
        except (TimeoutError, RedisError, OSError) as error:
            raise LinkDown(str(error) or type(error).__name__) from error
        connection.attach(writer)

    async def _open(self, opener: Any) -> asyncio.StreamWriter:
        try:
            async with asyncio.timeout(self._timeout):
                await opener.connect()
        except BaseException:
            opener._close()
            raise
        writer: asyncio.StreamWriter = opener._writer
        opener._writer = opener._reader = None
        return writer
