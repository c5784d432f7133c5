"""Frames of every codec are read by those who know nothing of ours: a wsproto client, zstandard alone."""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import Any, Final

import orjson
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, TextMessage
from wsproto.extensions import PerMessageDeflate

from broker.config import Wire
from broker.protocol.codec import DEFLATE, JSON, ZSTD, Codec, Encoder
from broker.protocol.dictionaries import Dictionaries
from broker.protocol.frames import BINARY, TEXT
from broker.protocol.training import train

WIRE: Final = Wire()
NONE: Final = Dictionaries.load(None)
PAYLOADS = st.one_of(
    st.text(max_size=400).map(str.encode),
    st.builds(lambda text, times: (text * times).encode(), st.text(max_size=30), st.integers(1, 3000)),
)


def client(*, deflate: bool = False) -> Connection:
    if not deflate:
        return Connection(ConnectionType.CLIENT)
    extension = PerMessageDeflate(client_no_context_takeover=True, server_no_context_takeover=True)
    extension.finalize("permessage-deflate; client_no_context_takeover; server_no_context_takeover")
    return Connection(ConnectionType.CLIENT, [extension])


def received(connection: Connection, frame: bytes) -> Any:
    """Content of the one whole message that ``frame`` is."""
    connection.receive_data(frame)
    [event] = connection.events()
    assert isinstance(event, TextMessage | BytesMessage)
    assert event.message_finished
    return event.data if isinstance(event, TextMessage) else bytes(event.data)


def crm_events(count: int, seed: int = 1) -> list[bytes]:
    rng = random.Random(seed)
    return [
        orjson.dumps(
            {
                "op": "event",
                "room": f"deal:{rng.randrange(5000)}",
                "event": rng.choice(("deal-updated", "activity-added", "contact-changed")),
                "data": {"id": rng.randrange(90_000), "amount": rng.randrange(10**6), "currency": "EUR"},
                "ts": 1.7e9 + number,
                "user": str(rng.randrange(400)),
                "offset": number,
            }
        )
        for number in range(count)
    ]


# -- plain ----------------------------------------------------------------------


@given(PAYLOADS)
def test_json_is_one_text_frame(payload: bytes) -> None:
    frame = Encoder(WIRE, NONE).encode(JSON, payload)
    assert type(frame) is bytes  # shared between sockets, so nobody can change it
    assert received(client(), frame) == payload.decode()


@given(st.sampled_from([JSON, DEFLATE, ZSTD]), PAYLOADS)
def test_equal_codecs_and_payloads_give_equal_frames(codec: Codec, payload: bytes) -> None:
    encoder = Encoder(WIRE, NONE)
    frame = encoder.encode(codec, payload)
    assert encoder.encode(Codec(codec.kind), payload) == frame
    assert encoder.encode(codec, bytes(bytearray(payload))) == frame


# -- permessage-deflate ------------------------------------------------------------


@given(st.lists(PAYLOADS, max_size=4), st.randoms(use_true_random=False))
def test_deflated_frames_stand_alone(payloads: list[bytes], rng: random.Random) -> None:
    encoder = Encoder(WIRE, NONE)
    frames = [(encoder.encode(DEFLATE, payload), payload) for payload in payloads]
    rng.shuffle(frames)
    reader = client(deflate=True)
    for frame, payload in frames:
        assert received(reader, frame) == payload.decode()


@pytest.mark.parametrize("level", [1, 6, 9])
@pytest.mark.parametrize("least", [0, 100])
def test_small_frames_are_not_deflated(level: int, least: int) -> None:
    encoder = Encoder(Wire(deflate_level=level, deflate_min_bytes=least), NONE)
    for size in (0, 1, 99, 100, 101, 5000):
        frame = encoder.encode(DEFLATE, b"x" * size)
        compressed = bool(frame[0] & 0x40)
        assert compressed is (size >= least)
        assert received(client(deflate=True), frame) == "x" * size
        if not compressed:
            assert frame == encoder.encode(JSON, b"x" * size)
    assert len(encoder.encode(DEFLATE, b"x" * 5000)) < 100


