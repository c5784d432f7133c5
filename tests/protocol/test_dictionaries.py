"""Dictionaries: trained for real, found again, versions side by side; nothing on the disk crashes a scan."""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from broker.protocol import dictionaries as module
from broker.protocol.dictionaries import (
    DICTIONARY_IDS,
    MAX_DICTIONARIES,
    MAX_DICTIONARY_BYTES,
    MAX_NAMESPACES,
    MAX_SAMPLE_BYTES,
    MIN_SAMPLES,
    Dictionaries,
    SampleRecorder,
    TrainedDictionary,
    TrainingError,
    load_samples,
    train,
)
from broker.protocol.events import Position, make_event
from broker.protocol.inflate import ZstdReader

COMPANIES = (
    "Acme",
    "Globex",
    "Initech",
    "Umbrella",
    "Hooli",
    "Stark Industries",
    "Wayne Enterprises",
    "Wonka",
)
STAGES = ("lead", "qualified", "proposal", "negotiation", "won", "lost")


def crm_events(count: int, *, seed: int = 1, namespace: str = "deal") -> list[bytes]:
    """Events such as a CRM's backend publishes, as they go over the wire: about 200 bytes each."""
    rng = random.Random(seed)
    events = []
    for number in range(count):
        data: dict[str, Any] = {"id": rng.randrange(90_000)}
        kind = rng.choice(("deal-updated", "activity-added", "contact-changed"))
        if kind == "deal-updated":
            data |= {"stage": rng.choice(STAGES), "amount": rng.randrange(1_000, 999_999), "currency": "EUR"}
        elif kind == "activity-added":
            data |= {
                "kind": rng.choice(("call", "mail")),
                "subject": f"Follow up with {rng.choice(COMPANIES)}",
            }
        else:
            data |= {
                "company": rng.choice(COMPANIES),
                "field": "email",
                "new": f"u{rng.randrange(10**6)}@example.com",
            }
        user = str(rng.randrange(400))
        event = make_event(
            f"{namespace}:{rng.randrange(5_000)}",
            kind,
            data | {"owner": user, "changed_by": f"user-{rng.randrange(400)}"},
            1.7e9 + number + round(rng.random(), 6),
            user=user,
        )
        event.place(Position("e", number + 1))
        events.append(event.wire)
    return events


EVENTS = crm_events(600)


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


# ------------------------------------------------------------------ training


def test_a_dictionary_leaves_a_third_of_single_events_it_never_saw(tmp_path: Path) -> None:
    trained = train(crm_events(2000), rooms="deal:*", directory=tmp_path, now=1000.0)
    dictionaries = Dictionaries.load(tmp_path)
    assert dictionaries.problems == []
    loaded = dictionaries.get(trained.id)
    assert loaded is not None
    squeeze = zstandard.ZstdCompressor(level=1, dict_data=loaded.compression, write_checksum=False)
    fresh = [b"[%b]" % event for event in crm_events(300, seed=2)]
    frames = [squeeze.compress(event) for event in fresh]
    assert 180 < sum(map(len, fresh)) / len(fresh) < 240
    ratio = sum(map(len, frames)) / sum(map(len, fresh))
    assert ratio <= 0.35
    # The figures on the disk are honest: within a few points of what new events give.
    assert trained.ratio_with == pytest.approx(ratio, abs=0.03)
    assert trained.ratio_without > 0.6
    reader = ZstdReader(64 * 1024, dictionaries.for_reading)
    assert [reader.decompress(frame) for frame in frames] == fresh
    assert {zstandard.get_frame_parameters(frame).dict_id for frame in frames} == {trained.id}


def test_what_training_writes(tmp_path: Path) -> None:
    trained = train(iter(EVENTS), rooms="deal:*", directory=str(tmp_path), size=4096, level=3, now=1000.0)
    assert trained.id in DICTIONARY_IDS
    assert (trained.rooms, trained.created, trained.samples, trained.level) == ("deal:*", 1000.0, 600, 3)
    assert trained.sample_bytes == sum(map(len, EVENTS)) + 2 * len(EVENTS)
    folder = tmp_path / "dictionaries"
    assert sorted(path.name for path in folder.iterdir()) == [f"{trained.id}.dict", f"{trained.id}.json"]
    raw = (folder / f"{trained.id}.dict").read_bytes()
    assert len(raw) == trained.bytes <= 4096
    assert hashlib.sha256(raw).hexdigest() == trained.sha256
    written = (folder / f"{trained.id}.json").read_bytes()
    assert msgspec.json.decode(written, type=TrainedDictionary) == trained
    assert train(EVENTS, rooms="deal:*", directory=tmp_path).created > 1.7e9


def test_ids_already_on_the_disk_are_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DICTIONARY_IDS", range(40_000, 40_002))
    assert {train(EVENTS, rooms="deal:*", directory=tmp_path).id for _ in range(2)} == {40_000, 40_001}
    with pytest.raises(TrainingError, match="holds every id there is; remove"):
        train(EVENTS, rooms="deal:*", directory=tmp_path)


