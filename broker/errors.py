"""One catalogue of what can go wrong, as clients, backends and operators see it.

Two vocabularies and no third: an :class:`ErrorCode` answers one message and the
session goes on; a :class:`CloseCode` ends the session. Everything that refuses
something raises :class:`BrokerError` with a code from here, so that each
refusal is documented, counted under its code, and told with one sentence a
person can act on. ``docs/errors.md`` is this file in prose.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum


class ErrorCode(StrEnum):
    """Why one message was refused (``{"op": "error", "code": …}``)."""

    BAD_MESSAGE = "bad_message"
    UNKNOWN_OP = "unknown_op"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    BAD_ROOM = "bad_room"
    NOT_JOINED = "not_joined"
    NOT_FOUND = "not_found"
    TOO_LARGE = "too_large"
    RATE_LIMITED = "rate_limited"
    LIMIT_EXCEEDED = "limit_exceeded"
    CONFLICT = "conflict"
    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"
    SUPERSEDED = "superseded"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


RETRYABLE = frozenset({ErrorCode.RATE_LIMITED, ErrorCode.UNAVAILABLE, ErrorCode.TIMEOUT, ErrorCode.INTERNAL})
"""Codes after which the same message may succeed later (``"retry": true``)."""


class CloseCode(IntEnum):
    """Why a connection ended (RFC 6455 section 7.4, and our own ranges).

    4400-4499 are final: the client must not come back with the same
    credentials. 4500-4599 ask it to come back after ``retry_after``.
    """

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    INVALID_DATA = 1007
    POLICY = 1008
    TOO_BIG = 1009
    INTERNAL = 1011
    TOKEN_REFUSED = 4401
    FORBIDDEN = 4403
    NEVER_AUTHENTICATED = 4408
    TOKEN_EXPIRED = 4501
    DRAINING = 4503
    SLOW_CONSUMER = 4508
    NO_PONG = 4509
    SESSION_LIMIT = 4512
    TOO_MANY_MESSAGES = 4529

    @property
    def final(self) -> bool:
        """Whether the client must not reconnect (``bye`` says ``retry_after: null``)."""
        return 4400 <= self < 4500


class BrokerError(Exception):
    """A refusal with a documented code.

    ``room`` and ``retry_after`` (seconds) are told to the client where given.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        room: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.room = room
        self.retry_after = retry_after

    @property
    def retry(self) -> bool:
        """Whether the same message may succeed later."""
        return self.code in RETRYABLE


class ConfigurationError(Exception):
    """Bad configuration: where it stands, which key, what is wrong, how to mend it.

    ``str()`` of it is the whole sentence for a person; the command line prints
    it and exits with 2.
    """

    def __init__(self, source: str, key: str, problem: str, mend: str) -> None:
        super().__init__(f"{source}: {key}: {problem}; {mend}")
        self.source = source
        self.key = key
        self.problem = problem
        self.mend = mend
