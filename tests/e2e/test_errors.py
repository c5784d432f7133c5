"""Every op with every error code that it documents, and what is no message at all."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from broker.config import Rate, Rates
from tests.e2e.harness import OPEN, config, running, token
from tests.e2e.raw_client import connected

SINCE = {"epoch": "e", "offset": 0}
LONG = "r" * 201
EVENT = {"event": "e", "data": 1}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("auth", {}, "bad_message"),
    ("auth", {"token": 5}, "bad_message"),
    ("auth", {"token": "nonsense"}, "unauthenticated"),
    ("join", {}, "bad_message"),
    ("join", {"room": 7}, "bad_message"),
    ("join", {"room": ""}, "bad_room"),
    ("join", {"room": LONG}, "bad_room"),
    ("join", {"room": "ä" * 101}, "bad_room"),
    ("join", {"room": "a*"}, "bad_room"),
    ("join", {"room": "a\u0007"}, "bad_room"),
    ("join", {"room": "deal:1", "since": 3}, "bad_message"),
    ("join", {"room": "deal:1", "since": {"epoch": "e" * 65, "offset": 0}}, "bad_message"),
    ("join", {"room": "deal:1", "since": {"epoch": "e", "offset": -1}}, "bad_message"),
    ("join", {"room": "deal:1", "since": {"epoch": "e", "offset": 2**53}}, "bad_message"),
    ("join", {"room": "deal:1", "since": {"epoch": "e", "offset": 1.5}}, "bad_message"),
    ("join", {"room": "deal:1", "since": {"epoch": 1, "offset": 1}}, "bad_message"),
    ("join", {"room": "deal:1", "tail": -1}, "bad_message"),
    ("join", {"room": "deal:1", "presence": "yes"}, "bad_message"),
    ("join", {"room": "deal:1", "filter": "x"}, "bad_message"),
    ("join", {"room": "deal:1", "filter": {"like": ["a", "b"]}}, "bad_message"),
    ("join", {"room": "closed:1"}, "unauthenticated"),
    ("join", {"room": "members:1"}, "unauthenticated"),
    ("join", {"room": "user:7"}, "forbidden"),
    ("join", {"room": "all"}, "forbidden"),
    ("leave", {}, "bad_message"),
    ("leave", {"room": "deal:9"}, "not_joined"),
    ("leave", {"room": "a*"}, "bad_room"),
    ("leave", {"room": "all"}, "forbidden"),
    ("leave", {"room": "user:7"}, "forbidden"),
    ("publish", {"room": "deal:1", "event": "e"}, "bad_message"),
    ("publish", {"room": "deal:1", "data": 1}, "bad_message"),
    ("publish", {"event": "e", "data": 1}, "bad_message"),
    ("publish", {"room": "deal:1", "event": "", "data": 1}, "bad_message"),
    ("publish", {"room": "deal:1", "event": "e" * 129, "data": 1}, "bad_message"),
    ("publish", {"room": "deal:1", **EVENT, "key": ""}, "bad_message"),
    ("publish", {"room": "deal:1", **EVENT, "slot": 1}, "bad_message"),
    ("publish", {"room": "deal:1", **EVENT, "echo": "no"}, "bad_message"),
    ("publish", {"room": "deal:1", **EVENT, "tags": []}, "bad_message"),
    ("publish", {"room": "deal:1", **EVENT, "tags": {"a": {}}}, "bad_message"),
    ("publish", {"room": "deal:1", "event": "e", "data": 2**64}, "bad_message"),
    ("publish", {"room": "a*", **EVENT}, "bad_room"),
    ("publish", {"room": "small:1", "event": "e", "data": "x" * 300}, "too_large"),
    ("publish", {"room": "closed:1", **EVENT}, "unauthenticated"),
    ("publish", {"room": "all", **EVENT}, "forbidden"),
    ("publish", {"room": "user:7", **EVENT}, "forbidden"),
    ("state", {"room": "deal:1"}, "bad_message"),
    ("state", {"room": "deal:1", "state": []}, "bad_message"),
    ("state", {"room": "deal:9", "state": {}}, "not_joined"),
    ("state", {"room": "deal:1", "state": {"x": "y" * 2048}}, "too_large"),
    ("presence", {}, "bad_message"),
    ("presence", {"room": "a*"}, "bad_room"),
    ("presence", {"room": "closed:1"}, "unauthenticated"),
    ("presence", {"room": "shy:1"}, "forbidden"),
    ("history", {"room": "deal:1"}, "bad_message"),
    ("history", {"room": "deal:1", "since": SINCE, "before": 3}, "bad_message"),
    ("history", {"room": "deal:1", "before": 3, "limit": 0}, "bad_message"),
    ("history", {"room": "deal:1", "before": 3, "limit": 1001}, "bad_message"),
    ("history", {"room": "deal:1", "at": "noon"}, "bad_message"),
    ("history", {"room": "a*", "before": 1}, "bad_room"),
    ("history", {"room": "live:1", "before": 1}, "not_found"),
    ("history", {"room": "closed:1", "before": 1}, "unauthenticated"),
    ("ack", {"room": "deal:1"}, "bad_message"),
    ("ack", {"room": "deal:1", "offset": -1}, "bad_message"),
    ("ack", {"room": "deal:1", "offset": 999}, "bad_message"),
    ("ack", {"room": "live:1", "offset": 1}, "bad_message"),
    ("ack", {"room": "deal:9", "offset": 1}, "not_joined"),
    ("call", {}, "bad_message"),
    ("call", {"method": 1}, "bad_message"),
    ("call", {"method": "no.such"}, "not_found"),
    ("cancel", {}, "bad_message"),
    ("cancel", {"call": "nothing"}, "not_found"),
    ("cancel", {"call": None}, "not_found"),
    ("dict", {}, "bad_message"),
    ("dict", {"dict": 7}, "bad_message"),
    ("frobnicate", {}, "unknown_op"),
    ("ok", {}, "unknown_op"),
]


def rooms() -> Any:
    return config(
        rooms={
            "small": msgspec.structs.replace(OPEN, event_bytes=256),
            "shy": msgspec.structs.replace(OPEN, presence=False),
        },
    )


async def test_every_refusal_that_needs_no_preparation() -> None:
    """One session for all: each refusal leaves it as it was."""
    async with running(rooms()) as broker, connected(broker.client_port) as client:
        for room in ("deal:1", "live:1"):
            assert (await client.ask("join", room=room))["op"] == "ok"
        for op, fields, code in REFUSED:
            answer = await client.ask(op, **fields)
            assert (answer["op"], answer.get("code")) == ("error", code), (op, fields, answer)
            assert answer["message"]
            assert answer["retry"] is False
            if code not in {"bad_message", "bad_room", "unknown_op"} and "room" in fields:
                assert answer["room"] == fields["room"]
        counted = broker.context.registry.errors
        assert sum(counted.values()) == len(REFUSED)
        assert set(counted) == {code for _, _, code in REFUSED}


async def test_an_identity_turns_unauthenticated_into_forbidden() -> None:
    async with running() as broker, connected(broker.client_port, token=token("7")) as client:
        for op, fields in (
            ("join", {"room": "closed:1"}),
            ("join", {"room": "user:8"}),
            ("publish", {"room": "closed:1", **EVENT}),
            ("publish", {"room": "user:7", **EVENT}),
            ("publish", {"room": "all", **EVENT}),
            ("presence", {"room": "closed:1"}),
            ("presence", {"room": "user:8"}),
            ("history", {"room": "user:8", "before": 1}),
            ("leave", {"room": "user:7"}),
        ):
            assert await client.refusal(op, **fields) == "forbidden", (op, fields)
        assert (await client.ask("join", room="members:1"))["op"] == "ok"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "bad_message"),
        ("{", "bad_message"),
        ("nonsense", "bad_message"),
        ("[]", "bad_message"),
        ("null", "bad_message"),
        ("17", "bad_message"),
        ('"ping"', "bad_message"),
        ("[1]", "bad_message"),
        ("{}", "bad_message"),
        ('{"op":null}', "bad_message"),
        ('{"op":"ping","id":1.5}', "bad_message"),
        ('{"op":"ping","id":[]}', "bad_message"),
        ('{"op":"ping","id":true}', "bad_message"),
        ('{"op":"ping","id":18446744073709551616}', "bad_message"),
        ('{"op":"ping","id":"' + "i" * 65 + '"}', "bad_message"),
        ('{"op":"ping"} {"op":"ping"}', "bad_message"),
        ('{"op":"publish","room":"deal:1","event":"e","data":NaN}', "bad_message"),
        ('{"op":"publish","room":"deal:1","event":"e","data":1e999}', "bad_message"),
        ('{"op":"publish","room":"deal:1","event":"e","data":"\\ud800"}', "bad_message"),
        ('{"op":"publish","room":"deal:1","event":"e","data":' + "[" * 64 + "]" * 64 + "}", "bad_message"),
        ("[" * 30_000, "bad_message"),
        ('{"a":' * 5_000, "bad_message"),
        ("[" + ",".join(['{"op":"ping"}'] * 257) + "]", "limit_exceeded"),
    ],
)
async def test_what_is_no_message_is_answered_and_harms_nothing(text: str, code: str) -> None:
    async with running() as broker, connected(broker.client_port) as client:
        await client.send_text(text)
        answer = await client.next()
        assert (answer["op"], answer["code"]) == ("error", code)
        assert "id" not in answer
        assert (await client.ask("ping"))["op"] == "ok"
        assert broker.context.registry.errors == {code: 1}


async def test_one_bad_message_in_an_array_spoils_only_itself() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        await client.send_text('[{"op":"ping","id":1},{"op":"join","id":2},7,{"op":"ping","id":"three"}]')
        answers = await client.take(4)
        assert [(answer["op"], answer.get("id")) for answer in answers] == [
            ("ok", 1), ("error", 2), ("error", None), ("ok", "three"),
        ]  # fmt: skip


async def test_unknown_fields_are_ignored() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        assert (await client.ask("join", room="deal:1", colour="red", nested={"a": [1]}))["op"] == "ok"


async def test_a_session_has_a_limited_number_of_rooms() -> None:
    """The server's own rooms do not count."""
    few = config(limits={"rooms_per_session": 2})
    async with running(few) as broker, connected(broker.client_port, token=token("7")) as client:
        for room in ("deal:1", "deal:2"):
            assert (await client.ask("join", room=room))["op"] == "ok"
        assert await client.refusal("join", room="deal:3") == "limit_exceeded"
        assert (await client.ask("join", room="deal:2", tail=1))["op"] == "ok"
        await client.ask("leave", room="deal:1")
        assert (await client.ask("join", room="deal:3"))["op"] == "ok"


