"""A WebSocket client of raw bytes, so that a test can also say what no honest client would."""

from __future__ import annotations

import json
import struct
import zlib
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import trio
import zstandard

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
DEFLATE = "permessage-deflate; client_max_window_bits"

Message = dict[str, Any]


class Ended(Exception):  # noqa: N818 - an end is no error
    """The server ended the stream: ``code`` and ``reason`` of its close frame, 1006 without one."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


def request(path: str = "/ws", *, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """A good upgrade request."""
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: localhost",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {KEY}",
        "Sec-WebSocket-Version: 13",
        *(f"{name}: {value}" for name, value in headers),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, masked: bool = True) -> bytes:
    """One frame, legal or not."""
    size = len(payload)
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    mark = 0x80 if masked else 0
    if size < 126:
        head = bytes([first, mark | size])
    elif size < 65536:
        head = bytes([first, mark | 126]) + struct.pack(">H", size)
    else:
        head = bytes([first, mark | 127]) + struct.pack(">Q", size)
    return head + (b"\0\0\0\0" if masked else b"") + payload


def close_frame(code: int, reason: str = "") -> bytes:
    """A close frame."""
    return frame(CLOSE, struct.pack(">H", code) + reason.encode())


class RawClient:
    """One connection. ``next`` gives the messages one by one, whatever batches they came in."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.status = 0
        self.head = b""
        self.welcome: Message = {}
        self.batches: list[list[Message]] = []
        """Every batch as it came."""
        self.opcodes: list[int] = []
        self.dictionaries: dict[int, zstandard.ZstdCompressionDict] = {}
        self.dictionaries_used: list[int] = []
        """Dictionary of each zstd frame, 0 for none."""
        self._buffer = b""
        self._messages: deque[Message] = deque()
        self._ids = 0

    # -- handshake ----------------------------------------------------------------

    async def upgrade(self, data: bytes) -> int:
        """Send a request; return the status of the answer."""
        await self.stream.send_all(data)
        return await self.answer()

    async def answer(self) -> int:
        """The status of the answer, 0 if none came."""
        while b"\r\n\r\n" not in self._buffer:
            data = await self.stream.receive_some()
            if not data:
                return 0
            self._buffer += data
        self.head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        self.status = int(self.head.split(b" ", 2)[1])
        return self.status

    async def body(self) -> bytes:
        """The rest of the stream."""
        while data := await self.stream.receive_some():
            self._buffer += data
        return self._buffer

    # -- out ----------------------------------------------------------------------

    async def send_bytes(self, data: bytes) -> None:
        """Any bytes."""
        await self.stream.send_all(data)

    async def send(self, *messages: Message) -> None:
        """Each message in a frame of its own, all in one packet."""
        await self.send_bytes(b"".join(frame(TEXT, json.dumps(message).encode()) for message in messages))

    async def send_text(self, text: str | bytes) -> None:
        """One text frame."""
        await self.send_bytes(frame(TEXT, text.encode() if isinstance(text, str) else text))

    async def ask(self, op: str, **fields: Any) -> Message:
        """Send one message with an id; its reply. What else comes is kept for :meth:`next`."""
        self._ids += 1
        identifier = f"q{self._ids}"
        await self.send({"op": op, "id": identifier, **fields})
        return await self.reply(identifier)

    async def reply(self, identifier: int | str) -> Message:
        """The reply to ``identifier``; what comes before it is kept for :meth:`next`."""
        kept: list[Message] = []
        while True:
            message = await self.next()
            if message.get("id") == identifier and message["op"] in {"ok", "error"}:
                self._messages.extendleft(reversed(kept))
                return message
            kept.append(message)

    async def refusal(self, op: str, **fields: Any) -> str:
        """The error code that one message is answered with."""
        answer = await self.ask(op, **fields)
        assert answer["op"] == "error", answer
        return str(answer["code"])

    # -- in -----------------------------------------------------------------------

    async def frame(self) -> tuple[int, int, bytes]:
        """Opcode, reserved bits and payload of the next frame. Raises :class:`Ended` at the end."""
        head = await self._take(2)
        size = head[1] & 0x7F
        if size == 126:
            (size,) = struct.unpack(">H", await self._take(2))
        elif size == 127:
            (size,) = struct.unpack(">Q", await self._take(8))
        assert not head[1] & 0x80, "a server does not mask"
        assert head[0] & 0x80, "this server does not fragment"
        return head[0] & 0x0F, head[0] >> 4 & 7, await self._take(size)

    async def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            try:
                data = await self.stream.receive_some(65536)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                raise Ended(1006)
            self._buffer += data
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    async def next(self) -> Message:
        """The next message. Pings are answered. Raises :class:`Ended` when the server closes."""
        while not self._messages:
            opcode, rsv, payload = await self.frame()
            self.opcodes.append(opcode)
            if opcode == PING:
                await self.send_bytes(frame(PONG, payload))
            elif opcode == CLOSE:
                await self._answer_close(payload)
                code, reason = (struct.unpack(">H", payload[:2])[0], payload[2:]) if payload else (1005, b"")
                raise Ended(code, reason.decode())
            elif opcode in {TEXT, BINARY}:
                batch = json.loads(self._text(opcode, rsv, payload))
                assert isinstance(batch, list), "a frame is an array of messages"
                assert batch
                self.batches.append(batch)
                self._messages.extend(batch)
        return self._messages.popleft()

    async def _answer_close(self, payload: bytes) -> None:
        try:
            await self.send_bytes(frame(CLOSE, payload[:2]))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # ours crossed theirs

    def _text(self, opcode: int, rsv: int, payload: bytes) -> bytes:
        if opcode == BINARY:
            parameters = zstandard.get_frame_parameters(payload)
            assert parameters.content_size, "the content size is always told"
            assert not parameters.has_checksum
            self.dictionaries_used.append(parameters.dict_id)
            dictionary = self.dictionaries[parameters.dict_id] if parameters.dict_id else None
            return zstandard.ZstdDecompressor(dict_data=dictionary).decompress(payload)
        if rsv & 4:
            return zlib.decompressobj(-15).decompress(payload + b"\0\0\xff\xff")
        return payload

    async def take(self, count: int) -> list[Message]:
        """The next ``count`` messages."""
        return [await self.next() for _ in range(count)]

    async def event(self) -> Message:
        """The next event; positions and presence are passed over."""
        while True:
            message = await self.next()
            if message["op"] == "event":
                return message

    async def until(self, op: str) -> Message:
        """The next message with this op; the others are passed over."""
        while True:
            message = await self.next()
            if message["op"] == op:
                return message

    async def end(self) -> Ended:
        """Read to the end; how it ended."""
        while True:
            try:
                await self.next()
            except Ended as ended:
                return ended

    async def ended_with(self) -> tuple[Message | None, int]:
        """``bye``, if there was one, and the close code."""
        bye = None
        while True:
            try:
                message = await self.next()
            except Ended as ended:
                return bye, ended.code
            if message["op"] == "bye":
                bye = message

    async def close(self, code: int = 1000) -> None:
        """Close in good order."""
        try:
            await self.send_bytes(close_frame(code))
            await self.end()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the test has ended the connection in its own way
        await self.stream.aclose()


async def tcp(port: int) -> trio.SocketStream:
    """A plain connection to this machine."""
    return await trio.open_tcp_stream("127.0.0.1", port)


@asynccontextmanager
async def opened(
    port: int,
    *,
    path: str = "/ws",
    token: str | None = None,
    protocol: str | None = None,
    deflate: bool = False,
    headers: Iterable[tuple[str, str]] = (),
) -> AsyncIterator[RawClient]:
    """A client after its upgrade, before it has read anything. Closed at the end, come what may."""
    wanted = list(headers)
    if token is not None:
        wanted.append(("Authorization", f"Bearer {token}"))
    if protocol is not None:
        wanted.append(("Sec-WebSocket-Protocol", protocol))
    if deflate:
        wanted.append(("Sec-WebSocket-Extensions", DEFLATE))
    async with await tcp(port) as stream:
        client = RawClient(stream)
        status = await client.upgrade(request(path, headers=wanted))
        assert status == 101, client.head
        yield client


@asynccontextmanager
async def connected(port: int, **options: Any) -> AsyncIterator[RawClient]:
    """A client that has been welcomed, and closes in good order."""
    async with opened(port, **options) as client:
        client.welcome = await client.next()
        yield client
        with trio.move_on_after(5):
            await client.close()