@pytest.mark.parametrize(
    ("samples", "rooms", "size", "message"),
    [
        (
            [],
            "deal:*",
            16_384,
            "only 0 different events of deal:* are recorded, 100 are needed; set record = true",
        ),
        (EVENTS[: MIN_SAMPLES - 1], "deal:*", 16_384, "only 99 different events"),
        (EVENTS[:1] * 1000, "deal:*", 16_384, "only 1 different events"),
        (EVENTS, "", 16_384, "is not a room or a prefix"),
        (
            EVENTS,
            "de*al",
            16_384,
            "'de*al' is not a room or a prefix followed by '*'; use a pattern such as 'deal:*'",
        ),
        (EVENTS, "x" * 201, 16_384, "is not a room or a prefix"),
        (EVENTS, "deal:*", 100, "a dictionary cannot have 100 bytes; choose 256 to"),
        (EVENTS, "deal:*", MAX_DICTIONARY_BYTES + 1, "a dictionary cannot have"),
        ([b"%d" % n for n in range(200)], "deal:*", 16_384, "plain zstd leaves 302%; they share too little"),
        ([random.Random(n).randbytes(300) for n in range(300)], "deal:*", 4096, "they share too little"),
    ],
    ids=["none", "few", "repeated", "no room", "star", "long", "small", "large", "tiny", "noise"],
)
def test_what_cannot_be_trained_says_why_and_what_to_do(
    tmp_path: Path, samples: list[bytes], rooms: str, size: int, message: str
) -> None:
    with pytest.raises(TrainingError) as caught:
        train(samples, rooms=rooms, directory=tmp_path, size=size)
    assert message in str(caught.value)
    assert str(caught.value) == f"{caught.value.problem}; {caught.value.mend}"
    assert list(tmp_path.rglob("*.*")) == []


def test_what_zstd_refuses_to_learn_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_SAMPLES", 1)
    with pytest.raises(TrainingError, match=r"zstd cannot learn from 2 events .*; record more"):
        train(EVENTS[:3], rooms="deal:*", directory=tmp_path)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train(EVENTS, rooms="deal:*", directory=tmp_path)
    assert list((tmp_path / "dictionaries").iterdir()) == []


# ------------------------------------------------------------------ at work


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


# ------------------------------------------------------------------ samples


def numbered(*numbers: int) -> list[bytes]:
    """Small events that say who they are."""
    return [b'{"room":"deal:%d"}' % number for number in numbers]


