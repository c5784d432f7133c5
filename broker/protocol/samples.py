"""Samples: a bounded part of the events that pass, kept on disk for training.

Recorded are only the namespaces that say so, because what is learnt from them
becomes public (:mod:`broker.protocol.dictionaries`). One file for each, under
the data directory::

    samples/deal.jsonl.zst      the namespace and how many events passed · one event a line

Only three calls touch the disk: :class:`SampleRecorder` itself, which reads what
was kept before; :meth:`SampleRecorder.flush`, to be called in a worker thread;
and :func:`load_samples`. Everything else is memory.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import zstandard

from broker.config import KIB, MIB
from broker.protocol.dictionaries import RoomPattern
from broker.protocol.files import read_file, write_file
from broker.protocol.inflate import InflateError, ZstdReader
from broker.protocol.training import TrainingError

__all__ = ["RecorderStatistics", "SampleRecorder", "Samples", "load_samples"]

MAX_SAMPLE_BYTES: Final = 4 * KIB
"""Longer events are not recorded: they compress well by themselves."""
MAX_NAMESPACES: Final = 64
"""Namespaces recorded at once. Clients may invent them where ``[rooms.default]`` records."""
MAX_RECORDED_BYTES: Final = 64 * MIB
"""All samples in memory together."""

_FOLDER = "samples"
_PLAIN_NAME = re.compile(r"[a-z0-9_-]{1,64}")


class RecorderStatistics(NamedTuple):
    """What a :class:`SampleRecorder` holds. ``refused`` counts events of namespaces above the limit."""

    namespaces: int
    seen: int
    samples: int
    bytes: int
    refused: int


class _Reservoir:
    """A uniform sample of everything seen, by Algorithm L (K.-H. Li, 1994).

    It draws how many events to pass over rather than one number per event, so
    that an event which is not taken costs a comparison.
    """

    __slots__ = ("_random", "_size", "_weight", "flushed", "items", "next", "seen")

    def __init__(self, size: int, rng: random.Random, items: list[bytes], seen: int) -> None:
        self._size = size
        self._random = rng
        self.items = items if len(items) <= size else rng.sample(items, size)
        # Below its size (the setting was raised) it fills up with what comes next.
        self.seen = max(seen, len(items)) if len(self.items) == size else len(self.items)
        self.flushed = self.seen
        # The largest of the `size` smallest of `seen` uniform keys; continues a run that was stored.
        full = len(self.items) == size
        self._weight = rng.betavariate(size, self.seen - size + 1) if full else 1.0
        self.next = self.seen + 1 + (self._skip() if full else 0)
        """Ordinal of the next event to be taken."""

    def victim(self) -> int:
        """Index of the item that gives way, or -1 while there is room."""
        return -1 if len(self.items) < self._size else int(self._random.random() * self._size)

    def take(self, wire: bytes, victim: int) -> None:
        if victim < 0:
            self.items.append(wire)
        else:
            self.items[victim] = wire
        self.next = self.seen + 1
        if len(self.items) == self._size:
            self._weight *= math.exp(math.log(1.0 - self._random.random()) / self._size)
            self.next += self._skip()

    def _skip(self) -> int:
        weight = min(self._weight, 1.0 - 2**-53)  # a key of exactly 1 would be followed for ever
        return int(math.log(1.0 - self._random.random()) / math.log1p(-weight))


class SampleRecorder:
    """Keeps a bounded, uniform sample of the events of each namespace, over restarts.

    ``directory`` is the data directory, ``per_namespace`` the number of events
    kept (0: none). The caller offers events of namespaces with ``record`` only,
    and calls :meth:`flush` now and then and at the end. With several processes
    on one directory the last to flush wins; its sample is as good as theirs.
    """

    __slots__ = ("_bytes", "_folder", "_per_namespace", "_random", "_refused", "_reservoirs", "problems")

    def __init__(self, directory: str | Path, per_namespace: int, *, seed: int | None = None) -> None:
        self._folder = Path(directory) / _FOLDER
        self._per_namespace = per_namespace
        self._random = random.Random(seed)
        self._refused = 0
        self._bytes = 0
        self._reservoirs: dict[str, _Reservoir] = {}
        stored, self.problems = _stored_samples(self._folder)
        for record in stored[:MAX_NAMESPACES] if per_namespace > 0 else ():
            reservoir = _Reservoir(per_namespace, self._random, record.items, record.seen)
            self._bytes += sum(map(len, reservoir.items))
            self._reservoirs[record.namespace] = reservoir

    def offer(self, namespace: str, wire: bytes) -> None:
        """Perhaps keep an event. Measured: 0.1 µs for one that is passed over, as most are, else 1 µs."""
        reservoir = self._reservoirs.get(namespace)
        if reservoir is None:
            if self._per_namespace < 1 or len(self._reservoirs) >= MAX_NAMESPACES:
                self._refused += 1
                return
            reservoir = _Reservoir(self._per_namespace, self._random, [], 0)
            self._reservoirs[namespace] = reservoir
        reservoir.seen += 1
        if reservoir.seen >= reservoir.next:
            self._take(reservoir, wire)

    def _take(self, reservoir: _Reservoir, wire: bytes) -> None:
        victim = reservoir.victim()
        growth = len(wire) - (len(reservoir.items[victim]) if victim >= 0 else 0)
        if len(wire) > MAX_SAMPLE_BYTES or b"\n" in wire or self._bytes + growth > MAX_RECORDED_BYTES:
            reservoir.next += 1  # the next one instead
            return
        self._bytes += growth
        reservoir.take(wire, victim)

    def flush(self) -> int:
        """Write what has changed; returns the number of files. To be called in a worker thread.

        Safe while the owner's thread goes on offering. Raises :class:`OSError`.
        """
        written = 0
        for namespace, reservoir in list(self._reservoirs.items()):
            seen = reservoir.seen
            if seen == reservoir.flushed:
                continue
            head = msgspec.json.encode({"namespace": namespace, "seen": seen})
            lines = b"\n".join([head, *list(reservoir.items)])
            packed = zstandard.ZstdCompressor(write_checksum=True).compress(lines)
            write_file(self._folder / _file_name(namespace), packed)
            reservoir.flushed = seen
            written += 1
        return written

    def statistics(self) -> RecorderStatistics:
        """What is held now."""
        reservoirs = self._reservoirs.values()
        return RecorderStatistics(
            namespaces=len(reservoirs),
            seen=sum(reservoir.seen for reservoir in reservoirs),
            samples=sum(len(reservoir.items) for reservoir in reservoirs),
            bytes=self._bytes,
            refused=self._refused,
        )


class Samples(NamedTuple):
    """Recorded events, as they went over the wire, and the files that could not be read."""

    events: list[bytes]
    problems: list[str]


def load_samples(directory: str | Path, pattern: str) -> Samples:
    """Recorded events of the rooms that ``pattern`` matches, for :func:`~broker.protocol.training.train`.

    Raises :class:`TrainingError` for a pattern that is none.
    """
    try:
        rooms = RoomPattern(pattern)
    except ValueError as error:
        raise TrainingError(str(error), "use a pattern such as 'deal:*'") from None
    stored, problems = _stored_samples(Path(directory) / _FOLDER)
    events = []
    for wire in (wire for record in stored for wire in record.items):
        try:
            if rooms.matches(_event_room.decode(wire).room):
                events.append(wire)
        except msgspec.MsgspecError:
            problems.append(f"{directory}: a sample is not an event")
    return Samples(events, problems)


class _EventRoom(msgspec.Struct):
    room: str


class _Head(msgspec.Struct):
    """First line of a file of samples."""

    namespace: str
    seen: int


class _Record(NamedTuple):
    namespace: str
    seen: int
    items: list[bytes]


_event_room = msgspec.json.Decoder(_EventRoom)
_head = msgspec.json.Decoder(_Head)


def _file_name(namespace: str) -> str:
    """A name that is safe on every file system, and readable where it can be."""
    if _PLAIN_NAME.fullmatch(namespace):
        return f"{namespace}.jsonl.zst"
    digest = hashlib.sha256(namespace.encode()).hexdigest()[:16]
    return f"{re.sub('[^a-z0-9_-]', '_', namespace.lower())[:40]}~{digest}.jsonl.zst"


def _read_samples(path: Path, reader: ZstdReader) -> _Record:
    head, *items = reader.decompress(read_file(path, MAX_RECORDED_BYTES)).split(b"\n")
    about = _head.decode(head)
    if path.name != _file_name(about.namespace):
        raise ValueError(f"holds the namespace {about.namespace!r}")
    return _Record(about.namespace, about.seen, items)


def _stored_samples(folder: Path) -> tuple[list[_Record], list[str]]:
    """Every readable file of samples, and a sentence for each other one."""
    reader = ZstdReader(2 * MAX_RECORDED_BYTES, lambda _id: None)
    records: list[_Record] = []
    problems: list[str] = []
    for path in sorted(folder.glob("*.jsonl.zst")):
        try:
            records.append(_read_samples(path, reader))
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
        except (ValueError, msgspec.MsgspecError, InflateError) as error:
            problems.append(f"{path}: {error}")
    return records, problems
