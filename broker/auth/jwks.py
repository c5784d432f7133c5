"""A JWK set behind a URL: fetched at the start, now and then, and when a token names an unknown key.

One task (:meth:`RemoteKeys.run`) owns every fetch and is never cancelled by a
session that goes away; whoever needs newer keys asks it and waits. So there is
one fetch in flight however many sessions come back at once, and a client that
hangs up cannot waste the fetch of the others.

``idle`` → ``fetching`` → ``idle``: after a success for :data:`REFRESH_SECONDS`,
after a failure for a growing moment, and from either at once when asked, but
not within :data:`REFETCH_SECONDS` of the last one. A fetch that fails leaves
the keys as they were; one that succeeds replaces them, so that a key the issuer
has withdrawn is gone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import structlog
import trio

from broker.auth import crypto
from broker.auth.material import FixedKeys, KeyProblem, Material
from broker.config import KIB

if TYPE_CHECKING:
    import httpx

log = structlog.get_logger(__name__)

REFETCH_SECONDS: Final = 30.0
"""Tokens with made-up key ids must not make us hammer the issuer."""

REFRESH_SECONDS: Final = 600.0
"""How long a key the issuer has withdrawn may still be believed."""

FETCH_SECONDS: Final = 10.0
"""For one fetch, from name resolution to the last byte."""

MAX_SET_BYTES: Final = 256 * KIB
"""Room for every key that is looked at, certificates included; a bound against nonsense."""


class FetchFailed(Exception):  # noqa: N818 - an outcome, caught one call up
    """The set could not be had; says why."""


class RemoteKeys:
    """The keys behind ``url`` that fit ``algorithm``. Empty until the first fetch."""

    def __init__(self, url: str, algorithm: str) -> None:
        self.url = url
        self.algorithm = algorithm
        self.fetches = 0
        """Fetches begun."""
        self.failures = 0
        """Fetches that failed in a row; 0 once one has succeeded."""
        self._keys = FixedKeys(())
        self._body = b""
        self._began: float | None = None
        self._fetching = True  # the first begins with run(); who comes earlier waits for it
        self._wanted = trio.Event()
        self._settled = trio.Event()

    def find(self, kid: str | None) -> Sequence[Material]:
        """Keys that may have signed a token naming ``kid``."""
        return self._keys.find(kid)

    @property
    def fetched(self) -> bool:
        """Whether the keys are those of the latest fetch: at least one was made, and it succeeded."""
        return self._began is not None and not self._fetching and self.failures == 0

    def retry_in(self, now: float) -> float:
        """Seconds until :meth:`refresh` is worth calling; 0: now. ``now`` is Trio's clock."""
        if self._fetching or self._began is None:
            return 0.0
        return max(0.0, self._began + REFETCH_SECONDS - now)

    async def refresh(self) -> None:
        """Wait until the set has been fetched, by joining the fetch in flight or asking for one.

        Returns at once within :data:`REFETCH_SECONDS` of the last fetch. Never
        raises and never waits for much longer than one fetch; look at
        :attr:`fetched` afterwards.
        """
        settled = self._settled
        if not self._fetching:
            if self.retry_in(trio.current_time()) > 0:
                return
            self._wanted.set()
        with trio.move_on_after(FETCH_SECONDS + 1):  # the margin lets the fetch itself time out first
            await settled.wait()

    async def run(self, changed: Callable[[], None]) -> None:
        """Fetch until cancelled. ``changed`` is called after the keys have been replaced."""
        import httpx  # noqa: PLC0415 - only for brokers that have a URL configured

        headers = {"Accept": "application/jwk-set+json, application/json", "Accept-Encoding": "identity"}
        async with httpx.AsyncClient(headers=headers, timeout=FETCH_SECONDS) as client:
            while True:
                self._fetching = True
                self._began = trio.current_time()
                self.fetches += 1
                await self._attempt(client, changed)
                self._fetching = False
                self._settled.set()
                self._settled = trio.Event()
                with trio.move_on_after(self._pause()):
                    await self._wanted.wait()
                self._wanted = trio.Event()

    def _pause(self) -> float:
        if not self.failures:
            return REFRESH_SECONDS
        return float(min(REFETCH_SECONDS, 2.0 ** min(self.failures, 10)) * random.uniform(0.5, 1))

    async def _attempt(self, client: httpx.AsyncClient, changed: Callable[[], None]) -> None:
        """One fetch; whatever goes wrong with it is logged, counted, and tried again later."""
        try:
            body = await _download(client, self.url)
            keys = FixedKeys(crypto.from_jwk_set(self.algorithm, body))
        except (FetchFailed, KeyProblem) as problem:
            self.failures += 1
            log.warning("jwks_fetch_failed", url=self.url, reason=str(problem), failures=self.failures)
            return
        self.failures = 0
        if body != self._body:
            self._body, self._keys = body, keys
            log.info("jwks_keys_replaced", url=self.url, keys=len(keys))
            changed()


async def _download(client: httpx.AsyncClient, url: str) -> bytes:
    """The body behind ``url``. Raises :class:`FetchFailed`."""
    import httpx  # noqa: PLC0415 - loaded by run() already

    body = bytearray()
    too_large = False
    try:
        with trio.move_on_after(FETCH_SECONDS) as scope:
            async with client.stream("GET", url, follow_redirects=False) as response:
                if response.status_code != 200:
                    raise FetchFailed(f"it answered {response.status_code}; redirects are not followed")
                if response.headers.get("content-encoding", "identity") != "identity":
                    # Unasked for, and a few kB of it could inflate to gigabytes.
                    raise FetchFailed("it answered with a content encoding")
                async for chunk in response.aiter_raw():
                    if len(body) + len(chunk) > MAX_SET_BYTES:
                        # Leaving the loop would abandon the generators inside httpx and httpcore (Trio
                        # warns of each); a cancellation unwinds them all, from the innermost await.
                        too_large = True
                        scope.cancel()
                    else:
                        body += chunk
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise FetchFailed(f"{type(error).__name__}: {error}") from error
    if too_large:
        raise FetchFailed(f"its answer is larger than {MAX_SET_BYTES} bytes")
    if scope.cancelled_caught:
        raise FetchFailed(f"no answer within {FETCH_SECONDS:.0f} s")
    return bytes(body)
