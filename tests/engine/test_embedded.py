"""The embedded engine: the contract, on disk and in memory, and what only it promises."""

from __future__ import annotations

import os
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from broker.engine.base import Deliver, Engine, HistoryPage, HistoryQuery, Retention, Seen
from broker.engine.commit_queue import BATCH_EVENTS, WAITING_EVENTS
from broker.engine.embedded import ACKNOWLEDGE_AFTER, EmbeddedEngine
from broker.engine.writer import SWEEP_INTERVAL, SWEEP_ROOMS, TRIM_EVENTS
from broker.errors import BrokerError, ConfigurationError, ErrorCode
from broker.protocol.events import Event, Position, make_event
from tests.engine.contract import (
    ALL,
    KEEP,
    START,
    EngineContract,
    Harness,
    ManualClock,
    Reply,
    Rig,
    offsets,
    running,
)


class DiskHarness:
    """Engines over one directory."""

    survives = True

    def __init__(self, path: Path) -> None:
        self.clock = ManualClock()
        self.path = path

    def engine(self, *, ring_events: int = 4) -> EmbeddedEngine:
        return EmbeddedEngine(self.path, ring_events=ring_events, clock=self.clock)

    def fresh(self) -> Harness:
        return DiskHarness(Path(tempfile.mkdtemp(dir=self.path)))


class MemoryHarness:
    """Engines without a directory."""

    survives = False

    def __init__(self) -> None:
        self.clock = ManualClock()

    def engine(self, *, ring_events: int = 4) -> Engine:
        return EmbeddedEngine(None, ring_events=ring_events, clock=self.clock)

    def fresh(self) -> Harness:
        return MemoryHarness()


class TestOnDisk(EngineContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Harness:
        return DiskHarness(tmp_path)


class TestInMemory(EngineContract):
    @pytest.fixture
    def harness(self) -> Harness:
        return MemoryHarness()


# The store fails


def sabotage(path: Path, sql: str) -> None:
    """Change the database behind the engine's back, as a foreign tool would."""
    connection = sqlite3.connect(path / "broker.db", isolation_level=None)
    connection.execute(sql)
    connection.close()


REFUSE = "CREATE TRIGGER refuse BEFORE INSERT ON {} BEGIN SELECT RAISE(ABORT, 'no more'); END"


async def refusal(reply: Reply) -> str:
    answer = await reply.answer()
    assert isinstance(answer, BrokerError)
    assert answer.code is ErrorCode.UNAVAILABLE
    assert answer.retry_after
    return answer.message


async def test_a_full_disk_answers_unavailable_and_heals(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path)) as rig:
        first = await rig.publish("deal:1", "before", key="a").position()
        engine = rig.engine
        assert isinstance(engine, EmbeddedEngine)
        writer = engine._store.writer
        [pages] = writer.execute("PRAGMA page_count").fetchone()
        writer.execute(f"PRAGMA max_page_count = {pages}")
        replies = [rig.publish("deal:1", "x" * 9000, key=f"k{number}") for number in range(20)]
        replies += [rig.publish("deal:new")]
        for reply in replies:
            assert "full" in await refusal(reply)
        assert rig.offsets("deal:1") == [1]
        assert rig.offsets("deal:new") == []
        assert engine.statistics()["failing"] == 1
        assert engine.statistics()["failed_publishes"] == 21

        writer.execute("PRAGMA max_page_count = 1000000")
        # Neither an offset nor a key of what failed is left.
        assert await rig.publish("deal:1", "after", key="k3").position() == Position(first.epoch, 2)
        assert await rig.publish("deal:1", key="a").position() == first
        assert offsets(await rig.history("deal:1", ALL)) == [1, 2]
        assert engine.statistics()["failing"] == 0


