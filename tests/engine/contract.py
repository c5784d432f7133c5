"""The engine contract as tests: every engine passes them unchanged.

A test module of an engine subclasses :class:`EngineContract` and gives it a
``harness`` fixture::

    class TestEmbedded(EngineContract):
        @pytest.fixture
        def harness(self, tmp_path): ...

Nothing here looks inside an engine, or waits for time to pass: the engine's
clock is a :class:`ManualClock`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from operator import itemgetter
from typing import Any, Protocol

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.engine.base import Engine, HistoryPage, HistoryQuery, Retention, Seen
from broker.errors import BrokerError, ErrorCode
from broker.protocol.events import Event, Position, make_event

START = 1_700_000_000.0
KEEP = Retention(100, 3600.0)
ALL = HistoryQuery(limit=1000, tail=1000)


class ManualClock:
    """Unix time that stands still unless told."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class Harness(Protocol):
    """How the contract gets engines. All of one harness share one store and one clock."""

    clock: ManualClock
    survives: bool
    """Whether the store outlives the engine."""

    def engine(self, *, ring_events: int = 4) -> Engine: ...

    def fresh(self) -> Harness:
        """A harness like this one, with an empty store and a clock of its own."""


class Reply:
    """The answer to one publish."""

    def __init__(self) -> None:
        self.answers: list[Position | BrokerError] = []
        self._answered = trio.Event()

    def __call__(self, answer: Position | BrokerError) -> None:
        self.answers.append(answer)
        self._answered.set()

    async def answer(self) -> Position | BrokerError:
        """The answer, which must be the only one."""
        await self._answered.wait()
        [answer] = self.answers
        return answer

    async def position(self) -> Position:
        """The same, where success is expected."""
        answer = await self.answer()
        assert isinstance(answer, Position), answer
        return answer


class Rig:
    """A running engine, and everything that it delivered."""

    def __init__(self, engine: Engine, clock: ManualClock) -> None:
        self.engine = engine
        self.clock = clock
        self.delivered: list[Event] = []
        self.scope = trio.CancelScope()

    def deliver(self, events: Sequence[Event]) -> None:
        assert events
        self.delivered += events

    def offsets(self, room: str) -> list[int]:
        """Offsets delivered for ``room``, in the order of delivery."""
        return [event.offset for event in self.delivered if event.room == room]

    def publish(
        self,
        room: str,
        data: object = None,
        *,
        key: str | None = None,
        publisher: str = "ann",
        retention: Retention = KEEP,
        **fields: Any,
    ) -> Reply:
        event = make_event(room, "said", data, self.clock.now, key=key, publisher=publisher, **fields)
        reply = Reply()
        self.engine.publish(event, retention, reply)
        return reply

    async def fill(
        self, room: str, count: int, *, retention: Retention = KEEP, step: float = 0.0
    ) -> Position:
        """Publish ``count`` events, ``step`` seconds apart."""
        replies = []
        for number in range(count):
            replies.append(self.publish(room, number, retention=retention))
            self.clock.now += step
        return [await reply.position() for reply in replies][-1]

    async def history(self, room: str, query: HistoryQuery, retention: Retention = KEEP) -> HistoryPage:
        """Read, and check that memory and disk agree whenever memory answers."""
        page = await self.engine.history(room, query, retention)
        quick = self.engine.history_nowait(room, query)
        if quick is not None:
            assert summary(quick) == summary(page)
        return page


@asynccontextmanager
async def running(harness: Harness, *, ring_events: int = 4) -> AsyncIterator[Rig]:
    """An engine that runs inside the block."""
    rig = Rig(harness.engine(ring_events=ring_events), harness.clock)
    async with trio.open_nursery() as nursery:
        rig.scope = nursery.cancel_scope
        await nursery.start(rig.engine.run, rig.deliver)
        yield rig
        nursery.cancel_scope.cancel()


def offsets(page: HistoryPage) -> list[int]:
    return [event.offset for event in page.events]


def summary(page: HistoryPage) -> tuple[Any, ...]:
    return [(event.position, event.wire) for event in page.events], page.top, page.recovered, page.more


