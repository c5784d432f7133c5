from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.admin.overview import HEADERS, duration, page
from broker.admin.statistics import (
    Process,
    PumpStatistics,
    StageStatistics,
    Statistics,
    TrafficStatistics,
)

SNAPSHOT = Statistics(
    node="n1",
    version="1.0",
    ready=True,
    started_at=0.0,
    uptime=93784.0,
    hub={"rooms": 3, "published": 1234567, "deliveries": 5, "dropped": 0},
    registry={
        "sessions": 2,
        "users": 1,
        "connections": 2,
        "opened": 9,
        "closes": {"1000": 4},
        "refused": {},
        "errors": {"forbidden": 1},
    },
    engine={"stored": 12},
    tokens={},
    admin={},
    peers={"nodes": 3},
    cluster={"link": {"up": 1}},
    load={"load": 0.25, "connections": 0.1, "cpu": 0.25, "lag": 0.0, "outbox": 0.0},
    mover={},
    pump=PumpStatistics(1, 2, 3),
    traffic=TrafficStatistics(1, 2, 3, 4),
    stages={
        "commit": StageStatistics(3, 0.1, 0.005, 0.01, None),
        "fanout": StageStatistics(0, 0.0, None, None, None),
    },
    process=Process(1, 50_000_000, 1.25, 12, 1024, 1, (1, 2, 3)),
)


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_shows_what_is_counted_and_loads_itself_again() -> None:
    text = page(SNAPSHOT)
    for shown in ("n1", "1,234,567", "1 d 2 h", "50.0", "5 ms / more", "forbidden", "stored"):
        assert shown in text
    assert '<meta http-equiv="refresh" content="5">' in text
    assert "not ready" not in text
    assert "not ready" in page(msgspec.structs.replace(SNAPSHOT, ready=False))


@given(st.text(max_size=40))
def test_nothing_that_is_shown_becomes_markup(text: str) -> None:
    evil = f"{text}<script>alert(1)</script>\"'><img onerror=x>"
    found = msgspec.structs.replace(
        SNAPSHOT, node=evil, registry={**SNAPSHOT.registry, "errors": {evil: 1}}, engine={evil: evil}
    )
    tags = Tags(page(found))
    assert not tags.found & {"script", "img"}
    assert not any(name.startswith("on") for name in tags.attributes)


def test_the_policy_allows_the_pages_own_style_and_nothing_else() -> None:
    style = re.search("<style>(.*)</style>", page(SNAPSHOT))
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    policy = HEADERS["Content-Security-Policy"]
    assert f"style-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (3600, "1 h 0 min"), (90061, "1 d 1 h")],
)
def test_time_spans(seconds: float, text: str) -> None:
    assert duration(seconds) == text
