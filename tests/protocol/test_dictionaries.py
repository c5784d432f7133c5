"""Dictionaries at work: versions side by side, found again; nothing on the disk crashes a scan."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from broker.protocol import dictionaries as module
from broker.protocol.dictionaries import MAX_DICTIONARIES, MAX_DICTIONARY_BYTES, Dictionaries
from broker.protocol.training import train
from tests.protocol.crm_events import EVENTS, crm_events


def install(directory: Path, identifier: int, rooms: str, created: float, **changes: object) -> bytes:
    """Put a sound dictionary on the disk, made without :func:`train`; returns its bytes."""
    frames = [b"[%b]" % event for event in crm_events(100, seed=identifier)]
    raw = zstandard.train_dictionary(1024, [*frames], dict_id=identifier, k=50, d=8).as_bytes()
    about = {"id": identifier, "rooms": rooms, "sha256": hashlib.sha256(raw).hexdigest(), "created": created}
    folder = directory / "dictionaries"
    folder.mkdir(exist_ok=True)
    (folder / f"{identifier}.dict").write_bytes(raw)
    (folder / f"{identifier}.json").write_bytes(orjson.dumps(about | changes))
    return raw


def test_without_a_directory_there_are_none(tmp_path: Path) -> None:
    for directory in (None, tmp_path, tmp_path / "missing"):
        dictionaries = Dictionaries.load(directory)
        assert len(dictionaries) == 0
        assert dictionaries.problems == []
        assert dictionaries.announcement() == []
        assert dictionaries.rescan() == []
        assert dictionaries.get(7) is None
        assert dictionaries.for_reading(7) is None
        assert dictionaries.newest_for("deal") is None
        assert dictionaries.for_room("deal:1", {7}) == 0


def test_the_newest_version_is_announced_and_old_ones_stay(tmp_path: Path) -> None:
    old = install(tmp_path, 7, "deal:*", created=100.0)
    new = install(tmp_path, 5, "deal:*", created=200.0)
    install(tmp_path, 9, "task:*", created=150.0)
    dictionaries = Dictionaries.load(tmp_path)
    assert len(dictionaries) == 3
    assert dictionaries.announcement() == [
        {"id": 5, "url": "/dict/5", "sha256": hashlib.sha256(new).hexdigest(), "rooms": "deal:*"},
        {
            "id": 9,
            "url": "/dict/9",
            "sha256": hashlib.sha256((tmp_path / "dictionaries" / "9.dict").read_bytes()).hexdigest(),
            "rooms": "task:*",
        },
    ]
    found = dictionaries.get(7)
    assert found is not None
    assert found.raw == old
    assert dictionaries.for_room("deal:1", {7}) == 7
    assert dictionaries.for_room("deal:1", {5, 7, 9}) == 5
    assert dictionaries.for_room("deal:1", frozenset()) == 0
    assert dictionaries.for_room("deal:1", frozenset({9, 1000})) == 0
    assert dictionaries.for_room("other:1", {5, 7, 9}) == 0


def test_of_two_patterns_the_newer_dictionary_serves(tmp_path: Path) -> None:
    install(tmp_path, 1, "*", created=300.0)
    install(tmp_path, 2, "deal:*", created=200.0)
    install(tmp_path, 3, "deal:vip", created=100.0)
    install(tmp_path, 4, "deal:vip", created=100.0)  # the same moment: the higher id
    dictionaries = Dictionaries.load(tmp_path)
    assert dictionaries.for_room("deal:vip", {1, 2, 3, 4}) == 1
    assert dictionaries.for_room("deal:vip", {2, 3}) == 2
    assert dictionaries.for_room("deal:vip", {3, 4}) == 4
    assert dictionaries.for_room("deal:vip2", {3, 4}) == 0


@pytest.mark.parametrize(
    ("pattern", "room", "fits"),
    [
        ("deal:*", "deal:1", True),
        ("deal:*", "deal:", True),
        ("deal:*", "deal", False),
        ("deal:*", "deals:1", False),
        ("deal*", "deals:1", True),
        ("deal:1", "deal:1", True),
        ("deal:1", "deal:12", False),
        ("*", "anything", True),
        ("*", "all", False),
        ("*", "user:42", False),
        ("u*", "user:42", False),
        ("a*", "all", False),
        ("all", "all", True),
        ("user:*", "user:42", True),
        ("user:42", "user:42", True),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, room: str, fits: bool) -> None:
    install(tmp_path, 1, pattern, created=1.0)
    assert Dictionaries.load(tmp_path).for_room(room, {1}) == (1 if fits else 0)


def test_newest_for_a_room_or_a_namespace(tmp_path: Path) -> None:
    install(tmp_path, 1, "deal:*", created=100.0)
    install(tmp_path, 2, "deal:*", created=200.0)
    install(tmp_path, 3, "lobby", created=300.0)
    dictionaries = Dictionaries.load(tmp_path)

    def newest(name: str) -> int:
        found = dictionaries.newest_for(name)
        return 0 if found is None else found.id

    assert [newest(name) for name in ("deal", "deal:17", "lobby", "lobby:1", "task")] == [2, 2, 3, 0, 0]


def test_a_running_broker_finds_new_ones_and_keeps_what_was_deleted(tmp_path: Path) -> None:
    dictionaries = Dictionaries.load(tmp_path)
    first = train(EVENTS, rooms="deal:*", directory=tmp_path, now=100.0)
    assert [found.about for found in dictionaries.rescan()] == [first]
    held = dictionaries.get(first.id)
    assert dictionaries.rescan() == []
    assert dictionaries.get(first.id) is held  # not read again
    for path in (tmp_path / "dictionaries").iterdir():
        path.unlink()
    second = train(EVENTS, rooms="deal:*", directory=tmp_path, now=200.0)
    install(tmp_path, 3, "deal:*", created=150.0)
    assert [found.id for found in dictionaries.rescan()] == [3, second.id]
    assert dictionaries.get(first.id) is held
    assert [entry["id"] for entry in dictionaries.announcement()] == [second.id]


def _damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_damage("5.dict", lambda raw: raw[:-1] + b"\0"), "differs from its sha256"),
        (_damage("5.dict", lambda raw: raw[:100]), "differs from its sha256"),
        (_damage("5.dict", lambda _: bytes(MAX_DICTIONARY_BYTES + 1)), "5.dict is larger than 1048576 bytes"),
        (_damage("5.json", lambda _: b"{"), "5.json: Input data was truncated"),
        (_damage("5.json", lambda _: b"\xff\xfe"), "5.json: "),
        (_damage("5.json", lambda _: b'{"id": 5}'), "missing required field `rooms`"),
        (_damage("5.json", lambda text: text.replace(b'"id":5', b'"id":6')), "describes dictionary 6, not 5"),
        (
            _damage("5.json", lambda text: text.replace(b"deal:*", b"d*l:*")),
            "'d*l:*' is not a room or a prefix",
        ),
        (_damage("5.json", lambda text: text.replace(b"100.0", b"1e999")), "5.json: "),
        (_damage("5.json", lambda text: text + b" " * 20_000), "5.json is larger than 16384 bytes"),
        (lambda folder: (folder / "5.dict").unlink(), "5.dict: No such file"),
        (lambda folder: (folder / "5.json").unlink(), "5.dict: there is no 5.json that describes it"),
        (lambda folder: (folder / "5.json").rename(folder / "6.json"), "describes dictionary 5, not 6"),
        (lambda folder: (folder / "5.json").rename(folder / "05.json"), "describes dictionary 5, not 05"),
        (lambda folder: (folder / "notes.txt").write_text("hello"), "notes.txt: not a dictionary"),
        (lambda folder: (folder / "sub.json").mkdir(), "sub.json is not a regular file"),
        (lambda folder: os.mkfifo(folder / "pipe.json"), "pipe.json is not a regular file"),
        (lambda folder: (folder / "gone.json").symlink_to("nowhere"), "gone.json: No such file"),
    ],
)
def test_what_is_corrupt_or_foreign_is_told_and_left_alone(
    tmp_path: Path, damage: Callable[[Path], object], problem: str
) -> None:
    install(tmp_path, 5, "deal:*", created=100.0)
    install(tmp_path, 9, "task:*", created=100.0)
    damage(tmp_path / "dictionaries")
    dictionaries = Dictionaries.load(tmp_path)
    assert any(problem in told for told in dictionaries.problems), dictionaries.problems
    assert dictionaries.get(9) is not None


def test_a_sound_hash_over_an_unsound_dictionary_is_no_dictionary(tmp_path: Path) -> None:
    good = install(tmp_path, 5, "deal:*", created=100.0)
    for raw, problem in (
        (b"just some text, not a dictionary", "carries the id 0"),
        (good[:8] + b"\xff" * 1000, "unable to precompute"),
        (good[:4] + (6).to_bytes(4, "little") + good[8:], "carries the id 6"),
    ):
        path = tmp_path / "dictionaries" / "5.dict"
        path.write_bytes(raw)
        about = {"id": 5, "rooms": "deal:*", "sha256": hashlib.sha256(raw).hexdigest(), "created": 1.0}
        path.with_suffix(".json").write_bytes(orjson.dumps(about))
        dictionaries = Dictionaries.load(tmp_path)
        assert len(dictionaries) == 0
        assert problem in dictionaries.problems[0]


def test_files_being_written_are_no_problem(tmp_path: Path) -> None:
    install(tmp_path, 5, "deal:*", created=100.0)
    (tmp_path / "dictionaries" / "6.dict.1234.tmp").write_bytes(b"half")
    assert Dictionaries.load(tmp_path).problems == []


def test_a_directory_that_cannot_be_listed_is_told(tmp_path: Path) -> None:
    (tmp_path / "dictionaries").write_text("a file in its place")
    assert Dictionaries.load(tmp_path).problems == [f"{tmp_path / 'dictionaries'}: Not a directory"]


def test_too_many_dictionaries_leave_the_oldest_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_DICTIONARIES >= 100
    monkeypatch.setattr(module, "MAX_DICTIONARIES", 2)
    for identifier in (1, 2, 3):
        install(tmp_path, identifier, f"d{identifier}:*", created=float(identifier))
    dictionaries = Dictionaries.load(tmp_path)
    assert len(dictionaries) == 2
    assert dictionaries.get(1) is None
    assert "1 dictionaries above the limit of 2" in dictionaries.problems[0]


@given(
    st.binary(max_size=200), st.binary(max_size=200), st.sampled_from(["5.json", "5.dict", "x", "70000.json"])
)
def test_any_bytes_in_the_folder_are_survived(first: bytes, second: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "dictionaries"
        folder.mkdir()
        (folder / "5.dict").write_bytes(first)
        (folder / name).write_bytes(second)
        dictionaries = Dictionaries.load(directory)
        assert len(dictionaries) == 0
        assert dictionaries.problems
