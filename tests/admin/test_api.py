from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest
import trio

from broker.admin.api import OPERATIONS
from broker.config import Admin, Server, Store
from broker.errors import BrokerError, CloseCode, ErrorCode
from broker.hub.rooms import MemberState
from broker.protocol.events import Position
from tests.admin.harness import config, running

ANSWERS = {operation.name: operation.answer for operation in OPERATIONS}


def body(answer: httpx.Response, operation: str) -> dict[str, Any]:
    """The answer's JSON, which must be what the documentation says."""
    assert answer.status_code == 200, answer.text
    msgspec.json.decode(answer.content, type=ANSWERS[operation])
    found: dict[str, Any] = answer.json()
    return found


def refusal(answer: httpx.Response) -> tuple[int, str]:
    found = answer.json()
    assert set(found) == {"code", "message"}
    return answer.status_code, found["code"]


# -- health ---------------------------------------------------------------------


async def test_health_needs_no_token_and_everything_else_does() -> None:
    async with running() as node, node.http(token=None) as http:
        assert body(await http.get("/healthz"), "health") == {"status": "ok"}
        assert body(await http.get("/readyz"), "readiness") == {"status": "ok"}
        for operation in OPERATIONS:
            if not operation.open:
                answer = await http.request(operation.method, operation.path)
                assert refusal(answer) == (401, "unauthenticated"), operation.path
                assert answer.headers["www-authenticate"] == "Bearer"
        assert refusal(await http.get("/nothing/here")) == (401, "unauthenticated")


async def test_a_node_that_stops_is_healthy_but_not_ready() -> None:
    settings = config(server=Server(port=0, drain_timeout=3600))
    async with running(settings) as node, node.http() as http, node.session() as session:
        node.broker.stop()
        assert (await session.next("bye"))["code"] == CloseCode.DRAINING
        assert refusal(await http.get("/readyz")) == (503, "unavailable")
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/api/stats")).json()["ready"] is False


# -- rooms ------------------------------------------------------------------------


async def test_rooms_are_listed_page_by_page() -> None:
    async with running() as node, node.http() as http, node.session() as one, node.session() as two:
        for number in range(5):
            await one.ask("join", room=f"deal:{number}")
        await two.ask("join", room="deal:3")
        seen: list[str] = []
        after = None
        while True:
            query = {"limit": "2", "prefix": "deal:", **({"after": after} if after else {})}
            found = body(await http.get("/api/rooms", params=query), "rooms")
            seen += [room["room"] for room in found["rooms"]]
            after = found["next"]
            if after is None:
                break
        assert seen == [f"deal:{number}" for number in range(5)]
        assert found["total"] == 6  # with room "all"
        query = {"sort": "members", "limit": "1", "prefix": "deal:"}
        found = body(await http.get("/api/rooms", params=query), "rooms")
        assert [(room["room"], room["members"]) for room in found["rooms"]] == [("deal:3", 2)]
        found = body(await http.get("/api/rooms", params={**query, "after": found["next"]}), "rooms")
        assert [(room["room"], room["members"]) for room in found["rooms"]] == [("deal:0", 1)]


async def test_a_room_shows_its_members_and_who_has_seen_what() -> None:
    async with running() as node, node.http() as http, node.session("ada") as ada:
        await ada.ask("join", room="deal:1", presence=True)
        await ada.ask("state", room="deal:1", state={"cursor": 3})
        async with node.session("bob") as bob:
            await bob.ask("join", room="deal:1")
            for number in range(3):
                await ada.ask("publish", room="deal:1", event="e", data=number, slot="s")
            await ada.ask("ack", room="deal:1", offset=3)
            await bob.ask("ack", room="deal:1", offset=2)
        found = body(await http.get("/api/rooms/deal:1"), "room")
        while found["members"] == 2:  # until the broker has seen Bob go
            await trio.lowlevel.checkpoint()
            found = body(await http.get("/api/rooms/deal:1"), "room")
        assert found["alive"] is True
        assert found["position"]["offset"] == 3
        assert found["options"]["history"] == 100
        assert (found["members"], found["users"], found["watchers"]) == (1, 1, 1)
        (member,) = found["listed"]
        assert (member["user"], member["status"], member["seen"]) == ("ada", "live", 3)
        assert member["state"] == {"cursor": 3}
        assert {entry["who"]: entry["offset"] for entry in found["seen"]} == {"ada": 3, "bob": 2}
        assert found["seen_total"] == 2


