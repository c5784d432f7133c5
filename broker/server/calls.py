"""Methods that clients can ``call``: a registry, and the calls of one session."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import trio

from broker.errors import BrokerError, ErrorCode
from broker.protocol.messages import Call

if TYPE_CHECKING:
    from broker.server.session import Session

Method = Callable[["Session", Any], Awaitable[Any]]
"""Takes the calling session and ``params``; returns what JSON can say, or raises ``BrokerError``."""

CALL_TIMEOUT = 30.0
"""Seconds a method may take before the call is answered with ``timeout``."""


class Methods:
    """Name to method."""

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}

    def add(self, name: str, method: Method) -> None:
        """Register a method. A name is taken once."""
        if name in self._methods:
            raise ValueError(f"method {name!r} is registered already")
        self._methods[name] = method

    def find(self, name: str) -> Method:
        """The method, or ``not_found``."""
        method = self._methods.get(name)
        if method is None:
            raise BrokerError(ErrorCode.NOT_FOUND, f"there is no method {name!r}")
        return method


class RunningCall:
    """One call on its way; ends with one reply, whoever ends it first."""

    __slots__ = ("_method", "_scope", "code", "message")

    def __init__(self, method: Method, message: Call) -> None:
        self._method = method
        self._scope = trio.CancelScope()
        self.message = message
        self.code: ErrorCode | None = None

    def end(self, code: ErrorCode) -> None:
        """Give up: the reply will be ``code``."""
        self.code = code
        self._scope.cancel()

    async def run(self, session: Session) -> None:
        """Run to its end and answer."""
        try:
            with self._scope, trio.move_on_after(CALL_TIMEOUT):
                await trio.lowlevel.checkpoint_if_cancelled()  # it may have been given up before it began
                result = await self._method(session, self.message.params)
                if self.code is None:
                    session.answer(self.message.id, {"result": result})
                    return
            code = self.code or ErrorCode.TIMEOUT
            session.refuse(self.message.id, "call", BrokerError(code, _ENDINGS[code]))
        except BrokerError as error:
            session.refuse(self.message.id, "call", error)
        except Exception as error:  # a method is foreign code: its fault ends the call, not the session
            session.fault("call", error)
            session.refuse(self.message.id, "call", BrokerError(ErrorCode.INTERNAL, "the method failed"))
        finally:
            session.call_ended(self)


_ENDINGS = {
    ErrorCode.TIMEOUT: f"no answer within {CALL_TIMEOUT:g} s",
    ErrorCode.SUPERSEDED: "a newer call took its place",
    ErrorCode.CANCELLED: "cancelled",
}


async def _ping(session: Session, _params: Any) -> dict[str, Any]:
    return {"ts": session.context.wall()}


async def _limits(session: Session, _params: Any) -> dict[str, Any]:
    return session.limits()


def built_in() -> Methods:
    """The methods every broker has."""
    methods = Methods()
    methods.add("broker.ping", _ping)
    methods.add("broker.limits", _limits)
    return methods
