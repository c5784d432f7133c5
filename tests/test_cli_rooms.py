"""``broker listen`` and ``broker publish`` against a broker in a process of its own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import trio
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from broker.cli import broker
from broker.cli_options import Exit, Place, Tag
from broker.cli_rooms import MAX_LINE_BYTES, input_lines, json_line, text_line
from broker.cli_session import exit_code
from broker.client import (
    ClientError,
    Closed,
    ConnectFailed,
    ConnectionLost,
    Event,
    Item,
    Left,
    Lost,
    Member,
    Position,
    Presence,
    Rejoined,
    RequestError,
    RoomClosed,
)

SERVE = ["serve", "--dev", "--port", "0", "--admin-port", "-1", "--log-level", "warning"]


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")} | more


def served(*args: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "broker", *SERVE, *args], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    found = re.fullmatch(r"ready (ws://\S+)\n", process.stdout.readline())
    assert found is not None
    return process, found[1]


def end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    assert process.wait(30) == 0
    assert process.stdout is not None
    assert process.stdout.read() == ""
    process.stdout.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process, url = served("--set", "rooms.deal.history=100", "--data", str(tmp_path_factory.mktemp("data")))
    yield url
    end(process)


def call(*args: str, **env: str) -> Result:
    return CliRunner().invoke(broker, args, env={"BROKER_TOKEN": None, "BROKER_URL": None, **env})


# --- Against a broker ---------------------------------------------------------------


def test_publish_tells_where_the_event_is(url: str) -> None:
    assert call("publish", "deal:1", "made", '{"n": 1}', "--url", url).stdout == "deal:1 #1\n"
    result = call("publish", "deal:1", "made", "--url", url, "--json")
    found = json.loads(result.stdout)
    assert (found["room"], found["offset"]) == ("deal:1", 2)
    assert found["epoch"]
    assert call("publish", "quick:1", "made", "1", BROKER_URL=url).stdout == "quick:1 sent\n"
    assert json.loads(call("publish", "quick:1", "made", "--url", url, "--json").stdout) == {
        "room": "quick:1"
    }


def test_a_key_stores_once(url: str) -> None:
    token = call("token", "--dev", "--user", "7", "--publish", "deal:*").stdout.strip()
    first = call("publish", "deal:2", "made", "--key", "k", "--url", url, "--token", token)
    second = call("publish", "deal:2", "made", "--key", "k", "--url", url, "--token", token)
    assert (first.stdout, second.stdout) == ("deal:2 #1\n", "deal:2 #1\n")


def test_listen_shows_the_past_as_people_read_it(url: str) -> None:
    call(
        "publish",
        "deal:3",
        "deal-updated",
        '{"stage": "won"}',
        "--url",
        url,
        "--tag",
        "region=EMEA",
        "--slot",
        "card",
    )
    result = call("listen", "deal:3", "--tail", "5", "--count", "1", "--url", url)
    assert result.exit_code == Exit.OK
    clock, rest = result.stdout.split(" ", 1)
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3}", clock)
    assert rest == 'deal:3 #1 deal-updated {"stage": "won"} slot=card tags={"region": "EMEA"}\n'


def test_listen_as_json_goes_on_from_a_position(url: str) -> None:
    for number in range(3):
        call("publish", "deal:4", "n", str(number), "--url", url)
    first = json.loads(call("listen", "deal:4", "--tail", "3", "--count", "1", "--json", "--url", url).stdout)
    assert (first["op"], first["event"], first["data"], first["offset"]) == ("event", "n", 0, 1)
    place = f"{first['epoch']}:{first['offset']}"
    later = call("listen", "deal:4", "--since", place, "--count", "2", "--json", "--url", url)
    assert [json.loads(line)["data"] for line in later.stdout.splitlines()] == [1, 2]


def test_a_filter_hides_other_events(url: str) -> None:
    for region in ("APAC", "EMEA"):
        call("publish", "deal:5", "n", json.dumps(region), "--tag", f"region={region}", "--url", url)
    wanted = '{"eq": ["region", "EMEA"]}'
    result = call(
        "listen", "deal:5", "--tail", "9", "--count", "1", "--filter", wanted, "--json", "--url", url
    )
    assert json.loads(result.stdout)["data"] == "EMEA"


def test_several_rooms_are_one_output(url: str) -> None:
    for room in ("deal:6a", "deal:6b"):
        call("publish", room, "n", "--url", url)
    result = call("listen", "deal:6a", "deal:6b", "--tail", "1", "--count", "2", "--json", "--url", url)
    assert {json.loads(line)["room"] for line in result.stdout.splitlines()} == {"deal:6a", "deal:6b"}


def test_standard_input_line_by_line(url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "broker", "publish", "deal:8", "n", "-", "--url", url],
        input='{"a": 1}\n\n2\n"last"',
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "deal:8 #1\ndeal:8 #2\ndeal:8 #3\n", "")


def test_a_file_as_standard_input_and_a_line_that_is_not_json(url: str, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("1\n{\n3\n")
    with path.open("rb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "broker", "publish", "deal:9", "n", "-", "--url", url],
            stdin=file,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stdout) == (Exit.USAGE, "deal:9 #1\n")
    assert "line 2 is not JSON" in done.stderr


def test_ctrl_c_ends_listening_quietly(url: str) -> None:
    call("publish", "deal:10", "n", "--url", url)
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "broker", "listen", "deal:10", "--tail", "1", "--url", url],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "deal:10 #1" in process.stdout.readline()
    process.send_signal(2)
    rest, complaint = process.communicate(timeout=30)
    assert (process.returncode, rest, complaint.strip()) == (Exit.INTERRUPTED, "", "")


def test_a_reader_that_goes_away_ends_listening_quietly(url: str) -> None:
    for _ in range(3):
        call("publish", "deal:11", "n", "--url", url)
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "broker", "listen", "deal:11", "--tail", "3", "--url", url],
            env=environment(),
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (Exit.PIPE, "")


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["publish", "user:7", "n"], Exit.REFUSED, "forbidden: "),
        (["publish", "a*", "n"], Exit.FAILED, "bad_room"),
        (["listen", "deal:1", "--token", "nonsense"], Exit.REFUSED, "4401"),
        (["listen", "deal:1", "--filter", '{"like": 1}'], Exit.FAILED, "bad_message"),
    ],
)
def test_what_the_broker_refuses(args: list[str], code: Exit, sentence: str, url: str) -> None:
    result = call(*args, "--url", url)
    assert (result.exit_code, result.stdout) == (code, "")
    assert sentence in result.stderr
    assert result.stderr.startswith("broker: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_room_of_somebody_else_is_refused(url: str) -> None:
    token = call("token", "--dev", "--user", "8").stdout.strip()
    result = call("listen", "user:7", "--url", url, BROKER_TOKEN=token)
    assert (result.exit_code, result.stdout) == (Exit.REFUSED, "")
    assert "forbidden: " in result.stderr


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        result = call("publish", "a", "b", "--url", f"ws://127.0.0.1:{taken.getsockname()[1]}/ws")
    assert result.exit_code == Exit.UNREACHABLE
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["listen"], "Missing argument"),
        (["listen", "a", "b", "--since", "e:1"], "--since is a position in one room"),
        (["listen", "a", "--since", "5"], "'5' is no position; write EPOCH:OFFSET"),
        (["listen", "a", "--filter", "{"], "not JSON"),
        (["publish", "a", "b", "{"], "DATA is not JSON"),
        (["publish", "a", "b", "-", "--key", "k"], "--key would make all lines one event"),
        (["publish", "a", "b", "1", "--tag", "x"], "'x' has no '='; write NAME=VALUE"),
        (["publish", "a", "b", "1", "--url", "localhost"], "'localhost' is not ws://"),
        (["publish", "a", "b", "1", "--url", "http://localhost/"], "is not ws://"),
        (["publish", "a", "b", "1", "--url", "ws://localhost:99999/"], "is not ws://"),
    ],
)
def test_what_is_a_matter_of_usage(args: list[str], sentence: str) -> None:
    result = call(*args)
    assert result.exit_code == Exit.USAGE
    assert sentence in result.stderr


# --- Shapes ------------------------------------------------------------------------------


@given(st.text(min_size=1, max_size=64), st.integers(0, 2**53 - 1))
def test_positions_are_read_back(epoch: str, offset: int) -> None:
    assert Place().convert(f"{epoch}:{offset}", None, None) == (epoch, offset)


@pytest.mark.parametrize("text", ["", ":", ":5", "a:", "a:-1", "a:\u0661", "a:1.0"])
def test_what_is_no_position(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Place().convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("region=EMEA", ("region", "EMEA")),
        ("value=12", ("value", 12)),
        ("value=1.5", ("value", 1.5)),
        ('zip="01"', ("zip", "01")),
        ("zip=01", ("zip", "01")),
        ("flag=true", ("flag", "true")),
        ("nan=NaN", ("nan", "NaN")),
        ("big=1e999", ("big", "1e999")),
        ("huge=" + "9" * 400, ("huge", "9" * 400)),
        ("a=b=c", ("a", "b=c")),
        ("a=", ("a", "")),
    ],
)
def test_tags(text: str, tag: tuple[str, Any]) -> None:
    assert Tag().convert(text, None, None) == tag


def test_items_as_json_lines() -> None:
    event = Event(room="r", name="n", ts=1.0)
    assert json.loads(json_line(event)) == {"op": "event", "room": "r", "event": "n", "data": None, "ts": 1.0}
    lost = json.loads(json_line(Lost(room="r", reason="slow")))
    assert lost == {"op": "lost", "room": "r", "reason": "slow"}


def test_items_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    member = Member(session="s1", user="ada")
    guest = Member(session="s2")
    items: dict[Item, str] = {
        Event(room="r", name="two words", data="\x9b[31m", ts=1.5, user="ada"): (
            '00:00:01.500 r "two words" "\\u009b[31m" by=ada'
        ),
        Lost(room="r", reason="slow"): "r some events lost here (slow)",
        Lost(room="r", reason="slow", count=1200): "r 1,200 events lost here (slow)",
        Presence(room="r", joined=(member,), left=(guest,), changed=(guest,)): "r +ada -s2 ~s2",
        Left(room="r", code="forbidden"): "r taken away (forbidden)",
        Rejoined(room="r", reason="reconnect", recovered=True, position=Position("e", 1)): (
            "r joined again (reconnect): nothing was missed"
        ),
        Rejoined(room="r", reason="reconnect", recovered=False, position=None): (
            "r joined again (reconnect): events may be missing here"
        ),
    }
    for item, line in items.items():
        assert click.unstyle(text_line(item)) == line
        assert json.loads(json_line(item))["room"] == "r"
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConnectFailed("no", status=403), Exit.REFUSED),
        (ConnectFailed("no", status=503), Exit.UNREACHABLE),
        (Closed(4501, "expired"), Exit.REFUSED),
        (Closed(4512, "too many"), Exit.FAILED),
        (RequestError("unauthenticated", "no"), Exit.REFUSED),
        (RequestError("unavailable", "no"), Exit.FAILED),
        (RoomClosed("r", "forbidden"), Exit.REFUSED),
        (ConnectionLost("gone"), Exit.FAILED),
    ],
)
def test_exit_codes(error: ClientError, code: Exit) -> None:
    assert exit_code(error) == code


# --- Lines of a descriptor -----------------------------------------------------------------


async def test_lines_cut_anywhere() -> None:
    read, write = os.pipe()
    found: list[bytes] = []

    async def reader() -> None:
        async for line in input_lines(read):
            found.append(line)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            for piece in (b"on", b"e\ntwo\n\nth", b"ree"):
                os.write(write, piece)
                await trio.testing.wait_all_tasks_blocked()
            os.close(write)
    finally:
        os.close(read)
    assert found == [b"one", b"two", b"", b"three"]


async def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "endless"
    path.write_bytes(b"x" * (MAX_LINE_BYTES + 100_000))
    with path.open("rb") as file, pytest.raises(click.UsageError, match="a line is longer"):
        async for _ in input_lines(file.fileno()):
            pass
