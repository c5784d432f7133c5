"""The command table, and what the end-to-end tests of each op do not see."""

from __future__ import annotations

import pytest

from broker.config import Rates
from broker.engine.peers import Mate
from broker.protocol import messages
from broker.protocol.events import SessionId, UserId
from broker.server.commands import COMMANDS, HISTORY_BYTES, WAIT
from tests.e2e.harness import running, until
from tests.e2e.raw_client import connected
from tests.server.held_peers import HeldPeers


def test_every_op_has_its_row() -> None:
    assert {command.op: kind for kind, command in COMMANDS.items()} == messages.OPS
    for command in COMMANDS.values():
        assert hasattr(Rates(), command.rate), command.op
    assert {command.op for command in COMMANDS.values() if command.open} == {"auth", "ping"}


def test_what_must_wait_can_be_done_later() -> None:
    """``auth`` is never done at once, so it shows the shape of the rule."""
    for command in COMMANDS.values():
        if command.op == "auth":
            assert command.now(None, None) is WAIT  # type: ignore[arg-type]
            assert command.later is not None


@pytest.mark.parametrize("newest", [False, True])
async def test_a_history_reply_has_a_size_that_can_be_read_on_from(newest: bool) -> None:
    async with running() as broker, connected(broker.client_port) as client:
        stored = {}
        for number in range(12):
            stored = await client.ask("publish", room="deal:1", event="e", data=[number, "x" * 30_000])
        offsets: list[int] = []
        while len(offsets) < 12:
            if newest:
                page = await client.ask("history", room="deal:1", before=offsets[0] if offsets else 100)
            else:
                since = {"epoch": stored["epoch"], "offset": offsets[-1] if offsets else 0}
                page = await client.ask("history", room="deal:1", since=since)
                assert page["recovered"] is True
            found = [event["offset"] for event in page["events"]]
            assert found
            assert sum(len(str(event["data"])) for event in page["events"]) < HISTORY_BYTES + 31_000
            offsets = [*found, *offsets] if newest else [*offsets, *found]
            assert page["more"] is (len(offsets) < 12)
        assert offsets == list(range(1, 13))


async def test_presence_of_a_room_that_is_only_elsewhere() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        held = HeldPeers(broker.peers)
        held.elsewhere["live:1"] = [
            Mate(SessionId(session), UserId(user), b'{"session":"%b"}' % session.encode())
            for session, user in (("s1", "ann"), ("s2", "ann"))
        ]
        await client.send({"op": "presence", "room": "live:1", "id": 1}, {"op": "ping", "id": 2})
        held.release()
        answer = await client.next()
        assert [member["session"] for member in answer["members"]] == ["s1", "s2"]
        assert (answer["sessions"], answer["users"]) == (2, 1)
        assert (await client.next())["id"] == 2
        held.away = True
        assert await client.refusal("presence", room="live:1") == "unavailable"


async def test_presence_of_a_room_that_comes_to_be_while_others_are_asked() -> None:
    async with running() as broker, connected(broker.client_port) as a, connected(broker.client_port) as b:
        held = HeldPeers(broker.peers)
        await a.send({"op": "presence", "room": "live:1", "id": 1})
        await b.send({"op": "join", "room": "live:1", "id": 1})
        await until(lambda: held.asked)
        broker.hub.obtain("live:1", None)
        held.release()
        assert (await b.next())["op"] == "ok"
        assert (await a.next())["sessions"] in {0, 1}
        assert (await a.ask("presence", room="live:1"))["sessions"] == 1


async def test_presence_of_a_room_that_is_not_there() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        answer = await client.ask("presence", room="nowhere:1")
        assert (answer["members"], answer["sessions"], answer["users"]) == ([], 0, 0)
        assert "nowhere:1" not in broker.hub.rooms
