"""Pages of long lists, without ever holding the loop for long.

A node may have a million rooms. Sorting them for one page would stop every
session for a second, so a page is chosen from slices, with a chance for other
tasks between them; only the page itself is kept.
"""

from __future__ import annotations

import binascii
import heapq
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Final, TypeVar

import msgspec
import trio

from broker.errors import BrokerError, ErrorCode

SLICE: Final = 1000
"""Things looked at between two checkpoints: 0.6 ms of CPU for pages of 100, 2.6 ms for the largest."""

T = TypeVar("T")
K = TypeVar("K", bound=tuple[Any, ...])


async def page(
    things: Iterator[T],
    key: Callable[[T], K | None],
    limit: int,
    after: K | None,
) -> tuple[list[T], K | None]:
    """The ``limit`` things with the smallest keys above ``after``, and the key to go on from.

    ``key`` gives a tuple, unique for each thing, or ``None`` for one that does
    not belong to the list. The second result is ``None`` on the last page.
    ``things`` must not change meanwhile: pass an iterator over a copy.
    """
    best: list[tuple[K, int, T]] = []
    serial = 0  # between equal keys, so that things themselves are never compared
    while piece := list(islice(things, SLICE)):
        fresh = []
        for thing in piece:
            place = key(thing)
            if place is not None and (after is None or place > after):
                serial += 1
                fresh.append((place, serial, thing))
        best = heapq.nsmallest(limit + 1, best + fresh)
        await trio.lowlevel.checkpoint()
    more = len(best) > limit
    chosen = best[:limit]
    return [thing for _, _, thing in chosen], chosen[-1][0] if more else None


def write_cursor(key: tuple[Any, ...] | None) -> str | None:
    """A key as text for a URL."""
    if key is None:
        return None
    return urlsafe_b64encode(msgspec.json.encode(key)).decode().rstrip("=")


def read_cursor(text: str | None, kind: type[K]) -> K | None:
    """The key that :func:`write_cursor` wrote. Raises ``bad_message`` for anything else."""
    if text is None:
        return None
    try:
        raw = urlsafe_b64decode(text + "=" * (-len(text) % 4))
        key: K = msgspec.json.decode(raw, type=kind)
    except (binascii.Error, msgspec.MsgspecError, ValueError):
        raise BrokerError(ErrorCode.BAD_MESSAGE, "after: not the 'next' of a page of this list") from None
    return key
