"""Whatever comes after the upgrade: each violation gets its close code, is counted, and disturbs nobody."""

from __future__ import annotations

import struct
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import zstandard
from trio.testing import wait_all_tasks_blocked

from broker.app import Broker
from tests.e2e.harness import CONFIG, config, jump, running, until
from tests.e2e.raw_client import (
    BINARY,
    CLOSE,
    CONT,
    PING,
    PONG,
    TEXT,
    close_frame,
    connected,
    frame,
    opened,
)

ZSTD = "broker.v1.zstd"


@asynccontextmanager
async def in_company() -> AsyncIterator[Broker]:
    """A broker with a good client, which must be served before and after."""
    async with running() as broker, connected(broker.client_port) as good:
        await good.ask("join", room="deal:1")
        yield broker
        await good.ask("publish", room="deal:1", event="e", data="well")
        assert (await good.event())["data"] == "well"


def head(first: int, second: int, rest: bytes = b"") -> bytes:
    return bytes([first, second]) + rest


def squeezed(payload: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (deflate.compress(payload) + deflate.flush(zlib.Z_SYNC_FLUSH))[:-4]


VIOLATIONS = {
    "UTF-8 that is broken": (frame(TEXT, b'{"op":"\xff"}'), 1007),
    "UTF-8 that ends early": (frame(TEXT, b"\xe2\x82"), 1007),
    "UTF-8 with a surrogate": (frame(TEXT, b"\xed\xa0\x80"), 1007),
    "UTF-8 broken in the second fragment": (
        frame(TEXT, b"a", fin=False) + frame(CONT, b"\xff"),
        1007,
    ),
    "not masked": (frame(TEXT, b"{}", masked=False), 1002),
    "a ping that is not masked": (frame(PING, b"", masked=False), 1002),
    "RSV1 without deflate": (frame(TEXT, b"{}", rsv=4), 1002),
    "RSV2": (frame(TEXT, b"{}", rsv=2), 1002),
    "RSV3": (frame(TEXT, b"{}", rsv=1), 1002),
    "a control frame with RSV1": (frame(PING, b"", rsv=4), 1002),
    "opcode 3": (frame(3, b""), 1002),
    "opcode 7": (frame(7, b"x" * 70_000), 1002),
    "opcode 11": (frame(11, b""), 1002),
    "opcode 15": (frame(15, b""), 1002),
    "a ping of 126 bytes": (frame(PING, b"p" * 126), 1002),
    "a close frame of 126 bytes": (frame(CLOSE, b"\x03\xe8" + b"r" * 124), 1002),
    "a ping in fragments": (frame(PING, b"", fin=False), 1002),
    "a continuation of nothing": (frame(CONT, b""), 1002),
    "a message within a message": (frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"), 1002),
    "a close frame of one byte": (frame(CLOSE, b"\x03"), 1002),
    "close code 0": (close_frame(0), 1002),
    "close code 999": (close_frame(999), 1002),
    "close code 1005": (close_frame(1005), 1002),
    "close code 1006": (close_frame(1006), 1002),
    "close code 1015": (close_frame(1015), 1002),
    "close code 5000": (close_frame(5000), 1002),
    "a close reason that is not UTF-8": (frame(CLOSE, b"\x03\xe8\xff"), 1007),
    "a length of two bytes that fits in none": (head(0x81, 0xFE, b"\0\5\0\0\0\0hello"), 1002),
    "a length of eight bytes that fits in two": (head(0x81, 0xFF, struct.pack(">Q", 200) + bytes(204)), 1002),
    "a length with its highest bit": (head(0x81, 0xFF, b"\xff" * 8 + bytes(4)), 1002),
    "a declared length of 2^62": (head(0x81, 0xFF, struct.pack(">Q", 2**62) + bytes(4)), 1009),
    "64 KiB and one byte": (head(0x81, 0xFF, struct.pack(">Q", 65537) + bytes(4)), 1009),
    "64 KiB and one byte in fragments": (
        frame(TEXT, b" " * 40_000, fin=False) + frame(CONT, b" " * 25_537, fin=False),
        1009,
    ),
    "fragments without end": (
        frame(TEXT, b"", fin=False) + frame(CONT, b"", fin=False) * 5_000,
        1009,
    ),
    "fragments of one byte": (frame(TEXT, b"[", fin=False) + frame(CONT, b" ", fin=False) * 64, 1009),
    "binary where JSON was agreed": (frame(BINARY, b"{}"), 1003),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20, 1002),
    "noise": (bytes(range(128, 256)) * 8, 1002),
}


@pytest.mark.parametrize("name", VIOLATIONS)
async def test_each_violation_gets_its_close_code(name: str) -> None:
    data, code = VIOLATIONS[name]
    async with in_company() as broker:
        for pieces in (1, 7):
            async with connected(broker.client_port) as client:
                size = max(1, len(data) // pieces)
                for start in range(0, len(data), size):
                    try:
                        await client.send_bytes(data[start : start + size])
                    except OSError:
                        break
                    if pieces > 1:
                        await wait_all_tasks_blocked(0.0005)
                ended = await client.end()
                assert ended.code == code, ended
                assert not any(message["op"] == "bye" for batch in client.batches for message in batch)
        await until(lambda: len(broker.context.registry.sessions) == 1)
        assert broker.context.registry.closes == {code: 2}


async def test_messages_at_the_limits_are_taken() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        text = b'{"op":"ping","id":"large"}'.ljust(65536)
        await client.send_bytes(frame(TEXT, text))
        assert (await client.next())["id"] == "large"
        pieces = [frame(TEXT, b'{"op":"ping","id":"many"', fin=False)]
        pieces += [frame(CONT, b" ", fin=False)] * 62
        await client.send_bytes(b"".join([*pieces, frame(CONT, b"}")]))
        assert (await client.next())["id"] == "many"


async def test_control_frames_between_fragments() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        await client.send_bytes(
            frame(TEXT, b'{"op":"ping",', fin=False) + frame(PING, b"now") + frame(CONT, b'"id":1}')
        )
        assert await client.frame() == (PONG, 0, b"now")
        assert (await client.next())["id"] == 1


@pytest.mark.parametrize("opcode", [PING, PONG])
async def test_a_flood_of_control_frames_ends_the_session(opcode: int) -> None:
    async with in_company() as broker:
        async with connected(broker.client_port) as client:
            await client.send_bytes(frame(opcode, b"x") * 1000)
            bye, code = await client.ended_with()
            assert code == 4529
            assert bye is not None
        await until(lambda: broker.context.registry.closes == {4529: 1})


async def test_a_close_frame_is_answered_with_its_code() -> None:
    async with in_company() as broker:
        for code in (1000, 1001, 3000, 4999):
            async with connected(broker.client_port) as client:
                await client.send_bytes(close_frame(code, "so long"))
                ended = await client.end()
                assert (ended.code, ended.reason) == (code, "so long")
        async with connected(broker.client_port) as client:
            await client.send_bytes(frame(CLOSE))
            assert (await client.end()).code == 1005


async def test_nothing_is_handled_after_a_close_frame() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        message = b'{"op":"publish","room":"deal:1","event":"e","data":1}'
        await client.send_bytes(close_frame(1000) + frame(TEXT, message))
        await client.end()
        assert broker.hub.published == 0


async def test_who_does_not_answer_our_close_is_cut() -> None:
    async with in_company() as broker, opened(broker.client_port, token="nonsense") as client:
        await until(lambda: broker.context.registry.connections == 2)
        while (await client.frame())[0] != CLOSE:
            pass
        jump(CONFIG.server.close_timeout + 0.1)
        await until(lambda: broker.context.registry.connections == 1)


async def test_a_half_closed_socket_ends_the_session() -> None:
    async with in_company() as broker, connected(broker.client_port) as client:
        await client.ask("join", room="deal:1")
        await client.stream.send_eof()  # type: ignore[attr-defined]
        assert (await client.end()).code == 1006
        await until(lambda: broker.context.registry.closes == {1006: 1})


async def test_a_client_that_vanishes_leaves_its_rooms() -> None:
    async with running() as broker, connected(broker.client_port) as watcher:
        await watcher.ask("join", room="deal:1", presence=True)
        async with opened(broker.client_port) as client:
            await client.next()
            await client.ask("join", room="deal:1")
            await watcher.until("presence")
        while "left" not in await watcher.until("presence"):
            pass


# -- compressed -------------------------------------------------------------------------------


def zstd(payload: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(payload)


def unstated(payload: bytes) -> bytes:
    squeezer = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return squeezer.compress(payload) + squeezer.flush()


PING_TEXT = b'{"op":"ping","id":1}'
ZSTD_VIOLATIONS = {
    "no zstd": (b"hello", 1007),
    "nothing": (b"", 1007),
    "a bomb": (zstd(bytes(64 << 20)), 1009),
    "a bomb that does not say so": (unstated(bytes(64 << 20)), 1007),
    "a little too much": (zstd(b" " * (256 * 1024 + 1)), 1009),
    "size not stated": (unstated(PING_TEXT), 1007),
    "cut": (zstd(PING_TEXT)[:-1], 1007),
    "two frames": (zstd(PING_TEXT) * 2, 1007),
    "something after it": (zstd(PING_TEXT) + b"x", 1007),
    "a skippable frame": (b"\x50\x2a\x4d\x18\x04\0\0\0abcd", 1007),
    "not UTF-8": (zstd(b'"\xff"'), 1007),
    "an unknown dictionary": (
        zstandard.ZstdCompressor(
            dict_data=zstandard.train_dictionary(
                1024, [b"%d events of a kind, number %d" % (n, n * 7) for n in range(2000)], dict_id=77
            )
        ).compress(PING_TEXT),
        1007,
    ),
}


@pytest.mark.parametrize("name", ZSTD_VIOLATIONS)
async def test_each_zstd_violation_gets_its_close_code(name: str) -> None:
    payload, code = ZSTD_VIOLATIONS[name]
    async with in_company() as broker:
        async with connected(broker.client_port, protocol=ZSTD) as client:
            await client.send_bytes(frame(BINARY, payload))
            assert (await client.end()).code == code
        await until(lambda: broker.context.registry.closes == {code: 1})


async def test_zstd_both_ways() -> None:
    async with running() as broker, connected(broker.client_port, protocol=ZSTD) as client:
        assert b"Sec-WebSocket-Protocol: broker.v1.zstd" in client.head
        await client.ask("join", room="deal:1")
        await client.send_bytes(
            frame(BINARY, zstd(b'{"op":"publish","id":9,"room":"deal:1","event":"e","data":[1,2]}'))
        )
        assert (await client.event())["data"] == [1, 2]
        assert (await client.next())["id"] == 9
        assert set(client.opcodes) == {BINARY}
        await client.send_bytes(frame(BINARY, zstd(b"broken")))
        assert (await client.next())["code"] == "bad_message"


DEFLATE_VIOLATIONS = {
    "a bomb": (squeezed(bytes(60 << 20)), 1009),
    "a little too much": (squeezed(b" " * (256 * 1024 + 1)), 1009),
    "no deflate": (b"\xff\xff\xff\xff", 1007),
    "not UTF-8": (squeezed(b'"\xff"'), 1007),
}


@pytest.mark.parametrize("name", DEFLATE_VIOLATIONS)
async def test_each_deflate_violation_gets_its_close_code(name: str) -> None:
    payload, code = DEFLATE_VIOLATIONS[name]
    async with in_company() as broker:
        async with connected(broker.client_port, deflate=True) as client:
            await client.send_bytes(frame(TEXT, payload, rsv=4))
            assert (await client.end()).code == code
        await until(lambda: broker.context.registry.closes == {code: 1})


async def test_deflate_both_ways() -> None:
    async with running() as broker, connected(broker.client_port, deflate=True) as client:
        assert b"server_no_context_takeover; client_no_context_takeover" in client.head
        await client.ask("join", room="deal:1")
        text = b'{"op":"publish","id":9,"room":"deal:1","event":"e","data":"' + b"abc " * 200 + b'"}'
        await client.send_bytes(frame(TEXT, squeezed(text), rsv=4))
        assert (await client.event())["data"] == "abc " * 200
        await client.send_bytes(frame(TEXT, text))
        assert (await client.event())["data"] == "abc " * 200


async def test_deflate_can_be_turned_off() -> None:
    plain = config(server={"deflate": False})
    async with running(plain) as broker, connected(broker.client_port, deflate=True) as client:
        assert b"Extensions" not in client.head


async def test_zstd_can_be_turned_off() -> None:
    plain = config(server={"zstd": False})
    both = "broker.v1.zstd, broker.v1.json"
    async with running(plain) as broker, connected(broker.client_port, protocol=both) as client:
        assert b"broker.v1.json" in client.head


# -- /echo ------------------------------------------------------------------------------------


async def test_echo_gives_back_what_came() -> None:
    async with running() as broker, opened(broker.client_port, path="/echo") as client:
        for size in (0, 1, 125, 126, 65535, 65536, 3_000_000):
            await client.send_bytes(frame(BINARY, b"\xfe" * size))
            assert await client.frame() == (BINARY, 0, b"\xfe" * size)
        await client.send_bytes(frame(TEXT, b"a", fin=False) + frame(CONT, b"b" * 10) + frame(PING, b"p"))
        assert await client.frame() == (TEXT, 0, b"a" + b"b" * 10)
        assert await client.frame() == (PONG, 0, b"p")
        await client.send_bytes(frame(PONG, b"unasked"))
        await client.send_bytes(close_frame(1000))
        assert (await client.end()).code == 1000


async def test_echo_of_deflate() -> None:
    async with running() as broker, opened(broker.client_port, path="/echo", deflate=True) as client:
        await client.send_bytes(frame(TEXT, squeezed(b"again and " * 50), rsv=4))
        opcode, rsv, payload = await client.frame()
        assert (opcode, rsv) == (TEXT, 4)
        assert zlib.decompressobj(-15).decompress(payload + b"\0\0\xff\xff") == b"again and " * 50
        await client.close()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(TEXT, b"\xff"), 1007),
        (frame(TEXT, b"", masked=False), 1002),
        (head(0x82, 0xFF, struct.pack(">Q", (16 << 20) + 1) + bytes(4)), 1009),
    ],
)
async def test_echo_has_the_same_frames(data: bytes, code: int) -> None:
    async with running() as broker, opened(broker.client_port, path="/echo") as client:
        await client.send_bytes(data)
        assert (await client.end()).code == code


async def test_an_echo_that_nobody_reads_ends() -> None:
    async with running() as broker, opened(broker.client_port, path="/echo") as client:
        megabytes = frame(BINARY, bytes(8 << 20))
        try:
            for _ in range(40):
                await client.send_bytes(megabytes)
                await client.send_bytes(frame(PING, b"p" * 125) * 100)
                assert broker.traffic.queued <= (64 << 20) + (8 << 20) + 4096
        except OSError:
            pass
        jump(CONFIG.server.close_timeout + 1)
        await until(lambda: broker.context.registry.connections == 0)


async def test_echoes_end_with_the_broker() -> None:
    async with running() as broker, opened(broker.client_port, path="/echo"):
        pass
