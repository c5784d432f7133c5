"""Samples: as likely for every event, bounded, kept over restarts; nothing on the disk crashes a reader."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

import orjson
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from broker.protocol import samples as module
from broker.protocol.samples import MAX_NAMESPACES, MAX_SAMPLE_BYTES, SampleRecorder, load_samples
from broker.protocol.training import TrainingError, train
from tests.protocol.crm_events import EVENTS, crm_events


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