# -- zstd -----------------------------------------------------------------------------


@given(PAYLOADS, st.sampled_from([1, 3, 19]))
def test_zstd_is_one_binary_frame_of_stated_size(payload: bytes, level: int) -> None:
    frame = Encoder(Wire(zstd_level=level), NONE).encode(ZSTD, payload)
    content = received(client(), frame)
    assert isinstance(content, bytes)
    parameters = zstandard.get_frame_parameters(content)
    assert parameters.content_size == len(payload)
    assert parameters.has_checksum is False
    assert parameters.dict_id == 0
    assert zstandard.ZstdDecompressor().decompress(content) == payload


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    train(crm_events(400), rooms="deal:*", directory=directory, size=4096, now=1.0)
    train(crm_events(400, seed=2), rooms="deal:*", directory=directory, size=4096, now=2.0)
    return directory


def test_a_dictionary_is_named_in_the_header_and_makes_frames_smaller(trained: Path) -> None:
    dictionaries = Dictionaries.load(trained)
    encoder = Encoder(WIRE, dictionaries)
    payload = b"[%b]" % crm_events(1, seed=3)[0]
    plain = encoder.encode(ZSTD, payload)
    ids = [path.stem for path in sorted(trained.glob("*/*.dict"))]
    assert len(ids) == 2
    for identifier in map(int, ids):
        frame = encoder.encode(Codec("zstd", identifier), payload)
        content = received(client(), frame)
        parameters = zstandard.get_frame_parameters(content)
        assert parameters.dict_id == identifier
        assert parameters.content_size == len(payload)
        assert parameters.has_checksum is False
        raw = (trained / "dictionaries" / f"{identifier}.dict").read_bytes()
        reader = zstandard.ZstdDecompressor(dict_data=zstandard.ZstdCompressionDict(raw))
        assert reader.decompress(content) == payload
        assert len(frame) < len(plain) * 0.7
        assert encoder.encode(Codec("zstd", identifier), payload) == frame


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 20_000])
def test_large_batches_go_without_a_dictionary(trained: Path, size: int) -> None:
    dictionaries = Dictionaries.load(trained)
    [newest] = dictionaries.announcement()
    encoder = Encoder(Wire(dictionary_max_bytes=1000), dictionaries)
    content = received(client(), encoder.encode(Codec("zstd", newest["id"]), b"x" * size))
    used = zstandard.get_frame_parameters(content).dict_id
    assert used == (newest["id"] if size <= 1000 else 0)


# -- counting, and the echo ------------------------------------------------------------


def test_bytes_are_counted() -> None:
    encoder = Encoder(WIRE, NONE)
    frames = [encoder.encode(codec, b"x" * 1000) for codec in (JSON, DEFLATE, ZSTD)]
    assert encoder.raw_bytes == 3000
    assert encoder.encoded_bytes == sum(map(len, frames))


@pytest.mark.parametrize("size", [0, 10, 5000])
def test_an_echo_keeps_the_kind_of_the_message(size: int) -> None:
    encoder = Encoder(WIRE, NONE)
    for codec in (JSON, DEFLATE):
        reader = client(deflate=codec is DEFLATE)
        text = encoder.encode_echo(codec, TEXT, b"x" * size)
        binary = encoder.encode_echo(codec, BINARY, b"\xff" * size)
        assert received(reader, text) == "x" * size
        assert received(reader, binary) == b"\xff" * size
        for frame in (text, binary):
            assert bool(frame[0] & 0x40) is (codec is DEFLATE and size >= WIRE.deflate_min_bytes)


def test_deflated_messages_end_as_the_rfc_says() -> None:
    # RFC 7692 section 7.2.1: the tail of the sync flush is cut off, and is not needed within.
    frame = Encoder(WIRE, NONE).encode(DEFLATE, b"hello " * 100)
    body = frame[2:]
    assert not body.endswith(b"\x00\x00\xff\xff")
    reader = zlib.decompressobj(-15)
    assert reader.decompress(body + b"\x00\x00\xff\xff") == b"hello " * 100
