"""The pages under ``docs/`` against the code: what they say must still be so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
import trio
from msgspec import inspect

from broker.admin.statistics import Process, PumpStatistics, TrafficStatistics
from broker.app import Broker
from broker.config import Auth, Config, Rate
from broker.engine.embedded import EmbeddedEngine
from broker.errors import CloseCode, ErrorCode
from broker.protocol.events import Event
from broker.protocol.filters import compile_filter
from broker.protocol.http_faults import Fault
from broker.protocol.messages import OPS, Join, Refusal, decode
from broker.settings_names import required
from broker.settings_schema import KEYS, ROOM_KEYS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "CHANGELOG.md"])

SAID_BY_SERVER = {
    "welcome", "ok", "error", "event", "position", "presence", "lost", "left", "dicts", "bye",
}  # fmt: skip

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
_ROW = re.compile(r"^\| `([a-zA-Z_.]+)` \| ([^|]*) \|", re.MULTILINE)
_STATISTIC = re.compile(r"`(hub|registry|engine|traffic|tokens|stages|process|pump)\.([a-z_]+)`")


class Line(NamedTuple):
    """One frame of an example: where it stands, and its text."""

    where: str
    text: str


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def examples(info: str) -> list[Line]:
    """Every line of the blocks that begin with ```` ```info ````, in all pages."""
    return [
        Line(f"{page.name}: {line[:60]}", line)
        for page in PAGES
        for found, body in _FENCE.findall(text_of(page))
        if found == info
        for line in body.splitlines()
        if line.strip()
    ]


def names(lines: Sequence[Line]) -> list[str]:
    return [line.where for line in lines]


CLIENT = examples("json client")
SERVER = examples("json server")


# -- examples -------------------------------------------------------------------


@pytest.mark.parametrize("line", CLIENT, ids=names(CLIENT))
def test_client_examples_are_understood(line: Line) -> None:
    for message in decode(line.text.encode(), max_batch=256):
        assert not isinstance(message, Refusal), message
        if isinstance(message, Join) and message.filter is not None:
            compile_filter(message.filter)


def test_every_op_has_an_example() -> None:
    shown = {orjson.loads(line.text)["op"] for line in CLIENT}
    assert shown == set(OPS)


@pytest.mark.parametrize("line", SERVER, ids=names(SERVER))
def test_server_examples_are_batches(line: Line) -> None:
    batch = orjson.loads(line.text)
    assert isinstance(batch, list)
    for message in batch:
        assert message["op"] in SAID_BY_SERVER
        if message["op"] in {"error", "left"}:
            ErrorCode(message["code"])
        if message["op"] == "bye":
            code = CloseCode(message["code"])
            assert (message["retry_after"] is None) == code.final


def test_everything_the_server_says_has_an_example() -> None:
    shown = {message["op"] for line in SERVER for message in orjson.loads(line.text)}
    assert shown == SAID_BY_SERVER


# -- codes ----------------------------------------------------------------------


@pytest.mark.parametrize("code", ErrorCode)
def test_errors_page_tells_every_error_code(code: ErrorCode) -> None:
    assert f"\n| `{code.value}` |" in text_of(DOCS / "errors.md")


@pytest.mark.parametrize("code", CloseCode)
def test_errors_page_tells_every_close_code(code: CloseCode) -> None:
    assert f"\n| {code.value} |" in text_of(DOCS / "errors.md")


@pytest.mark.parametrize("fault", Fault)
def test_errors_page_tells_every_refusal_of_a_request(fault: Fault) -> None:
    assert f"`{fault.value}`" in text_of(DOCS / "errors.md")


# -- limits ---------------------------------------------------------------------


def limits() -> Iterator[tuple[str, Any]]:
    """Every number of the schema that bounds something, with its default; rates as (rate, burst)."""
    for path, key in KEYS.items():
        if path[-1] == "port" or not isinstance(required(key.kind), inspect.IntType | inspect.FloatType):
            continue
        if path[0] == "rates" and len(path) == 3:
            if path[2] == "rate":
                rate = getattr(Config().rates, path[1])
                assert isinstance(rate, Rate)
                yield ".".join(path[:2]), (rate.rate, rate.burst)
        else:
            yield ".".join(path), key.default
    for name, key in ROOM_KEYS.items():
        if isinstance(key.kind, inspect.IntType | inspect.FloatType):
            yield f"rooms.NAMESPACE.{name}", key.default


def told_limits() -> dict[str, str]:
    return dict(_ROW.findall(text_of(DOCS / "limits.md")))


@pytest.mark.parametrize(("name", "default"), list(limits()), ids=str)
def test_limits_page_tells_every_limit_and_its_default(name: str, default: Any) -> None:
    told = told_limits()[name].replace(",", "")
    if isinstance(default, tuple):
        rate, burst = default
        assert told == f"{rate:g} burst {burst}"
    else:
        assert float(told) == default


def test_limits_page_invents_none() -> None:
    assert set(told_limits()) <= {name for name, _ in limits()}


# -- counters -------------------------------------------------------------------


async def counters() -> dict[str, set[str]]:
    """Names under each part of ``/api/stats``."""
    broker = Broker(Config(auth=Auth(anonymous=True)))
    context = broker.context

    def deliver(_events: Sequence[Event]) -> None:
        """Nothing is published here."""

    engine = EmbeddedEngine(None, ring_events=16)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run, deliver)
        of_engine = set(engine.statistics())
        nursery.cancel_scope.cancel()
    return {
        "hub": set(context.hub.statistics()),
        "registry": set(context.registry.statistics()),
        "engine": of_engine,
        "tokens": set(context.verifier.statistics()._asdict()),
        "stages": {name for name, _ in context.stages.items()},
        "traffic": set(TrafficStatistics.__struct_fields__),
        "pump": set(PumpStatistics.__struct_fields__),
        "process": set(Process.__struct_fields__),
    }


async def test_counters_that_pages_name_exist() -> None:
    found = await counters()
    for page in PAGES:
        for part, name in _STATISTIC.findall(text_of(page)):
            assert name in found[part], f"{page.name}: there is no {part}.{name}"


# -- links ----------------------------------------------------------------------


def anchor(heading: str) -> str:
    """How a heading is linked to: lower case, punctuation gone, spaces as hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def links(page: Path) -> Iterator[str]:
    prose = _FENCE.sub("", text_of(page))
    return (link for link in _LINK.findall(prose) if "://" not in link)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{page.name}: {link}"
        if heading:
            assert heading in {anchor(found) for found in _HEADING.findall(text_of(target))}, link


def test_index_names_every_page() -> None:
    index = DOCS / "README.md"
    named = {link.partition("#")[0] for link in links(index)}
    assert {page.name for page in DOCS.glob("*.md")} - {index.name} <= named