async def test_a_refused_row_takes_its_whole_batch_back(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path)) as rig:
        top = await rig.fill("deal:1", 3)
        sabotage(tmp_path, REFUSE.format("publish_key"))
        event = make_event("deal:1", "said", None, START, key="k")
        reply = Reply()
        rig.engine.publish(event, KEEP, reply)
        other = rig.publish("deal:2")
        assert "no more" in await refusal(reply)
        assert "no more" in await refusal(other)
        assert event.position is None
        assert event.wire == event.body
        sabotage(tmp_path, "DROP TRIGGER refuse")
        rig.engine.publish(event, KEEP, retry := Reply())
        assert await retry.position() == Position(top.epoch, 4)


async def test_opening_fails_and_heals(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path)) as rig:
        sabotage(tmp_path, REFUSE.format("room"))
        for call in (rig.engine.open("deal:1", KEEP), rig.engine.history("deal:1", ALL, KEEP)):
            with pytest.raises(BrokerError, match="no more"):
                await call
        assert rig.engine.position("deal:1") is None
        sabotage(tmp_path, "DROP TRIGGER refuse")
        assert (await rig.engine.open("deal:1", KEEP)).offset == 0


async def test_a_damaged_past_is_unavailable_not_wrong(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path)) as rig:
        await rig.fill("deal:1", 5)
        sabotage(tmp_path, "DELETE FROM event WHERE offset = 3")
        with pytest.raises(BrokerError, match="missing"):
            await rig.engine.history("deal:1", ALL, KEEP)
        sabotage(tmp_path, "UPDATE event SET wire = x'7b' WHERE offset = 4")
        with pytest.raises(BrokerError):
            await rig.engine.history("deal:1", HistoryQuery(limit=2, tail=2), KEEP)
        sabotage(tmp_path, "ALTER TABLE acknowledgement RENAME TO gone")
        with pytest.raises(BrokerError, match="no such table"):
            await rig.engine.acknowledgements("deal:1")
        assert rig.engine.statistics()["failed_reads"] == 3
        assert (await rig.publish("deal:1").position()).offset == 6


async def test_a_name_that_sqlite_cannot_take_harms_nobody_else_later(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path)) as rig:
        reply = Reply()
        rig.engine.publish(Event("deal:\ud800", b"{}", START), KEEP, reply)
        await refusal(reply)
        assert (await rig.publish("deal:1").position()).offset == 1


async def test_acknowledgements_that_could_not_be_written_are_tried_again(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async with running(DiskHarness(tmp_path)) as rig:
        await rig.fill("deal:1", 5)
        sabotage(tmp_path, REFUSE.format("acknowledgement"))
        rig.engine.acknowledge("deal:1", "ann", 4, START)
        rig.engine.acknowledge("deal:gone", "ann", 4, START)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(ACKNOWLEDGE_AFTER)
        await trio.testing.wait_all_tasks_blocked()
        await rig.publish("deal:1").answer()  # comes back with the acknowledgements, or after them
        assert rig.engine.statistics()["failed_commits"] == 1
        assert await rig.engine.acknowledgements("deal:1") == [Seen("ann", 4, START)]
        sabotage(tmp_path, "DROP TRIGGER refuse")
        mock_clock.jump(ACKNOWLEDGE_AFTER)
        await trio.testing.wait_all_tasks_blocked()
        await rig.publish("deal:1").position()
        assert rig.engine.statistics()["acknowledgements"] == 1
        assert await rig.engine.acknowledgements("deal:1") == [Seen("ann", 4, START)]


async def test_acknowledgements_on_disk_never_move_back(tmp_path: Path) -> None:
    for offset in (4, 2):
        async with running(DiskHarness(tmp_path)) as rig:
            await rig.publish("deal:1").position()
            rig.engine.acknowledge("deal:1", "ann", offset, START + offset)
    async with running(DiskHarness(tmp_path)) as rig:
        assert await rig.engine.acknowledgements("deal:1") == [Seen("ann", 4, START + 4)]


# The store cannot be used


async def refused_start(path: Path) -> ConfigurationError:
    engine = EmbeddedEngine(path, ring_events=4)
    with trio.CancelScope() as scope:

        class Started:
            """An engine that starts all the same is stopped again."""

            def started(self, _value: None = None) -> None:
                scope.cancel()

        with pytest.raises(ConfigurationError) as caught:
            await engine.run(lambda _events: None, task_status=cast("trio.TaskStatus[None]", Started()))
        assert caught.value.key == "store.data"
        assert caught.value.mend
        return caught.value
    pytest.fail("the engine started")


async def test_a_second_broker_is_refused(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path)) as rig:
        error = await refused_start(tmp_path)
        assert f"process {os.getpid()}" in error.problem
        await rig.publish("deal:1").position()
    async with running(DiskHarness(tmp_path)) as rig:
        assert (await rig.publish("deal:1").position()).offset == 2