def naive_page(
    events: Sequence[tuple[int, float]], top: Position, query: HistoryQuery, retention: Retention, now: float
) -> tuple[list[int], bool, bool]:
    """The contract in its plainest words: (offsets, recovered, more) from all (offset, ts) ever stored."""
    kept = [
        offset for offset, ts in events if offset > top.offset - retention.size and ts > now - retention.ttl
    ]
    if query.since is not None:
        epoch, since = query.since
        if epoch != top.epoch or since > top.offset:
            return [], False, False
        wanted = [offset for offset in kept if offset > since]
        missed = top.offset - since
        return wanted[: query.limit], len(wanted) == missed, len(wanted) > query.limit
    if query.at is not None:
        stamps = dict(events)
        wanted = [offset for offset in kept if stamps[offset] >= query.at]
        return wanted[: query.limit], False, len(wanted) > query.limit
    if query.before is not None:
        wanted, count = [offset for offset in kept if offset < query.before], query.limit
    else:
        assert query.tail is not None
        wanted, count = kept, min(query.limit, query.tail)
    return wanted[len(wanted) - min(count, len(wanted)) :], False, len(wanted) > count


class EngineContract:
    """Subclass it and define the ``harness`` fixture."""

    # Publishing

    async def test_offsets_are_consecutive_in_call_order(self, harness: Harness) -> None:
        async with running(harness) as rig:
            replies = [rig.publish("deal:1", number) for number in range(50)]
            positions = [await reply.position() for reply in replies]
            assert [position.offset for position in positions] == list(range(1, 51))
            [epoch] = {position.epoch for position in positions}
            assert 0 < len(epoch) <= 64
            assert rig.offsets("deal:1") == list(range(1, 51))

    async def test_a_delivered_event_is_placed(self, harness: Harness) -> None:
        async with running(harness) as rig:
            position = await rig.publish("deal:1", {"a": 1}, slot="card", tags={"region": "EMEA"}).position()
            [event] = rig.delivered
            assert event.position == position
            assert event.wire.endswith(b',"offset":1}')
            [stored] = (await rig.history("deal:1", ALL)).events
            assert (stored.wire, stored.slot, stored.tags) == (event.wire, "card", {"region": "EMEA"})
            assert stored.ts == event.ts

    async def test_rooms_are_streams_of_their_own(self, harness: Harness) -> None:
        async with running(harness) as rig:
            names = [f"deal:{number % 3}" for number in range(30)]
            positions = [await reply.position() for reply in [rig.publish(name) for name in names]]
            assert len({position.epoch for position in positions}) == 3
            for name in set(names):
                assert rig.offsets(name) == list(range(1, 11))

    async def test_deliver_comes_before_done(self, harness: Harness) -> None:
        async with running(harness) as rig:
            seen: list[bool] = []
            answered = trio.Event()

            def done(answer: Position | BrokerError) -> None:
                assert isinstance(answer, Position)
                seen.append(answer.offset in rig.offsets("deal:1"))
                if len(seen) == 20:
                    answered.set()

            for number in range(20):
                rig.engine.publish(make_event("deal:1", "said", number, START), KEEP, done)
            await answered.wait()
            assert all(seen)

    async def test_many_publishers_at_once(self, harness: Harness) -> None:
        async with running(harness) as rig:
            own: dict[int, list[int]] = {number: [] for number in range(40)}

            async def publisher(number: int) -> None:
                for turn in range(10):
                    position = await rig.publish(f"deal:{turn % 2}", number, publisher=str(number)).position()
                    own[number].append(position.offset)

            async with trio.open_nursery() as nursery:
                for number in own:
                    nursery.start_soon(publisher, number)
            for parity in (0, 1):
                assert rig.offsets(f"deal:{parity}") == list(range(1, 201))
                assert all(mine[parity::2] == sorted(mine[parity::2]) for mine in own.values())

    async def test_unusual_names_and_data(self, harness: Harness) -> None:
        async with running(harness) as rig:
            for room in ("a'b\"{}%", "räume:☃", "x" * 200, "deal:1 "):
                await rig.publish(room, ["\u0000", "☃", "]},", 2**53], key="k\u2028'").position()
                page = await rig.history(room, ALL)
                assert [event.wire for event in page.events] == [rig.delivered[-1].wire]

    # Idempotency

    async def test_a_key_is_stored_once(self, harness: Harness) -> None:
        async with running(harness) as rig:
            first = await rig.publish("deal:1", "first", key="k").position()
            other = await rig.publish("deal:1", "other").position()
            assert await rig.publish("deal:1", "second", key="k").position() == first
            assert other.offset == 2
            assert rig.offsets("deal:1") == [1, 2]

    async def test_a_key_twice_in_one_breath(self, harness: Harness) -> None:
        async with running(harness) as rig:
            replies = [rig.publish("deal:1", number, key="k") for number in range(5)]
            assert {await reply.position() for reply in replies} == {replies[0].answers[0]}
            assert rig.offsets("deal:1") == [1]

    async def test_keys_belong_to_room_and_publisher(self, harness: Harness) -> None:
        async with running(harness) as rig:
            await rig.publish("deal:1", key="k", publisher="ann").position()
            assert (await rig.publish("deal:1", key="k", publisher="bob").position()).offset == 2
            assert (await rig.publish("deal:2", key="k", publisher="ann").position()).offset == 1

    async def test_a_key_is_remembered_for_five_minutes(self, harness: Harness) -> None:
        async with running(harness) as rig:
            await rig.publish("deal:1", key="k").position()
            rig.clock.now += 299
            assert (await rig.publish("deal:1", key="k").position()).offset == 1
            rig.clock.now += 2
            assert (await rig.publish("deal:1", key="k").position()).offset == 2
            assert (await rig.publish("deal:1", key="k").position()).offset == 2

    # Rooms

    async def test_open_makes_a_room_warm(self, harness: Harness) -> None:
        async with running(harness) as rig:
            engine = rig.engine
            assert engine.position("deal:1") is None
            assert engine.history_nowait("deal:1", ALL) is None
            top = await engine.open("deal:1", KEEP)
            assert top.offset == 0
            assert engine.position("deal:1") == top
            assert await rig.publish("deal:1").position() == Position(top.epoch, 1)
            assert engine.position("deal:1") == Position(top.epoch, 1) == await engine.open("deal:1", KEEP)
            page = engine.history_nowait("deal:1", HistoryQuery(limit=10, since=top))
            assert page is not None
            assert offsets(page) == [1]
            engine.close("deal:1")
            engine.close("deal:1")
            assert engine.position("deal:1") is None
            assert await engine.open("deal:1", KEEP) == Position(top.epoch, 1)

    async def test_concurrent_opens_agree(self, harness: Harness) -> None:
        async with running(harness) as rig:
            tops: list[Position] = []

            async def join() -> None:
                tops.append(await rig.engine.open("deal:1", KEEP))

            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(join)
            assert len(tops) == 10
            assert len(set(tops)) == 1

    async def test_position_is_what_was_delivered(self, harness: Harness) -> None:
        """Whoever reads the top and joins in the same moment misses nothing."""
        async with running(harness) as rig:
            replies = [rig.publish("deal:1") for _ in range(20)]
            top = await rig.engine.open("deal:1", KEEP)
            assert rig.offsets("deal:1") == list(range(1, top.offset + 1))
            for reply in replies:
                await reply.position()
            assert rig.engine.position("deal:1") == Position(top.epoch, 20)

    async def test_a_cancelled_open_leaves_nothing_open(self, harness: Harness) -> None:
        async with running(harness) as rig:
            rooms = [f"deal:{number}" for number in range(20)]
            opened: list[str] = []

            async def join(room: str) -> None:
                await rig.engine.open(room, KEEP)
                opened.append(room)

            async with trio.open_nursery() as nursery:
                for room in rooms:
                    nursery.start_soon(join, room)
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            await rig.publish("deal:0").position()  # comes back after whatever was asked before it
            assert [room for room in rooms if rig.engine.position(room) is not None] == sorted(
                opened, key=rooms.index
            )

    async def test_a_room_that_is_not_open_works_too(self, harness: Harness) -> None:
        async with running(harness) as rig:
            position = await rig.publish("deal:1").position()
            assert rig.offsets("deal:1") == [1]
            assert rig.engine.position("deal:1") is None
            assert (await rig.history("deal:1", ALL)).top == position

    async def test_an_unknown_room_has_an_epoch_that_lasts(self, harness: Harness) -> None:
        async with running(harness) as rig:
            page = await rig.history("deal:1", ALL)
            assert (page.events, page.top.offset, page.more) == ([], 0, False)
            assert await rig.publish("deal:1").position() == Position(page.top.epoch, 1)
            assert (await rig.history("deal:1", HistoryQuery(limit=5, since=page.top))).recovered

    # History

    @pytest.mark.parametrize("warm", [True, False])
    @pytest.mark.parametrize(
        ("query", "expected", "more"),
        [
            (HistoryQuery(limit=3, tail=5), [8, 9, 10], True),
            (HistoryQuery(limit=9, tail=2), [9, 10], True),
            (HistoryQuery(limit=9, tail=0), [], True),
            (HistoryQuery(limit=20, tail=20), list(range(1, 11)), False),
            (HistoryQuery(limit=10, tail=10), list(range(1, 11)), False),
            (HistoryQuery(limit=3, before=10), [7, 8, 9], True),
            (HistoryQuery(limit=3, before=4), [1, 2, 3], False),
            (HistoryQuery(limit=3, before=1), [], False),
            (HistoryQuery(limit=3, before=99), [8, 9, 10], True),
            (HistoryQuery(limit=3, at=START + 30), [4, 5, 6], True),
            (HistoryQuery(limit=3, at=START + 75), [9, 10], False),
            (HistoryQuery(limit=3, at=START - 1), [1, 2, 3], True),
            (HistoryQuery(limit=3, at=START + 999), [], False),
        ],
    )
    async def test_reading_the_past(
        self, harness: Harness, query: HistoryQuery, expected: list[int], more: bool, warm: bool
    ) -> None:
        async with running(harness) as rig:
            if warm:
                await rig.engine.open("deal:1", KEEP)
            top = await rig.fill("deal:1", 10, step=10.0)
            page = await rig.history("deal:1", query)
            assert (offsets(page), page.more, page.top) == (expected, more, top)

    @pytest.mark.parametrize("warm", [True, False])
    @pytest.mark.parametrize(
        ("since", "limit", "expected"),
        [(7, 9, [8, 9, 10]), (0, 3, [1, 2, 3]), (10, 3, []), (8, 1, [9])],
    )
    async def test_recovery(
        self, harness: Harness, since: int, limit: int, expected: list[int], *, warm: bool
    ) -> None:
        async with running(harness) as rig:
            if warm:
                await rig.engine.open("deal:1", KEEP)
            top = await rig.fill("deal:1", 10)
            page = await rig.history("deal:1", HistoryQuery(limit=limit, since=Position(top.epoch, since)))
            assert (offsets(page), page.recovered, page.top) == (expected, True, top)
            assert page.more is (since + len(expected) < 10)

    @pytest.mark.parametrize("warm", [True, False])
    async def test_foreign_or_future_positions_are_not_recovered(self, harness: Harness, warm: bool) -> None:
        async with running(harness) as rig:
            if warm:
                await rig.engine.open("deal:1", KEEP)
            top = await rig.fill("deal:1", 10)
            for since in (Position("other", 9), Position("", 0), Position(top.epoch, 11)):
                page = await rig.history("deal:1", HistoryQuery(limit=5, since=since))
                assert (page.events, page.recovered, page.top) == ([], False, top)

    @pytest.mark.parametrize("warm", [True, False])
    async def test_size_bounds_the_past(self, harness: Harness, warm: bool) -> None:
        keep = Retention(5, 3600.0)
        async with running(harness) as rig:
            if warm:
                await rig.engine.open("deal:1", keep)
            top = await rig.fill("deal:1", 12, retention=keep)
            page = await rig.history("deal:1", ALL, keep)
            assert (offsets(page), page.more) == ([8, 9, 10, 11, 12], False)
            at_the_edge = HistoryQuery(limit=9, since=Position(top.epoch, 7))
            assert (await rig.history("deal:1", at_the_edge, keep)).recovered
            beyond = await rig.history("deal:1", HistoryQuery(limit=2, since=Position(top.epoch, 6)), keep)
            assert not beyond.recovered
            # Not recovered, but the reader may go on where the past begins.
            assert (offsets(beyond), beyond.more) == ([8, 9], True)

    @pytest.mark.parametrize("warm", [True, False])
    async def test_ttl_bounds_the_past(self, harness: Harness, warm: bool) -> None:
        keep = Retention(100, 60.0)
        async with running(harness) as rig:
            if warm:
                await rig.engine.open("deal:1", keep)
            top = await rig.fill("deal:1", 6, retention=keep, step=10.0)  # at 0, 10, … 50; now it is 60
            assert offsets(await rig.history("deal:1", ALL, keep)) == [2, 3, 4, 5, 6]
            rig.clock.now += 25
            assert offsets(await rig.history("deal:1", ALL, keep)) == [4, 5, 6]
            for since, recovered in ((3, True), (2, False)):
                query = HistoryQuery(limit=9, since=Position(top.epoch, since))
                page = await rig.history("deal:1", query, keep)
                assert (offsets(page), page.recovered) == ([4, 5, 6], recovered)
            rig.clock.now += 60
            page = await rig.history("deal:1", HistoryQuery(limit=9, since=top), keep)
            assert (page.events, page.recovered, page.top) == ([], True, top)
            assert (await rig.history("deal:1", HistoryQuery(limit=9, at=START), keep)).events == []

    async def test_pages_belong_to_their_reader(self, harness: Harness) -> None:
        async with running(harness) as rig:
            await rig.fill("deal:1", 3)
            pages: list[HistoryPage] = []

            async def read() -> None:
                pages.append(await rig.engine.history("deal:1", ALL, KEEP))

            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(read)
            pages[0].events.clear()
            assert [offsets(page) for page in pages[1:]] == [[1, 2, 3]] * 4

    async def test_a_read_sees_what_was_answered_before_it(self, harness: Harness) -> None:
        async with running(harness) as rig:

            async def read() -> None:
                await rig.engine.history("deal:1", ALL, KEEP)

            async with trio.open_nursery() as nursery:
                for turn in range(1, 30):
                    nursery.start_soon(read)  # may be under way when ours begins
                    await rig.publish("deal:1").position()
                    assert len((await rig.engine.history("deal:1", ALL, KEEP)).events) == turn

    # Acknowledged positions

    async def test_acknowledgements_never_move_back(self, harness: Harness) -> None:
        async with running(harness) as rig:
            await rig.fill("deal:1", 9)
            assert await rig.engine.acknowledgements("deal:1") == []
            for who, offset in (("ann", 3), ("ann", 7), ("ann", 5), ("bob", 1)):
                rig.engine.acknowledge("deal:1", who, offset, START + offset)
            seen = await rig.engine.acknowledgements("deal:1")
            assert sorted(seen) == [Seen("ann", 7, START + 7), Seen("bob", 1, START + 1)]
            assert await rig.engine.acknowledgements("deal:2") == []

    # Restart and end

    async def test_a_restart_changes_nothing(self, harness: Harness) -> None:
        if not harness.survives:
            pytest.skip("this store lives and dies with its engine")
        async with running(harness) as rig:
            top = await rig.fill("deal:1", 5)
            keyed = await rig.publish("deal:1", "keyed", key="k").position()
            empty = await rig.engine.open("deal:2", KEEP)
            rig.engine.acknowledge("deal:1", "ann", 4, START)
        async with running(harness) as rig:
            assert await rig.engine.open("deal:1", KEEP) == keyed
            assert await rig.engine.open("deal:2", KEEP) == empty
            assert await rig.publish("deal:1", "again", key="k").position() == keyed
            assert await rig.publish("deal:1").position() == Position(top.epoch, 7)
            page = await rig.history("deal:1", HistoryQuery(limit=50, since=Position(top.epoch, 0)))
            assert offsets(page) == list(range(1, 8))
            assert page.recovered
            rig.engine.acknowledge("deal:1", "ann", 2, START + 1)
            assert await rig.engine.acknowledgements("deal:1") == [Seen("ann", 4, START)]

    async def test_cancelling_answers_everybody(self, harness: Harness) -> None:
        async with running(harness) as rig:
            replies = [rig.publish("deal:1", number) for number in range(100)]
            rig.scope.cancel()
        answers = [await reply.answer() for reply in replies]
        stored = [answer.offset for answer in answers if isinstance(answer, Position)]
        assert stored == rig.offsets("deal:1") == list(range(1, len(stored) + 1))
        for answer in answers[len(stored) :]:
            assert isinstance(answer, BrokerError)
            assert answer.code is ErrorCode.UNAVAILABLE
        if harness.survives:
            async with running(harness) as again:
                assert offsets(await again.history("deal:1", ALL)) == stored

    async def test_after_the_end_everything_is_unavailable(self, harness: Harness) -> None:
        async with running(harness) as rig:
            await rig.engine.open("deal:1", KEEP)
        engine = rig.engine
        answer = await rig.publish("deal:1").answer()
        assert isinstance(answer, BrokerError)
        assert answer.code is ErrorCode.UNAVAILABLE
        assert answer.retry
        assert engine.position("deal:1") is None
        for call in (
            lambda: engine.open("deal:1", KEEP),
            lambda: engine.history("deal:1", ALL, KEEP),
            lambda: engine.acknowledgements("deal:1"),
        ):
            with pytest.raises(BrokerError) as caught:
                await call()
            assert caught.value.code is ErrorCode.UNAVAILABLE

    async def test_a_second_run_of_the_same_engine_is_refused(self, harness: Harness) -> None:
        async with running(harness) as rig:
            with pytest.raises(RuntimeError):
                await rig.engine.run(rig.deliver)
            await rig.publish("deal:1").position()

    # Everything at once, against a model

    @given(data=st.data())
    @settings(
        max_examples=30,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )
    def test_against_a_model(self, harness: Harness, data: st.DataObject) -> None:
        steps = data.draw(st.lists(STEPS, min_size=1, max_size=25), label="steps")
        ring_events = data.draw(st.integers(0, 6), label="ring_events")
        trio.run(ModelCheck(harness.fresh(), ring_events).check, steps)


