"""Frames that a socket would not take at once. No IO: the caller sends.

An outbox exists only while its session has a backlog. It counts bytes, joins
small frames into one send, and keeps what a short send left over, so that a
frame is never torn. The limits it is held against are the caller's.
"""

from __future__ import annotations

from collections import deque

JOIN_BYTES = 64 * 1024
"""Small frames are joined up to this size: one system call instead of many."""


class Outbox:
    """Bytes waiting for one socket, in order."""

    __slots__ = ("_chunks", "size")

    def __init__(self) -> None:
        self._chunks: deque[bytes | memoryview] = deque()
        self.size = 0
        """Bytes waiting."""

    def push(self, frame: bytes, sent: int = 0) -> None:
        """Queue what is left of ``frame`` after ``sent`` bytes of it went out."""
        self._chunks.append(memoryview(frame)[sent:] if sent else frame)
        self.size += len(frame) - sent

    def peek(self) -> bytes | memoryview:
        """The bytes to send next; empty when nothing waits. Call :meth:`advance` with what went out."""
        chunks = self._chunks
        if not chunks:
            return b""
        first = chunks[0]
        if len(chunks) == 1 or len(first) + len(chunks[1]) > JOIN_BYTES:
            return first
        parts = [chunks.popleft()]
        size = len(first)
        while chunks and size + len(chunks[0]) <= JOIN_BYTES:
            size += len(chunks[0])
            parts.append(chunks.popleft())
        joined = b"".join(parts)
        chunks.appendleft(joined)
        return joined

    def advance(self, sent: int) -> None:
        """``sent`` bytes of what :meth:`peek` gave are on their way."""
        self.size -= sent
        first = self._chunks.popleft()
        if sent < len(first):
            self._chunks.appendleft(memoryview(first)[sent:])

    def keep_first(self) -> int:
        """Forget all but the first chunk, of which a part may be on its way; return the bytes forgotten."""
        first = self._chunks[0]
        forgotten = self.size - len(first)
        self._chunks = deque([first])
        self.size = len(first)
        return forgotten
