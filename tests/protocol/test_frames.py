"""Frames: two lanes and one answer, whatever comes and however it is cut; wsproto is the reference.

Every property feeds the same bytes to a plain wsproto connection and to the
decoder. Where they may differ, for limits that wsproto does not have, stands in
one table (:data:`LIMITS`).
"""

from __future__ import annotations

import gc
import itertools
import random
import sys
import tracemalloc
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage
from wsproto.extensions import Extension, PerMessageDeflate

from broker.errors import CloseCode
from broker.protocol.frames import (
    BINARY,
    CLOSE,
    FAIL,
    PING,
    PONG,
    TEXT,
    FrameDecoder,
    Incoming,
    encode_close,
    encode_frame,
    unmask,
)
from broker.protocol.inflate import MAX_STREAMS, BoundedInflate

CONTINUATION: Final = 0x0
MASK: Final = b"\x37\xfa\x21\x3d"
NO_LIMIT: Final = 1 << 63
FRAGMENTS: Final = 64
MESSAGE_BYTES: Final = 64 * 1024
INFLATED: Final = 256 * 1024


# -- a client of our own, which may break every rule ---------------------------


def masked(payload: bytes, mask: bytes) -> bytes:
    """RFC 6455 section 5.3, as it stands there."""
    return bytes(byte ^ key for byte, key in zip(payload, itertools.cycle(mask), strict=False))


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes | None = MASK,
    length_bytes: int | None = None,
    declared: int | None = None,
) -> bytes:
    """One frame of a client. ``length_bytes`` (0, 2 or 8) and ``declared`` make it lie."""
    size = len(payload) if declared is None else declared
    if length_bytes is None:
        length_bytes = 0 if size < 126 else 2 if size < 65536 else 8
    short = {0: size & 0x7F, 2: 126, 8: 127}[length_bytes]
    extended = (size & (1 << 8 * length_bytes) - 1).to_bytes(length_bytes, "big")
    first = fin << 7 | rsv << 4 | opcode
    if mask is None:
        return bytes([first, short]) + extended + payload
    body = masked(payload, mask) if len(payload) < 1000 else unmask(payload, mask)
    return bytes([first, 0x80 | short]) + extended + mask + body


def deflated(content: bytes, level: int = 1) -> bytes:
    """One message of permessage-deflate (RFC 7692 section 7.2.1)."""
    squeeze = zlib.compressobj(level, zlib.DEFLATED, -15)
    return (squeeze.compress(content) + squeeze.flush(zlib.Z_SYNC_FLUSH)).removesuffix(b"\x00\x00\xff\xff")


def message(opcode: int, payload: bytes, cuts: Iterable[int] = (), *, rsv: int = 0) -> list[bytes]:
    """The frames of one message, cut at the given places (more than once: an empty fragment)."""
    edges = [0, *sorted(min(cut, len(payload)) for cut in cuts), len(payload)]
    pieces = [payload[start:end] for start, end in itertools.pairwise(edges)]
    last = len(pieces) - 1
    return [
        frame(CONTINUATION if n else opcode, piece, fin=n == last, rsv=0 if n else rsv)
        for n, piece in enumerate(pieces)
    ]


# -- both sides of the comparison ----------------------------------------------


def inflate() -> BoundedInflate:
    return BoundedInflate(INFLATED)


def reference(data: bytes, extensions: list[Extension] | None = None) -> list[Incoming]:
    """What wsproto makes of ``data``, in the decoder's words; a violation without its reason."""
    connection = Connection(ConnectionType.SERVER, extensions)
    connection.receive_data(data)
    incoming: list[Incoming] = []
    parts: list[bytes] = []
    for event in connection.events():
        if isinstance(event, TextMessage | BytesMessage):
            parts.append(event.data.encode() if isinstance(event, TextMessage) else bytes(event.data))
            if event.message_finished:
                incoming.append((TEXT if isinstance(event, TextMessage) else BINARY, b"".join(parts)))
                parts = []
        elif isinstance(event, Ping):
            incoming.append((PING, bytes(event.payload)))
        elif isinstance(event, Pong):
            incoming.append((PONG, bytes(event.payload)))
        elif isinstance(event, CloseConnection):
            if connection.state is ConnectionState.REMOTE_CLOSING:
                incoming.append((CLOSE, (int(event.code), event.reason)))
            else:
                incoming.append((FAIL, int(event.code)))
    return incoming


