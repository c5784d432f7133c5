"""Tokens: at the handshake, by ``auth``, renewed, refused, expired; what they allow; who gets what."""

from __future__ import annotations

import time

import msgspec
import pytest

from broker.config import RoomOptions
from tests.e2e.harness import CONFIG, OPEN, config, jump, running, token, until
from tests.e2e.raw_client import connected, opened

CLOSED = config(auth={"anonymous": False})
READER = {"join": ["closed:*"], "publish": ["closed:*"], "presence": ["closed:*"]}


async def test_a_token_at_the_handshake_identifies() -> None:
    async with running(CLOSED) as broker:
        good = token("42", info={"name": "Ada"}, rooms=READER)
        async with connected(broker.client_port, token=good) as client:
            welcome = client.welcome
            assert welcome["user"] == "42"
            assert welcome["expires"] > time.time()
            assert set(welcome["rooms"]) == {"user:42"}
            assert set(welcome["rooms"]["user:42"]) == {"epoch", "offset"}
            joined = await client.ask("join", room="closed:1", presence=True)
            assert [(member["user"], member["info"]) for member in joined["members"]] == [
                ("42", {"name": "Ada"})
            ]
            await client.ask("publish", room="closed:1", event="e", data=1)
            assert (await client.event())["user"] == "42"
            assert broker.context.registry.statistics()["strangers"] == 0


async def test_a_token_in_the_query_only_where_it_is_allowed() -> None:
    async with (
        running(config(server={"query_token": True})) as broker,
        connected(broker.client_port, path=f"/ws?token={token('42')}") as client,
    ):
        assert client.welcome["user"] == "42"
    async with running() as broker, connected(broker.client_port, path=f"/ws?token={token('42')}") as client:
        assert client.welcome["user"] is None


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ("nonsense", 4401),
        ("", 4401),
        (token("42", now=time.time() - 9999, ttl=60), 4501),
        (token("42")[:-4] + "AAAA", 4401),
    ],
)
async def test_a_refused_token_is_told_after_the_upgrade(bad: str, code: int) -> None:
    async with running(CLOSED) as broker, opened(broker.client_port, token=bad) as client:
        bye, closed = await client.ended_with()
        assert closed == code
        assert client.batches == [[bye]], "nothing but the verdict"
        assert bye is not None
        assert bye["code"] == code
        assert (bye["retry_after"] is None) == (code < 4500)
        await until(lambda: broker.context.registry.closes == {code: 1})
        assert not broker.context.registry.refused, "no fault on the way"


@pytest.mark.parametrize(("bad", "code"), [("nonsense", 4401), (token("4", now=1, ttl=60), 4501)])
async def test_a_refused_auth_ends_a_session_without_identity(bad: str, code: int) -> None:
    async with running(CLOSED) as broker, connected(broker.client_port) as client:
        await client.send({"op": "auth", "token": bad, "id": 1})
        bye, closed = await client.ended_with()
        assert (closed, bye and bye["code"]) == (code, code)


async def test_renewal_replaces_the_token_and_a_failed_one_changes_nothing() -> None:
    async with (
        running(CLOSED) as broker,
        connected(broker.client_port, token=token("42", ttl=60, rooms=READER)) as client,
    ):
        await client.ask("join", room="closed:1")
        assert await client.refusal("auth", token="nonsense") == "unauthenticated"
        assert await client.refusal("auth", token=token("43")) == "conflict"
        assert (await client.ask("publish", room="closed:1", event="e", data=1))["op"] == "ok"
        renewed = await client.ask("auth", token=token("42", ttl=7200, rooms=READER))
        assert renewed["user"] == "42"
        assert renewed["expires"] > time.time() + 7000
        assert set(renewed["rooms"]) == {"user:42"}
        jump(600)  # the first token would have ended by now
        assert (await client.ask("publish", room="closed:1", event="e", data=1))["op"] == "ok"


