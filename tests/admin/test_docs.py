"""What docs/admin.md lists is what there is."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from broker.admin.api import OPERATIONS
from broker.admin.faults import STATUS
from tests.admin.fakes import Switchboard
from tests.admin.harness import cluster

GENERIC = ("broker_engine_", "broker_peers_", "broker_cluster_")
"""Metrics of parts that name what they count themselves."""
TEXT = (Path(__file__).parents[2] / "docs" / "admin.md").read_text()


def test_every_endpoint_is_described_and_no_other() -> None:
    described = set(re.findall(r"^\| `(GET|POST) (\S+)` \|", TEXT, re.MULTILINE))
    assert described == {(operation.method, operation.path) for operation in OPERATIONS}


def test_the_table_of_errors_is_the_map() -> None:
    rows = re.findall(r"^\| (\d{3}) \| (.+?) \|", TEXT, re.MULTILINE)
    told = {(code, int(status)) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    assert told == {(str(code), status) for code, status in STATUS.items()} | {("bad_message", 415)}


async def test_every_metric_is_listed_and_no_other() -> None:
    async with cluster(Switchboard(), "n1", "n2", group="here") as (node, _), node.http() as http:
        families = list(text_string_to_metric_families((await http.get("/metrics")).text))
    exported = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in families
        if not family.name.startswith(GENERIC)
    }
    table = TEXT[TEXT.index("## Metrics") :]
    listed = set(re.findall(r"`((?:broker|process|python)_\w+)(?:\{\w+\})?`", table))
    generic = {name for name in listed if name.startswith(GENERIC)}
    assert listed - generic == exported
    assert generic <= {
        family.name + ("_total" if family.type == "counter" else "") for family in families
    } | set(GENERIC)