def decoded(decoder: FrameDecoder, pieces: Iterable[bytes]) -> list[Incoming]:
    """What the decoder makes of ``pieces``; a violation without its reason, of which one is checked here."""
    incoming: list[Incoming] = []
    for piece in pieces:
        incoming += decoder.feed(piece)
    for kind, value in incoming[:-1]:
        assert kind not in (CLOSE, FAIL), value
    for kind, value in incoming[-1:]:
        assert decoder.done is (kind in (CLOSE, FAIL))
        if kind == FAIL:
            code, reason = value
            assert isinstance(code, CloseCode)
            assert reason
            incoming[-1] = (FAIL, int(code))
    return incoming


def pieces_of(data: bytes, cuts: list[int] | int) -> list[bytes]:
    """``data`` cut at the given places, or into pieces of one size (0: whole)."""
    if isinstance(cuts, int):
        step = cuts or max(1, len(data))
        return [data[start : start + step] for start in range(0, len(data), step)]
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def holds_wsproto(decoder: FrameDecoder) -> bool:
    return any(isinstance(held, Connection) for held in gc.get_referents(decoder))


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Assert that Python's allocations inside never grew by ``limit`` bytes."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit


# -- strategies ------------------------------------------------------------------

SIZES = st.one_of(
    st.integers(0, 300),
    st.sampled_from([0, 1, 124, 125, 126, 127, 128, 1023, 1024, 1025, 65535, 65536, 65537, 70_000]),
)
MASKS = st.one_of(st.binary(min_size=4, max_size=4), st.just(bytes(4)))
CHUNKINGS = st.one_of(
    st.just(0), st.integers(1, 20), st.lists(st.integers(0, 200_000), max_size=12), st.just(1)
)
BAD_TEXT = st.sampled_from(
    [
        b"\xff",
        b"\xc0\xaf",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"ab\x80",
        "é".encode()[:1],
        "😀".encode()[:3],
    ]
)


