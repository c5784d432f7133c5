"""The life of one connection, from the upgrade to the close code.

:meth:`Life.read` is the reader; whatever else a connection needs (renewing the
token, joining rooms again, noticing a silent peer, loading dictionaries) are
tasks in the connection's nursery and end with it.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import trio

from broker.client import dictionaries, wire
from broker.client.backoff import Backoff
from broker.client.errors import Closed, ConnectFailed, ConnectionLost, RequestError
from broker.client.link import Link, Target
from broker.client.messages import Authenticated, Bye, Dictionary, Dicts, Welcome
from broker.client.reception import Reception
from broker.client.rooms import Room

log = logging.getLogger("broker.client")

Token = str | Callable[[], "str | Awaitable[str | None] | None"] | None
"""A token, or what fetches one; called before every connection and every renewal."""

OpenStream = Callable[[], Awaitable[trio.abc.Stream]]
"""Opens the way to the broker; raises :class:`OSError`."""

PROTOCOL_FAULT = 1007
"""Close code for a broker whose messages make no sense (RFC 6455 section 7.4.1)."""

TOKEN_EXPIRED = 4501

RENEW_AT = 0.8
"""Part of a token's lifetime after which it is renewed; leaves time for a slow identity provider."""

RENEW_AGAIN = 1.0
"""Least wait before a failed renewal is tried again (s); brokers allow about one ``auth`` a second."""

PONG_TIMEOUT = 10.0
"""How long the broker may take to answer a ping (s), as it gives us."""

CLOSE_GRACE = 2.0
"""How long the broker may take to answer our close frame (s), as it gives us."""

CACHED_DICTIONARIES = 16
"""Dictionaries kept for the next connection; a broker offers a few and replaces them rarely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What :func:`~broker.client.connect` was asked for."""

    target: Target
    open_stream: OpenStream
    token: Token
    headers: Mapping[str, str]
    zstd: bool
    dictionaries: bool
    backoff: Backoff
    timeout: float
    max_frame: int

    @property
    def renewable(self) -> bool:
        """Whether a new token can be had."""
        return callable(self.token)

    async def fetch_token(self) -> str | None:
        """The token to use now."""
        if not callable(self.token):
            return self.token
        token = self.token()
        return await token if inspect.isawaitable(token) else token


@dataclass(frozen=True, slots=True)
class Ending:
    """How a connection ended, and whether and when (s) to come back."""

    error: ConnectFailed | Closed
    final: bool = False
    retry_after: float | None = None


