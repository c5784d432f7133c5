"""Answers to publishers whose event is stored, while what stands before it cannot be read."""

from __future__ import annotations

from collections.abc import Sequence

import trio
from trio.testing import MockClock

from broker.engine.open_rooms import OpenRooms
from broker.errors import BrokerError, ErrorCode
from broker.link.keys import Keys
from broker.protocol.events import Event, Position, make_event
from broker.streams.delivery import LATE, Delivery, Stream
from broker.streams.generation import Generation
from broker.streams.scripts import StreamNames, Tokens

KEYS = Keys("broker:")
EPOCH = "e"


class Rig:
    """A delivery with one open room, and what came of it."""

    def __init__(self) -> None:
        tokens = Tokens()
        rooms = OpenRooms(4, lambda _request, _urgent: None)
        self.delivery = Delivery(
            rooms,
            Generation(KEYS, lambda: "node", tokens),
            tokens.start,
            repair=lambda _stream, _at: None,
            strange=lambda: None,
            failed=self._fail,
        )
        self.delivery.deliver, self.delivery.moved = self._deliver, lambda _room, _position: None
        self.delivered: list[int] = []
        self.answers: dict[int, Position | BrokerError] = {}
        stream = Stream("deal:1", StreamNames(KEYS).of("deal:1"), Position(EPOCH, 0), 60.0)
        self.delivery.begin(stream, lambda: None)

    def _fail(self, error: Exception) -> None:
        raise error

    def _deliver(self, events: Sequence[Event]) -> None:
        self.delivered += [event.offset for event in events]

    def stored(self, offset: int) -> None:
        event = make_event("deal:1", "said", offset, 1.0)

        def done(answer: Position | BrokerError) -> None:
            assert offset not in self.answers, "answered twice"
            self.answers[offset] = answer

        self.delivery.stored(event, Position(EPOCH, offset), done, again=False)
        self.delivery.flush()


async def test_who_waits_too_long_is_told_and_the_event_still_passes(autojump_clock: MockClock) -> None:
    rig = Rig()
    rig.stored(2)
    rig.stored(3)
    rig.delivery.answer_late(trio.current_time())
    assert rig.answers == {}
    await trio.sleep(LATE / 2)
    rig.stored(5)
    await trio.sleep(LATE / 2)
    rig.delivery.answer_late(trio.current_time())
    for offset in (2, 3):
        answer = rig.answers[offset]
        assert isinstance(answer, BrokerError)
        assert (answer.code, answer.room) == (ErrorCode.UNAVAILABLE, "deal:1")
    assert (rig.delivery.late, rig.delivered) == (2, [])
    rig.stored(1)
    rig.stored(4)
    assert rig.delivered == [1, 2, 3, 4, 5]
    assert rig.answers[5] == Position(EPOCH, 5)
    await trio.sleep(2 * LATE)
    rig.delivery.answer_late(trio.current_time())
    assert rig.delivery.late == 2