async def test_a_renewal_that_allows_less_takes_rooms_away() -> None:
    async with running(CLOSED) as broker:
        grants = {"join": ["closed:*"], "presence": ["closed:*"], "publish": ["closed:*"]}
        less = {"join": ["closed:1"], "publish": ["closed:1"]}
        async with connected(broker.client_port, token=token("42", rooms=grants)) as client:
            for room in ("closed:1", "closed:2"):
                await client.ask("join", room=room, presence=True)
            await client.send({"op": "auth", "id": "renew", "token": token("42", rooms=less)})
            left = await client.until("left")
            assert left == {"op": "left", "room": "closed:2", "code": "forbidden"}
            assert (await client.reply("renew"))["op"] == "ok"
            assert await client.refusal("publish", room="closed:2", event="e", data=1) == "forbidden"
            assert (await client.ask("publish", room="closed:1", event="e", data=1))["op"] == "ok"
            assert (await client.event())["room"] == "closed:1"
            left_over = broker.hub.rooms["closed:1"]
            assert left_over.members == 1
            assert not left_over.watchers, "presence may not be seen any more either"


async def test_others_are_told_who_an_anonymous_session_turned_out_to_be() -> None:
    async with running() as broker, connected(broker.client_port) as a, connected(broker.client_port) as b:
        await a.ask("join", room="deal:1", presence=True)
        await b.ask("join", room="deal:1")
        assert (await a.until("presence"))["joined"][0]["user"] is None
        await b.ask("auth", token=token("7", info="Bo"))
        changed = (await a.until("presence"))["changed"]
        assert [(member["user"], member["info"]) for member in changed] == [("7", "Bo")]


async def test_an_expired_token_ends_the_session() -> None:
    async with (
        running(CLOSED) as broker,
        connected(broker.client_port, token=token("42", ttl=60)) as client,
    ):
        jump(60 + CONFIG.auth.leeway + 2)
        bye, code = await client.ended_with()
        assert code == 4501
        assert bye is not None
        assert bye["retry_after"] == 0.0


async def test_a_renewal_may_shorten_the_session() -> None:
    """Found by reading: deadlines that came nearer were not looked at before the old ones."""
    async with (
        running(config(auth={"anonymous": False}, server={"ping_interval": 3600.0})) as broker,
        connected(broker.client_port, token=token("42", ttl=3000)) as client,
    ):
        await client.ask("auth", token=token("42", ttl=60))
        jump(60 + CONFIG.auth.leeway + 2)
        assert (await client.ended_with())[1] == 4501


async def test_who_never_authenticates_is_ended() -> None:
    async with running(CLOSED) as broker, connected(broker.client_port) as client:
        jump(CONFIG.server.auth_timeout + 1)
        bye, code = await client.ended_with()
        assert code == 4408
        assert bye is not None
        assert bye["retry_after"] is None
    assert broker.context.registry.closes == {4408: 1}


async def test_an_anonymous_session_has_no_such_deadline() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        jump(CONFIG.server.auth_timeout + 2)
        assert (await client.ask("ping"))["op"] == "ok"


async def test_rooms_of_users_and_the_room_of_all() -> None:
    sender = token("9", rooms={"publish": ["user:42", "all"]})
    async with (
        running() as broker,
        connected(broker.client_port, token=token("42")) as a,
        connected(broker.client_port, token=token("42")) as b,
        connected(broker.client_port) as anonymous,
        connected(broker.client_port, token=sender) as c,
    ):
        stored = await c.ask("publish", room="user:42", event="hello", data=1)
        assert stored["offset"] == 1
        for client in (a, b):
            assert (await client.event())["room"] == "user:42"
        await c.ask("publish", room="all", event="everybody", data=2)
        for client in (a, b, c, anonymous):
            assert (await client.event())["event"] == "everybody"
        joined = await a.ask("join", room="user:42", since={"epoch": stored["epoch"], "offset": 0})
        assert joined["recovered"] is True
        assert (await a.event())["event"] == "hello"


