"""Logs: one line per event, nothing secret in it, nothing that a client could use against its reader."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from broker import logs
from broker.logs import FIELD_CHARACTERS, REDACTED, Throttle, clean_text, configure, get_logger, sanitise

JWT = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiI0MiJ9.FqXHW5mTrEXMuyLnvGnhXrpxxGu3ghCdJWODE8CYDx0"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


class Unprintable:
    """An object that cannot even be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_where_nobody_looks() -> None:
    stream = io.StringIO()
    configure(stream=stream)
    get_logger("broker.test").info("session opened", session="s1", count=3)
    (line,) = lines(stream)
    assert list(line) == ["timestamp", "level", "logger", "event", "session", "count"]
    assert line["timestamp"].endswith("Z")
    assert (line["level"], line["logger"], line["event"]) == ("info", "broker.test", "session opened")
    assert (line["session"], line["count"]) == ("s1", 3)


def test_columns_and_colours_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    configure(stream=stream)
    get_logger("x").warning("slow", room="deal:7")
    assert "\x1b[" in stream.getvalue()
    assert "deal:7" in stream.getvalue()


def test_no_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    configure(stream=stream)
    get_logger("x").warning("slow", room="deal:7")
    assert "\x1b" not in stream.getvalue()
    assert "room=deal:7" in stream.getvalue()


def test_the_style_can_be_chosen() -> None:
    stream = Terminal()
    configure("info", "json", stream=stream)
    get_logger("x").info("hello")
    assert lines(stream)[0]["event"] == "hello"
    stream = Terminal()
    configure("info", "console", stream=io.StringIO())
    get_logger("x").info("hello")


def test_lower_levels_are_left_out() -> None:
    stream = io.StringIO()
    configure("warning", stream=stream)
    log = get_logger("x")
    log.info("no")
    log.warning("yes")
    assert [line["event"] for line in lines(stream)] == ["yes"]


def test_a_log_that_cannot_be_written_is_counted_and_disturbs_nobody() -> None:
    output = configure(stream=Broken())
    get_logger("x").error("lost")
    closed = io.StringIO()
    closed.close()
    assert output.dropped == 1
    output = logs.Output(closed)
    output.write("lost")
    assert output.dropped == 1


def test_a_traceback_cannot_forge_a_line() -> None:
    stream = io.StringIO()
    configure("info", "console", stream=stream)
    try:
        raise ValueError(f"bad\n2026-01-01 [info] all is well\x1b[2J {JWT}")  # noqa: TRY301 - its traceback is wanted
    except ValueError:
        get_logger("x").exception("failed")
    first, *rest = stream.getvalue().splitlines()
    assert "failed" in first
    assert all(line.startswith("  ") for line in rest)
    assert "all is well\\x1b[2J [redacted]" in stream.getvalue()


def test_a_long_traceback_keeps_its_end() -> None:
    event = sanitise(None, "error", {"event": "x", "exception": "start\n" + "x" * 50_000 + "\nend"})
    assert event["exception"].endswith("\n  end")
    assert "start" not in event["exception"]
    assert len(event["exception"]) < logs.TRACE_CHARACTERS + 20


def test_libraries_log_through_the_same_chain() -> None:
    logging.getLogger().handlers[:] = []  # pytest's own raise on a record that cannot be formatted
    stream = io.StringIO()
    configure(stream=stream)
    configure(stream=stream)  # once more does not double the lines
    library = logging.getLogger("hypercorn.error")
    library.warning("token=%s is bad\n", "x")
    library.info("chatter")
    logging.getLogger("odd").log(logging.CRITICAL + 5, "loud")
    library.warning("%d", "not a number")
    try:
        raise KeyError("k")  # noqa: TRY301 - its traceback is wanted
    except KeyError:
        library.exception("failed")
    found = lines(stream)
    assert [line["event"] for line in found] == [
        "token=x is bad\\n",
        "loud",
        "'%d' ('not a number',)",
        "failed",
    ]
    assert [line["level"] for line in found] == ["warning", "critical", "warning", "error"]
    assert found[0]["logger"] == "hypercorn.error"
    assert "KeyError" in found[3]["exception"]


# --- What may leave the process -------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["token", "admin_token", "Authorization", "secret", "client_secret", "password", "Cookie"]
)
def test_fields_with_secret_names_are_redacted(name: str) -> None:
    assert sanitise(None, "info", {"event": "x", name: "hush"})[name] == REDACTED
    assert sanitise(None, "info", {"event": "x", "headers": {name: ["hush"]}})["headers"] == {name: REDACTED}