@st.composite
def payloads(draw: st.DrawFn) -> bytes:
    """Bytes of an interesting length."""
    size = draw(SIZES)
    seed = draw(st.binary(min_size=1, max_size=20))
    return (seed * (size // len(seed) + 1))[:size]


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """UTF-8, now and then long, and now and then not quite."""
    text = draw(st.text(max_size=60)).encode() * draw(st.sampled_from([1, 1, 1, 2, 1500]))
    return text + draw(st.just(b"") | BAD_TEXT) if draw(st.integers(0, 4)) == 0 else text


CUTS = st.lists(st.one_of(st.integers(0, 70), st.integers(0, 70_000)), max_size=5)
CONTROLS = st.builds(
    frame, st.sampled_from([PING, PONG]), st.binary(max_size=125), mask=MASKS, length_bytes=st.just(0)
)


@st.composite
def messages(draw: st.DrawFn) -> list[bytes]:
    """Frames of one message, control frames among them."""
    if draw(st.booleans()):
        frames = message(TEXT, draw(texts()), draw(CUTS))
    else:
        frames = message(BINARY, draw(payloads()), draw(CUTS))
    for control in draw(st.lists(CONTROLS, max_size=3)):
        frames.insert(draw(st.integers(0, len(frames))), control)
    return frames


@st.composite
def compressed_messages(draw: st.DrawFn) -> list[bytes]:
    """The same, compressed, and sometimes corrupted."""
    opcode, content = draw(
        st.one_of(st.tuples(st.just(TEXT), texts()), st.tuples(st.just(BINARY), payloads()))
    )
    payload = bytearray(deflated(content, draw(st.integers(0, 9))))
    if payload and draw(st.integers(0, 4)) == 0:
        payload[draw(st.integers(0, len(payload) - 1))] ^= draw(st.integers(1, 255))
    frames = message(opcode, bytes(payload), draw(CUTS), rsv=4)
    for control in draw(st.lists(CONTROLS, max_size=2)):
        frames.insert(draw(st.integers(0, len(frames))), control)
    return frames


CLOSE_PAYLOADS = st.one_of(
    st.just(b""),
    st.binary(max_size=3),
    st.builds(
        lambda code, reason: code.to_bytes(2, "big") + reason,
        st.one_of(
            st.sampled_from([999, 1000, 1003, 1004, 1005, 1006, 1011, 1012, 1014, 1015, 1016]),
            st.sampled_from([2999, 3000, 3999, 4000, 4401, 4999, 5000, 65535]),
        ),
        st.one_of(st.binary(max_size=130), st.text(max_size=40).map(str.encode), BAD_TEXT),
    ),
)


@st.composite
def strange_frames(draw: st.DrawFn) -> list[bytes]:
    """A frame that may break any rule, or several."""
    payload = draw(st.one_of(st.binary(max_size=140), texts(), CLOSE_PAYLOADS, st.just(deflated(b"ab"))))
    opcode = draw(st.one_of(st.sampled_from([CONTINUATION, TEXT, BINARY, CLOSE, PING]), st.integers(0, 15)))
    declared = len(payload) + draw(st.sampled_from([0, 0, 0, 1, -1, 70_000, NO_LIMIT]))
    minimal = 0 if declared < 126 else 2 if declared < 65536 else 8
    return [
        frame(
            opcode,
            payload,
            fin=draw(st.sampled_from([True, True, False])),
            rsv=draw(st.one_of(st.just(0), st.integers(0, 7))),
            mask=draw(st.one_of(MASKS, MASKS, st.none())),
            length_bytes=draw(st.sampled_from([minimal, minimal, 0, 2, 8])),
            declared=max(0, declared),
        )
    ]


CLOSES = CLOSE_PAYLOADS.map(lambda payload: [frame(CLOSE, payload)])


@st.composite
def streams(draw: st.DrawFn, *kinds: st.SearchStrategy[list[bytes]]) -> bytes:
    """Bytes of a connection, perhaps with some bits turned, perhaps cut short."""
    frames = draw(st.lists(st.one_of(*kinds), max_size=5))
    data = bytearray(b"".join(itertools.chain.from_iterable(frames)))
    if data and draw(st.integers(0, 3)) == 0:
        for place in draw(st.lists(st.integers(0, 8 * min(len(data), 400) - 1), min_size=1, max_size=3)):
            data[place >> 3] ^= 1 << (place & 7)
    if draw(st.integers(0, 3)) == 0:
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


# -- the promise -------------------------------------------------------------------


def compare(data: bytes, chunking: list[int] | int, *, deflate: bool) -> list[Incoming]:
    """Assert that the decoder, without limits, answers as wsproto does."""
    if isinstance(chunking, int) and 0 < chunking * 3000 < len(data):
        chunking = len(data) // 3000  # a slow-lane step costs about 10 µs
    decoder = FrameDecoder(NO_LIMIT, 0, inflate if deflate else None)
    incoming = decoded(decoder, pieces_of(data, chunking))
    assert incoming == reference(data, [inflate()] if deflate else None)
    return incoming


@given(streams(messages(), CONTROLS.map(lambda one: [one]), CLOSES), CHUNKINGS)
def test_frames_within_the_rules_are_read_alike(data: bytes, chunking: list[int] | int) -> None:
    compare(data, chunking, deflate=False)


@given(streams(messages(), strange_frames(), CLOSES), CHUNKINGS)
def test_frames_beyond_the_rules_are_refused_alike(data: bytes, chunking: list[int] | int) -> None:
    compare(data, chunking, deflate=False)


@given(streams(strange_frames()), CHUNKINGS, st.booleans())
def test_strange_frames_are_refused_alike(data: bytes, chunking: list[int] | int, deflate: bool) -> None:
    compare(data, chunking, deflate=deflate)


@given(streams(compressed_messages(), messages(), strange_frames()), CHUNKINGS)
def test_compressed_messages_are_read_alike(data: bytes, chunking: list[int] | int) -> None:
    compare(data, chunking, deflate=True)


@given(st.binary(max_size=300), CHUNKINGS, st.booleans())
@example(b"\x81", 0, False)
@example(b"\x81\x80", 1, False)
def test_any_bytes_are_read_alike(data: bytes, chunking: list[int] | int, deflate: bool) -> None:
    compare(data, chunking, deflate=deflate)


@given(st.lists(messages(), max_size=3), st.lists(CONTROLS, max_size=2), CHUNKINGS)
def test_nothing_is_held_between_messages(
    frames: list[list[bytes]], controls: list[bytes], chunking: list[int] | int
) -> None:
    data = b"".join([*itertools.chain.from_iterable(frames), *controls])
    decoder = FrameDecoder(NO_LIMIT, 0)
    for piece in pieces_of(data, chunking):
        decoder.feed(piece)
    assert not holds_wsproto(decoder)
    if not decoder.done:
        decoder.feed(b"\x81")
    assert holds_wsproto(decoder) is not decoder.done


def test_a_large_message_leaves_nothing_behind() -> None:
    decoder = FrameDecoder(MESSAGE_BYTES, FRAGMENTS)
    [(_, payload)] = decoder.feed(b"".join(message(BINARY, bytes(MESSAGE_BYTES), [1000])))
    assert len(payload) == MESSAGE_BYTES
    assert sum(map(sys.getsizeof, gc.get_referents(decoder))) < 4096


LANES = {
    "whole": frame(TEXT, b"hello"),
    "fragments": b"".join(message(TEXT, "schön 😀".encode(), range(12))),
    "empty": frame(TEXT) + frame(BINARY) + frame(PING) + frame(PONG),
    "empty fragments": b"".join(message(BINARY, b"x", [0, 0, 0, 1, 1])),
    "interleaved": frame(TEXT, b"a", fin=False) + frame(PING, b"p") + frame(CONTINUATION, b"b"),
    "125": frame(BINARY, bytes(125)),
    "126": frame(BINARY, bytes(126)),
    "65535": frame(BINARY, bytes(65535)),
    "65536": frame(BINARY, bytes(65536)),
    "long control": frame(PING, bytes(126)),
    "fragmented control": frame(PING, b"x", fin=False),
    "not minimal, 2": frame(TEXT, b"hello", length_bytes=2),
    "not minimal, 8": frame(TEXT, bytes(126), length_bytes=8),
    "sign bit": frame(BINARY, declared=1 << 63, length_bytes=8),
    "unmasked": frame(TEXT, b"hello", mask=None),
    "rsv1": frame(TEXT, b"hello", rsv=4),
    "rsv2": frame(TEXT, b"hello", rsv=2),
    "rsv3": frame(TEXT, b"hello", rsv=1),
    "opcode 3": frame(3, b"hello"),
    "opcode 11": frame(11, b"hello"),
    "stray continuation": frame(CONTINUATION, b"hello"),
    "message in a message": frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"),
    "bad text": frame(TEXT, b"\xc3\x28"),
    "cut code point": frame(TEXT, "é".encode()[:1]),
    "cut code point, fragments": b"".join(message(TEXT, "é".encode()[:1], [1])),
    "code point over two messages": frame(TEXT, "é".encode()[:1]) + frame(TEXT, "é".encode()[1:]),
    "surrogate": frame(TEXT, b"\xed\xa0\x80"),
    "bad binary is fine": frame(BINARY, b"\xff"),
    "close": frame(CLOSE),
    "close, code": frame(CLOSE, b"\x03\xe8"),
    "close, reason": frame(CLOSE, b"\x0f\xa0ade"),
    "close, one byte": frame(CLOSE, b"\x03"),
    "close, 1005": frame(CLOSE, b"\x03\xed"),
    "close, bad reason": frame(CLOSE, b"\x03\xe8\xff"),
    "close in a message": frame(TEXT, b"a", fin=False) + frame(CLOSE, b"\x03\xe8"),
    "after close": frame(CLOSE, b"\x03\xe8") + frame(TEXT, b"a"),
}


@pytest.mark.parametrize("data", LANES.values(), ids=LANES.keys())
@pytest.mark.parametrize("deflate", [False, True])
def test_known_cases_whole_byte_by_byte_and_between_others(data: bytes, deflate: bool) -> None:
    for before in (b"", frame(TEXT, b"before"), b"".join(message(BINARY, b"before", [3]))):
        for after in (b"", frame(BINARY, b"after"), b"\x81"):
            for step in (0, 1 if len(data) < 1000 else 997):
                compare(before + data + after, step, deflate=deflate)
    for end in range(0, len(data), max(1, len(data) // 50)):
        compare(data[:end], 0, deflate=deflate)


def test_what_comes_out() -> None:
    decoder = FrameDecoder(1000, 4)
    assert decoder.feed(frame(TEXT, "é".encode()) + frame(PING, b"1") + frame(BINARY)) == [
        (TEXT, "é".encode()),
        (PING, b"1"),
        (BINARY, b""),
    ]
    assert decoder.feed(b"".join(message(BINARY, b"abc", [1, 2]))) == [(BINARY, b"abc")]
    assert decoder.feed(frame(CLOSE, b"\x11\x94bye") + frame(TEXT, b"ignored")) == [(CLOSE, (4500, "bye"))]
    assert decoder.feed(frame(TEXT, b"ignored")) == []
    assert FrameDecoder(1000, 4).feed(frame(CLOSE)) == [(CLOSE, (1005, ""))]


def test_nothing_follows_a_violation() -> None:
    for bad in (frame(TEXT, b"\xff"), frame(3), frame(TEXT, mask=None), frame(BINARY, bytes(1001))):
        decoder = FrameDecoder(1000, 4)
        [(kind, (code, reason))] = decoder.feed(bad + frame(TEXT, b"ignored"))
        assert (kind, decoder.done) == (FAIL, True)
        assert isinstance(code, CloseCode)
        assert isinstance(reason, str)
        assert decoder.feed(frame(TEXT, b"ignored")) == []
        assert not holds_wsproto(decoder)


# -- limits, which wsproto does not have -------------------------------------------

BOMB = deflated(bytes(2 * INFLATED), 9)
ENDED = zlib.compressobj(1, zlib.DEFLATED, -15).flush(zlib.Z_FINISH)

PLAIN, DEFLATE = False, True

LIMITS: dict[str, tuple[bool, bytes, list[Incoming]]] = {
    # what was agreed, bytes that we close with 1009, and what wsproto without our limits says
    "length": (PLAIN, frame(BINARY, bytes(MESSAGE_BYTES + 1)), [(BINARY, bytes(MESSAGE_BYTES + 1))]),
    "length, no payload yet": (PLAIN, frame(TEXT, declared=MESSAGE_BYTES + 1), []),
    "length, fragments": (
        PLAIN,
        frame(TEXT, b"a", fin=False) + frame(CONTINUATION, b"b" * MESSAGE_BYTES),
        [(TEXT, b"a" + b"b" * MESSAGE_BYTES)],
    ),
    "length, compressed": (
        DEFLATE,
        frame(BINARY, deflated(bytes(MESSAGE_BYTES), 0), rsv=4),
        [(BINARY, bytes(MESSAGE_BYTES))],
    ),
    "length of text that is none": (PLAIN, frame(TEXT, b"\xff" * (MESSAGE_BYTES + 1)), [(FAIL, 1007)]),
    "length of a stray continuation": (
        PLAIN,
        frame(CONTINUATION, bytes(MESSAGE_BYTES + 1)),
        [(FAIL, 1002)],
    ),
    "length of a message in a message": (
        PLAIN,
        frame(TEXT, b"a", fin=False) + frame(TEXT, bytes(MESSAGE_BYTES)),
        [(FAIL, 1002)],
    ),
    "fragments": (
        PLAIN,
        b"".join(message(TEXT, b"x" * (FRAGMENTS + 1), range(1, FRAGMENTS + 1))),
        [(TEXT, b"x" * (FRAGMENTS + 1))],
    ),
    "fragments, empty": (PLAIN, b"".join(message(TEXT, b"x", [1] * FRAGMENTS)), [(TEXT, b"x")]),
    "fragments, compressed": (
        DEFLATE,
        b"".join(message(TEXT, deflated(b"x"), [1] * FRAGMENTS, rsv=4)),
        [(TEXT, b"x")],
    ),
    "inflated": (DEFLATE, frame(BINARY, BOMB, rsv=4), [(BINARY, bytes(2 * INFLATED))]),
    "inflated, fragments": (
        DEFLATE,
        b"".join(message(BINARY, BOMB, [1, 2, 3, 100], rsv=4)),
        [(BINARY, bytes(2 * INFLATED))],
    ),
}


def unbounded() -> PerMessageDeflate:
    """wsproto's own extension, as a client without context takeover gets it."""
    extension = PerMessageDeflate(client_no_context_takeover=True, server_no_context_takeover=True)
    extension.finalize("permessage-deflate; client_no_context_takeover; server_no_context_takeover")
    return extension


@pytest.mark.parametrize(("agreed", "data", "without_limits"), LIMITS.values(), ids=LIMITS.keys())
@pytest.mark.parametrize("step", [0, 7])
def test_the_pinned_table_of_limits(
    agreed: bool, data: bytes, without_limits: list[Incoming], step: int
) -> None:
    good = frame(TEXT, b"good")
    decoder = FrameDecoder(MESSAGE_BYTES, FRAGMENTS, inflate if agreed else None)
    assert decoded(decoder, pieces_of(good + data, step)) == [(TEXT, b"good"), (FAIL, 1009)]
    assert reference(data, [unbounded()] if agreed else None) == without_limits


def test_deflate_streams_within_a_message_are_bounded() -> None:
    # 32,000 streams of two bytes each would cost an inflater each; wsproto itself reads only the first.
    decoder = FrameDecoder(MESSAGE_BYTES, FRAGMENTS, inflate)
    assert decoded(decoder, [frame(BINARY, ENDED * (MAX_STREAMS - 1), rsv=4)]) == [(BINARY, b"")]
    assert decoded(decoder, [frame(BINARY, ENDED * MAX_STREAMS, rsv=4)]) == [(FAIL, 1007)]


def test_limits_may_be_filled_exactly() -> None:
    full = [
        frame(BINARY, bytes(MESSAGE_BYTES)),
        *message(BINARY, bytes(MESSAGE_BYTES), range(1, FRAGMENTS)),
        *message(BINARY, bytes(MESSAGE_BYTES), [0] * (FRAGMENTS - 1)),
    ]
    for step in (0, 5000):
        decoder = FrameDecoder(MESSAGE_BYTES, FRAGMENTS)
        assert decoded(decoder, pieces_of(b"".join(full * 2), step)) == [(BINARY, bytes(MESSAGE_BYTES))] * 6


@given(
    st.lists(st.tuples(st.sampled_from([TEXT, BINARY]), st.integers(0, 40), CUTS), max_size=5),
    st.lists(st.integers(0, 8), max_size=3),
    st.integers(0, 30),
    st.integers(0, 5),
    CHUNKINGS,
)
def test_limits_bite_at_the_first_frame_above_them(
    contents: list[tuple[int, int, list[int]]],
    pings: list[int],
    max_bytes: int,
    max_fragments: int,
    chunking: list[int] | int,
) -> None:
    data, refused = b"", False
    wanted: list[Incoming] = []
    for opcode, size, cuts in contents:
        frames = message(opcode, b"x" * size, cuts)
        taken = 0
        for number, (piece, following) in enumerate(itertools.pairwise([*frames, b""]), 1):
            data += piece
            taken += len(piece) - 6
            refused = refused or taken > max_bytes or 0 < max_fragments < number
            if number in pings and following:
                data += frame(PING, b"p")
                wanted += [] if refused else [(PING, b"p")]
        wanted += [] if refused else [(opcode, b"x" * size)]
    if refused:
        wanted.append((FAIL, 1009))
    assert decoded(FrameDecoder(max_bytes, max_fragments), pieces_of(data, chunking)) == wanted


@given(streams(messages(), compressed_messages(), strange_frames()), CHUNKINGS, st.integers(0, 300))
def test_with_limits_the_answer_is_the_same_up_to_them(
    data: bytes, chunking: list[int] | int, limit: int
) -> None:
    wanted = reference(data, [BoundedInflate(limit)])
    for max_bytes, max_fragments in ((limit, 0), (NO_LIMIT, 2), (limit, 2)):
        decoder = FrameDecoder(max_bytes, max_fragments, lambda: BoundedInflate(limit))
        incoming = decoded(decoder, pieces_of(data, chunking if len(data) < 3000 else 0))
        if incoming != wanted:
            assert incoming[-1] in ((FAIL, 1009), (FAIL, 1007))
            assert incoming[:-1] == wanted[: len(incoming) - 1]


def test_a_length_is_refused_before_a_byte_of_it_is_kept() -> None:
    for opcode, declared in ((BINARY, 1 << 40), (TEXT, NO_LIMIT - 1), (CONTINUATION, 1 << 40)):
        header = frame(opcode, declared=declared)
        for pieces in ([header], pieces_of(header, 1), [header + bytes(1000)]):
            decoder = FrameDecoder(MESSAGE_BYTES, FRAGMENTS)
            FrameDecoder(MESSAGE_BYTES, FRAGMENTS).feed(header)  # what wsproto loads once
            with memory_below(8 * 1024):
                assert decoded(decoder, pieces) == [(FAIL, 1009)]


def test_empty_fragments_end_at_the_limit() -> None:
    flood = frame(CONTINUATION, fin=False) * 300_000
    decoder = FrameDecoder(MESSAGE_BYTES, FRAGMENTS)
    decoder.feed(frame(TEXT, b"x", fin=False))
    with memory_below(32 * 1024):
        assert decoded(decoder, [flood]) == [(FAIL, 1009)]


def test_the_empty_end_of_a_message_above_the_limits_gives_no_message() -> None:
    # It was told as a message and then as a violation, because wsproto ends it at its header.
    for step in (0, 1):
        decoder = FrameDecoder(MESSAGE_BYTES, 3)
        assert decoded(decoder, pieces_of(b"".join(message(TEXT, b"abc", [1, 2, 3])), step)) == [(FAIL, 1009)]


def test_a_message_that_drips_in_takes_no_more_than_its_size() -> None:
    # A list of one-byte parts took 43 times the message.
    drip = pieces_of(frame(BINARY, random.Random(1).randbytes(20_000))[:-1], 1)
    decoder = FrameDecoder(MESSAGE_BYTES, FRAGMENTS)
    with memory_below(2 * 20_000):
        assert decoded(decoder, drip) == []


def test_empty_fragments_without_a_limit_take_no_memory() -> None:
    decoder = FrameDecoder(MESSAGE_BYTES, 0)
    decoder.feed(frame(TEXT, b"x", fin=False))
    flood = frame(CONTINUATION, fin=False) * 1000
    with memory_below(32 * 1024):
        assert decoded(decoder, [flood] * 10) == []
    assert decoder.feed(frame(CONTINUATION)) == [(TEXT, b"x")]


# -- pieces of it --------------------------------------------------------------------


def test_unmask_is_what_the_rfc_says() -> None:
    rng = random.Random(7)
    for size in [*range(2001), 4095, 65535, 65536, 100_003]:
        payload, mask = rng.randbytes(size), rng.randbytes(4)
        assert unmask(payload, mask) == masked(payload, mask)
    for mask in (bytes(4), b"\xff" * 4, b"\0\0\0\1", b"\1\0\0\0"):
        for payload in (bytes(9), b"\xff" * 9, bytes(1025)):
            assert unmask(payload, mask) == masked(payload, mask)


def client(extensions: list[Extension] | None = None) -> Connection:
    return Connection(ConnectionType.CLIENT, extensions)


def received(connection: Connection, data: bytes) -> list[Any]:
    connection.receive_data(data)
    return list(connection.events())


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 65537])
def test_frames_are_what_a_client_reads(size: int) -> None:
    payload = b"a" * size
    [text] = received(client(), encode_frame(TEXT, payload))
    assert (text.data, text.message_finished) == (payload.decode(), True)
    [binary] = received(client(), encode_frame(BINARY, payload))
    assert (binary.data, binary.message_finished) == (payload, True)
    if size <= 125:
        [ping, pong] = received(client(), encode_frame(PING, payload) + encode_frame(PONG, payload))
        assert (type(ping), ping.payload, type(pong), pong.payload) == (Ping, payload, Pong, payload)


@given(st.lists(st.tuples(st.text(max_size=200), st.booleans()), max_size=5))
def test_compressed_frames_are_what_a_client_inflates(contents: list[tuple[str, bool]]) -> None:
    data = b"".join(
        encode_frame(TEXT, deflated(text.encode()) if compressed else text.encode(), compressed=compressed)
        for text, compressed in contents
    )
    events = received(client([unbounded()]), data)
    assert [event.data for event in events] == [text for text, _ in contents]


@given(st.sampled_from([*map(int, CloseCode), 3000, 4999]), st.text(max_size=150))
def test_close_frames_are_what_a_client_reads(code: int, reason: str) -> None:
    data = encode_close(code, reason)
    assert len(data) <= 2 + 125
    [event] = received(client(), data)
    assert isinstance(event, CloseConnection)
    assert event.code == code
    assert reason.startswith(event.reason or "")


@pytest.mark.parametrize("letter", "aé€😀")
def test_long_reasons_are_cut_between_letters(letter: str) -> None:
    for size in range(118, 130):
        reason = "x" * (size % 4) + letter * (size // len(letter.encode()))
        [event] = received(client(), encode_close(4403, reason))
        assert reason.startswith(event.reason)
        assert min(len(reason.encode()), 120) <= len(event.reason.encode()) <= 123


def test_a_close_without_a_status_is_empty() -> None:
    assert encode_close(1005, "unheard") == b"\x88\x00"
