from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from hypercorn.trio.worker_context import EventWrapper
from trio.testing import MockClock, wait_all_tasks_blocked

from broker.admin import guard
from broker.admin.guard import GuardedStream


@asynccontextmanager
async def pair(scope: trio.CancelScope) -> AsyncIterator[tuple[GuardedStream, trio.SocketStream]]:
    """A guarded stream and the client's end of it."""
    ended = EventWrapper()
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    try:
        yield GuardedStream(ours, scope, ended.set), theirs
    finally:
        ours.socket.close()
        theirs.socket.close()


async def test_bytes_go_both_ways_until_the_end() -> None:
    async with pair(trio.CancelScope()) as (server, client):
        await client.send_all(b"question")
        assert await server.receive_some(1000) == b"question"
        await server.send_all(b"answer")
        assert await client.receive_some() == b"answer"
        await client.send_eof()
        assert await server.receive_some(1000) == b""
        await server.aclose()
        assert await client.receive_some() == b""


async def test_every_answer_moves_the_deadline(mock_clock: MockClock) -> None:
    scope = trio.CancelScope()
    async with pair(scope) as (server, _client):
        first = scope.deadline
        assert first == trio.current_time() + guard.ANSWER_SECONDS
        mock_clock.jump(5)
        await server.send_all(b"answer")
        assert scope.deadline == first + 5


async def test_a_client_that_does_not_read_cannot_hold_a_shielded_write(autojump_clock: MockClock) -> None:
    async with pair(trio.CancelScope()) as (server, _client):
        started = trio.current_time()
        with trio.CancelScope(shield=True), pytest.raises(trio.BrokenResourceError):
            await server.send_all(b"x" * 10_000_000)
        assert trio.current_time() == started + guard.WRITE_SECONDS


async def test_unanswered_input_is_bounded_and_the_refusal_still_arrives() -> None:
    async with pair(trio.CancelScope()) as (server, client), trio.open_nursery() as nursery:
        total = guard.REQUEST_BYTES + 3_000_000
        sent = trio.Event()

        async def flood() -> None:
            await client.send_all(b"x" * total)
            await client.send_eof()
            sent.set()

        nursery.start_soon(flood)
        read = 0
        while read < guard.REQUEST_BYTES:
            read += len(await server.receive_some(65536))
        ended = trio.Event()

        async def read_on() -> None:
            assert await server.receive_some(65536) == b""
            ended.set()

        nursery.start_soon(read_on)
        await wait_all_tasks_blocked()
        assert not ended.is_set()
        assert not sent.is_set()
        await server.send_all(b"too large")
        await server.aclose()
        await sent.wait()
        await ended.wait()
        assert await client.receive_some() == b"too large"
        assert await client.receive_some() == b""


async def test_a_reader_that_waits_when_the_stream_closes_reads_the_rest_away() -> None:
    async with pair(trio.CancelScope()) as (server, client), trio.open_nursery() as nursery:
        results: list[bytes] = []

        async def read() -> None:
            results.append(await server.receive_some(65536))

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        nursery.start_soon(server.aclose)
        await wait_all_tasks_blocked()
        assert await client.receive_some() == b""  # our half ends first
        await client.send_all(b"still talking")
        await wait_all_tasks_blocked()
        assert results == []
        await client.send_eof()
    assert results == [b""]


async def test_a_client_that_does_not_close_is_not_waited_for(autojump_clock: MockClock) -> None:
    async with pair(trio.CancelScope()) as (server, client):
        started = trio.current_time()
        await server.aclose()
        assert trio.current_time() == started + guard.LINGER_SECONDS
        await server.aclose()  # again, at once
        assert trio.current_time() == started + guard.LINGER_SECONDS
        assert await server.receive_some(1) == b""
        assert await client.receive_some() == b""


async def test_a_client_that_is_gone_is_no_error() -> None:
    async with pair(trio.CancelScope()) as (server, client):
        await client.send_all(b"x")
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.socket.close()
        await server.aclose()


async def test_abort_wakes_whoever_waits() -> None:
    async with pair(trio.CancelScope()) as (server, _client), trio.open_nursery() as nursery:

        async def write() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await server.send_all(b"x" * 10_000_000)

        nursery.start_soon(write)
        await wait_all_tasks_blocked()
        server.abort()