def kept_by(recorder: SampleRecorder, directory: str | Path) -> list[bytes]:
    """What the recorder holds now, by way of its files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)  # thousands of real ones take a while
        recorder.flush()
    return load_samples(directory, "*").events


def test_recorded_events_come_back_by_pattern(tmp_path: Path) -> None:
    recorder = SampleRecorder(tmp_path, 1000, seed=1)
    tasks = crm_events(50, namespace="task")
    for event in EVENTS:
        recorder.offer("deal", event)
    for event in tasks:
        recorder.offer("task", event)
    assert recorder.flush() == 2
    assert recorder.flush() == 0  # nothing new
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "deal.jsonl.zst",
        "task.jsonl.zst",
    ]
    assert load_samples(tmp_path, "deal:*") == (EVENTS, [])
    assert load_samples(str(tmp_path), "*") == (EVENTS + tasks, [])
    only = orjson.loads(tasks[0])["room"]
    assert load_samples(tmp_path, only).events == [
        event for event in tasks if orjson.loads(event)["room"] == only
    ]
    assert load_samples(tmp_path, "nobody:*") == ([], [])
    with pytest.raises(TrainingError, match="is not a room"):
        load_samples(tmp_path, "*:1")
    trained = train(load_samples(tmp_path, "deal:*").events, rooms="deal:*", directory=tmp_path)
    assert trained.samples == len(EVENTS)


def test_a_sample_is_bounded_and_every_event_is_as_likely() -> None:
    size, count, runs = 5, 40, 600
    kept: Counter[bytes] = Counter()
    for seed in range(runs):
        with tempfile.TemporaryDirectory() as directory:
            recorder = SampleRecorder(directory, size, seed=seed)
            for event in numbered(*range(count)):
                recorder.offer("deal", event)
            assert recorder.statistics()[:3] == (1, count, size)
            kept.update(kept_by(recorder, directory))
    # Each of 40 is kept with probability 1/8: in 75 of 600 runs, within 5 standard deviations (8.1 each).
    assert len(kept) == count
    assert all(abs(times - 75) < 41 for times in kept.values()), kept


def test_over_a_restart_every_event_stays_as_likely() -> None:
    size, runs = 4, 600
    kept: Counter[bytes] = Counter()
    for seed in range(runs):
        with tempfile.TemporaryDirectory() as directory:
            for part in range(2):
                recorder = SampleRecorder(directory, size, seed=2 * seed + part)
                for event in numbered(*range(12 * part, 12 * part + 12)):
                    recorder.offer("deal", event)
                held = kept_by(recorder, directory)
            assert recorder.statistics()[:3] == (1, 24, size)
            kept.update(held)
    # 4 of 24: in 100 of 600 runs, within 5 standard deviations (9.1 each).
    assert len(kept) == 24
    assert all(abs(times - 100) < 46 for times in kept.values()), kept


def test_the_size_may_change_over_a_restart(tmp_path: Path) -> None:
    recorder = SampleRecorder(tmp_path, 10, seed=1)
    for number in range(100):
        recorder.offer("deal", b"%d" % number)
    recorder.flush()
    fewer = SampleRecorder(tmp_path, 4, seed=2)
    assert fewer.statistics()[:3] == (1, 100, 4)
    more = SampleRecorder(tmp_path, 20, seed=3)
    assert more.statistics().samples == 10
    for number in range(200, 210):
        more.offer("deal", b"%d" % number)
    assert more.statistics().samples == 20
    none = SampleRecorder(tmp_path, 0, seed=4)
    none.offer("deal", b"{}")
    assert none.statistics() == (0, 0, 0, 0, 1)
    assert none.flush() == 0


def test_what_is_too_long_or_not_one_line_is_passed_over(tmp_path: Path) -> None:
    recorder = SampleRecorder(tmp_path, 2, seed=1)
    for wire in (
        b"x" * (MAX_SAMPLE_BYTES + 1),
        b"a\nb",
        b"one",
        b"x" * MAX_SAMPLE_BYTES,
        *[b"y" * 5000] * 100,
    ):
        recorder.offer("deal", wire)
    assert recorder.statistics() == (1, 104, 2, 3 + MAX_SAMPLE_BYTES, 0)


def test_bytes_are_bounded_over_all_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RECORDED_BYTES", 1000)
    recorder = SampleRecorder(tmp_path, 10, seed=1)
    for number in range(100):
        recorder.offer(f"n{number % 3}", b"x" * 150)
        assert recorder.statistics().bytes <= 1000
    for _ in range(500):  # a shorter one may still replace a longer one
        recorder.offer("n0", b"")
    assert recorder.statistics().bytes < 900


def test_namespaces_are_bounded(tmp_path: Path) -> None:
    recorder = SampleRecorder(tmp_path, 10, seed=1)
    for number in range(MAX_NAMESPACES + 5):
        recorder.offer(f"n{number}", b"{}")
    assert recorder.statistics() == (MAX_NAMESPACES, MAX_NAMESPACES, MAX_NAMESPACES, 2 * MAX_NAMESPACES, 5)


HOSTILE = (
    "..",
    ".",
    "../../etc/passwd",
    "a/b",
    "a\\b",
    "con\0",
    "",
    "Deal",
    "déal",
    "deal~",
    "-rf",
    "x" * 200,
    "😀" * 50,
)


@given(
    st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=60)), min_size=1, max_size=5, unique=True)
)
def test_any_namespace_becomes_one_file_in_the_folder(namespaces: list[str]) -> None:
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "data"
        recorder = SampleRecorder(directory, 10, seed=1)
        events = numbered(*range(len(namespaces)))
        for namespace, event in zip(namespaces, events, strict=True):
            recorder.offer(namespace, event)
        assert sorted(kept_by(recorder, directory)) == events
        assert [path.name for path in Path(parent).iterdir()] == ["data"]
        files = list((directory / "samples").iterdir())
        assert len(files) == len(namespaces)
        assert all(len(path.name.encode()) < 100 for path in files)
        again = SampleRecorder(directory, 10, seed=1)
        assert (again.problems, again.statistics()) == ([], recorder.statistics())


def test_namespaces_that_differ_in_case_only_are_two_files(tmp_path: Path) -> None:
    recorder = SampleRecorder(tmp_path, 10, seed=1)
    for namespace in ("deal", "Deal", "DEAL"):
        recorder.offer(namespace, b"{}")
    recorder.flush()
    assert len({path.name.lower() for path in (tmp_path / "samples").iterdir()}) == 3


def test_samples_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    recorder = SampleRecorder(tmp_path, 10, seed=1)
    recorder.offer("deal", EVENTS[0])
    recorder.offer("deal", b"not json")
    recorder.flush()
    folder = tmp_path / "samples"
    (folder / "copy.jsonl.zst").write_bytes((folder / "deal.jsonl.zst").read_bytes())
    (folder / "text.jsonl.zst").write_text("hello")
    (folder / "head.jsonl.zst").write_bytes(zstandard.compress(b'{"seen": 1}\n{}'))
    (folder / "bomb.jsonl.zst").write_bytes(
        zstandard.FRAME_HEADER + b"\xa0" + (200 << 20).to_bytes(4, "little")
    )
    (folder / "gone.jsonl.zst").symlink_to("nowhere")
    (folder / "unrelated.txt").write_text("hello")
    samples = load_samples(tmp_path, "deal:*")
    assert samples.events == EVENTS[:1]
    told = "\n".join(samples.problems)
    for problem in (
        "copy.jsonl.zst: holds the namespace 'deal'",
        "text.jsonl.zst: not a zstd frame",
        "head.jsonl.zst: Object missing required field `namespace`",
        "bomb.jsonl.zst: zstd content above",
        "gone.jsonl.zst: No such file",
        "a sample is not an event",
    ):
        assert problem in told
    assert len(SampleRecorder(tmp_path, 10).problems) == 5