async def test_what_was_seen_is_known_after_everybody_has_left() -> None:
    async with running() as node, node.http() as http:
        async with node.session("ada") as ada:
            await ada.ask("join", room="deal:1")
            position = await ada.ask("publish", room="deal:1", event="e", data=1)
            await ada.ask("ack", room="deal:1", offset=1)
            await ada.ask("leave", room="deal:1")
            node.broker.hub.rooms["deal:1"].idle_since -= 3600
            node.broker.hub.sweep_idle()
        found = body(await http.get("/api/rooms/deal:1"), "room")
        assert (found["alive"], found["members"], found["listed"]) == (False, 0, [])
        assert found["position"] == {"epoch": position["epoch"], "offset": 1}
        assert [(entry["who"], entry["offset"]) for entry in found["seen"]] == [("ada", 1)]


async def test_rooms_may_have_names_that_urls_do_not_like() -> None:
    name = "deal:ä/b?c#d%2F &"
    async with running() as node, node.http() as http, node.session() as session:
        await session.ask("join", room=name)
        path = "/api/rooms/" + "".join(f"%{byte:02X}" for byte in name.encode())
        assert body(await http.get(path), "room")["room"] == name


async def test_rooms_that_are_not_there() -> None:
    async with running() as node, node.http() as http:
        assert refusal(await http.get("/api/rooms/deal:1")) == (404, "not_found")
        assert refusal(await http.get("/api/rooms/live")) == (404, "not_found")
        assert refusal(await http.get("/api/rooms/a*")) == (400, "bad_room")
        assert refusal(await http.get("/api/rooms/a%00")) == (400, "bad_room")
        assert refusal(await http.get("/api/rooms/")) == (400, "bad_room")
        assert node.broker.engine.position("deal:1") is None


async def test_a_dashboards_slots_are_counted() -> None:
    async with running() as node, node.http() as http:
        for slot in "ab":
            await http.post("/api/publish", json={"room": "board:1", "event": "e", "data": 1, "slot": slot})
        found = body(await http.get("/api/rooms/board:1"), "room")
        assert (found["slots"], found["position"], found["seen"]) == (2, None, [])


# -- sessions and users -----------------------------------------------------------


async def test_sessions_are_listed_oldest_first_and_found_by_user_room_and_address() -> None:
    async with (
        running() as node,
        node.http() as http,
        node.session("ada") as ada,
        node.session("bob") as bob,
        node.session() as nobody,
    ):
        await bob.ask("join", room="deal:1")

        async def ids(**query: Any) -> list[str]:
            found = body(await http.get("/api/sessions", params=query), "sessions")
            assert found["total"] == 3
            return [session["session"] for session in found["sessions"]]

        assert await ids() == [ada.id, bob.id, nobody.id]
        assert await ids(user="ada") == [ada.id]
        assert await ids(user="eve") == []
        assert await ids(room="deal:1") == [bob.id]
        assert await ids(room="deal:2") == []
        assert await ids(address="127.0.0.1", limit=1) == [ada.id]
        assert await ids(address="203.0.113.7") == []
        first = body(await http.get("/api/sessions", params={"limit": 2}), "sessions")
        assert await ids(after=first["next"]) == [nobody.id]


async def test_a_session_with_its_rooms() -> None:
    async with running() as node, node.http() as http, node.session("ada") as ada:
        await ada.ask("join", room="deal:1", filter={"eq": ["a", 1]}, presence=True)
        found = body(await http.get(f"/api/sessions/{ada.id}"), "session")
        assert found["user"] == "ada"
        memberships = {entry["room"]: entry for entry in found["memberships"]}
        assert set(memberships) == {"all", "deal:1", "user:ada"} == set(found["rooms"])
        deal = memberships["deal:1"]
        assert (deal["status"], deal["filtered"], deal["watches_presence"]) == ("live", True, True)
        assert deal["position"]["offset"] == 0
        assert memberships["all"]["position"] is None
        member = node.broker.context.registry.of_user("ada")[0].memberships["deal:1"]
        await http.post("/api/publish", json={"room": "deal:1", "event": "e", "data": 1})
        reached = member.reached = Position(deal["position"]["epoch"], 0)
        member.room.set_apart(member, MemberState.SUSPENDED)
        node.broker.hub.tell_lost(member, "slow")
        found = body(await http.get(f"/api/sessions/{ada.id}"), "session")
        lost = next(entry for entry in found["memberships"] if entry["room"] == "deal:1")
        assert (lost["status"], lost["position"]) == ("lost", reached._asdict())
        assert refusal(await http.get("/api/sessions/nobody")) == (404, "not_found")


