"""The Python client against the real broker, over real sockets: what the script cannot play."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trustme

from broker.client import (
    Backoff,
    Client,
    Closed,
    ConnectFailed,
    Lost,
    Presence,
    Rejoined,
    RequestError,
    connect,
)

CONFIG = Path(__file__).parents[2] / "config" / "dev.toml"
BROKER = (sys.executable, "-m", "broker")

PATIENCE = 30.0
"""How long a test may take (s) before it fails instead of hanging."""

SOON = Backoff(base=0.05, cap=0.2)


@asynccontextmanager
async def broker(data: Path, *flags: str, port: int = 0) -> AsyncIterator[tuple[trio.Process, str]]:
    """A broker with its data in ``data``; gives the process and its URL."""
    command = [*BROKER, "serve", "--config", str(CONFIG), "--data", str(data), "--admin-port", "-1"]
    process = await trio.lowlevel.open_process(
        [*command, "--port", str(port), "--server-retry-after", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        async with process.stdout:
            ready = bytes(await process.stdout.receive_some())
            yield process, ready.split()[1].decode()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        with trio.CancelScope(shield=True):
            await process.wait()


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1].partition("/")[0])


def token_for(user: str) -> str:
    command = [*BROKER, "token", "--config", str(CONFIG), "--user", user]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(autouse=True)
async def no_descriptor_left() -> AsyncIterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before


async def test_the_verbs_in_both_codecs(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with broker(tmp_path) as (_, url):
            for zstd in (True, False):
                async with connect(url, zstd=zstd) as client:
                    await every_verb(client, f"deal:{zstd}")


async def every_verb(client: Client, name: str) -> None:
    room = await client.join(name, presence=True)
    assert set(room.members) == {client.session}
    position = await client.publish(name, "updated", {"stage": "won"}, tags={"region": "EMEA"})
    item = await anext(room)
    assert (item.name, item.data, item.tags) == ("updated", {"stage": "won"}, {"region": "EMEA"})
    assert item.position == position == room.position

    page = await client.history(name, before=10)
    assert page.events == (item,)
    assert page.position == position
    await client.set_state(name, {"cursor": 3})
    await client.ack(name, 1)
    who = await client.presence(name)
    assert (who.sessions, who.members[0].session, who.members[0].state) == (
        1,
        client.session,
        {"cursor": 3},
    )
    assert await client.ping() == pytest.approx(item.ts, abs=60)
    assert (await client.call("broker.limits"))["message"] == client.welcome.limits.message
    with pytest.raises(RequestError, match="not_found"):
        await client.call("no.such.method")
    with pytest.raises(RequestError, match="bad_room"):
        await client.join("*")
    await room.leave()
    assert [late async for late in room] == []


async def test_two_clients_see_each_other(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with broker(tmp_path) as (_, url), connect(url) as one, connect(url) as two:
            items = (await one.join("live:x", presence=True)).items()
            await two.join("live:x")
            came = await anext(items)
            while not (isinstance(came, Presence) and came.joined and came.joined[0].session == two.session):
                came = await anext(items)
            assert await two.publish("live:x", "hello", [1, "ä"]) is None
            hello = await anext(items)
            while isinstance(hello, Presence):
                hello = await anext(items)
            assert (getattr(hello, "data", None), getattr(hello, "offset", 0)) == ([1, "ä"], None)


async def test_recovers_after_the_broker_was_killed(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with broker(tmp_path) as (process, url), connect(url, backoff=SOON) as client:
            room = await client.join("deal:7")
            items = room.items()
            first = await client.publish("deal:7", "e", 1)
            assert getattr(await anext(items), "data", None) == 1
            process.kill()
            await process.wait()
            async with broker(tmp_path, port=port_of(url)) as (_, again), connect(again) as other:
                second = await other.publish("deal:7", "e", 2)
                assert first is not None
                assert second == first._replace(offset=2)
                notice, event = await anext(items), await anext(items)
                if not isinstance(notice, Rejoined):  # it was back before the publish
                    notice, event = event, notice
                assert isinstance(notice, Rejoined)
                assert notice.recovered
                assert getattr(event, "data", None) == 2
                assert client.statistics().connections == 2


async def test_a_drained_broker_sends_its_clients_away_and_back(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with broker(tmp_path) as (process, url), connect(url, backoff=SOON) as client:
            room = await client.join("deal:7")
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            async with broker(tmp_path, port=port_of(url)):
                await client.publish("deal:7", "e", 1)
                async for event in room:
                    assert event.data == 1
                    break
                assert room.recovered


async def test_a_user_is_known_by_token_and_has_a_room(tmp_path: Path) -> None:
    token = await trio.to_thread.run_sync(token_for, "42")

    async def fetch() -> str:
        return token

    with trio.fail_after(PATIENCE):
        async with broker(tmp_path) as (_, url), connect(url, token=fetch) as client:
            assert client.user == "42"
            assert client.welcome.expires is not None
            assert "user:42" in client.welcome.rooms
            place = client.welcome.rooms["user:42"]
            assert place is not None
            own = await client.join("user:42", since=place.position)
            assert own.recovered
            with pytest.raises(RequestError, match="forbidden"):
                await client.join("user:43")
            keyed = [await client.publish("deal:7", "e", n, key="once") for n in range(2)]
            assert keyed[0] == keyed[1] is not None


async def test_a_refused_token_is_final(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with broker(tmp_path) as (_, url):
            with pytest.raises(Closed, match="4401"):
                async with connect(url, token="forged"):
                    pass


async def test_nothing_but_a_broker_will_do(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with broker(tmp_path) as (_, url):
            with pytest.raises(ConnectFailed) as caught:
                async with connect(url.replace("/ws", "/elsewhere")):
                    pass
            assert caught.value.status == 404
        with pytest.raises(ConnectFailed) as caught:
            async with connect(url):
                pass
        assert caught.value.status is None


async def test_over_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    chain, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.private_key_pem.write_to_path(key)
    for number, blob in enumerate(certificate.cert_chain_pems):
        blob.write_to_path(chain, append=number > 0)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with trio.fail_after(PATIENCE):
        async with broker(tmp_path / "data", "--tls-cert", str(chain), "--tls-key", str(key)) as (_, url):
            assert url.startswith("wss://")
            async with connect(url, ssl_context=context) as client:
                room = await client.join("deal:7")
                await client.publish("deal:7", "e", "x" * 50_000)
                assert (await anext(room)).data == "x" * 50_000
            with pytest.raises(ConnectFailed, match="CERTIFICATE_VERIFY_FAILED"):
                async with connect(url):
                    pass


async def test_a_slow_reader_gets_everything_in_a_room_with_history(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            broker(tmp_path, "--limits-outbox-bytes", "20000") as (_, url),
            connect(url, buffer=10, backoff=SOON) as slow,
            connect(url) as fast,
        ):
            room = await slow.join("deal:7")
            for number in range(500):
                await fast.publish("deal:7", "e", {"n": number, "pad": os.urandom(4000).hex()})
            items = room.items()
            offsets: list[int] = []
            while len(offsets) < 500:
                item = await anext(items)
                assert not isinstance(item, Lost)
                if isinstance(item, Rejoined):
                    assert item.recovered
                else:
                    offsets.append(getattr(item, "offset", 0))
            # Whether the broker threw it out meanwhile (4508) or the kernel's buffers held it all.
            assert offsets == list(range(1, 501))
