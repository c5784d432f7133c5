"""Training: from recorded events to a zstd dictionary on disk.

Done once in a while, by ``broker train-dict``; a running broker finds the result
(:meth:`~broker.protocol.dictionaries.Dictionaries.rescan`). Only :func:`train`
touches the disk, and it computes for as long as it takes: not for an event loop.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec
import zstandard

from broker.config import KIB
from broker.protocol.dictionaries import FOLDER, MAX_DICTIONARY_BYTES, RoomPattern, TrainedDictionary
from broker.protocol.files import write_file

__all__ = ["TrainingError", "train"]

MIN_DICTIONARY_BYTES: Final = 256
"""What zstd needs for the entropy tables alone (ZDICT_DICTSIZE_MIN)."""
DICTIONARY_IDS: Final = range(32_768, 65_536)
"""Ids that training picks from: RFC 8878 section 3.1.1.1.3 reserves those below for a registry, and
those above take four bytes of every frame header instead of two, 1 % of a small event."""
MIN_SAMPLES: Final = 100
"""Different events needed for training; with fewer, the tenth held out says nothing."""
MIN_GAIN: Final = 0.95
"""A dictionary must leave less than this part of what plain zstd leaves, or it is not worth its download."""


class TrainingError(Exception):
    """No dictionary was made. ``str()`` of it says why and how to mend it."""

    def __init__(self, problem: str, mend: str) -> None:
        super().__init__(f"{problem}; {mend}")
        self.problem = problem
        self.mend = mend


def train(
    samples: Iterable[bytes],
    *,
    rooms: str,
    directory: str | Path,
    size: int = 16 * KIB,
    level: int = 1,
    now: float | None = None,
) -> TrainedDictionary:
    """Train a dictionary and add it to the data directory, as the newest for ``rooms``.

    ``samples`` are events as they go over the wire, without the array around
    them. A tenth is held out to measure the ratios. Takes about 50 ms for
    2,000 events. Raises :class:`TrainingError`, and :class:`OSError` where the
    directory cannot be written.
    """
    try:
        RoomPattern(rooms)
    except ValueError as error:
        raise TrainingError(str(error), "use a pattern such as 'deal:*'") from None
    if not MIN_DICTIONARY_BYTES <= size <= MAX_DICTIONARY_BYTES:
        raise TrainingError(
            f"a dictionary cannot have {size} bytes",
            f"choose {MIN_DICTIONARY_BYTES} to {MAX_DICTIONARY_BYTES}, 16384 is enough for most",
        )
    # As they travel: a frame is always an array. Repeated events would be both learnt and held out.
    frames = [b"[%b]" % sample for sample in dict.fromkeys(samples)]
    if len(frames) < MIN_SAMPLES:
        raise TrainingError(
            f"only {len(frames)} different events of {rooms} are recorded, {MIN_SAMPLES} are needed",
            "set record = true for their namespace, let clients publish, and train again",
        )
    held_out = frames[::10]
    learnt = [frame for number, frame in enumerate(frames) if number % 10]
    folder = Path(directory) / FOLDER
    identifier = _free_id(folder)
    try:
        raw = zstandard.train_dictionary(size, [*learnt], dict_id=identifier, level=level).as_bytes()
    except zstandard.ZstdError as error:
        raise TrainingError(
            f"zstd cannot learn from {len(learnt)} events ({error})", "record more of them"
        ) from None
    ratio_without, ratio_with = _ratio(held_out, level, None), _ratio(held_out, level, raw)
    if ratio_with >= ratio_without * MIN_GAIN:
        raise TrainingError(
            f"a dictionary would leave {ratio_with:.0%} of them, where plain zstd leaves {ratio_without:.0%}",
            "they share too little; train for rooms whose events resemble each other",
        )
    trained = TrainedDictionary(
        id=identifier,
        rooms=rooms,
        sha256=hashlib.sha256(raw).hexdigest(),
        created=time.time() if now is None else now,
        bytes=len(raw),
        samples=len(frames),
        sample_bytes=sum(map(len, frames)),
        level=level,
        ratio_without=round(ratio_without, 4),
        ratio_with=round(ratio_with, 4),
    )
    # The description last: it is what makes a dictionary exist.
    write_file(folder / f"{identifier}.dict", raw)
    write_file(folder / f"{identifier}.json", msgspec.json.format(msgspec.json.encode(trained)) + b"\n")
    return trained


def _free_id(folder: Path) -> int:
    """An id that no file here has. Random, because clients cache by id, perhaps from before this folder."""
    taken = {path.stem for path in folder.iterdir()} if folder.is_dir() else set()
    free = [identifier for identifier in DICTIONARY_IDS if str(identifier) not in taken]
    if not free:
        raise TrainingError(f"{folder} holds every id there is", "remove what no client uses any longer")
    return random.choice(free)


def _ratio(frames: list[bytes], level: int, raw: bytes | None) -> float:
    """Compressed to plain bytes, each frame by itself."""
    dictionary = None if raw is None else zstandard.ZstdCompressionDict(raw)
    compressor = zstandard.ZstdCompressor(level=level, dict_data=dictionary, write_checksum=False)
    return sum(len(compressor.compress(frame)) for frame in frames) / sum(map(len, frames))
