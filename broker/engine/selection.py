"""Which offsets answer a history query: plain arithmetic, the same for memory and disk.

A stream at rest is two numbers, *floor* and *top*: the offsets ``floor + 1`` to
``top`` are kept, everything at or below ``floor`` is gone (trimmed, or beyond
its retention). The ring and the store each find these two numbers in their own
way and then ask :func:`select`, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from broker.engine.base import HistoryQuery
from broker.protocol.events import Position


class Selection(NamedTuple):
    """The offsets ``first`` to ``last`` (empty if ``last`` is ``first - 1``), and what to say of them."""

    first: int
    last: int
    recovered: bool
    more: bool


def select(query: HistoryQuery, top: Position, floor: int, first_since: Callable[[float], int]) -> Selection:
    """Choose the offsets that answer ``query``.

    ``first_since(ts)`` returns the first kept offset whose event is not older
    than the Unix time ``ts``, or ``top.offset + 1``; it is called for ``at`` only.
    A ``since`` that was trimmed away is not recovered, and the page goes on at
    the oldest event that is left, so that a reader who pages through the past
    is told of the hole and still gets the rest.
    """
    if query.since is not None:
        since = query.since
        if since.epoch != top.epoch or since.offset > top.offset:
            return Selection(top.offset + 1, top.offset, recovered=False, more=False)
        first = max(since.offset, floor) + 1
        last = min(first + query.limit - 1, top.offset)
        return Selection(first, last, recovered=since.offset >= floor, more=last < top.offset)
    if query.at is not None:
        first = first_since(query.at)
        last = min(first + query.limit - 1, top.offset)
        return Selection(first, last, recovered=False, more=last < top.offset)
    if query.before is not None:
        count = query.limit
        last = max(min(query.before - 1, top.offset), floor)
    else:
        assert query.tail is not None, "one of since, before, at, tail must be given"
        count = min(query.tail, query.limit)
        last = top.offset
    first = max(last - count, floor) + 1
    return Selection(first, last, recovered=False, more=first > floor + 1)
