"""Whatever comes before the upgrade: the whole corpus against the real port, cut anywhere, in company."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from broker.app import Broker
from tests.e2e.harness import CONFIG, config, jump, running, token, until
from tests.e2e.raw_client import RawClient, connected, opened, request, tcp
from tests.protocol.hostile_requests import HOSTILE, UNFINISHED, Hostile, upgrade

CUTS = int(os.environ.get("HOSTILE_CUTS", "3"))
"""Places at which each request is cut, chosen by a fixed seed; 0 for every byte (three minutes)."""
MANY_CUTS = 1500
"""Longer requests, which repeat themselves, are cut at this many places at most."""

UNLIMITED = config(limits={"accepts": 0.0, "connections": 5000})


@asynccontextmanager
async def in_company() -> AsyncIterator[Broker]:
    """A broker with a good client, which must be served before and after."""
    async with running(UNLIMITED) as broker, connected(broker.client_port) as good:
        await good.ask("join", room="deal:1")
        yield broker
        await good.ask("publish", room="deal:1", event="e", data="well")
        assert (await good.event())["data"] == "well"


async def status_of(port: int, data: bytes, cut: int) -> int:
    """What the server answers when ``data`` comes in two pieces; 0 if it closes without an answer."""
    async with await tcp(port) as stream:
        client = RawClient(stream)
        try:
            await stream.send_all(data[:cut])
            if 0 < cut < len(data):
                await wait_all_tasks_blocked(0.0005)
                await stream.send_all(data[cut:])
        except trio.BrokenResourceError:
            pass  # it was refused before it was all said
        return await client.answer()


@pytest.mark.parametrize(
    "entry", [entry for entry in HOSTILE if entry.status != UNFINISHED], ids=lambda entry: entry.name
)
async def test_each_hostile_request_gets_its_answer(entry: Hostile) -> None:
    cuts = list(range(1, len(entry.data), len(entry.data) // MANY_CUTS + 1))
    if CUTS:
        chooser = random.Random(entry.name)
        cuts = [chooser.choice(cuts) for _ in range(CUTS)]
    async with in_company() as broker:
        for cut in [len(entry.data), *cuts]:
            assert await status_of(broker.client_port, entry.data, cut) == entry.status, cut
        await until(lambda: broker.context.registry.connections == 1)
        if entry.status != 101:
            assert sum(broker.context.registry.refused.values()) >= len(cuts) + 1, "each is counted"


async def test_unfinished_requests_end_at_the_deadline() -> None:
    """The corpus' unfinished ones, and every beginning of a good one, all at once."""
    good = upgrade()
    beginnings = [entry.data for entry in HOSTILE if entry.status == UNFINISHED]
    beginnings += [good[:cut] for cut in range(0, len(good), 7)]
    async with in_company() as broker, trio.open_nursery() as nursery:
        answers: list[int] = []

        async def wait_for_the_end(data: bytes) -> None:
            answers.append(await status_of(broker.client_port, data, len(data)))

        for data in beginnings:
            nursery.start_soon(wait_for_the_end, data)
        await until(lambda: broker.context.registry.connections == len(beginnings) + 1)
        await wait_all_tasks_blocked(0.01)
        jump(CONFIG.server.handshake_timeout + 0.1)
        await until(lambda: len(answers) == len(beginnings))
        assert set(answers) == {0}
        await until(lambda: broker.context.registry.refused == {"handshake_timeout": len(beginnings)})


async def test_a_handshake_that_dribbles_ends_at_the_deadline() -> None:
    async with in_company() as broker, await tcp(broker.client_port) as stream:
        for byte in upgrade()[:40]:
            await stream.send_all(bytes([byte]))
            await wait_all_tasks_blocked(0.0005)
            jump(CONFIG.server.handshake_timeout / 39)
        assert await RawClient(stream).answer() == 0


@pytest.mark.parametrize("size", [0, 1, 16, 100])
async def test_clients_that_go_away_in_the_middle(size: int) -> None:
    async with in_company() as broker:
        for _ in range(20):
            async with await tcp(broker.client_port) as stream:
                await stream.send_all(upgrade()[:size])
        await until(lambda: broker.context.registry.connections == 1)


async def test_clients_that_reset_right_after_the_upgrade() -> None:
    async with in_company() as broker:
        for _ in range(20):
            stream = await tcp(broker.client_port)
            # Linger 0: close sends RST.
            stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await stream.send_all(upgrade())
            await stream.aclose()
        await until(lambda: broker.context.registry.connections == 1)


async def test_frames_that_come_with_the_request_are_handled_after_welcome() -> None:
    async with running() as broker, await tcp(broker.client_port) as stream:
        client = RawClient(stream)
        early = b"\x81\x96\0\0\0\0" + b'{"op":"ping","id":1}  '
        assert await client.upgrade(request() + early) == 101
        assert (await client.next())["op"] == "welcome"
        assert (await client.next())["id"] == 1
        await client.close()


# -- pages -------------------------------------------------------------------------------------


async def page(port: int, line: str, *headers: str) -> tuple[int, bytes, bytes]:
    """Status, head and body of one request."""
    async with await tcp(port) as stream:
        client = RawClient(stream)
        status = await client.upgrade("\r\n".join([line, *headers, "", ""]).encode())
        return status, client.head, await client.body()