async def test_what_came_for_a_user_meanwhile_is_recovered() -> None:
    sender = token("9", rooms={"publish": ["user:42"]})
    async with running() as broker, connected(broker.client_port, token=sender) as c:
        async with connected(broker.client_port, token=token("42")) as client:
            position = client.welcome["rooms"]["user:42"]
        await c.ask("publish", room="user:42", event="missed", data=1)
        async with connected(broker.client_port, token=token("42")) as client:
            assert client.welcome["rooms"]["user:42"]["offset"] == 1
            assert (await client.ask("join", room="user:42", since=position))["recovered"] is True
            assert (await client.event())["event"] == "missed"


async def test_nothing_comes_before_welcome() -> None:
    """Found by reading: the room of all went live while the user's room was still being opened."""
    sender = token("9", rooms={"publish": ["all", "user:42"]})
    async with running() as broker, connected(broker.client_port, token=sender) as c:
        for number in range(20):
            await c.send(*[{"op": "publish", "room": "all", "event": "e", "data": number}] * 5)
            async with opened(broker.client_port, token=token(f"u{number}")) as client:
                assert (await client.next())["op"] == "welcome"
                await client.close()


async def test_a_user_has_a_limited_number_of_sessions() -> None:
    few = config(limits={"sessions_per_user": 2})
    async with running(few) as broker:
        user = token("42")
        async with connected(broker.client_port, token=user), connected(broker.client_port, token=user):
            async with opened(broker.client_port, token=user) as third:
                bye, code = await third.ended_with()
                assert code == 4512
                assert bye is not None
                assert bye["retry_after"] > 0
            async with connected(broker.client_port) as by_auth:
                await by_auth.send({"op": "auth", "token": user})
                assert (await by_auth.ended_with())[1] == 4512
            async with connected(broker.client_port, token=token("43")):
                pass
        await until(lambda: not broker.context.registry.sessions)
        async with connected(broker.client_port, token=user) as client:
            assert client.welcome["user"] == "42"


async def test_a_full_node_says_so_before_welcome() -> None:
    few = config(limits={"rooms": 2})
    async with running(few) as broker, connected(broker.client_port, token=token("1")):
        async with opened(broker.client_port, token=token("2")) as client:
            bye, code = await client.ended_with()
            assert code == 4512
            assert bye is not None
            assert bye["retry_after"] > 0
        async with connected(broker.client_port) as client:
            assert await client.refusal("auth", token=token("2")) == "limit_exceeded"
            assert (await client.ask("ping"))["op"] == "ok"
            assert broker.context.registry.statistics()["users"] == 1, "it is nobody still"


async def test_guessing_tokens_gets_slower() -> None:
    async with running(CLOSED) as broker:
        for _ in range(4):
            async with opened(broker.client_port, token="guess") as client:
                await client.ended_with()
        async with opened(broker.client_port, token="guess") as client:
            await until(lambda: len(broker.context.registry.sessions) == 1)
            jump(8)
            assert (await client.ended_with())[1] == 4401


async def test_a_client_that_gives_up_while_its_token_is_judged_leaves_nothing() -> None:
    async with running(CLOSED) as broker:
        for _ in range(5):
            async with opened(broker.client_port, token="guess"):
                pass
        jump(20)


async def test_access_of_a_namespace() -> None:
    rooms = {
        "tokens": RoomOptions(history=10),
        "readable": RoomOptions(join="anyone", publish="user"),
        "default": msgspec.structs.replace(OPEN, publish="token"),
    }
    async with running(config(rooms=rooms)) as broker:
        async with connected(broker.client_port) as anonymous:
            assert (await anonymous.ask("join", room="readable:1"))["op"] == "ok"
            assert (
                await anonymous.refusal("publish", room="readable:1", event="e", data=1) == "unauthenticated"
            )
            assert await anonymous.refusal("publish", room="other", event="e", data=1) == "unauthenticated"
        granted = token("7", rooms={"join": ["tokens:*"], "publish": ["other"]})
        async with connected(broker.client_port, token=granted) as user:
            assert (await user.ask("publish", room="readable:1", event="e", data=1))["op"] == "ok"
            assert (await user.ask("join", room="tokens:1"))["op"] == "ok"
            assert await user.refusal("publish", room="tokens:1", event="e", data=1) == "forbidden"
            assert (await user.ask("publish", room="other", event="e", data=1))["op"] == "ok"
