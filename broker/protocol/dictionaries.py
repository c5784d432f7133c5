"""zstd dictionaries: found on disk, put to work, trained from recorded events.

Theory. A single event of 200 bytes is too short for a compressor to learn from:
zstd leaves 80 % of it. What events of one kind share (keys, names of events,
the shape of ids) can be learnt beforehand into a dictionary, which both sides
hold; then 27 % are left (``docs/wire.md``). A frame names its dictionary by the
id in its header, so versions live side by side: a new one is announced, old
ones stay valid for whoever has loaded them. Files never change once written.

A dictionary consists of fragments of the events it was trained from, and anyone
may fetch it. Hence events are recorded only in namespaces that say so.

Everything lives under the data directory::

    dictionaries/40961.dict  40961.json     the bytes · what is known about them
    samples/deal.jsonl.zst                  recorded events of one namespace

This module reads and writes files, on purpose the only one here that does:
:meth:`Dictionaries.rescan`, :meth:`SampleRecorder.flush` and :func:`train` are
to be called in a worker thread; everything else is memory.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypedDict

import msgspec
import zstandard

from broker.config import KIB, MIB
from broker.protocol.inflate import InflateError, ZstdReader

__all__ = [
    "Announcement",
    "Dictionaries",
    "Dictionary",
    "SampleRecorder",
    "Samples",
    "TrainedDictionary",
    "TrainingError",
    "load_samples",
    "train",
]

MAX_DICTIONARIES: Final = 256
"""Loaded at once, the newest first: each holds about 70 kB for as long as the process lives."""
MAX_DICTIONARY_BYTES: Final = 1 * MIB
"""Larger files are not read. Beyond 16 KiB nothing was gained (measured on events of 200 B)."""
MIN_DICTIONARY_BYTES: Final = 256
"""What zstd needs for the entropy tables alone (ZDICT_DICTSIZE_MIN)."""
MAX_DESCRIPTION_BYTES: Final = 16 * KIB
DICTIONARY_IDS: Final = range(32_768, 65_536)
"""Ids that training picks from: RFC 8878 section 3.1.1.1.3 reserves those below for a registry, and
those above take four bytes of every frame header instead of two, 1 % of a small event."""
MIN_SAMPLES: Final = 100
"""Different events needed for training; with fewer, the tenth held out says nothing."""
MIN_GAIN: Final = 0.95
"""A dictionary must leave less than this part of what plain zstd leaves, or it is not worth its download."""
MAX_PATTERN_BYTES: Final = 200
"""As long as a room's name."""

_FOLDER = "dictionaries"
_SAMPLE_FOLDER = "samples"


# -- patterns -------------------------------------------------------------------


class _Pattern:
    """The rooms a dictionary is for: one room, or all that begin with what stands before a final ``*``.

    As with permissions, a ``*`` does not reach the server's own rooms, except
    where the pattern names them (``user:*``).
    """

    __slots__ = ("_stem", "_user_rooms", "_wild")

    def __init__(self, pattern: str) -> None:
        stem = pattern.removesuffix("*")
        if not 1 <= len(pattern.encode(errors="replace")) <= MAX_PATTERN_BYTES or "*" in stem:
            raise ValueError(f"{pattern!r} is not a room or a prefix followed by '*'")
        self._stem = stem
        self._wild = stem != pattern
        self._user_rooms = stem.startswith("user:")

    def matches(self, room: str) -> bool:
        if not self._wild:
            return room == self._stem
        return room.startswith(self._stem) and (
            self._user_rooms or not (room == "all" or room.startswith("user:"))
        )


# -- dictionaries at work ---------------------------------------------------------


