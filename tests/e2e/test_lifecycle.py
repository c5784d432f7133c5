"""From the first accept to the end: keepalive, drain, cancellation at any moment, faults that stay small."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from broker.app import Broker
from broker.server.session import Session
from tests.e2e.harness import (
    CONFIG,
    config,
    jump,
    living_tasks,
    open_descriptors,
    real_deadline,
    running,
    token,
    until,
)
from tests.e2e.raw_client import CLOSE, PING, Ended, RawClient, connected, opened, request, tcp

INTERVAL = CONFIG.server.ping_interval


# -- keepalive -----------------------------------------------------------------------------------


async def test_who_answers_pings_stays() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        for _ in range(3):
            jump(INTERVAL + 2)
            assert (await client.frame())[0] == PING
            await client.send_bytes(b"\x8a\x80\0\0\0\0")
            await until(lambda: all(s.connection.heard for s in broker.context.registry.sessions.values()))
            jump(CONFIG.server.pong_timeout + 2)
            assert (await client.ask("ping"))["op"] == "ok"


async def test_who_never_answers_pings_is_ended() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        jump(INTERVAL + 2)
        assert (await client.frame())[0] == PING
        jump(CONFIG.server.pong_timeout + 2)
        bye, code = await client.ended_with()
        assert code == 4509
        assert bye is not None
        assert bye["retry_after"] > 0
    assert broker.context.registry.closes == {4509: 1}


async def test_whatever_it_says_a_client_is_alive() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        for _ in range(4):
            jump(INTERVAL + 2)
            assert (await client.frame())[0] == PING
            assert (await client.ask("ping"))["op"] == "ok"
            jump(CONFIG.server.pong_timeout + 2)
            assert (await client.ask("ping"))["op"] == "ok"


# -- drain ---------------------------------------------------------------------------------------


async def test_drain() -> None:
    async with running() as broker:
        clients: list[RawClient] = []
        waits: list[float] = []

        async def stay(task_status: trio.TaskStatus[None]) -> None:
            async with connected(broker.client_port) as client:
                await client.ask("join", room="deal:1")
                clients.append(client)
                task_status.started()
                bye, code = await client.ended_with()
                assert code == 4503
                assert bye is not None
                assert bye["code"] == 4503
                waits.append(bye["retry_after"])

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                await nursery.start(stay)
            broker.stop()
        assert all(0 < wait <= CONFIG.server.retry_after for wait in waits)
        assert len(set(waits)) > 5, "they must not all come back at once"
        assert not broker.ready


async def test_while_it_drains_the_port_says_so() -> None:
    async with running() as broker, opened(broker.client_port) as client:
        await client.next()
        broker.stop()
        await until(lambda: broker.server.draining)
        async with await tcp(broker.client_port) as stream:
            page = RawClient(stream)
            assert await page.upgrade(b"GET /healthz HTTP/1.0\r\n\r\n") == 503
            assert await page.body() == b"draining\n"
        async with await tcp(broker.client_port) as stream:
            late = RawClient(stream)
            assert await late.upgrade(request()) == 503
            assert b"Retry-After" in late.head
        assert (await client.ended_with())[1] == 4503


async def test_drain_does_not_wait_for_who_does_not_answer() -> None:
    async with running() as broker, opened(broker.client_port) as client:
        await client.next()
        broker.stop()
        while (await client.frame())[0] != CLOSE:
            pass
        await wait_all_tasks_blocked(0.01)
        jump(CONFIG.server.drain_timeout + 0.1)
        assert (await client.end()).code == 1006


async def test_drain_gives_what_is_queued() -> None:
    async with (
        running() as broker,
        connected(broker.client_port) as talker,
        connected(broker.client_port) as reader,
    ):
        await reader.ask("join", room="live:1")
        text = "x" * 50_000
        published = 0
        while broker.traffic.queued < 100_000:
            await talker.ask("publish", room="live:1", event="e", data=text)
            published += 1
        broker.stop()
        for _ in range(published):
            assert (await reader.event())["data"] == text
        assert (await reader.ended_with())[1] == 4503


# -- cancellation --------------------------------------------------------------------------------


async def _busy(broker: Broker, number: int) -> None:
    """A client that does a bit of everything until its connection is gone."""
    try:
        async with opened(broker.client_port, token=token(f"u{number % 3}")) as client:
            await client.next()
            await client.ask("join", room="deal:1", presence=True, tail=5)
            while True:
                await client.ask("publish", room="deal:1", event="e", data="x" * 500)
                await client.ask("publish", room="live:1", event="e", data="x")
                await client.ask("history", room="deal:1", before=10)
                await client.ask("join", room=f"deal:{number}", tail=3)
                await client.ask("leave", room=f"deal:{number}")
                await client.ask("call", method="broker.ping")
    except (Ended, OSError, trio.BrokenResourceError, trio.ClosedResourceError, AssertionError):
        pass  # at any moment


@pytest.mark.parametrize("seed", range(12))
async def test_cancellation_at_any_moment_leaves_nothing(seed: int, tmp_path: Any, caplog: Any) -> None:
    moment = random.Random(seed)
    descriptors, tasks = open_descriptors(), living_tasks()
    broker = Broker(config(store={"data": str(tmp_path)}))
    with real_deadline():
        async with trio.open_nursery() as clients:
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(broker.run))
                for number in range(8):
                    clients.start_soon(_busy, broker, number)
                for _ in range(moment.randrange(400)):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            assert not broker.context.registry.sessions
            assert broker.context.registry.connections == 0
            assert broker.traffic.queued == 0
            assert len(broker.pump) == 0
            assert "fault" not in broker.context.registry.refused
            clients.cancel_scope.cancel()
    assert living_tasks() == tasks
    assert open_descriptors() == descriptors


@pytest.mark.parametrize("seed", range(4))
async def test_stop_at_any_moment_loses_nothing_acknowledged(seed: int, tmp_path: Any) -> None:
    moment = random.Random(seed)
    settings = config(store={"data": str(tmp_path)})
    acknowledged = 0
    with real_deadline():
        broker = Broker(settings)
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(broker.run))

            async def talk() -> None:
                nonlocal acknowledged
                async with opened(broker.client_port) as client:
                    await client.next()
                    try:
                        while True:
                            answer = await client.ask("publish", room="deal:1", event="e", data=acknowledged)
                            assert answer["offset"] == acknowledged + 1
                            acknowledged = answer["offset"]
                    except Ended:
                        pass

            nursery.start_soon(talk)
            wanted = moment.randrange(1, 40)
            await until(lambda: acknowledged >= wanted)
            broker.stop()
    async with running(settings) as again, connected(again.client_port) as client:
        page = await client.ask("history", room="deal:1", before=2**53 - 1)
        assert page["offset"] >= acknowledged
        assert [event["data"] for event in page["events"]][-1] >= acknowledged - 1


# -- a restart -----------------------------------------------------------------------------------


async def test_a_restart_keeps_epoch_offsets_and_keys(tmp_path: Any) -> None:
    settings = config(store={"data": str(tmp_path)})
    async with running(settings) as broker, connected(broker.client_port) as client:
        for number in range(5):
            stored = await client.ask("publish", room="deal:1", event="e", data=number, key=f"k{number}")
    async with running(settings) as broker, connected(broker.client_port) as client:
        since = {"epoch": stored["epoch"], "offset": 3}
        joined = await client.ask("join", room="deal:1", since=since)
        assert joined["recovered"] is True
        assert (joined["epoch"], joined["offset"]) == (stored["epoch"], 5)
        assert [event["data"] for event in await client.take(2)] == [3, 4]
        assert (await client.ask("publish", room="deal:1", event="e", data="new"))["offset"] == 6


async def test_without_a_store_a_restart_begins_a_new_epoch() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        stored = await client.ask("publish", room="deal:1", event="e", data=1)
    async with running() as broker, connected(broker.client_port) as client:
        since = {"epoch": stored["epoch"], "offset": 0}
        joined = await client.ask("join", room="deal:1", since=since)
        assert joined["recovered"] is False
        assert joined["epoch"] != stored["epoch"]


# -- calls, and faults ---------------------------------------------------------------------------


class Methods:
    """Methods that a test steers."""

    def __init__(self, broker: Broker) -> None:
        self.started = trio.Event()
        self.release = trio.Event()
        self.cancelled = 0
        methods = broker.context.methods
        methods.add("test.wait", self._wait)
        methods.add("test.fail", self._fail)
        methods.add("test.odd", self._odd)

    async def _wait(self, _session: Session, params: Any) -> Any:
        self.started.set()
        try:
            await self.release.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        return params

    async def _fail(self, _session: Session, _params: Any) -> Any:
        raise ZeroDivisionError("a fault of a method")

    async def _odd(self, _session: Session, _params: Any) -> Any:
        return object()


async def test_calls_run_at_once_and_answer_when_they_are_done() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        methods = Methods(broker)
        await client.send({"op": "call", "id": "slow", "method": "test.wait", "params": [1]})
        await methods.started.wait()
        assert (await client.ask("call", method="broker.ping"))["result"]["ts"] > 1.7e9
        assert set((await client.ask("call", method="broker.limits"))["result"]) >= {"message", "rooms"}
        methods.release.set()
        assert (await client.reply("slow"))["result"] == [1]


async def test_a_call_may_be_cancelled_superseded_or_time_out() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        methods = Methods(broker)
        await client.send({"op": "call", "id": "a", "method": "test.wait"})
        await methods.started.wait()
        await client.send({"op": "call", "id": "a", "method": "broker.ping"})
        assert (await client.reply("a"))["code"] == "conflict"
        assert (await client.ask("cancel", call="a"))["op"] == "ok"
        assert (await client.reply("a"))["code"] == "cancelled"
        await client.send({"op": "call", "id": "b", "method": "test.wait", "supersede": "search"})
        await client.send({"op": "call", "id": "c", "method": "test.wait", "supersede": "search"})
        assert (await client.reply("b"))["code"] == "superseded"
        await client.ask("ping")
        jump(31)
        answer = await client.reply("c")
        assert (answer["code"], answer["retry"]) == ("timeout", True)
        assert methods.cancelled >= 2


async def test_a_fault_in_a_method_ends_only_its_call() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        methods = Methods(broker)
        await client.send({"op": "call", "id": "slow", "method": "test.wait"})
        await methods.started.wait()
        assert await client.refusal("call", method="test.fail") == "internal"
        assert await client.refusal("call", method="test.odd") == "internal"
        assert (await client.ask("ping"))["op"] == "ok"
        methods.release.set()
        assert (await client.reply("slow"))["op"] == "ok"


async def test_only_so_many_calls_at_once() -> None:
    few = config(limits={"calls": 2})
    async with running(few) as broker, connected(broker.client_port) as client:
        methods = Methods(broker)
        await client.send(*[{"op": "call", "id": name, "method": "test.wait"} for name in ("a", "b", "c")])
        assert (await client.reply("c"))["code"] == "limit_exceeded"
        methods.release.set()
        for name in ("a", "b"):
            assert (await client.reply(name))["op"] == "ok"
        assert (await client.ask("call", method="broker.ping"))["op"] == "ok"


async def test_calls_end_with_their_session() -> None:
    async with running() as broker:
        methods = Methods(broker)
        async with connected(broker.client_port) as client:
            await client.send(*[{"op": "call", "method": "test.wait"}] * 3)
            await methods.started.wait()
        await until(lambda: methods.cancelled == 3)


async def test_a_call_queued_before_a_join_is_started() -> None:
    """Found by reading: what woke the session's task could be used up by the join."""
    async with running() as broker, connected(broker.client_port) as client:
        for number in range(20):
            await client.send_text(
                f'[{{"op":"join","room":"cold:{number}"}},{{"op":"call","id":{number},"method":"broker.ping"}},'
                f'{{"op":"join","room":"deal:{number}","tail":5}}]'
            )
            assert (await client.reply(number))["op"] == "ok"


