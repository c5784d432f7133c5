"""The ASGI application: one ladder that every request climbs, then its handler.

1. who is asking (:mod:`broker.admin.access`); 2. the route (Starlette); 3. a
deadline; 4. a place among those who run at once; 5. the query; 6. the body,
bounded and typed; 7. the handler. Whatever is refused or fails on the way is
answered by :meth:`Web._refuse`, so that every answer has one shape, and
nothing raises into the server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
import structlog
import trio
from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from broker.admin import openapi
from broker.admin.access import Access
from broker.admin.api import OPERATIONS
from broker.admin.faults import HttpError, describe
from broker.admin.node import Node
from broker.admin.operations import Call, Operation, Raw
from broker.admin.statistics import Statistics, read_process, statistics
from broker.auth.failures import FailureDelay
from broker.errors import BrokerError, ErrorCode

log = structlog.get_logger(__name__)

REQUEST_SECONDS: Final = 10.0
"""Longest time from a request's head to the start of its answer, its body included."""
BODY_BYTES: Final = 256 * 1024
CONCURRENT: Final = 16
"""Requests that run at once; further ones are told to come again."""

_HEADERS: Final = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


class Web:
    """The application of one node."""

    def __init__(self, node: Node, operations: Sequence[Operation] = OPERATIONS) -> None:
        self._node = node
        self._access = Access(node.context.config.admin)
        self._failures = FailureDelay()
        self._document = openapi.document(operations)
        self._open = {operation.path for operation in operations if operation.open}
        self._starlette = Starlette(
            routes=[_route(operation, self._endpoint(operation)) for operation in operations],
            exception_handlers={HTTPException: self._unrouted},
        )
        self._starlette.router.redirect_slashes = False
        self._running = 0
        self.connections = 0
        """Open connections, counted by the server."""
        self.requests = 0
        self.refused = 0
        """Requests answered with an error of theirs (4xx)."""
        self.faults = 0
        """Faults of ours: in handlers, and contained in connections."""
        self.restarts = 0

    def counters(self) -> dict[str, int]:
        """What this port says of itself."""
        return {
            "connections": self.connections,
            "requests": self.requests,
            "refused": self.refused,
            "faults": self.faults,
            "restarts": self.restarts,
        }

    # -- the ladder -------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # answered 403 before any handshake
            return
        self.requests += 1
        if scope["path"] not in self._open:
            try:
                await self._admit(scope)
            except BrokerError as error:
                await self._refuse(error)(scope, receive, send)
                return
        await self._starlette(scope, receive, send)

    async def _admit(self, scope: Scope) -> None:
        peer = scope["client"][0] if scope["client"] else None
        try:
            self._access.check(scope["headers"], peer)
        except BrokerError:
            tried = any(name == b"authorization" for name, _ in scope["headers"])
            if tried:
                # Guessing gets slower and slower; whoever has the token never waits.
                await trio.sleep(self._failures.failed(peer or "", trio.current_time()))
            raise

    def _endpoint(self, operation: Operation) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                with trio.fail_after(REQUEST_SECONDS):
                    async with self._place(operation):
                        return await self._run(operation, request)
            except BrokerError as error:
                return self._refuse(error)
            except trio.TooSlowError:
                problem = f"no answer within {REQUEST_SECONDS:g} s; what was asked for may still happen"
                return self._refuse(BrokerError(ErrorCode.TIMEOUT, problem))
            except Exception:  # ours: it is told, counted, logged, and ends nothing
                self.faults += 1
                log.exception("fault in the operators' port", operation=operation.name)
                return self._refuse(BrokerError(ErrorCode.INTERNAL, "a fault of the server; see its log"))

        return endpoint

    @asynccontextmanager
    async def _place(self, operation: Operation) -> AsyncIterator[None]:
        """One of the places for requests that run at once; what is always open needs none."""
        if operation.open:
            yield
            return
        if self._running >= CONCURRENT:
            raise BrokerError(ErrorCode.UNAVAILABLE, "busy with other requests", retry_after=1)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    async def _run(self, operation: Operation, request: Request) -> Response:
        call = Call(
            node=self._node,
            statistics=self._statistics,
            document=self._document,
            path={name: str(value) for name, value in request.path_params.items()},
            query=read_query(request.query_params, operation.query),
            body=await read_body(request, operation.body) if operation.body is not None else None,
        )
        answer = await operation.handler(call)
        if isinstance(answer, Raw):
            return Response(answer.content, 200, {**_HEADERS, **answer.headers}, answer.media)
        return Response(msgspec.json.encode(answer), 200, _HEADERS, "application/json")

    async def _statistics(self) -> Statistics:
        process = await trio.to_thread.run_sync(read_process)
        return statistics(self._node, process, self.counters())

    # -- refusals -----------------------------------------------------------------------

    def _refuse(self, error: BrokerError) -> Response:
        status, headers, problem = describe(error)
        self.refused += status < 500
        return Response(msgspec.json.encode(problem), status, {**_HEADERS, **headers}, "application/json")

    async def _unrouted(self, _request: Request, error: Exception) -> Response:
        """What Starlette's router turns away: no such path, or not that method."""
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            return self._refuse(BrokerError(ErrorCode.NOT_FOUND, "there is nothing here; see /openapi.json"))
        problem = "this path does not take that method"
        return self._refuse(HttpError(error.status_code, ErrorCode.UNKNOWN_OP, problem, error.headers))


def _route(operation: Operation, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
    path = openapi.PARAMETER.sub(r"{\1:path}", operation.path)
    return Route(path, endpoint, methods=[operation.method], name=operation.name)


def read_query(given: QueryParams, kind: type) -> Any:
    """The query as its type has it. Raises ``bad_message``, naming the field."""
    fields: Mapping[str, str] = dict(given)
    if len(fields) != len(given.multi_items()):
        raise BrokerError(ErrorCode.BAD_MESSAGE, "a query parameter is given twice")
    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        raise BrokerError(ErrorCode.BAD_MESSAGE, f"query: {error}") from None


async def read_body(request: Request, kind: type) -> Any:
    """The body as its type has it.

    Raises ``bad_message`` (415 for another content type), ``too_large``.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise HttpError(415, ErrorCode.BAD_MESSAGE, "send the body with Content-Type: application/json")
    payload = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise BrokerError(ErrorCode.BAD_MESSAGE, "the client left before its body had ended")
        payload += message.get("body", b"")
        if len(payload) > BODY_BYTES:
            raise BrokerError(ErrorCode.TOO_LARGE, f"a body may have {BODY_BYTES} bytes")
        if not message.get("more_body", False):
            break
    try:
        return msgspec.json.decode(payload, type=kind)
    except msgspec.ValidationError as error:
        raise BrokerError(ErrorCode.BAD_MESSAGE, str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BrokerError(ErrorCode.BAD_MESSAGE, f"not JSON: {error}") from None