class Life:
    """One connection at work.

    ``cache`` keeps dictionaries between lives, by hash; ``on_welcome`` is
    called once, by the reader, when the session stands.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        reception: Reception,
        link: Link,
        nursery: trio.Nursery,
        cache: dict[str, bytes],
        on_welcome: Callable[[Life], None],
    ) -> None:
        self.link = link
        self.welcome: Welcome | None = None
        self.user: str | None = None
        self.expires: float | None = None
        self.abandoned = ""
        self._settings = settings
        self._reception = reception
        self._nursery = nursery
        self._cache = cache
        self._on_welcome = on_welcome
        self._bye: Bye | None = None
        self._offered: dict[int, Dictionary] = {}

    # ----------------------------------------------------------- the reader

    async def read(self) -> Ending:
        """Read to the end and say what it means."""
        self._nursery.start_soon(self.link.write)
        try:
            while True:
                for message in await self.link.receive():
                    await self._dispatch(message)
        except ConnectionLost:
            return self._judge()
        except (wire.WireError, msgspec.ValidationError) as error:
            log.warning("the broker sent what is no message: %s", error)
            await self.link.close(PROTOCOL_FAULT, "not a message", grace=CLOSE_GRACE)
            return Ending(Closed(PROTOCOL_FAULT, str(error)))

    async def _dispatch(self, message: dict[str, Any]) -> None:
        op = str(message.get("op"))
        if op in {"ok", "error"}:
            if not self.link.settle(message):
                self._unclaimed(message)
        elif op == "welcome" and self.welcome is None:
            self._begin(msgspec.convert(message, Welcome))
        elif op == "bye":
            self._bye = msgspec.convert(message, Bye)
        elif op == "dicts":
            self._offer(msgspec.convert(message, Dicts).dicts)
        else:
            await self._reception.take(op, message)

    def _unclaimed(self, reply: dict[str, Any]) -> None:
        """A reply that nobody waits for (any more)."""
        if reply["op"] == "error":
            log.info("the broker refused: %s", reply)
        elif "recovered" in reply and not self._reception.joined(reply.get("room")):
            # A join that was given up: we are in a room that nobody has a handle of.
            self.link.send_nowait({"op": "leave", "room": reply.get("room")})

    def _judge(self) -> Ending:
        """From the close code, and the ``bye`` before it, to what follows."""
        code, reason = self.link.close_code
        bye = self._bye
        if bye is not None:
            # The close frame may be missing (1006); what was said before counts.
            code, reason = bye.code, bye.reason or reason
        if self.welcome is None and code < 4000:
            return Ending(ConnectFailed(f"closed before the welcome: {code} {reason}".rstrip()))
        final = (
            4400 <= code < 4500
            or (bye is not None and bye.retry_after is None)
            or (code == TOKEN_EXPIRED and not self._settings.renewable)
        )
        return Ending(Closed(code, reason), final, bye.retry_after if bye is not None else None)

    # ----------------------------------------------------------- the welcome

    def _begin(self, welcome: Welcome) -> None:
        self.welcome = welcome
        self.user, self.expires = welcome.user, welcome.expires
        self.link.max_message = welcome.limits.message
        self.link.max_batch = welcome.limits.batch
        self._on_welcome(self)
        missed = self._reception.greet(welcome.rooms)
        for room in [*self._reception.rooms.values(), *missed]:
            self.resume(room, "reconnect")
        self._nursery.start_soon(self._watch, welcome.ping)
        if self._settings.renewable:
            self._nursery.start_soon(self._renew)
        self._offer(welcome.dicts)

    def resume(self, room: Room, reason: str) -> None:
        """Join a room again, in the background."""
        self._nursery.start_soon(self._resume, room, reason)

    async def _resume(self, room: Room, reason: str) -> None:
        attempt = 0
        while self._reception.holds(room):
            try:
                await self.link.request("join", room.wish(), partial(self._reception.resumed, room, reason))
                if room.state is not None:
                    await self.link.request("state", {"room": room.name, "state": room.state})
            except ConnectionLost:
                return
            except RequestError as error:
                if not error.retry:
                    log.warning("cannot return to %s: %s", room.name, error)
                    self._reception.close(room, error.code)
                    return
                pause = error.retry_after
                await trio.sleep(self._settings.backoff.delay(attempt) if pause is None else pause)
                attempt += 1
            else:
                return

    async def _watch(self, interval: float) -> None:
        """Notice a broker that fell silent: no close, no reset, just nothing."""
        while True:
            frames = self.link.frames
            await trio.sleep(interval)
            # Nor is its silence the broker's while we do not read.
            if self.link.frames != frames or self._reception.stalled:
                continue
            pong = trio.Event()
            self._nursery.start_soon(self.link.ping, pong.set)
            with trio.move_on_after(PONG_TIMEOUT):
                await pong.wait()
            if not pong.is_set() and not self._reception.stalled:
                self.abandoned = f"no pong within {PONG_TIMEOUT:g} s"
                self._nursery.cancel_scope.cancel()

    # -------------------------------------------------------------- the token

    async def _renew(self) -> None:
        while self.expires is not None:
            await trio.sleep(max(RENEW_AGAIN, RENEW_AT * (self.expires - time.time())))
            try:
                token = await self._settings.fetch_token()
                if token is None:
                    return
                await self.link.request("auth", {"token": token}, self._authenticated)
            except ConnectionLost:
                return
            except Exception as error:  # the callback is the user's, and may raise anything
                log.warning("the token was not renewed: %r", error)

    def _authenticated(self, reply: dict[str, Any]) -> None:
        answer = msgspec.convert(reply, Authenticated)
        self.user, self.expires = answer.user, answer.expires
        self._reception.grant(answer.rooms)

    # ------------------------------------------------------- the dictionaries

    def _offer(self, offered: Iterable[Dictionary]) -> None:
        self._offered.update((dictionary.id, dictionary) for dictionary in offered)
        self.load_dictionaries()

    def load_dictionaries(self) -> None:
        """Fetch those that are meant for the rooms joined by now, in the background."""
        if not self._settings.dictionaries or not self.link.compressed:
            return
        for dictionary in tuple(self._offered.values()):
            if dictionaries.wanted(dictionary, self._reception.rooms):
                del self._offered[dictionary.id]
                self._nursery.start_soon(self._load, dictionary)

    async def _load(self, dictionary: Dictionary) -> None:
        try:
            content = self._cache.get(dictionary.sha256)
            if content is None:
                content = await self._fetch(dictionary)
            self.link.decoder.add_dictionary(content, dictionary.id)
            await self.link.request("dict", {"dict": dictionary.id})
        except ConnectionLost:
            return
        except (
            OSError,
            trio.TooSlowError,
            dictionaries.DictionaryError,
            wire.WireError,
            RequestError,
        ) as error:
            log.warning("going on without dictionary %d: %r", dictionary.id, error)

    async def _fetch(self, dictionary: Dictionary) -> bytes:
        settings = self._settings
        with trio.fail_after(settings.timeout):
            stream = await settings.open_stream()
            try:
                content = await dictionaries.fetch(stream, settings.target.authority, dictionary)
            finally:
                await trio.aclose_forcefully(stream)
        while len(self._cache) >= CACHED_DICTIONARIES:
            del self._cache[next(iter(self._cache))]
        self._cache[dictionary.sha256] = content
        return content