async def test_a_fault_in_a_handler_is_answered_and_stays_small() -> None:
    async with running() as broker, connected(broker.client_port) as client:

        def broken(_room: str) -> None:
            raise ZeroDivisionError("a fault of ours")

        listing, broker.engine.history_nowait = broker.engine.history_nowait, broken  # type: ignore[assignment, method-assign]
        assert await client.refusal("history", room="deal:1", before=1) == "internal"
        broker.engine.history_nowait = listing  # type: ignore[method-assign]
        assert (await client.ask("history", room="deal:1", before=1))["op"] == "ok"


async def test_rooms_vanish_when_they_are_idle() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        await client.ask("join", room="deal:1")
        await client.ask("join", room="live:1")
        assert {"deal:1", "live:1", "all"} <= set(broker.hub.rooms)
        await client.ask("leave", room="deal:1")
        await client.ask("leave", room="live:1")
        jump(7)
        await until(lambda: set(broker.hub.rooms) == {"all"})
        await wait_all_tasks_blocked(0.01)
        assert broker.engine.statistics()["rooms_open"] == 0


async def test_calls_given_up_in_the_same_breath_never_answer_with_success() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        await client.send(
            *[
                {"op": "call", "id": "a", "method": "broker.ping", "supersede": "search"},
                {"op": "call", "id": "b", "method": "broker.ping", "supersede": "search"},
                {"op": "cancel", "id": "c", "call": "b"},
            ]
        )
        assert (await client.reply("c"))["op"] == "ok"
        assert (await client.reply("a"))["code"] == "superseded"
        assert (await client.reply("b"))["code"] == "cancelled"
