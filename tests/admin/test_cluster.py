"""Three nodes, asked at any of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from broker.errors import CloseCode
from tests.admin.fakes import FailingEngine, Switchboard
from tests.admin.harness import Client, Running, cluster, config, running
from tests.admin.test_api import body, refusal

NAMES = ("n1", "n2", "n3")
EVERYBODY: list[dict[str, Any]] = [{"node": name, "error": None} for name in NAMES]
SILENT = {"node": "n3", "error": "no answer within 2 s"}


async def all_pages(node: Running, path: str, **query: Any) -> list[dict[str, Any]]:
    kind = path.rpartition("/")[2]
    found: list[dict[str, Any]] = []
    async with node.http() as http:
        after: dict[str, str] = {}
        while True:
            answer = body(await http.get(path, params={**query, **after}), kind)
            found += answer[kind]
            if answer["next"] is None:
                return found
            after = {"after": answer["next"]}


async def join(clients: Sequence[Client], *rooms: str) -> None:
    for client in clients:
        for room in rooms:
            await client.ask("join", room=room)


# -- rooms ------------------------------------------------------------------------


async def test_rooms_of_all_nodes_are_one_list() -> None:
    async with (
        cluster(Switchboard(), *NAMES) as (one, two, three),
        one.session() as first,
        two.session() as second,
        three.session() as third,
    ):
        await join([first], "deal:1", "deal:2")
        await join([second], "deal:2", "deal:4")
        await join([third], "deal:2", "deal:3", "deal:4")
        expected = [("deal:1", 1), ("deal:2", 3), ("deal:3", 1), ("deal:4", 2)]
        for node in (one, two, three):
            for limit in (1, 2, 3, 100):
                rooms = await all_pages(node, "/api/rooms", prefix="deal:", limit=limit)
                assert [(room["room"], room["members"]) for room in rooms] == expected
                fullest = await all_pages(node, "/api/rooms", prefix="deal:", limit=limit, sort="members")
                assert [room["room"] for room in fullest] == ["deal:2", "deal:4", "deal:1", "deal:3"]
        async with one.http() as http:
            found = body(await http.get("/api/rooms"), "rooms")
            assert (found["total"], found["nodes"], found["partial"]) == (10, EVERYBODY, False)
            for sort in ("name", "members"):
                query = {"local": "1", "prefix": "deal:", "sort": sort}
                here = body(await http.get("/api/rooms", params=query), "rooms")
                assert [(room["room"], room["members"]) for room in here["rooms"]] == [
                    ("deal:1", 1),
                    ("deal:2", 1),
                ]
                assert (here["total"], here["nodes"]) == (3, EVERYBODY[:1])


async def test_a_room_is_told_with_the_members_of_all_nodes() -> None:
    async with (
        cluster(Switchboard(), *NAMES) as (one, two, three),
        one.session("ada") as ada,
        two.session("ada") as again,
        two.session("bob") as bob,
    ):
        await join([ada, again, bob], "deal:1")
        await bob.ask("publish", room="deal:1", event="e", data=1)
        async with three.http() as http:
            found = body(await http.get("/api/rooms/deal:1"), "room")
            assert (found["alive"], found["members"], found["partial"]) == (True, 3, False)
            assert found["position"]["offset"] == 1  # the furthest
            assert [(each["node"], each["user"]) for each in found["listed"]] == [
                ("n1", "ada"),
                ("n2", "ada"),
                ("n2", "bob"),
            ]
            assert found["options"]["history"] == 100
            assert refusal(await http.get("/api/rooms/deal:1?local=true")) == (404, "not_found")
            assert refusal(await http.get("/api/rooms/deal:2")) == (404, "not_found")


# -- sessions and users -----------------------------------------------------------


async def test_sessions_of_all_nodes_are_one_list_by_age() -> None:
    async with (
        cluster(Switchboard(), *NAMES) as nodes,
        nodes[0].session("ada") as a,
        nodes[2].session("bob") as b,
        nodes[1].session("ada") as c,
        nodes[0].session() as d,
    ):
        expected = [(a.id, "n1"), (b.id, "n3"), (c.id, "n2"), (d.id, "n1")]
        for node in nodes:
            for limit in (1, 3, 100):
                found = await all_pages(node, "/api/sessions", limit=limit)
                assert [(each["session"], each["node"]) for each in found] == expected
        found = await all_pages(nodes[2], "/api/sessions", user="ada")
        assert [each["session"] for each in found] == [a.id, c.id]
        async with nodes[2].http() as http:
            assert (await http.get("/api/sessions")).json()["total"] == 4
            here = body(await http.get("/api/sessions?local=1"), "sessions")
            assert ([each["session"] for each in here["sessions"]], here["total"]) == ([b.id], 1)


async def test_a_session_is_found_wherever_it_is() -> None:
    switchboard = Switchboard()
    async with (
        cluster(switchboard, *NAMES) as (one, two, _),
        two.session("ada") as ada,
        one.http() as http,
        two.http() as there,
    ):
        await ada.ask("join", room="deal:1")
        found = body(await http.get(f"/api/sessions/{ada.id}"), "session")
        assert (found["node"], found["user"]) == ("n2", "ada")
        assert {each["room"] for each in found["memberships"]} == {"all", "deal:1", "user:ada"}
        switchboard.asked.clear()
        assert (await there.get(f"/api/sessions/{ada.id}")).status_code == 200
        assert not switchboard.asked, "it is here, so nobody else has it"
        assert refusal(await http.get("/api/sessions/nobody")) == (404, "not_found")
        assert refusal(await http.get(f"/api/sessions/{ada.id}?local=1")) == (404, "not_found")


async def test_a_user_with_the_sessions_of_all_nodes() -> None:
    async with (
        cluster(Switchboard(), *NAMES) as (one, two, three),
        two.session("ada") as older,
        one.session("ada") as younger,
        three.http() as http,
    ):
        found = body(await http.get("/api/users/ada"), "user")
        assert [(each["session"], each["node"]) for each in found["sessions"]] == [
            (older.id, "n2"),
            (younger.id, "n1"),
        ]
        assert (found["session_count"], found["position"]["offset"]) == (2, 0)
        here = body(await http.get("/api/users/ada?local=1"), "user")
        assert (here["session_count"], here["position"]) == (0, None)


async def test_a_users_sessions_are_ended_everywhere() -> None:
    async with (
        cluster(Switchboard(), *NAMES) as (one, two, three),
        one.session("ada") as first,
        two.session("ada") as second,
        three.session("bob") as bob,
        three.http() as http,
    ):
        answer = body(await http.post("/api/disconnect", json={"user": "ada"}), "disconnect")
        assert answer["disconnected"] == 2
        for client in (first, second):
            assert await client.close_code() == 4403
        answer = body(await http.post("/api/disconnect", json={"session": bob.id}), "disconnect")
        assert (answer["disconnected"], len(answer["nodes"])) == (1, 1)
        assert await bob.close_code() == 4403


async def test_a_session_is_ended_on_another_node() -> None:
    async with (
        cluster(Switchboard(), *NAMES) as (one, two, _),
        two.session() as session,
        one.http() as http,
    ):
        answer = await http.post("/api/disconnect", json={"session": session.id, "code": 4503})
        assert body(answer, "disconnect")["disconnected"] == 1
        assert await session.close_code() == 4503
        answer = await http.post("/api/disconnect", json={"session": "nobody"})
        assert refusal(answer) == (404, "not_found")


# -- who does not answer ----------------------------------------------------------


async def test_an_incomplete_answer_says_so() -> None:
    switchboard = Switchboard()
    async with (
        cluster(switchboard, *NAMES) as (one, two, three),
        one.http() as http,
        two.session("ada") as ada,
        three.session("ada") as missing,
    ):
        await join([ada, missing], "deal:1")
        switchboard.silent.add("n3")
        silent = [*EVERYBODY[:2], SILENT]
        for path in ("/api/rooms", "/api/rooms/deal:1", "/api/sessions", "/api/users/ada", "/api/stats"):
            found = (await http.get(path)).json()
            assert (found["partial"], found["nodes"]) == (True, silent), path
        assert (await http.get("/api/users/ada")).json()["session_count"] == 1
        load = body(await http.get("/api/load"), "load")
        assert load["partial"]
        assert load["nodes"][2] == {**SILENT, "load": 0.0, "parts": None}
        # It may be there: nobody must believe that it is nowhere.
        for answer in (
            await http.get(f"/api/sessions/{missing.id}"),
            await http.get("/api/rooms/deal:2"),
            await http.post("/api/disconnect", json={"session": missing.id}),
            await http.post("/api/drain", json={"node": "n3"}),
        ):
            assert refusal(answer) == (503, "unavailable")
            assert "n3" in answer.json()["message"]
        ended = body(await http.post("/api/disconnect", json={"user": "ada"}), "disconnect")
        assert (ended["disconnected"], ended["partial"]) == (1, True)
        assert await ada.close_code() == 4403
        switchboard.silent.clear()
        assert (await missing.ask("ping"))["op"] == "ok"


# -- nodes ------------------------------------------------------------------------


async def test_nodes_and_who_answers() -> None:
    async with cluster(Switchboard(), *NAMES) as (one, two, _), two.session(), one.http() as http:
        found = body(await http.get("/api/nodes"), "nodes")
        assert found["node"] == "n1"
        assert [(each["name"], each["sessions"], each["draining"]) for each in found["nodes"]] == [
            ("n1", 0, False),
            ("n2", 1, False),
            ("n3", 0, False),
        ]
    async with running() as alone, alone.http() as http:
        found = body(await http.get("/api/nodes"), "nodes")
        assert [each["name"] for each in found["nodes"]] == ["test-node"]


async def test_load_of_every_node_and_its_parts() -> None:
    async with cluster(Switchboard(), *NAMES) as (one, two, _), one.http() as http:
        two.broker.load.tick(0.05)
        two.broker.load.sample(trio.current_time())
        found = body(await http.get("/api/load"), "load")
        assert (found["node"], found["partial"]) == ("n1", False)
        assert set(found["parts"]) == {"connections", "cpu", "lag", "outbox"}
        assert [each["node"] for each in found["nodes"]] == list(NAMES)
        assert found["nodes"][1]["parts"]["lag"] >= 0.5
        assert found["nodes"][1]["load"] >= 0.5
        here = body(await http.get("/api/load?local=1"), "load")
        assert [each["node"] for each in here["nodes"]] == ["n1"]


@pytest.mark.parametrize("name", ["n2", None])
async def test_a_node_is_emptied_and_stays_up(name: str | None) -> None:
    async with cluster(Switchboard(), *NAMES) as (one, two, three), one.http() as http:
        meant = two if name else one
        async with meant.session() as first, meant.session() as second, three.session() as other:
            request = {"node": name} if name else {}
            answer = body(await http.post("/api/drain", json=request), "drain")
            assert answer == {"node": name or "n1", "told": 2}
            for client in (first, second):
                bye = await client.next("bye")
                assert (bye["code"], bye["retry_after"] > 0) == (CloseCode.DRAINING, True)
            answer = body(await http.post("/api/drain", json=request), "drain")
            assert answer["told"] == 0
            assert (await other.ask("ping"))["op"] == "ok"
            async with meant.http() as there:
                assert refusal(await there.get("/readyz")) == (503, "unavailable")
                assert (await there.get("/healthz")).status_code == 200
                assert (await there.get("/api/stats?local=1")).json()["ready"] is False
            async with three.http() as there:
                assert (await there.get("/readyz")).status_code == 200
                nodes = (await there.get("/api/nodes")).json()["nodes"]
                assert {each["name"]: each["draining"] for each in nodes}[name or "n1"] is True


async def test_sessions_of_another_node_are_asked_to_move() -> None:
    async with cluster(Switchboard(), *NAMES) as (one, two, _), one.http() as http:
        async with two.session() as session:
            request = {"share": 1, "over": 0, "node": "n2"}
            answer = body(await http.post("/api/rebalance", json=request), "rebalance")
            assert answer == {"node": "n2", "moving": 1, "over": 0.0}
            bye = await session.next("bye")
            assert (bye["code"], bye["retry_after"] > 0) == (CloseCode.DRAINING, True)
            assert await session.close_code() == 4503
        async with two.http() as there:
            assert (await there.get("/readyz")).status_code == 200
        stats = (await http.get("/api/stats")).json()
        assert stats["mover"]["moved"] == 0
        assert stats["others"]["n2"]["mover"] == {"orders": 1, "moved": 1, "waiting": 0}
        own = body(await http.post("/api/rebalance", json={"share": 0.5, "over": 1}), "rebalance")
        assert own["node"] == "n1"


@pytest.mark.parametrize(
    ("path", "request_", "status", "code"),
    [
        ("/api/drain", {"node": "n9"}, 404, "not_found"),
        ("/api/drain", {"node": ""}, 400, "bad_message"),
        ("/api/drain", {"nodes": "n1"}, 400, "bad_message"),
        ("/api/rebalance", {"share": 0.5, "over": 1, "node": "n9"}, 404, "not_found"),
        ("/api/rebalance", {"share": 1.5, "over": 1}, 400, "bad_message"),
        ("/api/rebalance", {"share": -0.1, "over": 1}, 400, "bad_message"),
        ("/api/rebalance", {"share": 0.5, "over": 3601}, 400, "bad_message"),
        ("/api/rebalance", {"share": 0.5}, 400, "bad_message"),
    ],
)
async def test_bad_orders(path: str, request_: dict[str, Any], status: int, code: str) -> None:
    async with cluster(Switchboard(), "n1", "n2") as (one, two), one.http() as http:
        assert refusal(await http.post(path, json=request_)) == (status, code)
        assert one.broker.ready
        assert two.broker.ready


# -- numbers ------------------------------------------------------------------------


async def test_statistics_of_all_nodes_and_their_sum() -> None:
    async with cluster(Switchboard(), *NAMES) as (one, two, _), one.session(), two.session() as other:
        await other.ask("publish", room="live", event="e", data=1)
        async with one.http() as http:
            found = body(await http.get("/api/stats"), "stats")
            assert (found["node"], found["hub"]["published"]) == ("n1", 0)
            assert set(found["others"]) == {"n2", "n3"}
            assert found["others"]["n2"]["hub"]["published"] == 1
            assert found["totals"]["registry"]["sessions"] == 2
            assert found["totals"]["hub"]["published"] == 1
            assert found["peers"]["nodes"] == 3
            here = body(await http.get("/api/stats?local=1"), "stats")
            assert (here["others"], here["totals"], len(here["nodes"])) == ({}, {}, 1)


async def test_one_port_tells_the_metrics_of_all_workers() -> None:
    switchboard = Switchboard()
    async with cluster(switchboard, *NAMES, group="machine") as (one, two, three), one.http() as http:
        switchboard.lines["n3"].group = "another"
        async with two.session():
            text = (await http.get("/metrics")).text
            families = {family.name: family for family in text_string_to_metric_families(text)}
            for family in families.values():
                assert family.documentation
                workers = {sample.labels["worker"] for sample in family.samples}
                only = {"n1"} if family.name.startswith("broker_admin_") else {"n1", "n2"}
                assert workers == only or not family.samples, family.name
            sessions = families["broker_sessions"].samples
            assert {sample.labels["worker"]: sample.value for sample in sessions} == {"n1": 0, "n2": 1}
            counts = {
                sample.labels["worker"]: sample.value
                for sample in families["broker_stage_seconds"].samples
                if sample.name.endswith("_count") and sample.labels["stage"] == "handshake"
            }
            assert counts == {"n1": 0, "n2": 1}
            assert text.count("# HELP broker_sessions ") == 1
            switchboard.silent.add("n2")
            text = (await http.get("/metrics")).text
            families = {family.name: family for family in text_string_to_metric_families(text)}
            up = {sample.labels["worker"]: sample.value for sample in families["broker_worker_up"].samples}
            assert up == {"n1": 1, "n2": 0}
        async with three.http() as elsewhere:
            assert 'worker="n1"' not in (await elsewhere.get("/metrics")).text


async def test_what_is_counted_of_other_nodes_is_exported() -> None:
    async with cluster(Switchboard(), "n1", "n2") as (one, _), one.http() as http:
        text = (await http.get("/metrics")).text
        assert "broker_peers_nodes 2.0" in text
        assert "# TYPE broker_peers_asks_total counter" in text
        assert "# TYPE broker_cluster_link_up gauge" in text
        assert "broker_cluster_link_commands_total 7.0" in text
        assert "worker" not in text


# -- readiness ----------------------------------------------------------------------


async def test_not_ready_while_the_store_fails() -> None:
    async with running(config()) as node, node.http() as http:
        engine = FailingEngine(node.broker.engine)
        assert (await http.get("/readyz")).status_code == 200
        engine.failing = True
        assert refusal(await http.get("/readyz")) == (503, "unavailable")
        assert (await http.get("/healthz")).status_code == 200
        assert "broker_ready 0.0" in (await http.get("/metrics")).text
        engine.failing = False
        assert (await http.get("/readyz")).status_code == 200