class TrainedDictionary(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about a dictionary: the JSON beside its bytes.

    ``created`` is Unix time in seconds, ``samples`` and ``sample_bytes`` are
    what it was made from. The ratios are compressed to plain bytes of single
    events that training did not see, without and with the dictionary. A
    dictionary from elsewhere needs the first four fields only.
    """

    id: int
    rooms: str
    sha256: str
    created: float
    bytes: int = 0
    samples: int = 0
    sample_bytes: int = 0
    level: int = 0
    ratio_without: float = 0.0
    ratio_with: float = 0.0


_description = msgspec.json.Decoder(TrainedDictionary)


@dataclass(frozen=True, slots=True, eq=False)
class Dictionary:
    """One version of a dictionary, ready for use. ``raw`` is what ``/dict/<id>`` serves, unchangeable."""

    about: TrainedDictionary
    raw: bytes
    compression: zstandard.ZstdCompressionDict
    """For compressors and decompressors alike; digested for the level of :meth:`Dictionaries.load`."""
    pattern: _Pattern

    @property
    def id(self) -> int:
        """The Dictionary_ID in the header of every frame that needs it."""
        return self.about.id


class Announcement(TypedDict):
    """One entry of ``dicts`` in ``welcome`` (``docs/protocol.md``)."""

    id: int
    url: str
    sha256: str
    rooms: str


class _Catalogue(NamedTuple):
    """All that is looked up, exchanged as one, so that a reader in another thread sees old or new."""

    by_id: dict[int, Dictionary]
    newest_first: tuple[Dictionary, ...]
    announced: tuple[Dictionary, ...]


class Dictionaries:
    """All dictionaries of a data directory; made by :meth:`load`.

    Once loaded, a dictionary stays, whatever happens to its file: sessions
    depend on it.
    """

    __slots__ = ("_catalogue", "_directory", "_level", "problems")

    def __init__(self, directory: str | Path | None, level: int) -> None:
        self._directory = None if directory is None else Path(directory) / _FOLDER
        self._level = level
        self._catalogue = _Catalogue({}, (), ())
        self.problems: list[str] = []
        """What the last scan could not use, one sentence for each file, to be logged."""

    @classmethod
    def load(cls, directory: str | Path | None, *, level: int = 1) -> Dictionaries:
        """Read what there is. Never raises for what lies on the disk; see :attr:`problems`.

        ``directory`` is the data directory; without one there are no
        dictionaries. ``level`` is the compression level they are used with.
        """
        dictionaries = cls(directory, level)
        dictionaries.rescan()
        return dictionaries

    def rescan(self) -> list[Dictionary]:
        """Read what is new on the disk and return it, oldest first. To be called in a worker thread.

        The caller announces them with the op ``dicts`` where this is not empty.
        """
        known = self._catalogue.by_id
        found, self.problems = self._scan(known)
        found = found[: MAX_DICTIONARIES - len(known)]
        everything = [*known.values(), *found]
        everything.sort(key=_age, reverse=True)
        newest: dict[str, Dictionary] = {}
        for dictionary in everything:
            newest.setdefault(dictionary.about.rooms, dictionary)
        self._catalogue = _Catalogue(
            {dictionary.id: dictionary for dictionary in everything},
            tuple(everything),
            tuple(newest.values()),
        )
        return sorted(found, key=_age)

    def _scan(self, known: dict[int, Dictionary]) -> tuple[list[Dictionary], list[str]]:
        """What is new on the disk, newest first, and what cannot be used."""
        if self._directory is None:
            return [], []
        try:
            paths = sorted(self._directory.iterdir())
        except FileNotFoundError:
            return [], []
        except OSError as error:
            return [], [f"{self._directory}: {error.strerror}"]
        names = {path.name for path in paths}
        found: list[Dictionary] = []
        problems: list[str] = []
        for path in paths:
            if path.suffix == ".json":
                try:
                    if path.stem not in map(str, known):
                        found.append(_read_dictionary(path, self._level))
                except OSError as error:
                    problems.append(f"{error.filename or path}: {error.strerror or error}")
                except (ValueError, msgspec.MsgspecError, zstandard.ZstdError) as error:
                    problems.append(f"{path}: {error}")
            elif path.suffix == ".dict" and f"{path.stem}.json" not in names:
                problems.append(f"{path}: there is no {path.stem}.json that describes it")
            elif path.suffix not in (".dict", ".tmp"):  # .tmp: being written, or left by a crash
                problems.append(f"{path}: not a dictionary")
        found.sort(key=_age, reverse=True)
        beyond = max(0, len(known) + len(found) - MAX_DICTIONARIES)
        if beyond:
            problems.append(f"{self._directory}: {beyond} dictionaries above the limit of {MAX_DICTIONARIES}")
        return found, problems

    def get(self, dictionary_id: int) -> Dictionary | None:
        """The dictionary with this id, of any version."""
        return self._catalogue.by_id.get(dictionary_id)

    def for_reading(self, dictionary_id: int) -> zstandard.ZstdCompressionDict | None:
        """The same as :class:`~broker.protocol.inflate.ZstdReader` asks for it."""
        found = self._catalogue.by_id.get(dictionary_id)
        return None if found is None else found.compression

    def for_room(self, room: str, loaded: frozenset[int] | set[int]) -> int:
        """Id of the newest dictionary for ``room`` among those a session has loaded; 0 for none."""
        if loaded:
            for dictionary in self._catalogue.newest_first:
                if dictionary.about.id in loaded and dictionary.pattern.matches(room):
                    return dictionary.about.id
        return 0

    def newest_for(self, name: str) -> Dictionary | None:
        """The newest dictionary for a room, or for the rooms of a namespace (a name without ``:``)."""
        names = (name,) if ":" in name else (name, f"{name}:")
        for dictionary in self._catalogue.newest_first:
            if any(map(dictionary.pattern.matches, names)):
                return dictionary
        return None

    def announcement(self) -> list[Announcement]:
        """``dicts`` of ``welcome``: the newest version for each pattern, newest first."""
        return [
            {
                "id": dictionary.id,
                "url": f"/dict/{dictionary.id}",
                "sha256": dictionary.about.sha256,
                "rooms": dictionary.about.rooms,
            }
            for dictionary in self._catalogue.announced
        ]

    def __len__(self) -> int:
        return len(self._catalogue.by_id)


def _age(dictionary: Dictionary) -> tuple[float, int]:
    return dictionary.about.created, dictionary.id


def _read_dictionary(path: Path, level: int) -> Dictionary:
    """Read ``path`` (the JSON) and the bytes it describes. Raises for everything that does not fit."""
    about = _description.decode(_read(path, MAX_DESCRIPTION_BYTES))
    if path.stem != str(about.id):
        raise ValueError(f"describes dictionary {about.id}, not {path.stem}")
    pattern = _Pattern(about.rooms)
    raw = _read(path.with_suffix(".dict"), MAX_DICTIONARY_BYTES)
    if hashlib.sha256(raw).hexdigest() != about.sha256:
        raise ValueError("the dictionary differs from its sha256")
    compression = zstandard.ZstdCompressionDict(raw, dict_type=zstandard.DICT_TYPE_FULLDICT)
    if compression.dict_id() != about.id or not about.id:
        raise ValueError(f"the dictionary carries the id {compression.dict_id()}")
    compression.precompute_compress(level=level)
    return Dictionary(about, raw, compression, pattern)


def _read(path: Path, limit: int) -> bytes:
    if path.exists() and not path.is_file():  # a pipe would block
        raise ValueError(f"{path.name} is not a regular file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path.name} is larger than {limit} bytes")
    return data


def _write(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too
    finally:
        os.close(folder)


# -- training ---------------------------------------------------------------------


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
        _Pattern(rooms)
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
    folder = Path(directory) / _FOLDER
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
    _write(folder / f"{identifier}.dict", raw)
    _write(folder / f"{identifier}.json", msgspec.json.format(msgspec.json.encode(trained)) + b"\n")
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


# -- samples ------------------------------------------------------------------------

MAX_SAMPLE_BYTES: Final = 4 * KIB
"""Longer events are not recorded: they compress well by themselves."""
MAX_NAMESPACES: Final = 64
"""Namespaces recorded at once. Clients may invent them where ``[rooms.default]`` records."""
MAX_RECORDED_BYTES: Final = 64 * MIB
"""All samples in memory together."""

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
        self._folder = Path(directory) / _SAMPLE_FOLDER
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
            _write(self._folder / _file_name(namespace), packed)
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
    """Recorded events of the rooms that ``pattern`` matches, for :func:`train`.

    Raises :class:`TrainingError` for a pattern that is none.
    """
    try:
        rooms = _Pattern(pattern)
    except ValueError as error:
        raise TrainingError(str(error), "use a pattern such as 'deal:*'") from None
    stored, problems = _stored_samples(Path(directory) / _SAMPLE_FOLDER)
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
    head, *items = reader.decompress(_read(path, MAX_RECORDED_BYTES)).split(b"\n")
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
