"""Fetching dictionaries by hand; what a session makes of them is in ``test_life``."""

from __future__ import annotations

import hashlib

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import memory_stream_pair

from broker.client.dictionaries import SIZE_LIMIT, DictionaryError, fetch, wanted
from broker.client.messages import Dictionary

CONTENT = b"a dictionary" * 1000


def offered(url: str = "/dict/7", content: bytes = CONTENT) -> Dictionary:
    return Dictionary(7, url, hashlib.sha256(content).hexdigest(), "deal:*")


async def fetched(dictionary: Dictionary, *answer: bytes) -> bytes:
    """What comes of an answer that arrives in these pieces."""
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await theirs.receive_some()
            for piece in answer:
                await theirs.send_all(piece)
                await trio.testing.wait_all_tasks_blocked()
            await theirs.aclose()

        nursery.start_soon(serve)
        content = await fetch(ours, "broker.test", dictionary)
        nursery.cancel_scope.cancel()
    return content


async def test_the_answer_may_come_in_pieces_and_chunks() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%b\r\n" % (len(CONTENT), CONTENT)
    assert await fetched(offered(), head[:10], head[10:], chunk[:500], chunk[500:], b"0\r\n\r\n") == CONTENT


@pytest.mark.parametrize("url", ["http://elsewhere.test/dict/7", "//elsewhere.test/dict/7", "dict/7", ""])
async def test_only_from_the_broker_itself(url: str) -> None:
    ours, _ = memory_stream_pair()
    with pytest.raises(DictionaryError, match="not a path"):
        await fetch(ours, "broker.test", offered(url))


async def test_no_larger_than_allowed() -> None:
    content = b"x" * (SIZE_LIMIT + 1)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)
    with pytest.raises(ExceptionGroup) as caught:
        await fetched(offered(content=content), answer)
    assert caught.group_contains(DictionaryError, match="larger than")


async def test_a_connection_that_breaks_meanwhile() -> None:
    ours, theirs = memory_stream_pair()
    await trio.aclose_forcefully(theirs)
    with pytest.raises(DictionaryError):
        await fetch(ours, "broker.test", offered())


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [("deal:*", True), ("*", True), ("deal:7", True), ("deal:", False), ("d?al:*", False), ("*:7", True)],
)
def test_patterns(pattern: str, fits: bool) -> None:
    dictionary = Dictionary(7, "/dict/7", "", pattern)
    assert wanted(dictionary, ["other", "deal:7"]) is fits
    assert not wanted(dictionary, [])


@given(st.text(), st.text())
def test_a_star_stands_for_anything(head: str, tail: str) -> None:
    assert wanted(Dictionary(7, "/dict/7", "", "deal:*"), [f"deal:{head}{tail}"])
