"""Bounded decompression: sound data comes back whole, bombs cost what the limit says, all else is told."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import CloseReason, FrameProtocol, Opcode

from broker.errors import CloseCode
from broker.protocol.inflate import MAX_STREAMS, MAX_WINDOW_BYTES, BoundedInflate, InflateError, ZstdReader

LIMIT = 64 * 1024
MIB = 1024 * 1024


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


# ------------------------------------------------------------------ zstd


def no_dictionaries(_id: int) -> None:
    return None


def reader(max_bytes: int = LIMIT) -> ZstdReader:
    return ZstdReader(max_bytes, no_dictionaries)


def zstd(content: bytes, *, checksum: bool = False, stated: bool = True, level: int = 1) -> bytes:
    squeeze = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=stated)
    if stated:
        return squeeze.compress(content)
    stream = squeeze.compressobj()
    return stream.compress(content) + stream.flush()


def refusal(act: Callable[[], object]) -> InflateError:
    with pytest.raises(InflateError) as caught:
        act()
    return caught.value


@given(st.binary(max_size=2000), st.integers(1, 1000), st.booleans(), st.sampled_from([1, 3, 19]))
def test_zstd_content_comes_back(content: bytes, times: int, checksum: bool, level: int) -> None:
    content = (content * times)[:LIMIT]
    assert reader().decompress(zstd(content, checksum=checksum, level=level)) == content


def test_zstd_content_may_fill_the_limit_exactly() -> None:
    assert reader(100).decompress(zstd(b"a" * 100)) == b"a" * 100
    error = refusal(lambda: reader(100).decompress(zstd(b"a" * 101)))
    assert error.too_large
    assert error.close_code is CloseCode.TOO_BIG
    assert error.reason == "zstd content above 100 bytes"


def test_zstd_bomb_that_states_its_size() -> None:
    bomb = zstd(bytes(64 * MIB), level=19)
    assert len(bomb) < 2100
    with memory_below(LIMIT):
        assert refusal(lambda: reader().decompress(bomb)).too_large


def test_zstd_bomb_that_does_not_state_its_size() -> None:
    bomb = zstd(bytes(64 * MIB), level=19, stated=False)
    assert len(bomb) < 2100
    with memory_below(LIMIT):
        error = refusal(lambda: reader().decompress(bomb))
    assert error.close_code is CloseCode.INVALID_DATA
    assert "does not state" in error.reason


def test_zstd_bomb_that_understates_its_size() -> None:
    # A single-segment header with a 4-byte content size, over the bomb's blocks.
    bomb = zstd(bytes(64 * MIB), level=19)
    blocks = bomb[zstandard.frame_header_size(bomb) :]
    for stated in (0, 1, 1000, LIMIT):
        lie = zstandard.FRAME_HEADER + b"\xa0" + struct.pack("<I", stated) + blocks
        assert zstandard.get_frame_parameters(lie).content_size == stated
        with memory_below(2 * LIMIT):
            assert refusal(lambda lie=lie: reader().decompress(lie)).close_code is CloseCode.INVALID_DATA  # type: ignore[misc]


def test_zstd_window_is_bounded_even_for_small_content() -> None:
    for log, fits in ((23, True), (24, False), (27, False)):
        parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=log)
        # The size of the window shows in the header only where it is not the content itself.
        stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=100)
        frame = stream.compress(b"a" * 100) + stream.flush()
        header = bytearray(zstandard.FRAME_HEADER + bytes([0x40, (log - 10) << 3]) + struct.pack("<H", 0))
        body = frame[zstandard.frame_header_size(frame) :]
        # A two-byte content size counts from 256, so state 300 and let the body be what it is.
        header[6:8] = struct.pack("<H", 300 - 256)
        forged = bytes(header) + body
        assert zstandard.get_frame_parameters(forged).window_size == 1 << log
        error = refusal(lambda forged=forged: reader().decompress(forged))  # type: ignore[misc]
        assert error.too_large is not fits
        assert fits or error.reason == f"zstd window above {MAX_WINDOW_BYTES} bytes"


GOOD = zstd(b'{"op":"ping"}' * 20)
SKIPPABLE = b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"abcd"


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", "not a zstd frame"),
        (b"\x28\xb5", "not a zstd frame"),
        (b'{"op":"ping"}', "not a zstd frame"),
        (SKIPPABLE, "not a zstd frame"),
        (SKIPPABLE + GOOD, "not a zstd frame"),
        (zstandard.FRAME_HEADER, "header is broken"),
        (zstandard.FRAME_HEADER + b"\xff" * 20, "header is broken"),
        (GOOD + b"x", "corrupt"),
        (GOOD + GOOD, "corrupt"),
        (GOOD + SKIPPABLE, "corrupt"),
        (zstd(b"") + b"x", "corrupt"),
        (zstd(b"") + GOOD, "corrupt"),
        (zstd(b"")[:-1], "corrupt"),
        (zstd(b"", checksum=True)[:-1] + b"\0", "corrupt"),
    ],
)
def test_zstd_data_that_is_no_single_whole_frame(frame: bytes, reason: str) -> None:
    error = refusal(lambda: reader().decompress(frame))
    assert not error.too_large
    assert error.close_code is CloseCode.INVALID_DATA
    assert reason in error.reason


@pytest.mark.parametrize("checksum", [False, True])
def test_a_zstd_frame_cut_anywhere_is_invalid(checksum: bool) -> None:
    frame = zstd(bytes(range(256)) * 3, checksum=checksum)
    for end in range(len(frame)):
        assert not refusal(lambda end=end: reader().decompress(frame[:end])).too_large  # type: ignore[misc]


def test_a_wrong_checksum_is_invalid() -> None:
    frame = zstd(b"abc" * 50, checksum=True)
    assert not refusal(lambda: reader().decompress(frame[:-1] + bytes([frame[-1] ^ 1]))).too_large


def _outcome(decode: Callable[[], bytes]) -> bytes | InflateError:
    try:
        return decode()
    except InflateError as error:
        return error


@given(st.binary(max_size=300), st.data())
def test_any_bytes_after_the_magic_give_bounded_content_or_a_verdict(
    tail: bytes, data: st.DataObject
) -> None:
    frame = zstandard.FRAME_HEADER + tail
    if data.draw(st.booleans()):  # a sound frame with some bytes changed reaches further
        changed = bytearray(zstd(b"the quick brown fox " * 20, checksum=data.draw(st.booleans())))
        for at, value in data.draw(
            st.lists(st.tuples(st.integers(4, len(changed) - 1), st.integers(0, 255)))
        ):
            changed[at] = value
        frame = bytes(changed)
    outcome = _outcome(lambda: reader(1000).decompress(frame))
    assert isinstance(outcome, InflateError) or len(outcome) <= 1000


def test_zstd_dictionaries_are_found_by_the_id_in_the_frame() -> None:
    samples = [
        b'{"op":"publish","room":"deal:%d","event":"deal-updated","data":{"n":%d}}' % (n, n * n)
        for n in range(500)
    ]
    trained = zstandard.train_dictionary(4096, [*samples], dict_id=40_000, level=1)
    asked: list[int] = []

    def find(dictionary_id: int) -> zstandard.ZstdCompressionDict | None:
        asked.append(dictionary_id)
        return trained if dictionary_id == 40_000 else None

    both = ZstdReader(LIMIT, find)
    frame = zstandard.ZstdCompressor(dict_data=trained).compress(samples[0])
    assert both.decompress(frame) == samples[0]
    assert both.decompress(frame) == samples[0]
    assert both.decompress(GOOD) == b'{"op":"ping"}' * 20
    assert asked == [40_000]  # found once, then known; and never looked for without an id
    other = zstandard.train_dictionary(4096, [*samples], dict_id=40_001, level=1)
    foreign = zstandard.ZstdCompressor(dict_data=other).compress(samples[0])
    error = refusal(lambda: both.decompress(foreign))
    assert error.reason == "unknown zstd dictionary 40001"
    assert error.close_code is CloseCode.INVALID_DATA


# ------------------------------------------------------------------ permessage-deflate

CLIENT_MASK = b"\x01\x02\x03\x04"


def frame(opcode: Opcode, payload: bytes = b"", *, fin: bool = True, rsv1: bool = False) -> bytes:
    """One frame as a client sends it, with any combination of bits."""
    first = (0x80 if fin else 0) | (0x40 if rsv1 else 0) | opcode
    size = len(payload)
    if size < 126:
        head = bytes([first, 0x80 | size])
    elif size < 65536:
        head = bytes([first, 0xFE]) + struct.pack("!H", size)
    else:
        head = bytes([first, 0xFF]) + struct.pack("!Q", size)
    mask = itertools.cycle(CLIENT_MASK)
    return head + CLIENT_MASK + bytes(byte ^ key for byte, key in zip(payload, mask, strict=False))


def deflate(content: bytes, *, level: int = 1, window: int = 15, flush: int = zlib.Z_SYNC_FLUSH) -> bytes:
    squeeze = zlib.compressobj(level, zlib.DEFLATED, -window)
    return (squeeze.compress(content) + squeeze.flush(flush)).removesuffix(b"\x00\x00\xff\xff")


def fragments(payload: bytes, sizes: list[int], opcode: Opcode = Opcode.BINARY) -> bytes:
    """One compressed message in frames of these sizes (and one for the rest)."""
    frames = []
    for size in sizes:
        frames.append(frame(opcode, payload[:size], fin=False, rsv1=opcode is not Opcode.CONTINUATION))
        payload, opcode = payload[size:], Opcode.CONTINUATION
    frames.append(frame(opcode, payload, rsv1=opcode is not Opcode.CONTINUATION))
    return b"".join(frames)


class Server:
    """The receiving end: wsproto with our extension, fed in any pieces."""

    def __init__(self, max_bytes: int = LIMIT) -> None:
        self._connection = Connection(ConnectionType.SERVER, [BoundedInflate(max_bytes)])
        self.messages: list[bytes] = []
        self.pings: list[bytes] = []
        self.closed: CloseReason | None = None
        self.taken = 0
        """Content bytes handed out, of unfinished messages too."""
        self._parts: list[bytes] = []

    def feed(self, data: bytes, *, chunk: int = 1 << 30) -> Server:
        for start in range(0, len(data), chunk):
            if self.closed is None:
                self._connection.receive_data(data[start : start + chunk])
                self._take_events()
        return self

    def _take_events(self) -> None:
        for event in self._connection.events():
            if isinstance(event, TextMessage | BytesMessage):
                part = event.data.encode() if isinstance(event, TextMessage) else bytes(event.data)
                self.taken += len(part)
                self._parts.append(part)
                if event.message_finished:
                    self.messages.append(b"".join(self._parts))
                    self._parts = []
            elif isinstance(event, Ping):
                self.pings.append(bytes(event.payload))
            elif isinstance(event, CloseConnection):
                self.closed = CloseReason(event.code)
                return


def test_it_is_enabled_offers_nothing_and_leaves_what_is_sent_alone() -> None:
    extension = BoundedInflate(LIMIT)
    assert extension.enabled()
    assert extension.offer() is False
    sender = FrameProtocol(False, [extension])
    assert sender.send_data(b"hello", fin=True) == b"\x82\x05hello"
    assert sender.ping(b"x") == b"\x89\x01x"


@given(
    st.lists(
        st.tuples(st.binary(max_size=400), st.integers(1, 40), st.integers(0, 9), st.booleans()), max_size=4
    ),
    st.lists(st.integers(0, 60), max_size=5),
    st.integers(1, 50),
    st.booleans(),
)
def test_messages_come_back_in_any_chunks_and_fragments(
    contents: list[tuple[bytes, int, int, bool]], sizes: list[int], chunk: int, pinged: bool
) -> None:
    wire, wanted = b"", []
    for content, times, level, compressed in contents:
        wanted.append(content * times)
        if compressed:
            wire += fragments(deflate(content * times, level=level, window=9 + level % 7), sizes)
        else:
            wire += frame(Opcode.BINARY, content * times)
        if pinged:
            wire += frame(Opcode.PING, b"between")
    server = Server().feed(wire, chunk=chunk)
    assert (server.closed, server.messages) == (None, wanted)


@given(st.lists(st.text(max_size=200), max_size=4), st.integers(1, 30))
def test_wsproto_as_the_client_is_understood(texts: list[str], chunk: int) -> None:
    extension = PerMessageDeflate(client_no_context_takeover=True, server_no_context_takeover=True)
    extension.finalize("permessage-deflate; client_no_context_takeover; server_no_context_takeover")
    client = FrameProtocol(True, [extension])
    server = Server()
    for text in texts:
        for piece, fin in ((text[: len(text) // 2], False), (text[len(text) // 2 :], True)):
            server.feed(bytes(client.send_data(piece, fin=fin)), chunk=chunk)
    assert (server.closed, server.messages) == (None, [text.encode() for text in texts])


def test_control_frames_amid_a_compressed_message_are_left_alone() -> None:
    payload = deflate(b"hello hello hello")
    wire = (
        frame(Opcode.TEXT, payload[:4], fin=False, rsv1=True)
        + frame(Opcode.PING, b"amid")
        + frame(Opcode.CONTINUATION, b"", fin=False)
        + frame(Opcode.PING)
        + frame(Opcode.CONTINUATION, payload[4:])
    )
    for chunk in (1, 7, len(wire)):
        server = Server().feed(wire, chunk=chunk)
        assert server.messages == [b"hello hello hello"]
        assert server.pings == [b"amid", b""]
        assert server.closed is None


def test_an_uncompressed_message_after_a_compressed_one_is_not_inflated() -> None:
    looks_compressed = deflate(b"abc")
    wire = frame(Opcode.BINARY, deflate(b"abc"), rsv1=True) + frame(Opcode.BINARY, looks_compressed)
    assert Server().feed(wire).messages == [b"abc", looks_compressed]


@pytest.mark.parametrize(
    "payload",
    [
        b"\x00",
        b"",
        b"\x02\x00",
        deflate(b"", flush=zlib.Z_FINISH),
        deflate(b"", flush=zlib.Z_FINISH) + b"\x00",
    ],
)
@pytest.mark.parametrize("sizes", [[], [0], [1, 0]])
def test_empty_messages(payload: bytes, sizes: list[int]) -> None:
    server = Server().feed(
        fragments(payload, sizes) + frame(Opcode.BINARY, deflate(b"next"), rsv1=True), chunk=1
    )
    assert (server.closed, server.messages) == (None, [b"", b"next"])


def test_examples_of_rfc_7692_section_7_2_3() -> None:
    for payload in (
        "f2 48 cd c9 c9 07 00",  # one block
        "00 05 00 fa ff 48 65 6c 6c 6f 00",  # a block without compression
        "f3 48 cd c9 c9 07 00 00",  # a final block, and the empty one that follows it
        "f2 48 05 00 00 00 ff ff ca c9 c9 07 00",  # two blocks
    ):
        for sizes in ([], [1], [3, 1], [7]):
            assert Server().feed(fragments(bytes.fromhex(payload), sizes)).messages == [b"Hello"], payload


def test_final_blocks_end_streams_and_not_the_message() -> None:
    ended = deflate(b"one ", flush=zlib.Z_FINISH)
    for payload, wanted in (
        (ended, b"one "),  # without the empty block that ought to follow
        (ended + b"\x00", b"one "),
        (ended + deflate(b"two"), b"one two"),
        (ended * MAX_STREAMS, None),
        (ended * (MAX_STREAMS - 1), b"one " * (MAX_STREAMS - 1)),
    ):
        for chunk in (1, 5, 1 << 20):
            server = Server().feed(frame(Opcode.BINARY, payload, rsv1=True), chunk=chunk)
            assert server.messages == ([] if wanted is None else [wanted])
            assert server.closed is (CloseReason.INVALID_FRAME_PAYLOAD_DATA if wanted is None else None)


def test_content_may_fill_the_limit_exactly() -> None:
    for chunk in (1, 1 << 20):
        exact = Server(1000).feed(frame(Opcode.BINARY, deflate(b"a" * 1000), rsv1=True), chunk=chunk)
        assert exact.messages == [b"a" * 1000]
        above = Server(1000).feed(frame(Opcode.BINARY, deflate(b"a" * 1001), rsv1=True), chunk=chunk)
        assert above.closed is CloseReason.MESSAGE_TOO_BIG


BOMB = deflate(bytes(64 * MIB), level=9)


@pytest.mark.parametrize("sizes", [[], [1] * 50, [20_000, 20_000]], ids=["whole", "slivers", "fragments"])
@pytest.mark.parametrize("chunk", [1, 4096, 1 << 30])
def test_bombs_cost_what_the_limit_says(sizes: list[int], chunk: int) -> None:
    wire = fragments(BOMB, sizes)
    assert len(wire) < 66_000
    server = Server()
    server.feed(b"")
    with memory_below(512 * 1024):  # wire copies, wsproto's buffers, and the limit twice
        server.feed(wire[:40_000] if chunk == 1 else wire, chunk=chunk)
    assert server.closed is CloseReason.MESSAGE_TOO_BIG
    assert server.messages == []
    assert server.taken <= LIMIT


def test_a_bomb_of_many_streams_is_bounded_too() -> None:
    server = Server().feed(
        frame(Opcode.BINARY, deflate(bytes(2 * LIMIT // 3), flush=zlib.Z_FINISH) * 3, rsv1=True)
    )
    assert server.closed is CloseReason.MESSAGE_TOO_BIG
    # 32,000 streams of two bytes each hold nothing, and would cost an inflater each.
    server = Server().feed(frame(Opcode.BINARY, b"\x03\x00" * 32_000, rsv1=True))
    assert server.closed is CloseReason.INVALID_FRAME_PAYLOAD_DATA


def test_the_limit_is_for_each_message_by_itself() -> None:
    wire = frame(Opcode.BINARY, deflate(b"a" * 1000), rsv1=True) * 5
    assert len(Server(1000).feed(wire).messages) == 5


def test_text_that_inflates_to_broken_utf8_is_invalid() -> None:
    server = Server().feed(frame(Opcode.TEXT, deflate(b"\xff\xfe"), rsv1=True))
    assert server.closed is CloseReason.INVALID_FRAME_PAYLOAD_DATA


@pytest.mark.parametrize("opcode", [Opcode.TEXT, Opcode.BINARY])
def test_a_message_cut_short_is_invalid(opcode: Opcode) -> None:
    payload = deflate(bytes(value % 97 for value in range(1000)))
    for end in range(1, len(payload) - 1):
        server = Server().feed(frame(opcode, payload[:end], rsv1=True))
        assert (server.closed, server.messages) == (CloseReason.INVALID_FRAME_PAYLOAD_DATA, []), end


def test_rubbish_is_invalid() -> None:
    for payload in (b"\xff" * 10, b"\x06", b"hello world"):
        server = Server().feed(frame(Opcode.BINARY, payload, rsv1=True))
        assert server.closed is CloseReason.INVALID_FRAME_PAYLOAD_DATA


@pytest.mark.parametrize(
    "wire",
    [
        frame(Opcode.PING, b"x", rsv1=True),
        frame(Opcode.CLOSE, b"\x03\xe8", rsv1=True),
        frame(Opcode.TEXT, deflate(b"ab")[:2], fin=False, rsv1=True)
        + frame(Opcode.CONTINUATION, deflate(b"ab")[2:], rsv1=True),
        frame(Opcode.TEXT, b"ab", fin=False) + frame(Opcode.CONTINUATION, deflate(b"ab"), rsv1=True),
        frame(Opcode.CONTINUATION, deflate(b"ab"), rsv1=True),
        frame(Opcode.CONTINUATION, b"ab"),
        frame(Opcode.TEXT, b"ab", fin=False) + frame(Opcode.TEXT, deflate(b"ab"), rsv1=True),
        frame(Opcode.TEXT, deflate(b"ab"), fin=False, rsv1=True) + frame(Opcode.TEXT, b"ab"),
        bytes([frame(Opcode.TEXT, b"ab")[0] | 0x20]) + frame(Opcode.TEXT, b"ab")[1:],
    ],
    ids=[
        "ping",
        "close",
        "second frame",
        "of a plain message",
        "stray",
        "stray plain",
        "amid",
        "amid plain",
        "rsv2",
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_bits_and_frames_where_they_must_not_be(wire: bytes, chunk: int) -> None:
    server = Server().feed(wire, chunk=chunk)
    assert (server.closed, server.messages) == (CloseReason.PROTOCOL_ERROR, [])


@given(st.binary(max_size=200), st.lists(st.integers(0, 50), max_size=4), st.integers(1, 50))
def test_any_payload_gives_the_same_verdict_in_any_chunks(
    payload: bytes, sizes: list[int], chunk: int
) -> None:
    whole = Server(1000).feed(frame(Opcode.BINARY, payload, rsv1=True))
    parts = Server(1000).feed(fragments(payload, sizes), chunk=chunk)
    assert (whole.closed, whole.messages) == (parts.closed, parts.messages)
    assert parts.taken <= 1000
