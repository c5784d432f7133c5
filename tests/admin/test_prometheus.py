from __future__ import annotations

import trio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from broker.admin.prometheus import HUB, TOKENS, buckets
from broker.metrics import Histogram
from tests.admin.harness import running


async def test_every_metric_parses_and_follows_the_conventions() -> None:
    async with running() as node, node.http() as http, node.session("ada") as ada:
        await ada.ask("join", room="deal:1")
        await ada.ask("publish", room="deal:1", event="e", data=1)
        await ada.ask("join", room="a*")
        async with node.session() as other:
            await http.post("/api/disconnect", json={"session": other.id})
            assert await other.close_code() == 4403
        while 4403 not in node.broker.context.registry.closes:
            await trio.lowlevel.checkpoint()
        stats = (await http.get("/api/stats")).json()
        answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    for family in families.values():
        assert family.documentation
        assert family.name.startswith(("broker_", "process_", "python_"))
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
    unnamed = set(stats["hub"]) - {"rooms"} - set(HUB) | set(stats["tokens"]) - {"identities"} - set(TOKENS)
    assert not unnamed, "counted, but not exported"
    assert values["broker_sessions",] == 1
    assert values["broker_ready",] == 1
    assert values["broker_opened_sessions_total",] == 2
    assert values["broker_published_events_total",] == 1
    assert values["broker_errors_total", ("code", "bad_room")] == 1
    assert values["broker_closed_sessions_total", ("code", "4403")] == 1
    assert values["broker_engine_stored_total",] == 1
    assert values["broker_engine_rooms_open",] == 2
    assert values["broker_tokens_verified_total",] == 1
    assert values["broker_stage_seconds_count", ("stage", "commit")] == 1
    assert values["broker_stage_seconds_bucket", ("le", "+Inf"), ("stage", "handshake")] == 2
    assert families["broker_loop_lag_seconds"].type == "histogram"
    assert values["process_resident_memory_bytes",] > 10_000_000


@given(st.lists(st.floats(min_value=0, max_value=100)))
def test_buckets_are_cumulative_and_end_with_all(observed: list[float]) -> None:
    histogram = Histogram()
    for value in observed:
        histogram.observe(value)
    found = buckets(histogram)
    assert [bound for bound, _ in found] == [*map(repr, histogram.bounds), "+Inf"]
    for bound, count in found:
        assert count == sum(value <= float(bound) for value in observed)
