"""What can go wrong at the client, by whose fault it is.

:class:`ConnectFailed` and :class:`Closed` are about the connection,
:class:`RequestError` about one message, :class:`RoomClosed` about one room.
"""

from __future__ import annotations


class ClientError(Exception):
    """Base of everything that the client raises on its own account."""


class ConnectFailed(ClientError):  # noqa: N818  # says what happened, as trio and h11 name theirs
    """No session came about: unreachable, not a broker, or the upgrade was refused.

    ``status`` is the HTTP status, where it came that far.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ConnectionLost(ClientError):  # noqa: N818
    """The connection went while the request was under way, so nobody knows whether it was carried out.

    The client is reconnecting; the caller decides whether to ask again.
    """


class Closed(ClientError):  # noqa: N818
    """The client is closed and does not come back.

    ``code`` and ``reason`` are those of the close frame: 44xx when the broker
    refused for good, 4501 when a fixed token expired, 1000 when the
    ``async with`` block was left.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}".rstrip())
        self.code = code
        self.reason = reason


class RequestError(ClientError):
    """The broker refused one message; ``code`` is from the catalogue in ``docs/errors.md``.

    ``retry``: the same message may succeed later, after ``retry_after`` seconds if given.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retry: bool = False,
        retry_after: float | None = None,
        room: str | None = None,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry = retry
        self.retry_after = retry_after
        self.room = room


class RoomClosed(ClientError):  # noqa: N818
    """The room was taken away (permission, administrator), or could not be joined again."""

    def __init__(self, room: str, code: str) -> None:
        super().__init__(f"{room}: {code}")
        self.room = room
        self.code = code