async def test_a_user_with_all_sessions() -> None:
    async with running() as node, node.http() as http, node.session("a/b") as one, node.session("a/b") as two:
        found = body(await http.get("/api/users/a%2Fb"), "user")
        assert [session["session"] for session in found["sessions"]] == [one.id, two.id]
        assert (found["session_count"], found["room"]) == (2, "user:a/b")
        assert found["position"]["offset"] == 0
        absent = body(await http.get("/api/users/eve"), "user")
        assert (absent["sessions"], absent["position"]) == ([], None)
        assert refusal(await http.get("/api/users/a*")) == (400, "bad_message")


# -- publish ----------------------------------------------------------------------


async def test_publish_reaches_a_client_and_tells_where_it_was_stored() -> None:
    async with running() as node, node.http() as http, node.session() as session:
        joined = await session.ask("join", room="deal:1")
        content = {"event": "won", "data": {"id": 7}, "slot": "s", "key": "k", "tags": {"region": "EMEA"}}
        answer = body(await http.post("/api/publish", json={"room": "deal:1", **content}), "publish")
        assert answer == {"epoch": joined["epoch"], "offset": 1}
        event = await session.next("event")
        assert {name: event[name] for name in content} == content
        assert event["offset"] == 1
        assert "user" not in event
        again = body(await http.post("/api/publish", json={"room": "deal:1", **content}), "publish")
        assert again == answer  # the same key is stored once
        await session.ask("join", room="live")
        assert body(await http.post("/api/publish", json={"room": "live", **content}), "publish") == {}
        assert (await session.next("event"))["room"] == "live"


async def test_operators_reach_a_user_and_everybody() -> None:
    async with running() as node, node.http() as http, node.session("ada") as ada:
        for room in ("user:ada", "all"):
            await http.post("/api/publish", json={"room": room, "event": "e", "data": None})
            assert (await ada.next("event"))["room"] == room


async def test_broadcast_tells_of_each_room() -> None:
    async with running() as node, node.http() as http, node.session() as session:
        await session.ask("join", room="live")
        rooms = ["deal:1", "live", "a*", "tiny", *(f"deal:many:{number}" for number in range(100))]
        request = {"rooms": rooms, "event": "e", "data": "x" * 300}
        found = body(await http.post("/api/broadcast", json=request), "broadcast")
        assert [result["room"] for result in found["results"]] == rooms
        stored, live, bad, large, *many = found["results"]
        assert (stored["ok"], stored["offset"]) == (True, 1)
        assert live == {"room": "live", "ok": True}
        assert (bad["ok"], bad["code"], large["code"]) == (False, "bad_room", "too_large")
        assert all(result["ok"] and result["offset"] == 1 for result in many)
        assert (found["published"], found["failed"]) == (102, 2)
        assert (await session.next("event"))["data"] == "x" * 300


async def test_a_store_that_cannot_store_is_told() -> None:
    async with running() as node, node.http() as http:

        def refuse(event: Any, retention: Any, done: Any) -> None:
            done(BrokerError(ErrorCode.UNAVAILABLE, "the disk is full"))

        node.broker.engine.publish = refuse  # type: ignore[method-assign]  # a full disk, without one
        request = {"room": "deal:1", "event": "e", "data": 1}
        assert refusal(await http.post("/api/publish", json=request)) == (503, "unavailable")
        request = {"rooms": ["deal:1"], "event": "e", "data": 1}
        found = body(await http.post("/api/broadcast", json=request), "broadcast")
        assert found["results"] == [
            {"room": "deal:1", "ok": False, "code": "unavailable", "message": "the disk is full"}
        ]


# -- disconnect -------------------------------------------------------------------


async def test_a_session_is_ended_with_bye_and_code() -> None:
    async with running() as node, node.http() as http, node.session() as session:
        request = {"session": session.id, "code": 4503, "reason": "moved"}
        found = body(await http.post("/api/disconnect", json=request), "disconnect")
        assert found == {
            "disconnected": 1,
            "nodes": [{"node": "test-node", "error": None}],
            "partial": False,
        }
        bye = await session.next("bye")
        assert (bye["code"], bye["reason"]) == (4503, "moved")
        assert await session.close_code() == 4503


async def test_all_sessions_of_a_user_are_ended_for_good_by_default() -> None:
    async with (
        running() as node,
        node.http() as http,
        node.session("ada") as one,
        node.session("ada") as two,
        node.session("bob") as bob,
    ):
        answer = await http.post("/api/disconnect", json={"user": "ada"})
        assert body(answer, "disconnect")["disconnected"] == 2
        for session in (one, two):
            assert await session.next("bye") == {
                "op": "bye",
                "code": 4403,
                "reason": "disconnected by an operator",
                "retry_after": None,
            }
            assert await session.close_code() == 4403
        assert (await bob.ask("ping"))["op"] == "ok"
        answer = await http.post("/api/disconnect", json={"user": "eve"})
        assert body(answer, "disconnect")["disconnected"] == 0