async def test_a_node_has_a_limited_number_of_rooms() -> None:
    few = config(limits={"rooms": 3})
    async with running(few) as broker, connected(broker.client_port) as client:
        for room in ("deal:1", "live:1"):
            assert (await client.ask("join", room=room))["op"] == "ok"
        for room in ("deal:2", "live:2", "board:2"):
            assert await client.refusal("join", room=room) == "limit_exceeded"
        assert (
            await client.refusal("publish", room="latest:2", event="e", data=1, slot="s") == "limit_exceeded"
        )
        # What was opened for nothing has been closed again.
        assert broker.engine.statistics()["rooms_open"] == 1


RATES = Rates(
    message=Rate(rate=1, burst=1000),
    publish=Rate(rate=1, burst=2),
    join=Rate(rate=1, burst=2),
    state=Rate(rate=1, burst=2),
    query=Rate(rate=1, burst=2),
    call=Rate(rate=1, burst=2),
    auth=Rate(rate=1, burst=2),
)


@pytest.mark.parametrize(
    ("op", "fields"),
    [
        ("auth", {"token": "x"}),
        ("join", {"room": "deal:1"}),
        ("publish", {"room": "deal:1", **EVENT}),
        ("state", {"room": "deal:1", "state": {}}),
        ("presence", {"room": "deal:1"}),
        ("call", {"method": "broker.ping"}),
        ("ping", {}),
    ],
)
async def test_each_class_has_its_rate(op: str, fields: dict[str, Any]) -> None:
    async with running(config(rates=RATES)) as broker, connected(broker.client_port) as client:
        await client.send(*[{"op": op, "id": number, **fields} for number in range(3)])
        answers = [await client.reply(number) for number in range(3)]
        assert all(answer.get("code") != "rate_limited" for answer in answers[:2])
        assert answers[2]["code"] == "rate_limited"
        assert answers[2]["retry"] is True
        assert 0 < answers[2]["retry_after"] <= 1.0