async def test_a_foreign_program_in_the_database(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path)) as rig:
        await rig.publish("deal:1").position()
    other = sqlite3.connect(tmp_path / "broker.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert "close the program" in (await refused_start(tmp_path)).mend
    other.close()


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "broker.db").write_bytes(b"certainly not SQLite" * 500)
    assert "backup" in (await refused_start(tmp_path)).mend
    (tmp_path / "broker.db").unlink()
    async with running(DiskHarness(tmp_path)) as rig:  # and the lock was let go
        await rig.publish("deal:1").position()


async def test_a_torn_database(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path)) as rig:
        await rig.publish("deal:1").position()
    file = tmp_path / "broker.db"
    content = file.read_bytes()
    file.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    assert "backup" in (await refused_start(tmp_path)).mend


async def test_a_database_whose_keys_cannot_be_read(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path)) as rig:
        await rig.publish("deal:1").position()
    sabotage(tmp_path, "DROP TABLE publish_key")
    assert "publish_key" in (await refused_start(tmp_path)).problem


async def test_a_database_of_another_format(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path)):
        pass
    sabotage(tmp_path, "PRAGMA user_version = 99")
    assert "format 99" in (await refused_start(tmp_path)).problem


async def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    await refused_start(tmp_path / "file" / "data")


async def test_a_directory_in_the_place_of_the_database(tmp_path: Path) -> None:
    (tmp_path / "broker.db").mkdir()
    assert "permissions" in (await refused_start(tmp_path)).mend


# Retention on disk


def rows(path: Path, sql: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(path / "broker.db")
    found = connection.execute(sql).fetchall()
    connection.close()
    return found


async def sweep(rig: Rig, mock_clock: trio.testing.MockClock) -> None:
    """Let a sweep happen, and wait until it is over."""
    before = rig.engine.statistics()["sweeps"]
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(SWEEP_INTERVAL)
    await trio.testing.wait_all_tasks_blocked()
    await rig.publish("other").position()  # the batch of the sweep, or one after it
    assert rig.engine.statistics()["sweeps"] > before


async def test_trimming_by_size_is_amortised(tmp_path: Path) -> None:
    keep = Retention(100, 3600.0)
    async with running(DiskHarness(tmp_path)) as rig:
        for _ in range(10):
            await rig.fill("deal:1", 50, retention=keep)
            [(count,)] = rows(tmp_path, "SELECT count(*) FROM event")
            assert count <= 100 + 64 + 50
        assert len((await rig.history("deal:1", ALL, keep)).events) == 100
        assert rig.engine.statistics()["trimmed"] >= 300


async def test_a_retention_that_shrinks_is_followed(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path)) as rig:
        await rig.fill("deal:1", 100)
        small = Retention(3, 3600.0)
        await rig.engine.open("deal:1", small)
        await rig.publish("deal:1", retention=small).position()
        assert rows(tmp_path, "SELECT size FROM room") == [(3,)]
        assert rows(tmp_path, "SELECT min(offset) FROM event") == [(99,)]
        assert offsets(await rig.history("deal:1", ALL, small)) == [99, 100, 101]
        # Who asks for more than the room was opened with is not answered by the ring.
        assert len((await rig.engine.history("deal:1", ALL, KEEP)).events) == 3


