from __future__ import annotations

import zlib

import hiredis
import orjson
import pytest
import zstandard

from bench.dialect import (
    Acknowledged,
    Backends,
    Broker,
    Content,
    Dialect,
    Returning,
    SocketIO,
    joined_at,
)
from bench.events import crm_bodies
from tests.bench.recordings import TEXT, payload_of, recording, workload

BINARY = 0x82
RSV1 = 0xC1


def test_json() -> None:
    assert Broker().read(TEXT, payload_of([3, 4])) == Content([3, 4], [])


def test_replies_are_expected_and_everything_else_is_noticed() -> None:
    batch = [
        {"op": "welcome"},
        {"op": "ok"},
        {"op": "bye", "code": 4503, "reason": "drain"},
        {"op": "position"},
    ]
    assert Broker().read(TEXT, orjson.dumps(batch)) == Content([], ["bye 4503 drain", "position"])


def test_deflate_reads_compressed_frames_and_plain_ones() -> None:
    compressor = zlib.compressobj(1, zlib.DEFLATED, -15)
    compressed = compressor.compress(payload_of([1])) + compressor.flush(zlib.Z_SYNC_FLUSH)
    dialect = Broker("deflate")
    assert dialect.read(RSV1, compressed[:-4]).events == [1]
    assert dialect.read(TEXT, payload_of([2])).events == [2]


def test_zstd_with_and_without_a_dictionary() -> None:
    samples: list[bytes | bytearray | memoryview] = [body.encode() for body in crm_bodies(2000, seed=1)]
    dictionary = zstandard.train_dictionary(4096, samples, dict_id=7)
    dialect = Broker("zstd", dictionary=7, dictionaries={7: dictionary.as_bytes()})
    with_it = zstandard.ZstdCompressor(dict_data=dictionary).compress(payload_of([5]))
    assert dialect.read(BINARY, with_it).events == [5]
    assert dialect.read(BINARY, zstandard.compress(payload_of([6]))).events == [6]
    assert orjson.loads(dialect.opening("bench:1")[0]) == {"op": "dict", "id": 2, "dict": 7}


@pytest.mark.parametrize(
    ("payload", "content"),
    [
        (b'0{"sid":"x","pingInterval":25000}', Content([], [])),
        (b'40{"sid":"x"}', Content([], [])),
        (b"430[]", Content([], [])),
        (b'42["event",{"room":"r","data":{"n":"0000000009"}}]', Content([9], [])),
        (b'42["other",{}]', Content([], ["other"])),
        (b'44{"message":"no"}', Content([], ['44{"message":"no"}'])),
    ],
)
def test_socket_io(payload: bytes, content: Content) -> None:
    assert SocketIO().read(TEXT, payload) == content


@pytest.mark.parametrize(("dialect", "prefix"), [(Broker(), ""), (SocketIO(), "42")])
def test_publishes_are_json(dialect: Dialect, prefix: str) -> None:
    text = dialect.publish("bench:1", '{"n":"##########"}')
    assert text.startswith(prefix)
    assert "##########" in str(orjson.loads(text.removeprefix(prefix)))


@pytest.mark.parametrize("dialect", [Broker(), SocketIO()])
def test_without_a_room_nothing_is_joined(dialect: Dialect) -> None:
    assert not any("join" in text for text in dialect.opening(None))
    assert "join" in dialect.opening("bench:1")[-1]


def test_replies_count_for_those_who_wait_for_them() -> None:
    dialect = Acknowledged()
    asked = orjson.loads(dialect.publish("kept:1", '{"n":"##########"}'))
    assert (asked["id"], asked["room"]) == ("##########", "kept:1")
    said = [
        {"op": "ok", "id": "0000000002", "epoch": "e", "offset": 1},
        {"op": "ok", "id": "0000000000", "epoch": "e", "offset": 2},
        {"op": "error", "id": "0000000001", "code": "unavailable"},
    ]
    assert dialect.read(TEXT, orjson.dumps(said)) == Content([2, 0], ["error unavailable"])
    assert dialect.stored_in(workload([0], [(0, 0), (0, 0), (0, 0)])) == {
        ("bench:0", 1): 2,
        ("bench:0", 2): 0,
    }


def test_backends_speak_redis() -> None:
    reader = hiredis.Reader()
    reader.feed(Backends().publish("bench:ä", '{"n":"##########"}').encode())
    command, channel, said = reader.gets()
    assert (command, channel.decode()) == (b"PUBLISH", "broker:room:bench:ä")
    assert orjson.loads(said) == {"event": "update", "data": {"n": "##########"}}
    assert Backends().read(0, b"-ERR no\r") == Content([], ["-ERR no"])
    assert Backends().read(TEXT, payload_of([3])) == Content([3], [])


def test_those_who_return_know_events_by_their_offset() -> None:
    dialect = Returning({"r": ("e", 4)}, {("r", 5): 0, ("r", 6): 1})
    assert orjson.loads(dialect.opening("r")[0])["since"] == {"epoch": "e", "offset": 4}
    said = [
        {"op": "welcome"},
        {"op": "ok", "room": "r", "recovered": True},
        {"op": "event", "room": "r", "offset": 6},
        {"op": "event", "room": "r", "offset": 4},
    ]
    assert dialect.read(TEXT, orjson.dumps(said)) == Content([1, -1], [])
    assert dialect.read(TEXT, b'[{"op":"ok","room":"r","recovered":false}]').notices == ["not recovered"]


def test_where_the_rooms_were_is_in_the_replies() -> None:
    load = workload([0, 1], [])
    said = b'[{"op":"welcome"}]', b'[{"op":"ok","room":"bench:1","epoch":"e","offset":7}]'
    made = recording(load, [], raw=[(0, said[0]), (1, said[1])])
    assert joined_at(made) == {"bench:1": ("e", 7)}
