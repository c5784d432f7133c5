"""The client as its users see it: :func:`connect` and the verbs of the protocol."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import msgspec
import trio

from broker.client.backoff import Backoff
from broker.client.errors import Closed, ConnectionLost
from broker.client.life import OpenStream, Settings, Token
from broker.client.link import Target
from broker.client.messages import History, Members, Place, Position, Tags, Welcome, read_history
from broker.client.reception import Reception
from broker.client.rooms import Room, Stream
from broker.client.session import Session

BUFFER = 1000
"""Items kept per stream before the client stops reading."""

TIMEOUT = 10.0
"""How long a request, or a new session, may take (s)."""

MAX_FRAME = 16 * 1024 * 1024
"""Largest frame accepted, also after zstd (bytes); a broker cuts its batches far below."""


@dataclass(frozen=True, slots=True)
class ClientStatistics:
    """Counts since :func:`connect`, and what is the case now.

    ``frames`` and ``received_bytes`` (as they came over the wire) are those of
    ended connections and the present one. ``stalled``: a full stream holds the
    reader back.
    """

    connections: int
    frames: int
    received_bytes: int
    events: int
    waiting_items: int
    stalled: bool


class Client:
    """A session with the broker that comes back by itself; made by :func:`connect`.

    Every request waits for its reply, and for a connection if there is none, at
    most ``timeout`` seconds in all. It raises
    :class:`~broker.client.RequestError` when the broker refuses,
    :class:`~broker.client.ConnectionLost` when nobody can know whether it was
    carried out, and :class:`~broker.client.Closed` when the client is.
    Requests that may be carried out twice are sent again after a reconnect.
    """

    def __init__(self, settings: Settings, buffer: int) -> None:
        self._buffer = buffer
        self._reception = Reception(
            self, buffer, awaiting=lambda: self._session.awaiting, resume=self._resume
        )
        self._session = Session(settings, self._reception)

    # ------------------------------------------------------------ what it is

    @property
    def state(self) -> Literal["connecting", "connected", "closed"]:
        """Where the client stands now."""
        if self._session.closed is not None:
            return "closed"
        return "connected" if self._session.connected else "connecting"

    @property
    def closed(self) -> Closed | None:
        """Why the client does not come back, once that is so."""
        return self._session.closed

    @property
    def welcome(self) -> Welcome:
        """The broker's greeting to the latest session."""
        life = self._session.life
        assert life is not None, "connect() returns after the first welcome"
        assert life.welcome is not None
        return life.welcome

    @property
    def session(self) -> str:
        """Id of the latest session; a reconnect begins a new one."""
        return self.welcome.session

    @property
    def user(self) -> str | None:
        """Whom the token names; ``None`` while anonymous."""
        return self._session.life.user if self._session.life is not None else None

    @property
    def rooms(self) -> Mapping[str, Room]:
        """The rooms joined by :meth:`join`, by name."""
        return dict(self._reception.rooms)

    def statistics(self) -> ClientStatistics:
        """What happened so far."""
        session, reception = self._session, self._reception
        link = session.life.link if session.connected and session.life is not None else None
        return ClientStatistics(
            connections=session.connections,
            frames=session.frames + (link.frames if link is not None else 0),
            received_bytes=session.received_bytes + (link.received_bytes if link is not None else 0),
            events=reception.events,
            waiting_items=reception.waiting_items,
            stalled=reception.stalled,
        )

    # ---------------------------------------------------------------- rooms

    async def join(
        self,
        room: str,
        *,
        since: Position | None = None,
        tail: int | None = None,
        filter: Any = None,  # noqa: A002  # the protocol's word
        presence: bool = False,
        buffer: int | None = None,
    ) -> Room:
        """Join ``room`` and stay in it: after a reconnect it is joined again where it stood.

        ``since``: continue after that position; ``room.recovered`` says whether
        nothing is missing. ``tail``: the last n events come first (with
        ``since``: only when that failed). ``filter``: an expression over tags.
        ``presence``: keep ``room.members``, and receive changes as items.
        ``buffer``: items kept for the reader, instead of the client's; 0 for a
        room that is never iterated. A second join of a room ends the first
        one's iterators.
        """
        joined = Room(
            room,
            self,
            self._buffer if buffer is None else buffer,
            self._reception.progress,
            tail=tail,
            filter=filter,
            presence=presence,
            since=since,
        )
        await self.request("join", joined.wish(), on_ok=partial(self._reception.register, joined))
        if self._session.connected and self._session.life is not None:
            self._session.life.load_dictionaries()
        return joined

    async def leave(self, room: Room) -> None:
        """What :meth:`Room.leave` does."""
        was_held = self._reception.holds(room)
        self._reception.forget(room)
        if was_held and self._session.connected and self._session.life is not None:
            try:
                await self._session.life.link.request("leave", {"room": room.name})
            except ConnectionLost:
                pass  # the next session is not in the room either

    def events(self) -> Stream:
        """Everything received from now on, of all rooms, also those that the broker joined for this session.

        Rooms that nobody iterates keep nothing while such a stream is open. It
        takes items as long as somebody holds it; ``with client.events() as
        stream`` ends it for certain.
        """
        if self._session.closed is not None:
            raise Closed(self._session.closed.code, self._session.closed.reason)
        return self._reception.stream()

    def _resume(self, room: Room, reason: str) -> None:
        assert self._session.life is not None
        self._session.life.resume(room, reason)

    # ---------------------------------------------------------------- verbs

    async def publish(
        self,
        room: str,
        event: str,
        data: Any = None,
        *,
        key: str | None = None,
        slot: str | None = None,
        tags: Tags | None = None,
        echo: bool = True,
        timeout: float | None = None,  # noqa: ASYNC109  # it spans reconnects
    ) -> Position | None:
        """Publish, and return the position where the room keeps history.

        ``key`` makes it idempotent (rooms with history, 5 minutes): it is sent
        again after a reconnect and stored once. Without it, or for an
        anonymous client, whose keys are forgotten with the session, a
        connection that breaks meanwhile raises ``ConnectionLost``.
        """
        fields: dict[str, Any] = {"room": room, "event": event, "data": data}
        optional = {"key": key, "slot": slot, "tags": tags, "echo": None if echo else False}
        fields.update((name, value) for name, value in optional.items() if value is not None)
        again = key is not None and self.user is not None and not self._ephemeral(room)
        reply = await self.request("publish", fields, timeout=timeout, again=again)
        return msgspec.convert(reply, Place).position

    def _ephemeral(self, name: str) -> bool:
        """Whether the room is known to keep no history, so that it knows no keys either."""
        room = self._reception.rooms.get(name)
        return room is not None and room.position is None

    async def history(
        self,
        room: str,
        *,
        since: Position | None = None,
        before: int | None = None,
        at: float | None = None,
        limit: int = 100,
    ) -> History:
        """Read the past: after a position, before an offset, or from a time (Unix seconds) on."""
        fields: dict[str, Any] = {"room": room, "limit": limit}
        where = {"since": since and since._asdict(), "before": before, "at": at}
        fields.update((name, value) for name, value in where.items() if value is not None)
        return read_history(await self.request("history", fields))

    async def presence(self, room: str) -> Members:
        """Who is in ``room``."""
        return msgspec.convert(await self.request("presence", {"room": room}), Members)

    async def set_state(self, room: str, state: Mapping[str, Any]) -> None:
        """Set the own presence state (at most 2 KiB) in ``room``; set again after a reconnect if joined."""
        await self.request("state", {"room": room, "state": state})
        joined = self._reception.rooms.get(room)
        if joined is not None:
            joined.state = state

    async def ack(self, room: str, offset: int) -> None:
        """Everything up to ``offset`` was seen."""
        await self.request("ack", {"room": room, "offset": offset})

    async def call(
        self,
        method: str,
        params: Any = None,
        *,
        supersede: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  # it spans reconnects
    ) -> Any:
        """Call a method and return its result.

        A later call with the same ``supersede`` ends this one with the code
        ``superseded``. Cancelling the call cancels it at the broker too. Never
        sent twice.
        """
        fields: dict[str, Any] = {"method": method, "params": params}
        if supersede is not None:
            fields["supersede"] = supersede
        return (await self.request("call", fields, timeout=timeout, again=False)).get("result")

    async def ping(self) -> float:
        """The broker's clock (Unix seconds), by way of the session."""
        return msgspec.convert((await self.request("ping", {})).get("ts"), float)

    async def request(
        self,
        op: str,
        fields: dict[str, Any],
        *,
        timeout: float | None = None,  # noqa: ASYNC109  # it spans reconnects
        again: bool = True,
        on_ok: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Send any message and return the reply, for operations that have no method here.

        ``again``: send it once more if the connection breaks meanwhile.
        ``on_ok`` is called with the reply before any later message is looked at.
        """
        return await self._session.request(op, fields, timeout=timeout, again=again, on_ok=on_ok)


@asynccontextmanager
async def connect(
    url: str,
    *,
    token: Token = None,
    zstd: bool = True,
    dictionaries: bool = False,
    backoff: Backoff | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT,  # noqa: ASYNC109  # of each request, not of this call
    buffer: int = BUFFER,
    max_frame: int = MAX_FRAME,
    ssl_context: ssl.SSLContext | None = None,
    open_stream: OpenStream | None = None,
) -> AsyncIterator[Client]:
    """Connect to a broker, and stay connected while the ``async with`` block lasts.

    The block is entered when the first session stands. From then on the client
    comes back by itself, until the block is left or the broker refuses for good.

    ``token``: a JWT, or a function, sync or async, that fetches one; it is
    called before each connection and at 80 % of each token's lifetime.
    ``zstd``: let the broker compress. ``dictionaries``: load its zstd
    dictionaries too. ``backoff``: how to wait between attempts. ``headers``: of
    the upgrade. ``timeout`` (s) for requests and for each attempt. ``buffer``:
    items per stream before the client stops reading. ``max_frame`` (bytes).
    ``open_stream``: another way to the host than TCP or TLS.

    Raises :class:`~broker.client.ConnectFailed` or
    :class:`~broker.client.Closed` if the first attempt fails, and what the
    token function raises then.
    """
    target = Target.parse(url, ssl_context)
    settings = Settings(
        target=target,
        open_stream=open_stream or target.open,
        token=token,
        headers=headers or {},
        zstd=zstd,
        dictionaries=dictionaries,
        backoff=backoff or Backoff(),
        timeout=timeout,
        max_frame=max_frame,
    )
    client = Client(settings, buffer)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(client._session.run)
            try:
                yield client
            finally:
                try:
                    await client._session.close()
                finally:
                    nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # An error of the caller's block comes out as it went in, not wrapped by
        # a nursery that is no business of theirs.
        if len(group.exceptions) != 1:
            raise
        error = group.exceptions[0]
    else:
        return
    raise error
