"""The command table, and what the end-to-end tests of each op do not see."""

from __future__ import annotations

import pytest

from broker.config import Rates
from broker.protocol import messages
from broker.server.commands import COMMANDS, HISTORY_BYTES, WAIT
from tests.e2e.harness import running
from tests.e2e.raw_client import connected


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


async def test_presence_of_a_room_that_is_not_there() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        answer = await client.ask("presence", room="nowhere:1")
        assert (answer["members"], answer["sessions"], answer["users"]) == ([], 0, 0)
        assert "nowhere:1" not in broker.hub.rooms
