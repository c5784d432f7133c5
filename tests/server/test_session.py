"""One client's order, however slow the store and the client are."""

from __future__ import annotations

import pytest
from trio.testing import wait_all_tasks_blocked

from broker.errors import CloseCode
from broker.server.session import IN_FLIGHT
from tests.e2e.harness import CONFIG, config, jump, running, token, until
from tests.e2e.raw_client import PING, PONG, connected, frame, opened
from tests.server.held_engine import HeldEngine

EVENT = {"op": "publish", "event": "e", "data": 1}


async def test_what_overtakes_publishes_is_answered_behind_them() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        held = HeldEngine(broker.engine)
        held.hold_publishes()
        await client.send(
            EVENT | {"room": "deal:1", "id": 1},
            EVENT | {"room": "live:1", "id": 2},
            EVENT | {"room": "a*", "id": 3},
            {"op": "nonsense", "id": 4},
            EVENT | {"room": "deal:2", "id": 5},
            {"op": "ping", "id": 6},
        )
        await wait_all_tasks_blocked(0.005)
        assert client.batches == [[client.welcome]], "nothing is answered yet"
        assert broker.hub.published == 3
        held.release()
        answers = await client.take(6)
        assert [(answer["id"], answer["op"]) for answer in answers] == [
            (1, "ok"), (2, "ok"), (3, "error"), (4, "error"), (5, "ok"), (6, "ok"),
        ]  # fmt: skip


async def test_a_store_that_refuses_at_once_is_not_told_too_early() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        held = HeldEngine(broker.engine)
        held.hold_publishes()
        await client.send(EVENT | {"room": "deal:1", "id": 1})
        await until(lambda: broker.hub.published == 1)
        held.refusing = True
        await client.send(EVENT | {"room": "deal:1", "id": 2}, EVENT | {"room": "deal:1"})
        await until(lambda: broker.hub.published == 3)
        held.release()
        first, second, third = await client.take(3)
        assert (first["id"], first["op"]) == (1, "ok")
        assert (second["id"], second["code"], second["retry"]) == (2, "unavailable", True)
        assert (third["code"], third.get("id")) == ("unavailable", None)


async def test_a_store_that_stalls_stops_its_talkers() -> None:
    """Past the bounds the socket is no longer read, whatever the client sends; then all goes on."""
    async with running() as broker, connected(broker.client_port) as client:
        held = HeldEngine(broker.engine)
        held.hold_publishes()
        count = 3 * IN_FLIGHT
        await client.send(*[EVENT | {"room": "deal:1", "id": number} for number in range(count)])
        await client.send(*[{"op": "nonsense", "id": number} for number in range(count, 2 * count)])
        await wait_all_tasks_blocked(0.01)
        (session,) = broker.context.registry.sessions.values()
        assert broker.hub.published == IN_FLIGHT
        read = broker.traffic.bytes_read
        await client.send(*[{"op": "ping"}] * 100)
        await wait_all_tasks_blocked(0.01)
        assert broker.traffic.bytes_read == read
        assert session.describe()["inbox"] >= CONFIG.limits.inbox_messages
        held.release()
        for number in range(2 * count):
            assert (await client.next())["id"] == number


async def test_a_paused_session_is_not_taken_for_dead() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        held = HeldEngine(broker.engine)
        held.hold_publishes()
        await client.send(*[EVENT | {"room": "deal:1", "id": number} for number in range(2 * IN_FLIGHT)])
        await wait_all_tasks_blocked(0.01)
        for _ in range(4):
            jump(CONFIG.server.ping_interval + 2)
            await wait_all_tasks_blocked(0.01)
        held.release()
        for number in range(2 * IN_FLIGHT):
            assert (await client.next())["id"] == number


async def test_a_join_waits_for_the_publishes_before_it() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        held = HeldEngine(broker.engine)
        held.hold_publishes()
        await client.send(EVENT | {"room": "deal:1", "id": 1}, {"op": "join", "room": "deal:1", "id": 2})
        await wait_all_tasks_blocked(0.005)
        held.release()
        stored, joined = await client.take(2)
        assert (stored["id"], joined["id"]) == (1, 2)
        assert joined["offset"] == stored["offset"] == 1


async def test_a_session_that_ends_while_its_join_waits_leaves_nothing() -> None:
    async with running() as broker:
        held = HeldEngine(broker.engine)
        held.blind()
        held.hold("history")
        async with connected(broker.client_port) as other:
            for _ in range(3):
                await other.ask("publish", room="deal:1", event="e", data=1)
            async with opened(broker.client_port) as client:
                await client.next()
                await client.send({"op": "join", "room": "deal:1", "tail": 2})
                await held.entered.wait()
            await until(lambda: any(s.ending for s in broker.context.registry.sessions.values()))
            held.release()
            await until(lambda: len(broker.context.registry.sessions) == 1)


