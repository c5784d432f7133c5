"""Acknowledged positions are neither lost nor moved back while they wait."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.engine.base import Seen
from broker.engine.seen import SeenBuffer, newest

NOTE = st.tuples(st.sampled_from(["ann", "bob"]), st.integers(1, 20))
STEPS = st.lists(NOTE | st.sampled_from(["take", "written", "failed"]), max_size=30)


@given(steps=STEPS)
def test_buffer_and_disk_together_know_the_furthest(steps: list[tuple[str, int] | str]) -> None:
    buffer = SeenBuffer()
    disk: list[Seen] = []
    furthest: dict[str, int] = {}
    under_way = []
    for step in steps:
        if isinstance(step, tuple):
            who, offset = step
            buffer.note("deal:1", who, offset, float(offset))
            furthest[who] = max(furthest.get(who, 0), offset)
        elif step == "take":
            if buffer:
                under_way.append(buffer.take())
            assert not buffer
        elif under_way:
            request = under_way.pop(0)
            if step == "written":
                disk += [Seen(who, *position) for who, position in request.positions["deal:1"].items()]
            buffer.settle(request, written=step == "written")
        assert {seen.who: seen.offset for seen in newest([*disk, *buffer.of("deal:1")])} == furthest
    assert buffer.of("deal:2") == []
