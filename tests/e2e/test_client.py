"""The Python client against the real broker, over real sockets: what a script cannot play."""

from __future__ import annotations

import os
import random
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import trustme

from broker.app import Broker
from broker.client import (
    Backoff,
    Client,
    Closed,
    ConnectFailed,
    Event,
    Item,
    Lost,
    Presence,
    Rejoined,
    RequestError,
    connect,
)
from broker.config import Config
from broker.errors import CloseCode
from broker.protocol.events import SessionId
from broker.protocol.training import train
from tests.e2e.harness import CONFIG, config, running, serving, token, until

SOON = Backoff(base=0.05, cap=0.2)


def url_of(port: int, scheme: str = "ws") -> str:
    return f"{scheme}://127.0.0.1:{port}/ws"


@asynccontextmanager
async def client_of(settings: Config = CONFIG, **options: Any) -> AsyncIterator[tuple[Client, Broker]]:
    async with running(settings) as broker, connect(url_of(broker.client_port), **options) as client:
        yield client, broker


async def next_of(items: AsyncIterator[Item], kind: type[Item]) -> Any:
    """The next item of one kind."""
    async for item in items:
        if isinstance(item, kind):
            return item
    raise AssertionError("the room ended")


@pytest.mark.parametrize("zstd", [True, False])
async def test_the_verbs(zstd: bool) -> None:
    async with client_of(zstd=zstd) as (client, _):
        await every_verb(client, "deal:7")


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


async def test_two_clients_see_each_other() -> None:
    async with client_of() as (one, broker), connect(url_of(broker.client_port)) as two:
        items = (await one.join("live:x", presence=True)).items()
        await two.join("live:x")
        came = await next_of(items, Presence)
        while [member.session for member in came.joined] != [two.session]:
            came = await next_of(items, Presence)  # its own arrival comes first
        assert await two.publish("live:x", "hello", [1, "ä"]) is None
        hello = await next_of(items, Event)
        assert (hello.data, hello.offset) == ([1, "ä"], None)


async def test_a_user_is_known_by_token_and_has_a_room() -> None:
    async with client_of(token=lambda: token("42")) as (client, _):
        assert client.user == "42"
        assert client.welcome.expires is not None
        place = client.welcome.rooms["user:42"]
        assert place is not None
        assert (await client.join("user:42", since=place.position)).recovered
        with pytest.raises(RequestError, match="forbidden"):
            await client.join("user:43")
        keyed = [await client.publish("deal:7", "e", n, key="once") for n in range(2)]
        assert keyed[0] == keyed[1] is not None


async def test_events_of_rooms_that_the_broker_joined() -> None:
    # No client may publish there, save by the token of a backend.
    rooms = {"publish": ["all", "user:42"]}
    async with (
        client_of(config(server={"retry_after": 0.0}), token=token("42")) as (client, broker),
        connect(url_of(broker.client_port), token=token("backend", rooms=rooms)) as backend,
    ):
        items = client.events().items()
        await backend.publish("all", "news", 1)
        assert (await next_of(items, Event)).room == "all"
        await backend.publish("user:42", "mail", 2)
        mail = await next_of(items, Event)
        assert (mail.room, mail.data) == ("user:42", 2)
        # Thrown out, it misses something, comes back, and has it.
        broker.context.registry.sessions[SessionId(client.session)].disconnect(CloseCode.NO_PONG, "test")
        await backend.publish("user:42", "mail", 3)
        assert (await next_of(items, Event)).data == 3


async def test_a_refused_token_is_final() -> None:
    async with running() as broker:
        with pytest.raises(Closed, match="4401"):
            async with connect(url_of(broker.client_port), token="forged"):
                pass


async def test_nothing_but_a_broker_will_do() -> None:
    async with running() as broker:
        port = broker.client_port
        with pytest.raises(ConnectFailed) as caught:
            async with connect(f"ws://127.0.0.1:{port}/elsewhere"):
                pass
        assert caught.value.status == 404
    with pytest.raises(ConnectFailed) as caught:
        async with connect(url_of(port)):
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
    async with running(config(server={"tls_cert": str(chain), "tls_key": str(key)})) as broker:
        url = url_of(broker.client_port, "wss")
        async with connect(url, ssl_context=context) as client:
            room = await client.join("deal:7")
            await client.publish("deal:7", "e", "x" * 50_000)
            assert (await anext(room)).data == "x" * 50_000
        with pytest.raises(ConnectFailed, match="CERTIFICATE_VERIFY_FAILED"):
            async with connect(url):
                pass