ROOMS = st.sampled_from(["a", "b"])
SMALL = st.integers(0, 12)
Step = tuple[Any, ...]
QUERIES: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.just("since"), SMALL), st.tuples(st.just("before"), SMALL.map(lambda n: n + 1)),
    st.tuples(st.just("at"), st.integers(-5, 60)), st.tuples(st.just("tail"), SMALL),
)  # fmt: skip
STEPS: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.just("publish"), st.lists(st.tuples(ROOMS, st.none() | st.sampled_from("xyz")), max_size=6)),
    st.tuples(st.just("publish"), st.lists(st.tuples(ROOMS, st.none()), min_size=1, max_size=6)),
    st.tuples(st.just("open"), ROOMS),
    st.tuples(st.just("close"), ROOMS),
    st.tuples(st.just("read"), ROOMS, QUERIES, st.integers(1, 8)),
    st.tuples(st.just("wait"), st.sampled_from([1, 10, 40, 290])),
    st.tuples(st.just("acknowledge"), ROOMS, st.sampled_from(["ann", "bob"]), SMALL),
    st.tuples(st.just("restart")),
)


class ModelRoom:
    """A stream as the contract describes it."""

    def __init__(self) -> None:
        self.epoch: str | None = None
        self.events: list[tuple[int, float]] = []
        self.keys: dict[str, tuple[int, float]] = {}
        self.seen: dict[str, int] = {}

    def position(self, offset: int) -> Position:
        assert self.epoch is not None
        return Position(self.epoch, offset)

    def believe(self, position: Position) -> None:
        """The engine chooses the epoch once."""
        self.epoch = self.epoch or position.epoch

    def publish(self, key: str | None, now: float) -> int:
        """The offset that an event with ``key`` must get now."""
        if key is not None and key in self.keys and self.keys[key][1] > now - 300:
            return self.keys[key][0]
        offset = len(self.events) + 1
        self.events.append((offset, now))
        if key is not None:
            self.keys[key] = (offset, now)
        return offset


