"""One life after another: connecting, coming back, and what waits meanwhile.

Theory. One task (:meth:`Session.run`) owns the connection of the moment. It
connects, reads to the end, decides by the close code whether to come back and
when, and begins again. What outlives a connection stands in
:class:`~broker.client.reception.Reception` (rooms, positions, streams) and here
(requests that wait for a connection); what does not, in
:class:`~broker.client.life.Life` and :class:`~broker.client.link.Link`.

Everything a message changes is changed by the reader, synchronously, before it
looks at the next message, so that a room is registered before the replay that
follows the reply to its ``join``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar

import trio
import trio_websocket

from broker.client import wire
from broker.client.errors import Closed, ConnectFailed, ConnectionLost, RequestError
from broker.client.life import CLOSE_GRACE, Ending, Life, Settings
from broker.client.link import ABNORMAL, FOREIGN, Link, upgrade
from broker.client.reception import Reception

E = TypeVar("E", bound=BaseException)

log = logging.getLogger("broker.client")

REFUSED_FOR_GOOD = frozenset({400, 401, 403, 426})
"""HTTP answers to the upgrade that are about us. Others may come from a proxy while the broker restarts."""

LONGEST_WAIT = 3600.0
"""A broker's word on when to come back is believed up to here (s)."""


class Session:
    """The reconnect loop, and requests that outlast a connection."""

    def __init__(self, settings: Settings, reception: Reception) -> None:
        self.settings = settings
        self.life: Life | None = None
        """The latest that was welcomed; it may have ended."""
        self.connected = False
        self.closed: Closed | None = None
        self.connections = 0
        self.frames = 0
        self.received_bytes = 0
        self._reception = reception
        self._dictionaries: dict[str, bytes] = {}
        self._on_change = trio.lowlevel.ParkingLot()
        self._welcomed_at = math.inf
        self._started: Callable[[], None] = lambda: None

    @property
    def awaiting(self) -> bool:
        """Whether a request waits for its reply."""
        return self.connected and self.life is not None and self.life.link.awaiting

    # ------------------------------------------------------------- requests

    async def request(
        self,
        op: str,
        fields: dict[str, Any],
        *,
        timeout: float | None = None,  # noqa: ASYNC109  # it spans reconnects
        again: bool = True,
        on_ok: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Send a message and wait for its reply, if need be for a connection first.

        ``again``: send it once more when the connection goes meanwhile; for
        what can be done twice. ``timeout`` (s) covers all of it. Raises
        :class:`RequestError`, :class:`ConnectionLost`, :class:`Closed`.
        """
        limit = self.settings.timeout if timeout is None else timeout
        with trio.move_on_after(limit):
            while True:
                link = await self._wait_connected()
                try:
                    return await link.request(op, fields, on_ok)
                except ConnectionLost:
                    if not again:
                        raise
        if not self.connected:
            raise ConnectionLost(f"not connected for {limit:g} s")
        raise RequestError("timeout", f"no reply to {op} within {limit:g} s", retry=again)

    async def _wait_connected(self) -> Link:
        while not self.connected:
            if self.closed is not None:
                raise Closed(self.closed.code, self.closed.reason)
            await self._on_change.park()
        assert self.life is not None
        return self.life.link

    # ------------------------------------------------------------- the loop

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Stay connected until told not to. Started with the first welcome; raises if there is none."""
        self._started = task_status.started
        attempt = 0
        while True:
            self._welcomed_at = math.inf
            ending = await self._live()
            if self.connections == 0:
                raise ending.error
            if self.closed is not None:
                return
            if ending.final:
                self.finish(ending.error)
                return
            if trio.current_time() - self._welcomed_at >= self.settings.backoff.stable:
                attempt = 0
            if ending.retry_after is None:
                pause = self.settings.backoff.delay(attempt)
            else:
                pause = min(ending.retry_after, LONGEST_WAIT)
            attempt += 1
            log.info("disconnected (%s), back in %.1f s", ending.error, pause)
            await trio.sleep(pause)

    def finish(self, error: Closed | ConnectFailed | None) -> None:
        """The end. ``None``: wished by this side, so that readers end without an error."""
        if self.closed is not None:
            return
        if isinstance(error, ConnectFailed):
            error = Closed(ABNORMAL, str(error))
        self.closed = error if error is not None else Closed(1000, "the client was closed")
        self._on_change.unpark_all()
        self._reception.end(error)

    async def close(self) -> None:
        """Say good-bye to the broker, and stay away."""
        self.finish(None)
        if self.connected and self.life is not None:
            await self.life.link.close(grace=CLOSE_GRACE)

    # ------------------------------------------------------- one connection

    async def _live(self) -> Ending:
        settings = self.settings
        with trio.CancelScope(deadline=trio.current_time() + settings.timeout) as opening:
            try:
                token = await settings.fetch_token()
            except Exception as error:  # the callback is the user's, and may raise anything
                if self.connections == 0:
                    raise
                log.warning("no token: %r", error)
                return Ending(ConnectFailed(f"no token: {error!r}"))
            try:
                stream = await settings.open_stream()
            except OSError as error:
                return Ending(ConnectFailed(f"{settings.target.authority}: {error}"))
            try:
                return await self._converse(stream, token, opening)
            finally:
                await trio.aclose_forcefully(stream)
        return Ending(ConnectFailed(f"{settings.target.authority}: no welcome within {settings.timeout:g} s"))

    async def _converse(
        self,
        stream: trio.abc.Stream,
        token: str | None,
        opening: trio.CancelScope,
    ) -> Ending:
        """Upgrade, read to the end, and turn whatever the libraries below raise into an ending."""
        endings: list[Ending] = []  # the first tells the cause
        life: Life | None = None

        def on_welcome(life: Life) -> None:
            opening.deadline = math.inf
            self._up(life)

        try:
            async with trio.open_nursery() as nursery:
                link = await self._upgrade(nursery, stream, token)
                life = Life(
                    settings=self.settings,
                    reception=self._reception,
                    link=link,
                    nursery=nursery,
                    cache=self._dictionaries,
                    on_welcome=on_welcome,
                )
                try:
                    endings.append(await life.read())
                finally:
                    self._down(link)
                nursery.cancel_scope.cancel()
        except* ConnectFailed as failures:
            endings.append(Ending(_first(failures)))
        except* trio_websocket.ConnectionRejected as refusals:
            endings.append(_refused(_first(refusals)))
        except* FOREIGN as broken:
            endings.append(self._broken(life, repr(_first(broken))))
        if endings:
            return endings[0]
        return self._broken(life, life.abandoned if life is not None else "")

    def _broken(self, life: Life | None, why: str) -> Ending:
        if life is None or life.welcome is None:
            return Ending(ConnectFailed(f"{self.settings.target.authority}: {why}"))
        return Ending(Closed(ABNORMAL, why))

    async def _upgrade(self, nursery: trio.Nursery, stream: trio.abc.Stream, token: str | None) -> Link:
        settings = self.settings
        headers = [(name.encode(), value.encode()) for name, value in settings.headers.items()]
        if token is not None:
            headers.append((b"Authorization", b"Bearer " + token.encode()))
        websocket = await upgrade(
            nursery,
            stream,
            settings.target,
            protocols=[wire.ZSTD_PROTOCOL, wire.JSON_PROTOCOL] if settings.zstd else [wire.JSON_PROTOCOL],
            headers=headers,
            max_frame=settings.max_frame,
        )
        return Link(websocket, wire.Decoder(settings.max_frame), self._reception.progress)

    def _up(self, life: Life) -> None:
        self.life = life
        self.connected = True
        self.connections += 1
        self._welcomed_at = trio.current_time()
        if self.connections == 1:
            self._started()
        self._on_change.unpark_all()

    def _down(self, link: Link) -> None:
        self.connected = False
        self.frames += link.frames
        self.received_bytes += link.received_bytes
        link.fail("the connection ended")
        self._on_change.unpark_all()
        self._reception.progress()


def _first(group: BaseExceptionGroup[E]) -> E:
    """One of the errors of a broken connection; the others are its consequences."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _refused(refusal: trio_websocket.ConnectionRejected) -> Ending:
    """The upgrade was answered by something else than 101."""
    status = refusal.status_code
    retry_after = dict(refusal.headers).get(b"retry-after", b"")
    return Ending(
        ConnectFailed(f"the upgrade was answered by HTTP {status}", status=status),
        final=status in REFUSED_FOR_GOOD,
        retry_after=float(retry_after) if retry_after.isdigit() else None,
    )
