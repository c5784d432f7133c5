"""``broker export``, and the past in ``broker listen``, against a broker in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result

from broker.cli_options import Exit, Moment
from broker.cli_past import PAGE
from tests.test_cli_rooms import call, end, environment, served


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process, url = served(
        *("--set", "rooms.deal.history=10000", "--set", "rooms.short.history=3"),
        *("--data", str(tmp_path_factory.mktemp("data"))),
    )
    yield url
    end(process)


def fill(url: str, room: str, values: list[Any]) -> None:
    lines = "\n".join(map(json.dumps, values))
    subprocess.run(
        [sys.executable, "-m", "broker", "publish", room, "n", "-", "--url", url],
        input=lines, env=environment(), stdout=subprocess.DEVNULL, text=True, timeout=60, check=True,
    )  # fmt: skip


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def values(result: Result) -> list[Any]:
    return [line["data"] for line in lines(result.stdout) if line["op"] == "event"]


def position(result: Result) -> str:
    """The last word of standard error."""
    return result.stderr.split()[-1]


# --- export ----------------------------------------------------------------------------


def test_a_room_of_any_size_and_on_from_where_it_ended(url: str, tmp_path: Path) -> None:
    """Several pages, by their number of events and by their bytes."""
    count = PAGE * 2 + 100
    fill(url, "deal:1", ["x" * 100 if number < 1500 else number for number in range(count)])
    path = tmp_path / "out.jsonl"
    result = call("export", "deal:1", "--url", url, "-o", str(path))
    assert (result.exit_code, result.stdout) == (Exit.OK, "")
    exported = lines(path.read_text())
    assert [line["offset"] for line in exported] == list(range(1, count + 1))
    assert set(exported[0]) == {"op", "room", "event", "data", "ts", "offset", "epoch"}
    assert result.stderr == f"broker: 2,100 events, up to {exported[-1]['epoch']}:2100\n"
    fill(url, "deal:1", ["later"])
    again = call("export", "deal:1", "--url", url, "-o", str(path), "--since", position(result))
    assert again.stderr == f"broker: 1 event, up to {exported[-1]['epoch']}:2101\n"
    assert len(lines(path.read_text())) == count + 1
    nothing = call("export", "deal:1", "--url", url, "--since", position(again))
    assert (nothing.exit_code, nothing.stdout, position(nothing)) == (Exit.OK, "", position(again))


def test_parts_of_a_room(url: str) -> None:
    fill(url, "deal:2", [1, 2, 3])
    full = lines(call("export", "deal:2", "--url", url).stdout)
    times = [line["ts"] for line in full]

    def part(*args: str) -> list[Any]:
        return values(call("export", "deal:2", "--url", url, *args))

    assert part("--limit", "2") == [1, 2]
    assert part("--at", f"{times[1]:.9f}") == [2, 3]
    assert part("--until", f"{times[1]:.9f}") == [1, 2]
    assert part("--at", f"{times[1]:.9f}", "--until", f"{times[1]:.9f}") == [2]
    assert part("--since", f"{full[0]['epoch']}:1", "--limit", "1") == [2]
    assert part("--at", "2125-01-31T12:00:00Z") == []
    stopped = call("export", "deal:2", "--url", url, "--until", f"{times[0]:.9f}")
    assert position(stopped) == f"{full[0]['epoch']}:1", "what came after it is still to be had"


def test_a_hole_is_told_and_ends_with_1(url: str) -> None:
    fill(url, "short:1", [1])
    first = call("export", "short:1", "--url", url)
    fill(url, "short:1", [2, 3, 4, 5, 6])
    result = call("export", "short:1", "--url", url, "--since", position(first))
    assert (result.exit_code, values(result)) == (Exit.FAILED, [4, 5, 6])
    assert "broker: events are missing at the beginning: they were trimmed\n" in result.stderr
    assert result.stderr.endswith(":6\n")
    result = call("export", "short:1", "--url", url, "--since", "another:1")
    assert (result.exit_code, values(result)) == (Exit.FAILED, [4, 5, 6])
    assert result.stderr.startswith("broker: events are missing at the beginning: the stream was replaced\n")
    assert call("export", "short:1", "--url", url).exit_code == Exit.OK, "nobody asked for what was before"


def test_what_cannot_be_exported(url: str, tmp_path: Path) -> None:
    result = call("export", "quick:1", "--url", url)
    assert (result.exit_code, result.stderr) == (
        Exit.FAILED,
        "broker: not_found: room quick:1 keeps no history\n",
    )
    token = call("token", "--dev", "--user", "8").stdout.strip()
    assert call("export", "user:7", "--url", url, "--token", token).exit_code == Exit.REFUSED
    result = call("export", "a", "--url", url, "--since", "e:1", "--at", "5")
    assert result.exit_code == Exit.USAGE
    assert "both say where to begin" in result.stderr
    result = call("export", "deal:2", "--url", url, "-o", str(tmp_path / "none" / "file"))
    assert result.exit_code == Exit.FAILED
    assert "No such file or directory" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Linux device")
def test_a_full_disk_is_told_with_the_position_that_is_safe(url: str) -> None:
    fill(url, "deal:3", [1])
    result = call("export", "deal:3", "--url", url, "-o", "/dev/full")
    assert result.exit_code == Exit.FAILED
    assert "No space left on device" in result.stderr
    assert "up to" not in result.stderr, "nothing was written, so there is nothing to go on from"


def test_a_disk_that_becomes_full_leaves_whole_lines_and_a_way_on(url: str, tmp_path: Path) -> None:
    fill(url, "deal:9", ["x" * 1000] * 600)
    path = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "broker", "export", "deal:9", "--url", url, "-o", str(path)]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 400; exec "$@"', "sh", *command],  # 200 or 400 KiB, as the shell counts
        env=environment(), stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == Exit.FAILED
    told, error = done.stderr.splitlines()
    assert error == f"Error: {path}: File too large"
    kept = lines(path.read_text())
    assert 0 < len(kept) < 600
    assert told.endswith(f" {kept[-1]['epoch']}:{kept[-1]['offset']}")
    call("export", "deal:9", "--url", url, "-o", str(path), "--since", told.split()[-1])
    assert [line["offset"] for line in lines(path.read_text())] == list(range(1, 601))


def test_a_reader_that_goes_away_ends_it_quietly(url: str) -> None:
    fill(url, "deal:4", [1])
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "broker", "export", "deal:4", "--url", url],
            env=environment(), stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (Exit.PIPE, "")


def test_a_broker_that_is_asked_too_often_is_given_time() -> None:
    limits = (
        "--rates-enabled",
        "--rates-query-rate",
        "50",
        "--rates-query-burst",
        "1",
        "--rates-publish-rate",
        "0",
        "--rates-message-rate",
        "0",
    )
    process, url = served("--set", "rooms.deal.history=10000", *limits)
    try:
        fill(url, "deal:1", ["x" * 1000] * 600)
        result = call("export", "deal:1", "--url", url)
        assert (result.exit_code, len(values(result))) == (Exit.OK, 600)
    finally:
        end(process)


# --- listen ------------------------------------------------------------------------------


def test_listen_shows_the_past_and_goes_on_without_a_seam(url: str) -> None:
    fill(url, "deal:5", list(range(PAGE + 5)))
    line = [sys.executable, "-m", "broker", "listen", "deal:5", "--at", "-1h", "--json", "--url", url]
    with subprocess.Popen(
        [*line, "--count", str(PAGE + 8)], env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        found = [json.loads(process.stdout.readline())]
        fill(url, "deal:5", ["a", "b", "c"])  # now, or while it is still reading
        found += lines(process.stdout.read())
        assert process.wait(30) == 0
    assert [line["offset"] for line in found] == list(range(1, PAGE + 9))


def test_listen_to_the_past_alone(url: str) -> None:
    for room in ("deal:6a", "deal:6b"):
        fill(url, room, [1, 2, 3])
    where = ("--json", "--url", url)
    assert values(call("listen", "deal:6a", "--tail", "2", "--no-follow", *where)) == [2, 3]
    assert values(call("listen", "deal:6a", "--tail", "9", "--no-follow", *where)) == [1, 2, 3]
    assert values(call("listen", "deal:6a", "--at", "-1h", "--no-follow", "--count", "1", *where)) == [1]
    both = call("listen", "deal:6a", "deal:6b", "--at", "-1h", "--no-follow", *where)
    assert sorted(values(both)) == [1, 1, 2, 2, 3, 3]
    epoch, second = lines(both.stdout)[0]["epoch"], lines(both.stdout)[1]["ts"]
    room = lines(both.stdout)[0]["room"]
    assert values(call("listen", room, "--since", f"{epoch}:1", "--no-follow", *where)) == [2, 3]
    assert values(call("listen", room, "--at", "-1h", "--until", f"{second:.9f}", *where)) == [1, 2]
    assert values(call("listen", "deal:none", "--tail", "3", "--no-follow", *where)) == []


def test_a_filter_is_applied_to_the_past_too(url: str) -> None:
    for region in ("APAC", "EMEA"):
        call("publish", "deal:7", "n", json.dumps(region), "--tag", f"region={region}", "--url", url)
    wanted = ("--filter", '{"eq": ["region", "EMEA"]}', "--no-follow", "--json", "--url", url)
    assert values(call("listen", "deal:7", "--at", "-1h", *wanted)) == ["EMEA"]
    bad = call("listen", "deal:7", "--at", "-1h", "--filter", '{"like": 1}', "--url", url)
    assert bad.exit_code == Exit.USAGE
    assert "--filter" in bad.stderr


def test_listen_says_where_events_are_missing(url: str) -> None:
    fill(url, "short:2", [1])
    first = lines(call("listen", "short:2", "--tail", "1", "--count", "1", "--json", "--url", url).stdout)[0]
    fill(url, "short:2", [2, 3, 4, 5, 6])
    where = ("--no-follow", "--json", "--url", url)
    result = call("listen", "short:2", "--since", f"{first['epoch']}:1", *where)
    assert lines(result.stdout)[0] == {"op": "lost", "room": "short:2", "reason": "trimmed"}
    assert values(result) == [4, 5, 6]
    assert values(call("listen", "short:2", "--tail", "5", *where)) == [4, 5, 6]
    assert "lost" not in call("listen", "short:2", "--tail", "5", *where).stdout


def test_listen_ends_at_a_time(url: str) -> None:
    fill(url, "deal:8", [1])
    until = f"{time.time() + 0.5:.3f}"
    result = call("listen", "deal:8", "--tail", "1", "--until", until, "--json", "--url", url)
    assert (result.exit_code, values(result)) == (Exit.OK, [1])


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--no-follow"], "that would show nothing"),
        (["--until", "-1h"], "that would show nothing"),
        (["--at", "5", "--tail", "1"], "give one of them"),
        (["--at", "yesterday"], "'yesterday' is no time"),
    ],
)
def test_what_is_a_matter_of_usage(args: list[str], sentence: str) -> None:
    result = call("listen", "deal:1", *args)
    assert result.exit_code == Exit.USAGE
    assert sentence in result.stderr


# --- Times --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("1738324800", 1738324800.0),
        ("1738324800.25", 1738324800.25),
        ("2025-01-31T12:00:00Z", 1738324800.0),
        ("2025-01-31t12:00:00.250z", 1738324800.25),
        ("2025-01-31 14:00:00.5+02:00", 1738324800.5),
        ("2025-01-31T12:00:00.123456789Z", 1738324800.123456),
        ("1960-01-01T00:00:00Z", 0.0),
    ],
)
def test_times(text: str, seconds: float) -> None:
    assert Moment().convert(text, None, None) == seconds


def test_times_ago() -> None:
    before = time.time()
    found = Moment().convert("-15m", None, None)
    assert before - 900 <= found <= time.time() - 900
    assert Moment().convert("-3650d", None, None) < before - 3649 * 86400


@pytest.mark.parametrize(
    "text",
    ["", "x", "-", "-x", "-1y", "2025-01-31", "2025-02-31T12:00:00Z", "2025-01-31T12:00:00", "1e3", "\u0661"],
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Moment().convert(text, None, None)