async def test_a_session_that_ends_already_is_not_counted() -> None:
    settings = config(server=Server(port=0, close_timeout=3600))
    async with running(settings) as node, node.http() as http:
        silent = await trio.open_tcp_stream("127.0.0.1", node.broker.client_port)
        async with silent:
            await silent.send_all(
                b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            )
            while b"welcome" not in await silent.receive_some():
                pass
            (identifier,) = node.broker.context.registry.sessions
            request = {"session": identifier}
            for expected in (1, 0):
                answer = await http.post("/api/disconnect", json=request)
                assert body(answer, "disconnect")["disconnected"] == expected
            found = body(await http.get(f"/api/sessions/{identifier}"), "session")
            assert found["ending"] == 4403


# -- bad input, for every endpoint ---------------------------------------------------

GOOD = {"room": "deal:1", "event": "e", "data": 1}


@pytest.mark.parametrize(
    ("path", "request_", "status", "code", "says"),
    [
        ("/api/publish", {"room": "deal:1", "event": "e"}, 400, "bad_message", "`data`"),
        ("/api/publish", {**GOOD, "evnt": 1}, 400, "bad_message", "`evnt`"),
        ("/api/publish", {**GOOD, "room": 7}, 400, "bad_message", "$.room"),
        ("/api/publish", {**GOOD, "room": ""}, 400, "bad_room", "empty"),
        ("/api/publish", {**GOOD, "room": "a*"}, 400, "bad_room", "*"),
        ("/api/publish", {**GOOD, "room": "ä" * 101}, 400, "bad_room", "202 bytes"),
        ("/api/publish", {**GOOD, "event": ""}, 400, "bad_message", "$.event"),
        ("/api/publish", {**GOOD, "tags": {"a": []}}, 400, "bad_message", "tags.a"),
        ("/api/publish", {**GOOD, "tags": 1}, 400, "bad_message", "$.tags"),
        ("/api/publish", {**GOOD, "data": 2**70}, 400, "bad_message", "encoded"),
        ("/api/publish", {**GOOD, "data": "x" * 66_000}, 413, "too_large", "65536"),
        ("/api/publish", [], 400, "bad_message", "object"),
        ("/api/broadcast", {"rooms": [], "event": "e", "data": 1}, 400, "bad_message", "$.rooms"),
        ("/api/broadcast", {"rooms": ["a"] * 1001, "event": "e", "data": 1}, 400, "bad_message", "1000"),
        ("/api/broadcast", {"rooms": [1], "event": "e", "data": 1}, 400, "bad_message", "$.rooms[0]"),
        ("/api/broadcast", GOOD, 400, "bad_message", "`room`"),
        (
            "/api/broadcast",
            {"rooms": ["a"], "event": "e", "data": 1, "tags": {"": 1}},
            400,
            "bad_message",
            "tag",
        ),
        ("/api/disconnect", {}, 400, "bad_message", "session or user"),
        ("/api/disconnect", {"session": "a", "user": "b"}, 400, "bad_message", "only one"),
        ("/api/disconnect", {"session": "a"}, 404, "not_found", "session"),
        ("/api/disconnect", {"user": "a", "code": 4999}, 400, "bad_message", "4999"),
        ("/api/disconnect", {"user": "a", "code": "4403"}, 400, "bad_message", "$.code"),
        ("/api/disconnect", {"user": "a", "reason": "x" * 124}, 400, "bad_message", "$.reason"),
        ("/api/disconnect", {"user": "a", "resaon": "x"}, 400, "bad_message", "`resaon`"),
    ],
)
async def test_bad_bodies(path: str, request_: Any, status: int, code: str, says: str) -> None:
    async with running() as node, node.http() as http:
        answer = await http.post(path, json=request_)
        assert refusal(answer) == (status, code)
        assert says in answer.json()["message"]


@pytest.mark.parametrize("path", ["/api/publish", "/api/broadcast", "/api/disconnect"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"nul", b"\xff\xfe", b'{"a":1}x', b'{"room":"\xff"}', b'"\\ud800"', b"NaN", b"[" * 5000],
)
async def test_bodies_that_are_not_json(path: str, content: bytes) -> None:
    async with running() as node, node.http() as http:
        answer = await http.post(path, content=content, headers={"content-type": "application/json"})
        assert refusal(answer) == (400, "bad_message")


