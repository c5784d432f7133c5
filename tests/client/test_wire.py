from __future__ import annotations

import random
from typing import Any

import orjson
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from broker.client.wire import Decoder, WireError, encode, join

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=10,
)
messages = st.lists(st.dictionaries(st.text(), json_values, max_size=4), max_size=5)

LIMIT = 10_000


def samples() -> list[bytes | bytearray | memoryview]:
    rng = random.Random(7)
    return [
        orjson.dumps([{"op": "event", "room": f"deal:{rng.randrange(999)}", "data": {"stage": rng.random()}}])
        for _ in range(2000)
    ]


DICTIONARY = zstandard.train_dictionary(4096, samples(), dict_id=7)


@given(messages)
def test_both_codecs_give_back_the_messages(batch: list[dict[str, Any]]) -> None:
    decoder = Decoder(LIMIT)
    body = orjson.dumps(batch)
    assert decoder.decode(body.decode()) == batch
    assert decoder.decode(zstandard.ZstdCompressor(level=1).compress(body)) == batch


@given(st.binary() | st.text())
def test_anything_else_is_one_documented_error(frame: bytes | str) -> None:
    try:
        decoded = Decoder(LIMIT).decode(frame)
    except WireError:
        return
    assert isinstance(decoded, list)


@given(st.binary(max_size=200))
def test_nonsense_after_a_zstd_header_is_the_same_error(noise: bytes) -> None:
    frame = zstandard.ZstdCompressor(level=1).compress(b"[]")
    with pytest.raises(WireError):
        Decoder(LIMIT).decode(frame[:5] + noise + b"!")


@pytest.mark.parametrize("text", ["{}", "3", "[3]", "[[]]", "[", "[NaN]", ""])
def test_a_frame_is_an_array_of_objects(text: str) -> None:
    with pytest.raises(WireError):
        Decoder(LIMIT).decode(text)


def test_a_bomb_is_refused_before_it_is_inflated() -> None:
    bomb = zstandard.ZstdCompressor().compress(b" " * 50_000_000)
    with pytest.raises(WireError, match="50000000 bytes"):
        Decoder(LIMIT).decode(bomb)


def test_the_content_size_must_be_stated() -> None:
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(b"[]")
    with pytest.raises(WireError, match="content size"):
        Decoder(LIMIT).decode(frame)


def test_only_one_zstd_frame() -> None:
    frame = zstandard.ZstdCompressor(level=1).compress(b"[]")
    with pytest.raises(WireError, match="one zstd frame"):
        Decoder(LIMIT).decode(frame + frame)


def test_a_dictionary_must_be_loaded_first() -> None:
    body = bytes(samples()[0])
    frame = zstandard.ZstdCompressor(level=1, dict_data=DICTIONARY).compress(body)
    decoder = Decoder(LIMIT)
    with pytest.raises(WireError, match="dictionary 7"):
        decoder.decode(frame)
    decoder.add_dictionary(DICTIONARY.as_bytes(), 7)
    assert decoder.decode(frame) == orjson.loads(body)


@pytest.mark.parametrize("content", [b"", b"no dictionary at all", DICTIONARY.as_bytes()])
def test_a_dictionary_must_be_the_one_it_is_offered_as(content: bytes) -> None:
    with pytest.raises(WireError, match="calls itself"):
        Decoder(LIMIT).add_dictionary(content, 8)


def test_several_messages_travel_as_an_array() -> None:
    one, two = encode({"op": "ping"}), encode({"op": "x"})
    assert join([one]) == '{"op":"ping"}'
    assert join([one, two]) == '[{"op":"ping"},{"op":"x"}]'