def test_numbers_and_nothing_are_no_secrets() -> None:
    event = {"event": "x", "tokens": 3, "token": None, "tokens_left": 0.5}
    assert sanitise(None, "info", dict(event)) == event


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (JWT, REDACTED),
        (f"got {JWT}.", "got [redacted]."),
        (JWT[:60], REDACTED),
        (f"GET /ws?token={'x' * 10}&a=1", "GET /ws?token=[redacted]&a=1"),
        ("/ws?a=1&access_token=abc", "/ws?a=1&access_token=[redacted]"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer [redacted]"),
        ("bearer abc", "bearer [redacted]"),
        ("the bearer of news", "the bearer [redacted] news"),
        ("plain text", "plain text"),
        ("a\r\nb\x1b[31m\x9b\x00\x7f", "a\\r\\nb\\x1b[31m\\x9b\\x00\\x7f"),
        ("\u202etxt.exe\u2028\ud800", "\\u202etxt.exe\\u2028\\ud800"),
        ("größer 日本 🚀", "größer 日本 🚀"),
    ],
)
def test_texts(text: str, clean: str) -> None:
    assert clean_text(text) == clean


def test_long_texts_are_cut() -> None:
    assert clean_text("x" * 512) == "x" * 512
    assert clean_text("x" * 513) == "x" * 512 + "… (513 characters)"
    assert clean_text("x" * 100_000) == "x" * 512 + "… (100000 characters)"


def test_a_token_at_the_cut_is_redacted_as_a_whole() -> None:
    assert "eyJ" not in clean_text("x" * (FIELD_CHARACTERS - 20) + " " + JWT * 50)


def test_values_of_every_kind() -> None:
    fields = {
        "none": None,
        "flag": True,
        "nan": float("nan"),
        "float": 1.5,
        "huge": 1 << 70,
        "bytes": b"a\xff\x00",
        "view": memoryview(b"abc"),
        "deep": [[[[[1]]]]],
        "set": {1},
        "object": ValueError("x\ny"),
        "broken": Unprintable(),
        "mapping": {1: "x\n"},
    }
    event = sanitise(None, "info", {"event": 7, **fields})
    assert event == {
        "event": "7",
        "none": None,
        "flag": True,
        "nan": "nan",
        "float": 1.5,
        "huge": "a huge number",
        "bytes": "a\\xff\\x00",
        "view": "abc",
        "deep": [[[["…"]]]],
        "set": [1],
        "object": "x\\ny",
        "broken": "<Unprintable: RuntimeError in str()>",
        "mapping": {"1": "x\\n"},
    }


JSONISH = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()))
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(JSONISH, st.text(st.characters(exclude_categories=())))
def test_whatever_is_logged_is_one_printable_line_of_json(value: object, text: str) -> None:
    event = sanitise(None, "info", {"event": text, "field": value})
    line = str(structlog.processors.JSONRenderer(ensure_ascii=False)(None, "info", event))
    assert line.isprintable()
    line.encode()
    json.loads(line, parse_constant=pytest.fail)


# --- The throttle ------------------------------------------------------------------------


def test_a_key_passes_once_per_interval_and_tells_what_was_held_back() -> None:
    throttle = Throttle(30.0)
    assert throttle.admit("emfile", 100.0) == 0
    assert throttle.admit("emfile", 100.1) is None
    assert throttle.admit("other", 100.1) == 0
    assert throttle.admit("emfile", 129.9) is None
    assert throttle.admit("emfile", 130.0) == 2
    assert throttle.admit("emfile", 131.0) is None
    assert throttle.admit("emfile", 190.0) == 1
    assert throttle.statistics() == (2, 3)


def test_remembered_keys_are_bounded() -> None:
    throttle = Throttle(30.0, keys=2)
    for key in ("a", "b"):
        assert throttle.admit(key, 0.0) == 0
    assert throttle.admit("a", 1.0) is None
    assert throttle.admit("c", 1.0) == 0  # "b" gives way: unused for longest
    assert throttle.admit("a", 1.0) is None
    assert throttle.admit("b", 1.0) == 0
    assert throttle.statistics().keys == 2


def test_without_a_clock_the_monotonic_one_is_used() -> None:
    throttle = Throttle(3600.0)
    assert throttle.admit("x") == 0
    assert throttle.admit("x") is None


# --- Memory -------------------------------------------------------------------------------


def test_logging_does_not_bring_rich_into_a_serving_process() -> None:
    code = "import sys, broker.logs; assert 'rich.console' not in sys.modules; import rich.console"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
