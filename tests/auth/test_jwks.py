"""Rotation and floods against a real HTTP server on loopback; time is Trio's mock clock, moved by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing

from broker.auth.jwks import FETCH_SECONDS, MAX_SET_BYTES, REFETCH_SECONDS, REFRESH_SECONDS, RemoteKeys
from broker.auth.tokens import KeysUnavailable, TokenRefused, TokenVerifier
from broker.config import Auth, Key
from broker.errors import ErrorCode
from tests.auth.keypairs import NOW, SECRET, jwk, jwk_set, token


class Issuer:
    """An HTTP server with a key set; counts requests and can be told to misbehave."""

    def __init__(self) -> None:
        self.status = "200 OK"
        self.headers = ""
        self.body = jwk_set(jwk("RS256", "one"))
        self.tells_length = True
        self.requests = 0
        self.gate = trio.Event()
        self.gate.set()
        self.asked = trio.Event()
        self.url = ""

    async def serve(self, stream: trio.SocketStream) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            data = await stream.receive_some()
            if not data:
                return
            request += data
        self.requests += 1
        self.asked.set()
        await self.gate.wait()
        length = f"Content-Length: {len(self.body)}\r\n" if self.tells_length else ""
        head = f"HTTP/1.1 {self.status}\r\n{length}Connection: close\r\n"
        try:
            await stream.send_all(f"{head}{self.headers}\r\n".encode() + self.body)
        except trio.BrokenResourceError:
            pass  # the broker hangs up on what is too large


@asynccontextmanager
async def running(*more: Key) -> AsyncIterator[tuple[Issuer, TokenVerifier]]:
    """An issuer and a verifier that trusts it; everything is stopped at the end."""
    issuer = Issuer()
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(partial(trio.serve_listeners, issuer.serve, [listener]))
        issuer.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/jwks"
        keys = (Key(algorithm="RS256", jwks=issuer.url), *more)
        verify = TokenVerifier(Auth(keys=keys), dev=False, wall_clock=lambda: NOW)
        nursery.start_soon(verify.run)
        yield issuer, verify
        nursery.cancel_scope.cancel()


def signed(kid: str | None, number: int = 0) -> str:
    return token(None, algorithm="RS256", number=number, **({} if kid is None else {"kid": kid}))


async def outcome(verify: Callable[[str], Awaitable[object]], text: str) -> type[Exception] | None:
    try:
        await verify(text)
    except (TokenRefused, KeysUnavailable) as error:
        return type(error)
    return None


async def test_the_first_token_waits_for_the_first_fetch(mock_clock: trio.testing.MockClock) -> None:
    async with running() as (issuer, verify):
        assert verify.verify_nowait(signed("one")) is None
        assert (await verify.verify(signed("one"))).user == "42"
        assert verify.verify_nowait(signed("one")) is not None
        assert issuer.requests == 1


async def test_rotation(mock_clock: trio.testing.MockClock) -> None:
    async with running() as (issuer, verify):
        await verify.verify(signed("one"))
        issuer.body = jwk_set(jwk("RS256", "one"), jwk("RS256", "two", 1))
        mock_clock.jump(REFETCH_SECONDS)
        assert (await verify.verify(signed("two", 1))).user == "42"
        assert (await verify.verify(signed("one"))).user == "42"  # both are in the newest set
        assert issuer.requests == 2
        issuer.body = jwk_set(jwk("RS256", "two", 1))
        mock_clock.jump(REFETCH_SECONDS)
        with pytest.raises(TokenRefused, match="'three'"):
            await verify.verify(signed("three", 2))
        # The withdrawn key is gone, and so is the memory of the tokens it signed.
        mock_clock.jump(REFETCH_SECONDS)
        with pytest.raises(TokenRefused, match="'one'"):
            await verify.verify(signed("one"))
        assert (await verify.verify(signed("two", 1))).user == "42"


async def test_a_flood_of_unknown_keys_is_one_fetch_per_window(mock_clock: trio.testing.MockClock) -> None:
    async with running() as (issuer, verify):
        await verify.verify(signed("one"))
        for window in range(3):
            mock_clock.jump(REFETCH_SECONDS)
            found: list[type[Exception] | None] = []

            async def client(text: str, found: list[type[Exception] | None] = found) -> None:
                found.append(await outcome(verify.verify, text))

            async with trio.open_nursery() as nursery:
                for number in range(50):
                    nursery.start_soon(client, signed(f"made-up-{window}-{number}"))
            assert found == [TokenRefused] * 50
            assert issuer.requests == 2 + window
            with pytest.raises(KeysUnavailable) as caught:
                verify.verify_nowait(signed("another"))
            assert caught.value.code is ErrorCode.UNAVAILABLE
            assert caught.value.retry
            assert caught.value.retry_after == REFETCH_SECONDS
            assert (await verify.verify(signed("one"))).user == "42"
        assert issuer.requests == 4


async def test_a_client_that_hangs_up_does_not_waste_the_fetch(mock_clock: trio.testing.MockClock) -> None:
    async with running() as (issuer, verify):
        await verify.verify(signed("one"))
        issuer.body = jwk_set(jwk("RS256", "two", 1))
        mock_clock.jump(REFETCH_SECONDS)
        issuer.gate, issuer.asked = trio.Event(), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(verify.verify, signed("made-up"))
            await issuer.asked.wait()
            nursery.cancel_scope.cancel()
        assert verify.verify_nowait(signed("two", 1)) is None
        issuer.gate.set()
        assert (await verify.verify(signed("two", 1))).user == "42"
        assert issuer.requests == 2


async def test_an_issuer_that_is_down_at_the_start_is_tried_again(mock_clock: trio.testing.MockClock) -> None:
    async with running(Key(algorithm="HS256", secret=SECRET)) as (issuer, verify):
        issuer.status = "503 Busy"
        with pytest.raises(KeysUnavailable):
            await verify.verify(signed("one"))
        assert (await verify.verify(token())).user == "42"  # other keys are not concerned
        assert verify.statistics().key_fetch_failures == 1
        issuer.status = "200 OK"
        issuer.asked = trio.Event()
        mock_clock.jump(REFETCH_SECONDS)
        await issuer.asked.wait()
        assert (await verify.verify(signed("one"))).user == "42"
        assert verify.statistics().key_fetch_failures == 0


async def test_keys_outlive_an_issuer_that_is_down(mock_clock: trio.testing.MockClock) -> None:
    async with running() as (issuer, verify):
        await verify.verify(signed("one"))
        issuer.status = "500 Oops"
        mock_clock.jump(REFETCH_SECONDS)
        with pytest.raises(KeysUnavailable) as caught:
            await verify.verify(signed("two", 1))
        assert caught.value.retry_after == REFETCH_SECONDS
        assert (await verify.verify(signed("one"))).user == "42"


async def test_withdrawn_keys_are_noticed_without_being_asked(mock_clock: trio.testing.MockClock) -> None:
    async with running() as (issuer, verify):
        await verify.verify(signed("one"))
        issuer.body = jwk_set(jwk("RS256", "two", 1))
        issuer.asked = trio.Event()
        mock_clock.jump(REFRESH_SECONDS)
        await issuer.asked.wait()
        assert (await verify.verify(signed("two", 1))).user == "42"  # joins the fetch in flight
        assert verify.statistics().identities == 1
        assert issuer.requests == 2


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        ("302 Found", "Location: /jwks\r\n", None),
        ("404 Not Found", "", None),
        ("200 OK", "Content-Encoding: gzip\r\n", None),
        ("200 OK", "", b"x" * (MAX_SET_BYTES + 1)),
        ("200 OK", "", b"<html>"),
        ("200 OK", "", b"[]"),
        ("200 OK", "", jwk_set()),
        ("200 OK", "", jwk_set(jwk("ES256", "one"))),
        ("999999 what", "", None),
    ],
)
async def test_an_answer_that_is_no_key_set_is_a_failed_fetch(
    mock_clock: trio.testing.MockClock, status: str, headers: str, body: bytes | None
) -> None:
    async with running() as (issuer, verify):
        issuer.status, issuer.headers = status, headers
        issuer.body = issuer.body if body is None else body
        with pytest.raises(KeysUnavailable):
            await verify.verify(signed("one"))
        assert issuer.requests == 1
        assert verify.statistics().key_fetch_failures == 1


@pytest.mark.parametrize("tells_length", [True, False])
@pytest.mark.parametrize(("more", "good"), [(0, True), (1, False), (4 * MAX_SET_BYTES, False)])
async def test_the_limit_of_an_answer_is_exact(
    mock_clock: trio.testing.MockClock, more: int, good: bool, tells_length: bool
) -> None:
    async with running() as (issuer, verify):
        issuer.tells_length = tells_length
        issuer.body = issuer.body.ljust(MAX_SET_BYTES + more)
        assert await outcome(verify.verify, signed("one")) is (None if good else KeysUnavailable)


async def test_an_issuer_that_never_answers_is_given_up(mock_clock: trio.testing.MockClock) -> None:
    async with running() as (issuer, verify):
        issuer.gate = trio.Event()
        found: list[type[Exception] | None] = []

        async def client() -> None:
            found.append(await outcome(verify.verify, signed("one")))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(client)
            await issuer.asked.wait()
            mock_clock.jump(FETCH_SECONDS)
        assert found == [KeysUnavailable]


async def test_a_port_where_nobody_listens_is_a_failed_fetch(mock_clock: trio.testing.MockClock) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    auth = Auth(keys=(Key(algorithm="RS256", jwks=f"http://127.0.0.1:{port}/"),))
    verify = TokenVerifier(auth, dev=False, wall_clock=lambda: NOW)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(verify.run)
        with pytest.raises(KeysUnavailable):
            await verify.verify(signed("one"))
        nursery.cancel_scope.cancel()


async def test_without_its_task_a_key_set_is_unavailable_and_nothing_hangs(
    autojump_clock: trio.testing.MockClock,
) -> None:
    auth = Auth(keys=(Key(algorithm="RS256", jwks="http://127.0.0.1:1/"),))
    verify = TokenVerifier(auth, dev=False, wall_clock=lambda: NOW)
    with pytest.raises(KeysUnavailable):
        await verify.verify(signed("one"))


async def test_asking_again_within_the_window_returns_at_once(mock_clock: trio.testing.MockClock) -> None:
    async with running() as (issuer, verify), trio.open_nursery() as nursery:
        await verify.verify(signed("one"))
        remote = RemoteKeys(issuer.url, "RS256")
        nursery.start_soon(remote.run, lambda: None)
        await remote.refresh()
        assert remote.fetched
        assert remote.retry_in(trio.current_time()) == REFETCH_SECONDS
        await remote.refresh()
        assert remote.fetches == 1
        mock_clock.jump(REFETCH_SECONDS)
        await remote.refresh()
        assert remote.fetches == 2
        nursery.cancel_scope.cancel()


async def test_run_returns_where_no_url_is_configured() -> None:
    await TokenVerifier(Auth(), dev=True).run()


async def test_a_token_without_an_id_uses_a_set_of_one(mock_clock: trio.testing.MockClock) -> None:
    async with running() as (issuer, verify):
        assert (await verify.verify(signed(None))).user == "42"
        with pytest.raises(TokenRefused, match="signature"):
            await verify.verify(signed("one", 1))
        assert issuer.requests == 1  # the key is known: a bad signature is no reason to fetch


async def test_two_issuers_may_use_the_same_id(mock_clock: trio.testing.MockClock) -> None:
    async with running() as (first, _), running() as (second, _), trio.open_nursery() as nursery:
        second.body = jwk_set(jwk("RS256", "one", 1))
        keys = (
            Key(algorithm="RS256", jwks=first.url, issuer="a"),
            Key(algorithm="RS256", jwks=second.url, issuer="b"),
        )
        verify = TokenVerifier(Auth(keys=keys), dev=False, wall_clock=lambda: NOW)
        nursery.start_soon(verify.run)

        def of(issuer: str, number: int) -> str:
            claims = {"sub": issuer, "iss": issuer, "exp": NOW + 60}
            return token(claims, algorithm="RS256", number=number, kid="one")

        assert (await verify.verify(of("a", 0))).user == "a"
        assert (await verify.verify(of("b", 1))).user == "b"
        for forged in (of("b", 0), of("a", 1)):
            with pytest.raises(TokenRefused, match="iss"):
                await verify.verify(forged)
        nursery.cancel_scope.cancel()
