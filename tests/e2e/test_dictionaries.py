"""Trained dictionaries: announced, fetched, used, added while the broker runs."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from broker.clock import HOUSEKEEPING
from broker.protocol.dictionaries import TrainedDictionary
from broker.protocol.events import make_event
from broker.protocol.samples import load_samples
from broker.protocol.training import train
from tests.e2e.harness import OPEN, config, jump, running, until
from tests.e2e.raw_client import BINARY, RawClient, connected, frame, tcp

ZSTD = "broker.v1.zstd"


def samples(count: int = 400) -> list[bytes]:
    choose = random.Random(5)
    return [
        make_event(
            f"deal:{choose.randrange(1000)}",
            "deal-updated",
            {
                "stage": choose.choice(["won", "lost", "open"]),
                "owner": choose.randrange(9999),
                "currency": "EUR",
            },
            1.7e9 + number,
        ).wire
        for number in range(count)
    ]


def trained(data: Path) -> TrainedDictionary:
    return train(samples(), rooms="deal:*", directory=data, size=4096)


async def fetch(port: int, path: str) -> tuple[bytes, bytes]:
    """Head and body of a page."""
    async with await tcp(port) as stream:
        client = RawClient(stream)
        assert await client.upgrade(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()) == 200
        return client.head, await client.body()


async def use(client: RawClient, port: int, announced: dict[str, Any]) -> None:
    """Do as a client would: fetch, check, load, tell."""
    _, raw = await fetch(port, announced["url"])
    assert hashlib.sha256(raw).hexdigest() == announced["sha256"]
    client.dictionaries[announced["id"]] = zstandard.ZstdCompressionDict(raw)
    assert (await client.ask("dict", dict=announced["id"]))["op"] == "ok"


async def test_a_dictionary_is_announced_fetched_and_used(tmp_path: Path) -> None:
    about = trained(tmp_path)
    settings = config(store={"data": str(tmp_path)})
    async with running(settings) as broker, connected(broker.client_port, protocol=ZSTD) as client:
        (announced,) = client.welcome["dicts"]
        assert announced["id"] == about.id
        assert announced["rooms"] == "deal:*"
        head, raw = await fetch(broker.client_port, announced["url"])
        assert len(raw) == about.bytes
        assert b"immutable" in head
        assert b"Access-Control-Allow-Origin: *" in head
        await client.ask("join", room="deal:7")
        await use(client, broker.client_port, announced)
        fields = {"stage": "won", "currency": "EUR"}
        await client.ask("publish", room="deal:7", event="deal-updated", data=fields)
        assert (await client.event())["data"] == fields
        assert client.dictionaries_used[-2:] == [about.id, 0], "for the event, not for the reply"
        assert set(client.opcodes) == {BINARY}
        # And in the other direction.
        squeezer = zstandard.ZstdCompressor(dict_data=client.dictionaries[about.id])
        await client.send_bytes(frame(BINARY, squeezer.compress(b'{"op":"ping","id":"squeezed"}')))
        assert (await client.reply("squeezed"))["op"] == "ok"


async def test_frames_with_and_without_the_dictionary_in_one_room(tmp_path: Path) -> None:
    trained(tmp_path)
    settings = config(store={"data": str(tmp_path)})
    async with (
        running(settings) as broker,
        connected(broker.client_port, protocol=ZSTD) as with_it,
        connected(broker.client_port, protocol=ZSTD) as without,
        connected(broker.client_port) as plain,
    ):
        clients = (with_it, without, plain)
        await use(with_it, broker.client_port, with_it.welcome["dicts"][0])
        for client in clients:
            await client.ask("join", room="deal:7")
            await client.ask("join", room="live:7")
        for room in ("deal:7", "live:7"):
            await plain.ask("publish", room=room, event="e", data=room)
            for client in clients:
                assert (await client.event())["data"] == room
        assert "dicts" not in plain.welcome


async def test_errors_of_dict(tmp_path: Path) -> None:
    about = trained(tmp_path)
    settings = config(store={"data": str(tmp_path)})
    async with running(settings) as broker:
        async with connected(broker.client_port, protocol=ZSTD) as client:
            assert await client.refusal("dict", dict=about.id + 1) == "not_found"
            assert await client.refusal("dict", dict="x") == "bad_message"
        async with connected(broker.client_port) as client:
            assert await client.refusal("dict", dict=about.id) == "bad_message"


async def test_one_trained_meanwhile_is_announced(tmp_path: Path) -> None:
    settings = config(store={"data": str(tmp_path)}, server={"ping_interval": 3600.0})
    async with (
        running(settings) as broker,
        connected(broker.client_port, protocol=ZSTD) as client,
        connected(broker.client_port) as plain,
    ):
        assert "dicts" not in client.welcome
        about = trained(tmp_path)
        jump(HOUSEKEEPING + 1)
        announced = await client.until("dicts")
        assert [entry["id"] for entry in announced["dicts"]] == [about.id]
        await client.ask("join", room="deal:7")
        await use(client, broker.client_port, announced["dicts"][0])
        await plain.ask("publish", room="deal:7", event="e", data=1)
        assert (await client.event())["data"] == 1
        assert not any(message["op"] == "dicts" for batch in plain.batches for message in batch)


async def test_samples_of_recorded_rooms_are_kept(tmp_path: Path) -> None:
    """Also those that came after the last sweep: found by reading."""
    recorded = msgspec.structs.replace(OPEN, record=True)
    settings = config(store={"data": str(tmp_path)}, rooms={"deal": recorded})
    async with running(settings) as broker, connected(broker.client_port) as client:
        for number in range(20):
            await client.ask("publish", room="deal:1", event="e", data=number)
            await client.ask("publish", room="other:1", event="e", data=number)
    assert len(load_samples(tmp_path, "deal:*").events) == 20
    assert len(load_samples(tmp_path, "other:*").events) == 0


async def test_a_full_disk_costs_samples_and_not_sessions(tmp_path: Path) -> None:
    recorded = msgspec.structs.replace(OPEN, record=True)
    settings = config(
        store={"data": str(tmp_path)}, rooms={"deal": recorded}, server={"ping_interval": 3600.0}
    )
    async with running(settings) as broker, connected(broker.client_port) as client:
        (tmp_path / "samples").write_text("in the way of the folder")
        await client.ask("publish", room="deal:1", event="e", data=1)
        lag = broker.context.stages.loop_lag
        jump(HOUSEKEEPING + 1)
        ticks = lag.count
        await until(lambda: lag.count > ticks + 2)
        assert (await client.ask("ping"))["op"] == "ok"