async def test_healthz() -> None:
    async with running() as broker:
        assert (await page(broker.client_port, "GET /healthz HTTP/1.1", "Host: x"))[::2] == (200, b"ok\n")
        assert (await page(broker.client_port, "GET /healthz HTTP/1.0"))[::2] == (200, b"ok\n")
        assert (await page(broker.client_port, "HEAD /healthz HTTP/1.1", "Host: x"))[::2] == (200, b"")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("GET / HTTP/1.1", 404),
        ("GET /nothing HTTP/1.1", 404),
        ("GET /dict/ HTTP/1.1", 404),
        ("GET /dict/7 HTTP/1.1", 404),
        ("GET /dict/x HTTP/1.1", 404),
        ("GET /dict/99999999999999999999999 HTTP/1.1", 404),
        ("GET /dict/%D9%A3 HTTP/1.1", 404),
        ("POST /healthz HTTP/1.1", 404),
        ("GET /ws HTTP/1.1", 426),
        ("GET /echo HTTP/1.1", 426),
        ("POST /ws HTTP/1.1", 405),
    ],
)
async def test_what_is_no_websocket_gets_a_short_answer(line: str, status: int) -> None:
    async with running() as broker:
        found, head, body = await page(broker.client_port, line, "Host: x")
        assert found == status
        assert b"Connection: close" in head
        assert len(body) < 200


async def test_echo_only_where_it_is_on() -> None:
    async with running(config(server={"echo": False})) as broker:
        assert (await page(broker.client_port, "GET /echo HTTP/1.1", "Host: x"))[0] == 404


@pytest.mark.parametrize(
    ("origins", "origin", "status"),
    [
        ((), "http://localhost", 101),
        ((), "http://localhost:1234", 403),
        ((), "https://evil.example", 403),
        ((), "null", 403),
        (("https://app.example",), "https://app.example", 101),
        (("https://app.example",), "https://app.example.evil", 403),
        (("https://app.example",), "http://app.example", 403),
        (("loopback",), "http://127.0.0.1:3000", 101),
        (("*",), "https://evil.example", 101),
    ],
)
@pytest.mark.parametrize("path", ["/ws", "/echo"])
async def test_pages_of_other_origins(path: str, origins: tuple[str, ...], origin: str, status: int) -> None:
    async with (
        running(config(server={"origins": origins})) as broker,
        await tcp(broker.client_port) as stream,
    ):
        client = RawClient(stream)
        assert await client.upgrade(request(path, headers=[("Origin", origin)])) == status
    if status == 403:
        assert broker.context.registry.refused == {"origin": 1}


# -- limits ------------------------------------------------------------------------------------


async def test_connections_in_all() -> None:
    async with running(config(limits={"connections": 2})) as broker:
        async with connected(broker.client_port), connected(broker.client_port):
            for _ in range(3):
                async with await tcp(broker.client_port) as stream:
                    assert await RawClient(stream).upgrade(request()) == 503
            assert broker.context.registry.refused == {"connections": 3}
        await until(lambda: not broker.context.registry.connections)
        async with connected(broker.client_port):
            pass


async def test_connections_of_one_address() -> None:
    few = config(limits={"unauthenticated_per_address": 2})
    async with running(few) as broker, connected(broker.client_port) as a, connected(broker.client_port):
        async with await tcp(broker.client_port) as stream:
            client = RawClient(stream)
            assert await client.upgrade(request()) == 429
            assert b"Retry-After" in client.head
        await a.ask("auth", token=token("7"))  # now it is known, and its place is free
        async with connected(broker.client_port):
            pass


async def test_proxies_tell_the_address_if_they_are_trusted() -> None:
    few = config(limits={"unauthenticated_per_address": 1}, server={"trusted_proxies": ("127.0.0.0/8",)})
    async with running(few) as broker:

        def by(address: str) -> list[tuple[str, str]]:
            return [("X-Forwarded-For", address)]

        async with (
            opened(broker.client_port, headers=by("203.0.113.7")),
            opened(broker.client_port, headers=by("203.0.113.8")),
            await tcp(broker.client_port) as stream,
        ):
            assert await RawClient(stream).upgrade(request(headers=by("203.0.113.7"))) == 429
    async with (
        running(config(limits={"unauthenticated_per_address": 1})) as broker,
        opened(broker.client_port, headers=by("203.0.113.7")),
        await tcp(broker.client_port) as stream,
    ):
        assert await RawClient(stream).upgrade(request(headers=by("203.0.113.8"))) == 429


def _more_than(count: int, things: list[str]) -> bool:
    return len(things) > count


async def test_accepts_are_paced_and_nobody_is_lost() -> None:
    """With one a second and a burst of three, ten come in as time passes."""
    slow = config(limits={"accepts": 1.0, "accept_burst": 3})
    async with running(slow) as broker, trio.open_nursery() as nursery:
        welcomed: list[str] = []

        async def come() -> None:
            async with connected(broker.client_port) as client:
                welcomed.append(client.welcome["session"])

        for _ in range(10):
            nursery.start_soon(come)
        await until(lambda: len(welcomed) == 3)
        await wait_all_tasks_blocked(0.05)
        assert broker.context.registry.accepted == 3
        while len(welcomed) < 10:
            before = len(welcomed)
            jump(1.0)
            await until(partial(_more_than, before, welcomed))


async def test_one_by_one_each_accept_costs_one_token() -> None:
    """Found by reading: looking for a connection that was not there cost a token as well."""
    slow = config(limits={"accepts": 0.001, "accept_burst": 6})
    async with running(slow) as broker:
        for _ in range(6):
            async with connected(broker.client_port):
                pass
            await until(lambda: not broker.context.registry.connections)
        assert broker.context.registry.accepted == 6
