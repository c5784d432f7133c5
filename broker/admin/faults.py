"""How a refusal looks on the operators' port: one map from our error codes to HTTP statuses.

The body is always ``{"code", "message"}`` with a code of
:class:`~broker.errors.ErrorCode`; ``docs/admin.md`` tells the same table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import msgspec

from broker.errors import BrokerError, ErrorCode

STATUS: Final[Mapping[ErrorCode, int]] = {
    ErrorCode.BAD_MESSAGE: 400,
    ErrorCode.BAD_ROOM: 400,
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.UNKNOWN_OP: 405,
    ErrorCode.NOT_JOINED: 409,
    ErrorCode.LIMIT_EXCEEDED: 409,
    ErrorCode.CONFLICT: 409,
    ErrorCode.SUPERSEDED: 409,
    ErrorCode.CANCELLED: 409,
    ErrorCode.TOO_LARGE: 413,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.INTERNAL: 500,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.TIMEOUT: 504,
}
"""``limit_exceeded`` is 409: the node is full, and waiting alone mends nothing."""


class Problem(msgspec.Struct, frozen=True):
    """The body of every answer that is no success."""

    code: ErrorCode
    message: str


class HttpError(BrokerError):
    """A refusal that only HTTP knows: a status and headers of its own, with the nearest code."""

    def __init__(
        self, status: int, code: ErrorCode, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(code, message)
        self.status = status
        self.headers = dict(headers or {})


def describe(error: BrokerError) -> tuple[int, dict[str, str], Problem]:
    """Status, headers and body that tell ``error``."""
    headers: dict[str, str] = {}
    if isinstance(error, HttpError):
        status, headers = error.status, dict(error.headers)
    else:
        status = STATUS[error.code]
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"  # RFC 9110 section 11.6.1: a 401 must name a scheme
    if error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    return status, headers, Problem(error.code, error.message)