async def test_a_room_vanishes_when_all_has_expired(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    keep = Retention(100, 600.0)
    async with running(DiskHarness(tmp_path)) as rig:
        first = await rig.fill("deal:1", 5, retention=keep)
        held = await rig.engine.open("deal:2", keep)
        empty = (await rig.history("deal:3", ALL, keep)).top
        rig.engine.acknowledge("deal:1", "ann", 5, START)
        rig.clock.now += 601
        await sweep(rig, mock_clock)
        assert rig.engine.statistics()["removed_rooms"] == 2
        assert {name for (name,) in rows(tmp_path, "SELECT name FROM room")} == {"deal:2", "other"}
        again = await rig.publish("deal:1", retention=keep).position()
        assert again.offset == 1
        assert again.epoch != first.epoch
        assert (await rig.history("deal:3", ALL, keep)).top.epoch != empty.epoch
        assert await rig.engine.acknowledgements("deal:1") == []
        old = await rig.history("deal:1", HistoryQuery(limit=9, since=first), keep)
        assert (old.events, old.recovered) == ([], False)

        assert await rig.engine.open("deal:2", keep) == held
        rig.engine.close("deal:2")
        rig.clock.now += 601
        await sweep(rig, mock_clock)
        assert (await rig.engine.open("deal:2", keep)).epoch != held.epoch


async def test_a_room_outlives_its_keys(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    keep = Retention(100, 10.0)
    async with running(DiskHarness(tmp_path)) as rig:
        await rig.fill("deal:1", 3, retention=keep)
        rig.clock.now += 200
        keyed = await rig.publish("deal:1", key="k", retention=keep).position()
        rig.clock.now += 200  # the room is due, all its events have expired, but not the key
        await sweep(rig, mock_clock)
        assert rows(tmp_path, "SELECT offset FROM event WHERE room_id = 1") == [(4,)]
        assert await rig.publish("deal:1", key="k", retention=keep).position() == keyed
        assert rows(tmp_path, "SELECT count(*) FROM publish_key") == [(1,)]
        rig.clock.now += 101
        await sweep(rig, mock_clock)
        assert rows(tmp_path, "SELECT name FROM room") == [("other",)]
        assert rows(tmp_path, "SELECT count(*) FROM publish_key") == [(0,)]
        assert rig.engine.statistics()["keys"] == 0


async def test_a_sweep_trims_by_age_and_keeps_the_top(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    keep = Retention(10_000, 600.0)
    async with running(DiskHarness(tmp_path)) as rig:
        await rig.fill("deal:1", 1, retention=keep)
        await rig.fill("deal:1", 3000, retention=keep, step=0.125)  # until 375
        rig.clock.now += 325  # what came in the first 100 seconds is too old
        await sweep(rig, mock_clock)
        [bounds] = rows(tmp_path, "SELECT min(offset), max(offset) FROM event WHERE room_id = 1")
        assert bounds == (803, 3001)
        at = HistoryQuery(limit=1, at=START + 250.06)
        assert offsets(await rig.history("deal:1", at, keep)) == [2003]
        await rig.engine.open("deal:1", keep)
        rig.clock.now += 700
        await sweep(rig, mock_clock)
        assert rows(tmp_path, "SELECT offset FROM event WHERE room_id = 1") == [(3001,)]
        assert (await rig.publish("deal:1", retention=keep).position()).offset == 3002


async def test_a_large_sweep_takes_several_turns(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    keep = Retention(10_000, 600.0)
    async with running(DiskHarness(tmp_path)) as rig:
        await rig.fill("deal:big", TRIM_EVENTS + 1000, retention=keep)
        replies = [rig.publish(f"deal:{number}", retention=keep) for number in range(SWEEP_ROOMS + 20)]
        for reply in replies:
            await reply.position()
        rig.clock.now += 601
        await sweep(rig, mock_clock)
        for _ in range(10):  # a sweep that has more to do asks for the next one
            await rig.publish("other").position()
        assert rig.engine.statistics()["removed_rooms"] == SWEEP_ROOMS + 21
        assert rows(tmp_path, "SELECT name FROM room") == [("other",)]
        assert rig.engine.statistics()["sweeps"] >= 2


async def test_a_clock_that_steps_back_loses_nothing(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    keep = Retention(100, 600.0)
    async with running(DiskHarness(tmp_path)) as rig:
        await rig.fill("deal:1", 1, retention=keep)
        rig.clock.now += 500
        await rig.fill("deal:1", 2, retention=keep)
        rig.clock.now -= 5000
        await rig.fill("deal:1", 2, retention=keep)
        rig.clock.now += 5150
        await sweep(rig, mock_clock)
        assert offsets(await rig.history("deal:1", ALL, keep)) == [2, 3, 4, 5]


# The engine's own


async def test_the_log_is_folded_in_and_the_lock_let_go(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path)) as rig:
        await rig.fill("deal:1", 20)
        assert (tmp_path / "broker.db-wal").stat().st_size > 0
        await rig.history("deal:1", ALL)
    assert set(os.listdir(tmp_path)) == {"broker.db", "broker.lock"}
    assert rows(tmp_path, "SELECT count(*) FROM event") == [(20,)]
    assert stat.S_IMODE((tmp_path / "broker.lock").stat().st_mode) == 0o600


async def test_an_engine_can_run_again(tmp_path: Path) -> None:
    engine = EmbeddedEngine(tmp_path, ring_events=4)
    rig = Rig(engine, ManualClock())
    for turn in (1, 2):
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run, rig.deliver)
            assert (await rig.publish("deal:1").position()).offset == turn
            nursery.cancel_scope.cancel()


async def test_everybody_waiting_is_one_commit(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path)) as rig:
        await rig.fill("deal:1", 1)
        await rig.fill("deal:1", 500)
        numbers = rig.engine.statistics()
        assert numbers["stored"] == 501
        assert numbers["commits"] <= 4
        assert numbers["largest_batch"] >= 200


async def test_the_commit_window_gathers(tmp_path: Path) -> None:
    engine = EmbeddedEngine(tmp_path, ring_events=4, commit_window=0.001)
    rig = Rig(engine, ManualClock())
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run, rig.deliver)
        await rig.fill("deal:1", 5)
        nursery.cancel_scope.cancel()
    assert rig.offsets("deal:1") == [1, 2, 3, 4, 5]


class GateClock:
    """A clock whose reader, the writer thread, waits at it: a disk that stalls."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> float:
        self.reached.set()
        self.open.wait()
        return START


async def test_batches_and_the_queue_are_bounded(tmp_path: Path) -> None:
    gate = GateClock()
    engine = EmbeddedEngine(tmp_path, ring_events=4, clock=gate)
    rig = Rig(engine, ManualClock())
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run, rig.deliver)
        replies = [rig.publish("deal:1")]
        await trio.to_thread.run_sync(gate.reached.wait)
        replies += [rig.publish("deal:1") for _ in range(WAITING_EVENTS)]
        refused = [rig.publish("deal:1") for _ in range(2)]
        for reply in refused:
            assert "wait for the disk" in await refusal(reply)
        gate.open.set()
        assert [(await reply.position()).offset for reply in replies] == list(range(1, len(replies) + 1))
        numbers = engine.statistics()
        assert numbers["largest_batch"] == BATCH_EVENTS
        assert (numbers["refused"], numbers["waiting"]) == (2, 0)
        nursery.cancel_scope.cancel()


async def test_identical_reads_are_one_read(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path)) as rig:
        await rig.fill("deal:1", 20)
        await rig.engine.open("deal:1", KEEP)
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(rig.engine.history, "deal:1", ALL, KEEP)
        numbers = rig.engine.statistics()
        assert (numbers["reads"], numbers["shared_reads"]) == (1, 49)


async def test_a_reader_who_gives_up_does_not_end_the_others_read(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path)) as rig:
        await rig.fill("deal:1", 20)
        pages: list[HistoryPage] = []

        async def read(*, task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED) -> None:
            with trio.CancelScope() as scope:
                task_status.started(scope)
                pages.append(await rig.engine.history("deal:1", ALL, KEEP))

        async with trio.open_nursery() as nursery:
            first = await nursery.start(read)
            nursery.start_soon(read)
            first.cancel()
        assert [offsets(page) for page in pages] == [list(range(1, 21))]


async def test_a_read_warms_the_ring(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path), ring_events=8) as rig:
        await rig.fill("deal:1", 20)
        await rig.engine.open("deal:1", KEEP)
        query = HistoryQuery(limit=5, tail=5)
        assert rig.engine.history_nowait("deal:1", query) is None
        page = await rig.engine.history("deal:1", query, KEEP)
        await rig.publish("deal:1").position()
        quick = rig.engine.history_nowait("deal:1", HistoryQuery(limit=9, since=Position(page.top.epoch, 15)))
        assert quick is not None
        assert offsets(quick) == list(range(16, 22))
        assert quick.recovered


async def crash(engine: EmbeddedEngine, deliver: Deliver, then: Callable[[], None]) -> Exception:
    """Run the engine until it ends by itself; what did ``run`` raise?"""
    raised: list[Exception] = []

    async def run(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            await engine.run(deliver, task_status=task_status)
        except Exception as error:
            raised.append(error)

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        then()
    [error] = raised
    return error


async def test_a_bug_in_deliver_ends_the_engine_after_the_answers(tmp_path: Path) -> None:
    def deliver(_events: object) -> None:
        raise ZeroDivisionError

    engine = EmbeddedEngine(tmp_path, ring_events=4)
    rig = Rig(engine, ManualClock())
    replies: list[Reply] = []
    error = await crash(engine, deliver, lambda: replies.extend(rig.publish("deal:1") for _ in range(3)))
    assert isinstance(error, ZeroDivisionError)
    assert [(await reply.position()).offset for reply in replies] == [1, 2, 3]


async def test_a_bug_in_done_costs_nobody_else_the_answer(tmp_path: Path) -> None:
    def done(_answer: object) -> None:
        raise ZeroDivisionError

    engine = EmbeddedEngine(tmp_path, ring_events=4)
    rig = Rig(engine, ManualClock())
    replies: list[Reply] = []

    def publish() -> None:
        engine.publish(make_event("deal:1", "said", None, START), KEEP, done)
        replies.append(rig.publish("deal:1"))

    assert isinstance(await crash(engine, rig.deliver, publish), ZeroDivisionError)
    assert (await replies[0].position()).offset == 2


async def test_a_bug_in_the_writer_answers_everybody(tmp_path: Path) -> None:
    clock = ManualClock()
    engine = EmbeddedEngine(tmp_path, ring_events=4, clock=clock)
    rig = Rig(engine, ManualClock())
    replies: list[Reply] = []

    def publish() -> None:
        clock.now = "late"  # type: ignore[assignment]
        replies.extend(rig.publish("deal:1") for _ in range(3))

    assert isinstance(await crash(engine, rig.deliver, publish), TypeError)
    for reply in replies:
        await refusal(reply)
    assert rig.delivered == []


async def test_an_engine_cancelled_as_it_starts_answers_too(tmp_path: Path) -> None:
    engine = EmbeddedEngine(tmp_path, ring_events=4)
    rig = Rig(engine, ManualClock())
    with trio.CancelScope() as scope:

        class Started:
            """Cancels the engine before its first scheduler pass is over."""

            def started(self, _value: None = None) -> None:
                replies.append(rig.publish("deal:1"))
                scope.cancel()

        replies: list[Reply] = []
        await engine.run(rig.deliver, task_status=cast("trio.TaskStatus[None]", Started()))
    answer = await replies[0].answer()
    assert isinstance(answer, BrokerError) or rig.offsets("deal:1") == [1]


async def test_closing_while_the_engine_stops_is_no_error(tmp_path: Path) -> None:
    async with running(DiskHarness(tmp_path)) as rig:
        await rig.engine.open("deal:1", KEEP)
        closed = []

        def done(_answer: Position | BrokerError) -> None:
            rig.engine.close("deal:1")
            closed.append(rig.engine.position("deal:1"))

        rig.engine.publish(make_event("deal:1", "said", None, START), KEEP, done)
        rig.scope.cancel()
    assert closed == [None]