async def test_leave_and_join_while_a_join_waits() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        stored = {}
        for _ in range(3):
            stored = await client.ask("publish", room="deal:1", event="e", data=1)
        held = HeldEngine(broker.engine)
        held.blind()
        held.hold("history")
        since = {"epoch": stored["epoch"], "offset": 1}
        await client.send(
            {"op": "join", "room": "deal:1", "tail": 1, "id": 1},
            {"op": "leave", "room": "deal:1", "id": 2},
            {"op": "join", "room": "deal:1", "since": since, "id": 3},
        )
        await held.entered.wait()
        held.release()
        answers = await client.take(6)
        assert [message.get("id", message.get("offset")) for message in answers] == [1, 3, 2, 3, 2, 3]


async def test_a_join_that_fails_leaves_the_session_outside() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        held = HeldEngine(broker.engine)
        held.fail("open")
        await client.send({"op": "join", "room": "cold:1", "id": 1})
        await held.entered.wait()
        held.release()
        answer = await client.next()
        assert (answer["code"], answer["retry"]) == ("unavailable", True)
        assert "cold:1" not in broker.hub.rooms


async def test_a_store_that_fails_at_the_handshake_asks_to_come_back() -> None:
    async with running() as broker:
        held = HeldEngine(broker.engine)
        held.fail("open")
        held.release()
        async with opened(broker.client_port, token=token("42")) as client:
            bye, code = await client.ended_with()
            assert code == 1011
            assert bye is not None
            assert bye["retry_after"] > 0
        async with connected(broker.client_port) as client:
            assert await client.refusal("auth", token=token("42")) == "unavailable"
            assert (await client.ask("ping"))["op"] == "ok"


async def test_drain_while_a_token_is_judged() -> None:
    """``bye`` comes though ``welcome`` was never said."""
    async with running() as broker:
        held = HeldEngine(broker.engine)
        held.hold("open")
        async with opened(broker.client_port, token=token("42")) as client:
            await held.entered.wait()
            broker.stop()
            bye = await client.next()
            assert bye["code"] == 4503
            held.release()
            assert (await client.end()).code == 4503


async def test_dictionaries_are_not_announced_before_welcome() -> None:
    async with running() as broker:
        held = HeldEngine(broker.engine)
        held.hold("open")
        async with opened(broker.client_port, token=token("42"), protocol="broker.v1.zstd") as client:
            await held.entered.wait()
            broker.clock.announce_dictionaries()
            held.release()
            assert (await client.next())["op"] == "welcome"
            await client.close()


async def test_pings_are_answered_with_the_same_words() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        for payload in (b"", b"p" * 125):
            await client.send_bytes(frame(PING, payload))
            assert await client.frame() == (PONG, 0, payload)


async def test_describe_is_what_operators_see() -> None:
    async with running() as broker, connected(broker.client_port, token=token("42", info="i")) as client:
        await client.ask("join", room="deal:1")
        (session,) = broker.context.registry.sessions.values()
        shown = session.describe()
        assert shown["user"] == "42"
        assert shown["info"] == "i"
        assert shown["codec"] == "json"
        assert set(shown["rooms"]) == {"all", "deal:1", "user:42"}
        assert shown["outbox_bytes"] == 0
        assert shown["ending"] is None


async def test_disconnect_says_bye_once() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        (session,) = broker.context.registry.sessions.values()
        session.disconnect(CloseCode.FORBIDDEN, "by an operator")
        session.disconnect(CloseCode.INTERNAL, "too late")
        bye, code = await client.ended_with()
        assert code == 4403
        assert bye is not None
        assert (bye["reason"], bye["retry_after"]) == ("by an operator", None)


@pytest.mark.parametrize("limit", [1.0, 3.0])
async def test_the_limit_of_control_frames_is_a_setting(limit: float) -> None:
    few = config(limits={"control_frames": limit})
    async with running(few) as broker, connected(broker.client_port) as client:
        await client.send_bytes(frame(PING) * int(limit))
        for _ in range(int(limit)):
            assert (await client.frame())[0] == PONG
        await client.send_bytes(frame(PING))
        assert (await client.ended_with())[1] == 4529


async def test_without_a_limit_control_frames_are_free() -> None:
    free = config(limits={"control_frames": 0.0})
    async with running(free) as broker, connected(broker.client_port) as client:
        await client.send_bytes(frame(PING) * 1000)
        for _ in range(1000):
            assert (await client.frame())[0] == PONG
