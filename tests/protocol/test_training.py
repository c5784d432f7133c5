"""Training, for real: what it learns, what it writes, and why it refuses."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import msgspec
import pytest
import zstandard

from broker.protocol import training as module
from broker.protocol.dictionaries import MAX_DICTIONARY_BYTES, Dictionaries, TrainedDictionary
from broker.protocol.inflate import ZstdReader
from broker.protocol.training import DICTIONARY_IDS, MIN_SAMPLES, TrainingError, train
from tests.protocol.crm_events import EVENTS, crm_events


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
