"""Replies leave in the order in which their places were taken, each once, as early as they may."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from broker.server.replies import Replies, Reply


@given(st.lists(st.booleans(), max_size=30), st.randoms(use_true_random=False))
def test_replies_keep_their_order(known: list[bool], chooser: random.Random) -> None:
    replies = Replies()
    posted: list[bytes] = []
    open_places: list[tuple[int, Reply]] = []

    def post(message: bytes, after_events: bool) -> None:
        assert after_events == (int(message) % 2 == 0)
        posted.append(message)

    for number, ready in enumerate(known):
        if ready:
            replies.hold(b"%d" % number, after_events=number % 2 == 0)
        else:
            open_places.append((number, replies.reserve()))
    chooser.shuffle(open_places)
    replies.release(post)
    filled = {number for number, ready in enumerate(known) if ready}
    for number, reply in open_places:
        reply.fill(b"%d" % number, after_events=number % 2 == 0)
        filled.add(number)
        replies.release(post)
        first_unknown = min(set(range(len(known))) - filled, default=len(known))
        assert posted == [b"%d" % place for place in range(first_unknown)]
    replies.release(post)
    assert posted == [b"%d" % place for place in range(len(known))]
    assert len(replies) == 0


def test_where_nothing_was_asked_nothing_is_said() -> None:
    replies = Replies()
    replies.reserve().fill(None, after_events=True)
    posted: list[bytes] = []
    replies.release(lambda message, _after: posted.append(message))
    assert not posted
    assert len(replies) == 0
