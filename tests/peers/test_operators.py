"""An operator asks one node of a real cluster about all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
import trio

from broker.config import Redis
from tests.admin.harness import Running, config, running
from tests.link.linked import until
from tests.redis_server import RedisServer, redis_server


@asynccontextmanager
async def two_nodes(redis_at: RedisServer) -> AsyncIterator[tuple[Running, Running]]:
    """Nodes that know each other."""
    settings = [config(node=name, redis=Redis(url=redis_at.url)) for name in ("n1", "n2")]
    with trio.fail_after(60):
        async with running(settings[0]) as one, running(settings[1]) as two:
            for node in (one, two):
                await until(partial(_knows_another, node))
            yield one, two


def _knows_another(node: Running) -> bool:
    return len(node.broker.context.peers.nodes()) == 2


async def ready(http: httpx.AsyncClient, wanted: bool) -> None:
    """Wait until the node says so."""
    while True:
        if ((await http.get("/readyz")).status_code == 200) is wanted:
            return
        await trio.sleep(0.05)


async def answer(http: httpx.AsyncClient, path: str, **body: Any) -> Any:
    found = await (http.post(path, json=body) if body else http.get(path))
    assert found.status_code == 200, found.text
    return found.json()


async def test_one_node_answers_for_both(redis_at: RedisServer) -> None:
    async with (
        two_nodes(redis_at) as (one, two),
        one.session("ada") as ada,
        two.session("bob") as bob,
        one.http() as http,
    ):
        await ada.ask("join", room="deal:1")
        await bob.ask("join", room="deal:1")
        await bob.ask("publish", room="deal:1", event="e", data=1)
        rooms = await answer(http, "/api/rooms?prefix=deal:")
        assert [(room["room"], room["members"]) for room in rooms["rooms"]] == [("deal:1", 2)]
        room = await answer(http, "/api/rooms/deal:1")
        assert {(member["node"], member["user"]) for member in room["listed"]} == {
            ("n1", "ada"),
            ("n2", "bob"),
        }
        assert (room["position"]["offset"], room["partial"]) == (1, False)
        sessions = await answer(http, "/api/sessions")
        assert {(each["node"], each["session"]) for each in sessions["sessions"]} == {
            ("n1", ada.id),
            ("n2", bob.id),
        }
        assert (await answer(http, f"/api/sessions/{bob.id}"))["node"] == "n2"
        stats = await answer(http, "/api/stats")
        assert set(stats["others"]) == {"n2"}
        assert stats["totals"]["registry"]["sessions"] == 2
        assert stats["peers"]["nodes"] == 2
        text = (await http.get("/metrics")).text
        assert "broker_peers_nodes 2.0" in text
        assert "broker_cluster_link_up 1.0" in text
        assert [each["node"] for each in (await answer(http, "/api/load"))["nodes"]] == ["n1", "n2"]
        ended = await answer(http, "/api/disconnect", session=bob.id, code=4503)
        assert ended["disconnected"] == 1
        assert await bob.close_code() == 4503


async def test_another_node_is_emptied(redis_at: RedisServer) -> None:
    async with two_nodes(redis_at) as (one, two), two.session("bob") as bob, one.http() as http:
        assert await answer(http, "/api/drain", node="n2") == {"node": "n2", "told": 1}
        assert (await bob.next("bye"))["code"] == 4503
        async with two.http() as there:
            assert (await there.get("/readyz")).status_code == 503
        await until(lambda: one.broker.context.peers.nodes()[1].draining)
        assert (await answer(http, "/api/drain", node="n2"))["told"] == 0


async def test_without_redis_a_node_is_not_ready_and_answers_for_itself() -> None:
    with redis_server() as server:
        async with two_nodes(server) as (one, _), one.session("ada"), one.http() as http:
            server.freeze()
            await ready(http, False)
            sessions = await answer(http, "/api/sessions")
            assert ([each["node"] for each in sessions["sessions"]], sessions["partial"]) == (["n1"], True)
            assert not (await answer(http, "/api/sessions?local=1"))["partial"]
            server.thaw()
            await ready(http, True)


async def test_a_node_that_has_ended_well_is_not_waited_for(redis_at: RedisServer) -> None:
    long = Redis(url=redis_at.url, node_lease=600.0)
    with trio.fail_after(60):
        async with (
            running(config(node="n1", redis=long)) as one,
            running(config(node="n2", redis=long)) as two,
            one.http() as http,
        ):
            for node in (one, two):
                await until(partial(_knows_another, node))
            two.broker.stop()
            await until(lambda: not _knows_another(one))
            assert [each["name"] for each in (await answer(http, "/api/nodes"))["nodes"]] == ["n1"]
            assert not (await answer(http, "/api/rooms"))["partial"]
