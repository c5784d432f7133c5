"""The ring says what the store would say, or nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.engine.base import HistoryQuery, Retention
from broker.engine.ring import Ring
from broker.protocol.events import Event, Position, make_event
from tests.engine.contract import naive_page, offsets

FOREVER = Retention(1000, 1e9)


def placed(offset: int, ts: float = 0.0, epoch: str = "e") -> Event:
    event = make_event("deal:1", "said", None, ts)
    event.place(Position(epoch, offset))
    return event


@given(
    count=st.integers(0, 30),
    opened_at=st.integers(0, 30),
    capacity=st.integers(0, 12),
    warmed=st.integers(0, 30),
    size=st.integers(0, 35),
    ttl=st.integers(0, 35),
    limit=st.integers(0, 12),
    kind=st.sampled_from(["since", "foreign", "before", "at", "tail"]),
    value=st.integers(0, 34),
)
def test_exact_or_silent(
    *, count: int, opened_at: int, capacity: int, warmed: int, size: int, ttl: int, limit: int,
    kind: str, value: int,
) -> None:  # fmt: skip
    """Event n was said at second n; the ring saw those after ``opened_at``, and some that were read."""
    events = [placed(offset, offset) for offset in range(1, count + 1)]
    opened_at = min(opened_at, count)
    ring = Ring(Position("e", opened_at), Retention(size, ttl), capacity)
    for event in events[opened_at:]:
        ring.append(event)
    ring.extend_left(events[warmed:])
    query = {
        "since": HistoryQuery(limit, since=Position("e", value)),
        "foreign": HistoryQuery(limit, since=Position("f", value)),
        "before": HistoryQuery(limit, before=value),
        "at": HistoryQuery(limit, at=value),
        "tail": HistoryQuery(limit, tail=value),
    }[kind]
    now = count + 1.0
    page = ring.page(query, now)
    expected = naive_page(
        [(event.offset, event.ts) for event in events], Position("e", count), query, ring.retention, now
    )
    if page is not None:
        assert (offsets(page), page.recovered, page.more) == expected
        assert page.top == Position("e", count)
    covered = {event.offset for event in events[opened_at:][-capacity:]} if capacity else set()
    if kind == "since" and count >= value >= count - len(covered):
        assert page is not None, "all that was missed is in memory"


@given(
    capacity=st.integers(0, 40),
    pieces=st.lists(st.integers(0, 30), max_size=8),
)
def test_memory_is_bounded(capacity: int, pieces: list[int]) -> None:
    ring = Ring(Position("e", 0), FOREVER, capacity)
    offset = 0
    for piece in pieces:
        for _ in range(piece):
            offset += 1
            ring.append(placed(offset))
        assert min(offset, capacity) <= len(ring) <= capacity + max(capacity // 4, 16)
        assert ring.top == Position("e", offset)


def test_only_touching_events_are_taken() -> None:
    ring = Ring(Position("e", 10), FOREVER, 4)
    ring.extend_left([placed(offset) for offset in range(1, 9)])  # 9 and 10 are missing
    assert len(ring) == 0
    ring.append(placed(11))
    ring.extend_left([placed(offset) for offset in range(1, 13)])
    page = ring.page(HistoryQuery(limit=9, since=Position("e", 7)), 1.0)
    assert page is not None
    assert offsets(page) == [8, 9, 10, 11]