class ModelCheck:
    """Walks an engine and the model through the same steps."""

    retention = Retention(7, 100.0)

    def __init__(self, harness: Harness, ring_events: int) -> None:
        self.harness = harness
        self.ring_events = ring_events
        self.rooms = {"a": ModelRoom(), "b": ModelRoom()}
        self.opened: set[str] = set()

    async def check(self, steps: list[Step]) -> None:
        """Split at the restarts; each part has an engine of its own."""
        rest = list(steps)
        while rest:
            async with running(self.harness, ring_events=self.ring_events) as rig:
                while rest:
                    name, *arguments = rest.pop(0)
                    if name == "restart":
                        if self.harness.survives:
                            break
                        continue
                    await getattr(self, name)(rig, *arguments)
                    for room in self.rooms:
                        self.check_position(rig, room)
            self.opened.clear()

    def check_position(self, rig: Rig, name: str) -> None:
        room, position = self.rooms[name], rig.engine.position(name)
        if name in self.opened:
            assert position == room.position(len(room.events))
        else:
            assert position is None

    async def publish(self, rig: Rig, events: list[tuple[str, str | None]]) -> None:
        before = len(rig.delivered)
        replies = [(name, key, rig.publish(name, key=key, retention=self.retention)) for name, key in events]
        stored = []
        for name, key, reply in replies:
            position, room = await reply.position(), self.rooms[name]
            room.believe(position)
            count = len(room.events)
            assert position == room.position(room.publish(key, rig.clock.now))
            if len(room.events) > count:
                stored.append((name, position))
        delivered = [(event.room, event.position) for event in rig.delivered[before:]]
        # By room: rooms of a store in several parts have no order among them.
        assert sorted(delivered, key=itemgetter(0)) == sorted(stored, key=itemgetter(0))

    async def open(self, rig: Rig, name: str) -> None:
        top, room = await rig.engine.open(name, self.retention), self.rooms[name]
        room.believe(top)
        assert top == room.position(len(room.events))
        self.opened.add(name)

    async def close(self, rig: Rig, name: str) -> None:
        rig.engine.close(name)
        self.opened.discard(name)

    async def read(self, rig: Rig, name: str, wanted: tuple[str, int], limit: int) -> None:
        room, (kind, value) = self.rooms[name], wanted
        query = {
            "since": HistoryQuery(limit, since=Position(room.epoch or "?", value)),
            "before": HistoryQuery(limit, before=value),
            "at": HistoryQuery(limit, at=START + value),
            "tail": HistoryQuery(limit, tail=value),
        }[kind]
        page = await rig.history(name, query, self.retention)
        room.believe(page.top)
        assert page.top == room.position(len(room.events))
        expected = naive_page(room.events, page.top, query, self.retention, rig.clock.now)
        assert (offsets(page), page.recovered, page.more) == expected

    async def wait(self, rig: Rig, seconds: int) -> None:
        rig.clock.now += seconds

    async def acknowledge(self, rig: Rig, name: str, who: str, offset: int) -> None:
        await self.open(rig, name)
        rig.engine.acknowledge(name, who, offset, rig.clock.now)
        seen = self.rooms[name].seen
        seen[who] = max(seen.get(who, 0), offset)
        found = await rig.engine.acknowledgements(name)
        assert {one.who: one.offset for one in found} == seen
