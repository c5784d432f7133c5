"""What a row of the API's table is. The routes and the OpenAPI document are both made from the rows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from broker.admin.models import NoQuery
from broker.admin.node import Node
from broker.admin.statistics import Statistics
from broker.errors import ErrorCode


@dataclass(frozen=True, slots=True)
class Call:
    """One request, parsed and admitted."""

    node: Node
    statistics: Callable[[], Awaitable[Statistics]]
    """Takes a snapshot of the node."""
    document: Mapping[str, Any]
    """The OpenAPI document."""
    path: Mapping[str, str]
    query: Any
    body: Any


@dataclass(frozen=True, slots=True)
class Raw:
    """An answer that is no JSON."""

    content: bytes | str
    media: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint. ``handler`` returns what JSON can hold, or :class:`Raw`; it raises ``BrokerError``."""

    method: Literal["GET", "POST"]
    path: str
    """As OpenAPI writes it. A parameter takes the rest of the path: rooms and users may hold ``/``."""
    name: str
    summary: str
    handler: Callable[[Call], Awaitable[Any]]
    answer: Any
    """Type of the JSON answer."""
    query: type = NoQuery
    body: type | None = None
    media: str = "application/json"
    errors: tuple[ErrorCode, ...] = ()
    """Codes it refuses with, beyond those that any request may meet."""
    open: bool = False
    """Answered without a token, and even when the port is busy: never waits, tells no details."""
