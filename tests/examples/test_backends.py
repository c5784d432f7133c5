"""The examples of ``docs/backends.md``, run as they stand there, against a real Redis.

Only the port is changed. What they sent is then read as the broker reads it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson
import pytest
import redis

from broker.backends.said import decode_entry, decode_message
from broker.config import RoomOptions
from broker.link.keys import Keys
from tests.redis_server import RedisServer, redis_server

ROOT: Final = Path(__file__).parent.parent.parent
PAGE: Final = ROOT / "docs" / "backends.md"
KEYS: Final = Keys("broker:")
PATIENCE: Final = 30.0
"""Seconds until an example has failed."""

_FENCE: Final = re.compile(r"^```(sh|python|js|php)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Example(NamedTuple):
    """One block of the page."""

    language: str
    text: str

    @property
    def name(self) -> str:
        """For the report."""
        first = next((line for line in self.text.splitlines() if line and not line.startswith("<?")), "")
        return f"{self.language}: {first[:50]}"


class Program(NamedTuple):
    """How to run a language here."""

    command: tuple[str, ...]
    suffix: str
    package: str
    """What brings it, on Debian."""


PROGRAMS: Final = {
    "sh": Program(("sh", "-e"), ".sh", "redis-tools"),
    "python": Program((sys.executable,), ".py", "python3"),
    "js": Program(("node",), ".mjs", "nodejs"),
    "php": Program(("php",), ".php", "php-cli"),
}
EXAMPLES: Final = [Example(*found) for found in _FENCE.findall(PAGE.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


class Spoken(NamedTuple):
    """What an example said, as clients get it, without the time."""

    heard: list[dict[str, Any]]
    stored: list[dict[str, Any]]


class Run:
    """Runs examples, and hears what they say."""

    def __init__(self, server: RedisServer, directory: Path) -> None:
        self._server = server
        self._directory = directory

    def __call__(self, example: Example) -> Spoken:
        program = PROGRAMS[example.language]
        if shutil.which(program.command[0]) is None:
            pytest.skip(f"{program.command[0]} is not installed: apt-get install {program.package}")
        file = self._directory / f"example{program.suffix}"
        file.write_text(example.text.replace("6379", str(self._server.port)), encoding="utf-8")
        with self._server.client() as client:
            client.flushall()
            untyped: Any = client
            pubsub = untyped.pubsub(ignore_subscribe_messages=True)
            pubsub.psubscribe(KEYS.backend("*"))
            until(lambda: client.pubsub_numpat() == 1)
            command = [*program.command, str(file)]
            subprocess.run(command, check=True, timeout=PATIENCE, cwd=ROOT, env=environment())
            client.publish(KEYS.backend("end"), "")
            return Spoken(list(heard(pubsub)), list(stored(client)))


@pytest.fixture
def run(server: RedisServer, tmp_path: Path) -> Run:
    return Run(server, tmp_path)


def environment() -> dict[str, str]:
    """Enough to find programs, and the broker's own modules."""
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end


def heard(pubsub: Any) -> Iterator[dict[str, Any]]:
    """Messages up to our own, as nodes make them events."""
    for message in pubsub.listen():
        room = message["channel"].decode().removeprefix(KEYS.backend(""))
        if room == "end":
            pubsub.close()
            return
        yield body(decode_message(room, message["data"], RoomOptions(), 0.0).body)


def stored(client: redis.Redis) -> Iterator[dict[str, Any]]:
    entries: Any = client.xrange(KEYS.publish)
    for identifier, fields in entries:
        flat = [part for pair in fields.items() for part in pair]
        yield body(decode_entry(identifier.decode(), flat, lambda _: RoomOptions(), 0.0).body)


def body(wire: bytes) -> dict[str, Any]:
    message: dict[str, Any] = orjson.loads(wire)
    del message["op"], message["ts"]
    return message


def examples(language: str) -> list[Example]:
    found = [example for example in EXAMPLES if example.language == language]
    assert found, f"there is no example in {language}"
    return found


WON: Final = {"stage": "won", "by": "Zoë"}
UPDATED: Final = {"room": "deal:42", "event": "deal-updated", "data": WON}
STORED: Final = {"room": "deal:42", "event": "deal-won", "data": WON, "key": "deal-42-won"}


def test_with_redis_cli(run: Run) -> None:
    first = examples("sh")[0]
    told = {"room": "deal:42", "event": "deal-updated", "data": {"stage": "won"}}
    assert run(first) == Spoken([told], [{**told, "key": "deal-42-won"}])


def test_every_command_line_works(run: Run) -> None:
    for example in examples("sh"):
        run(example)


def test_a_user_for_backends_can_do_that_and_no_more(run: Run, server: RedisServer) -> None:
    (rule,) = (example for example in examples("sh") if "ACL" in example.text)
    run(rule)
    with server.client(username="shop", password="a-long-password") as client:
        client.publish(KEYS.backend("deal:42"), "x")
        client.xadd(KEYS.publish, {"room": "deal:42"})
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.xrange(KEYS.publish)
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.xadd(KEYS.rejected, {"a": "b"})
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.publish(KEYS.everybody, "x")


def test_with_the_publisher(run: Run) -> None:
    spoken = run(examples("python")[0])
    assert spoken.heard == [
        UPDATED,
        {"room": "all", "event": "maintenance", "data": {"minutes": 5}},
    ]
    won = {"room": "deal:42", "event": "deal-won", "data": {"amount": 1250.5}}
    assert spoken.stored[:2] == [
        {**won, "key": "deal-42-won", "user": "zoe"},
        {"room": "user:42", "event": "order-paid", "data": {"order": 7}, "key": "order-7-paid"},
    ]
    assert spoken.stored[2:] == [
        {"room": f"deal:{number}", "event": "price-changed", "data": {"percent": 3}} for number in range(1000)
    ]


def test_with_the_publisher_that_waits(run: Run) -> None:
    spoken = run(examples("python")[1])
    tags = {"region": "EMEA"}
    assert spoken.heard == [
        {"room": "deal:42", "event": "deal-updated", "data": {"stage": "won"}, "tags": tags},
        {"room": "user:42", "event": "order-paid", "data": {"order": 7}, "slot": "order-7"},
    ]
    assert spoken.stored == [{"room": "deal:42", "event": "deal-won", "data": {"amount": 1250.5}}]


@pytest.mark.parametrize("language", ["js", "php"])
def test_in_other_languages(run: Run, language: str) -> None:
    (example,) = examples(language)
    assert run(example) == Spoken([UPDATED], [STORED])


def test_all_examples_are_run() -> None:
    assert {example.language for example in EXAMPLES} == set(PROGRAMS)
    assert len(examples("python")) == 2