async def test_the_sessions_of_a_user_share_buckets() -> None:
    rates = msgspec.structs.replace(RATES, user_factor=1.0)
    async with running(config(rates=rates)) as broker:
        user = token("7")
        async with (
            connected(broker.client_port, token=user) as a,
            connected(broker.client_port, token=user) as b,
        ):
            for client in (a, b):
                assert (await client.ask("publish", room="deal:1", **EVENT))["op"] == "ok"
            assert await b.refusal("publish", room="deal:1", **EVENT) == "rate_limited"


async def test_a_flood_of_messages_ends_the_session() -> None:
    few = config(rates=Rates(message=Rate(rate=1, burst=10)))
    async with running(few) as broker, connected(broker.client_port) as client:
        await client.send(*[{"op": "ping"}] * 50)
        bye, code = await client.ended_with()
        assert code == 4529
        assert bye is not None
        assert bye["code"] == 4529
        assert bye["retry_after"] > 0
    assert broker.context.registry.closes == {4529: 1}


async def test_before_it_authenticates_a_session_may_only_authenticate_and_ping() -> None:
    closed = config(auth={"anonymous": False})
    async with running(closed) as broker, connected(broker.client_port) as client:
        assert (await client.ask("ping"))["op"] == "ok"
        for op, fields in (
            ("join", {"room": "deal:1"}),
            ("publish", {"room": "deal:1", **EVENT}),
            ("call", {"method": "broker.ping"}),
            ("presence", {"room": "deal:1"}),
            ("history", {"room": "deal:1", "before": 1}),
        ):
            assert await client.refusal(op, **fields) == "unauthenticated"
        assert (await client.ask("auth", token=token("7")))["user"] == "7"
        assert (await client.ask("join", room="deal:1"))["op"] == "ok"


async def test_what_follows_auth_in_one_packet_is_judged_after_it() -> None:
    closed = config(auth={"anonymous": False})
    async with running(closed) as broker, connected(broker.client_port) as client:
        await client.send_text(
            '[{"op":"auth","id":1,"token":"' + token("7") + '"},{"op":"join","id":2,"room":"members:1"},'
            '{"op":"nonsense","id":3},{"op":"ping","id":4}]'
        )
        answers = await client.take(4)
        assert [(answer["id"], answer["op"]) for answer in answers] == [
            (1, "ok"), (2, "ok"), (3, "error"), (4, "ok"),
        ]  # fmt: skip