@pytest.mark.parametrize("path", ["/api/publish", "/api/broadcast", "/api/disconnect"])
async def test_bodies_must_say_that_they_are_json(path: str) -> None:
    async with running(config(Admin(port=0, open_on_loopback=True))) as node, node.http(token=None) as http:
        for media in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            answer = await http.post(path, content=b"{}", headers={"content-type": media})
            assert refusal(answer) == (415, "bad_message")
        answer = await http.post(
            path, content=b"{}", headers={"content-type": "Application/JSON; charset=utf-8"}
        )
        assert refusal(answer) == (400, "bad_message")  # read, and found wanting


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/api/rooms?limit=0", "$.limit"),
        ("/api/rooms?limit=1001", "$.limit"),
        ("/api/rooms?limit=ten", "$.limit"),
        ("/api/rooms?sort=size", "$.sort"),
        ("/api/rooms?after=!", "after"),
        ("/api/rooms?sort=members&after=WyJhIl0", "after"),
        ("/api/rooms?lmit=1", "`lmit`"),
        ("/api/rooms?limit=1&limit=2", "twice"),
        ("/api/sessions?limit=-1", "$.limit"),
        ("/api/sessions?after=x", "after"),
        ("/api/sessions?name=x", "`name`"),
        ("/api/stats?verbose=1", "`verbose`"),
        ("/healthz?x=1", "`x`"),
        ("/readyz?x=1", "`x`"),
        ("/metrics?x=1", "`x`"),
        ("/openapi.json?x=1", "`x`"),
        ("/?x=1", "`x`"),
        ("/api/rooms/a?x=1", "`x`"),
        ("/api/sessions/a?x=1", "`x`"),
        ("/api/users/a?x=1", "`x`"),
    ],
)
async def test_bad_queries(path: str, says: str) -> None:
    async with running() as node, node.http() as http:
        answer = await http.get(path)
        assert refusal(answer) == (400, "bad_message")
        assert says in answer.json()["message"]


async def test_unknown_paths_and_methods() -> None:
    async with running() as node, node.http() as http:
        for path in ("/nothing", "/api", "/api/", "/api/notify", "/metrics/", "/healthz/"):
            assert refusal(await http.get(path)) == (404, "not_found")
        assert refusal(await http.post("/api/notify", json={})) == (404, "not_found")
        for method in ("PUT", "DELETE", "PATCH", "POST"):
            answer = await http.request(method, "/api/rooms")
            assert refusal(answer) == (405, "unknown_op")
            assert "GET" in answer.headers["allow"]
        answer = await http.get("/api/publish")
        assert refusal(answer) == (405, "unknown_op")
        assert answer.headers["allow"] == "POST"
        assert (await http.head("/api/stats")).content == b""


# -- numbers ------------------------------------------------------------------------


async def test_one_snapshot_of_everything(tmp_path: Any) -> None:
    settings = config(store=Store(data=str(tmp_path)))
    async with running(settings) as node, node.http() as http, node.session("ada") as ada:
        await ada.ask("join", room="deal:1")
        await ada.ask("publish", room="deal:1", event="e", data=1)
        await ada.ask("join", room="a*")
        await http.get("/nothing")
        found = body(await http.get("/api/stats"), "stats")
        assert (found["node"], found["ready"]) == ("test-node", True)
        assert (found["hub"]["published"], found["hub"]["rooms"]) == (1, 3)
        assert (found["registry"]["sessions"], found["registry"]["errors"]) == (1, {"bad_room": 1})
        assert found["engine"]["stored"] == 1
        assert found["tokens"]["verified"] == 1
        assert found["pump"]["sockets"] == 1
        assert found["traffic"]["bytes_read"] > 0
        assert found["stages"]["commit"]["count"] == 1
        assert found["stages"]["handshake"]["p50"] is not None
        assert found["process"]["rss_bytes"] > 10_000_000
        assert found["process"]["descriptors"] > 3
        assert (found["admin"]["requests"], found["admin"]["refused"]) == (2, 1)


async def test_the_overview_is_a_page_with_a_policy() -> None:
    async with running() as node, node.http() as http:
        answer = await http.get("/")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "test-node" in answer.text


async def test_answers_are_not_kept_nor_read_by_other_pages() -> None:
    async with running() as node, node.http() as http:
        for path in ("/healthz", "/api/stats", "/nothing"):
            headers = (await http.get(path)).headers
            assert headers["cache-control"] == "no-store"
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cross-origin-resource-policy"] == "same-origin"
            assert "access-control-allow-origin" not in headers