async def test_a_slow_reader_gets_everything_in_a_room_with_history() -> None:
    few = config(limits={"outbox_bytes": 20_000}, rooms={"deal": CONFIG.rooms["default"]})
    async with (
        client_of(few, buffer=10, backoff=SOON, zstd=False) as (slow, broker),
        connect(url_of(broker.client_port)) as fast,
    ):
        room = await slow.join("deal:7")
        for number in range(90):
            await fast.publish("deal:7", "e", {"n": number, "pad": os.urandom(20_000).hex()})
        # Whether the broker threw it out meanwhile (4508) or the kernel's buffers held it all.
        offsets: list[int | None] = []
        async for item in room.items():
            assert not isinstance(item, Lost)
            if isinstance(item, Rejoined):
                assert item.recovered
            elif isinstance(item, Event):
                offsets.append(item.offset)
                if item.offset == 90:
                    break
        assert offsets == list(range(1, 91))


async def test_dictionaries(tmp_path: Path) -> None:
    rng = random.Random(3)

    def deal() -> dict[str, Any]:
        return {"stage": rng.choice(["won", "lost", "open"]), "amount": rng.randrange(9999), "owner": "jane"}

    samples = [
        orjson.dumps({"op": "event", "room": f"deal:{n}", "event": "updated", "data": deal(), "ts": n / 7})
        for n in range(2000)
    ]
    train(samples, rooms="deal:*", directory=tmp_path)
    async with client_of(config(store={"data": str(tmp_path)}), dictionaries=True) as (client, broker):
        assert client.welcome.dicts
        room = await client.join("deal:7")
        session = broker.context.registry.sessions[SessionId(client.session)]
        await until(lambda: session._dictionaries)
        before = client.statistics().received_bytes
        for _ in range(20):
            await client.publish("deal:7", "updated", deal())
            assert (await anext(room)).data["owner"] == "jane"
        with_dictionary = client.statistics().received_bytes - before
        async with connect(url_of(broker.client_port)) as plain:
            room = await plain.join("deal:8")
            before = plain.statistics().received_bytes
            for _ in range(20):
                await plain.publish("deal:8", "updated", deal())
                await anext(room)
            assert with_dictionary < plain.statistics().received_bytes - before


async def test_recovers_after_the_broker_was_killed(tmp_path: Path) -> None:
    flags = ("--config", "config/dev.toml", "--data", str(tmp_path))
    async with serving(*flags) as first, connect(url_of(first.port), backoff=SOON) as client:
        items = (await client.join("deal:7")).items()
        one = await client.publish("deal:7", "e", 1)
        assert (await next_of(items, Event)).data == 1
        first.process.kill()
        await first.process.wait()
        async with (
            serving(*flags, "--port", str(first.port)) as second,
            connect(url_of(second.port)) as other,
        ):
            two = await other.publish("deal:7", "e", 2)
            assert one is not None
            assert two == one._replace(offset=2)
            # In either order: it may be back before the event, or recover it.
            both = [await anext(items), await anext(items)]
            assert [item.recovered for item in both if isinstance(item, Rejoined)] == [True]
            assert [item.data for item in both if isinstance(item, Event)] == [2]


async def test_a_drained_broker_sends_its_clients_away_and_back(tmp_path: Path) -> None:
    flags = ("--config", "config/dev.toml", "--data", str(tmp_path), "--server-retry-after", "0")
    async with serving(*flags) as first, connect(url_of(first.port), backoff=SOON) as client:
        room = await client.join("deal:7")
        assert await first.stop() == 0, first.logs.decode()
        async with serving(*flags, "--port", str(first.port)):
            await client.publish("deal:7", "e", 1)
            assert (await anext(room)).data == 1
            assert room.recovered
