"""zstd dictionaries: found on disk and put to work.

Theory. A single event of 200 bytes is too short for a compressor to learn from:
zstd leaves 80 % of it. What events of one kind share (keys, names of events,
the shape of ids) can be learnt beforehand into a dictionary, which both sides
hold; then 27 % are left (``docs/wire.md``). A frame names its dictionary by the
id in its header, so versions live side by side: a new one is announced, old
ones stay valid for whoever has loaded them. Files never change once written.

A dictionary consists of fragments of the events it was trained from, and anyone
may fetch it. Hence events are recorded only in namespaces that say so
(:mod:`broker.protocol.samples`), and learnt from only when somebody asks
(:mod:`broker.protocol.training`).

They live under the data directory, the bytes and what is known about them::

    dictionaries/40961.dict  40961.json

Only :meth:`Dictionaries.load` and :meth:`Dictionaries.rescan` touch the disk,
the one before the broker runs, the other in a worker thread; everything else is
memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypedDict

import msgspec
import zstandard

from broker.config import KIB, MIB
from broker.protocol.files import read_file

__all__ = ["Announcement", "Dictionaries", "Dictionary", "RoomPattern", "TrainedDictionary"]

MAX_DICTIONARIES: Final = 256
"""Loaded at once, the newest first: each holds about 70 kB for as long as the process lives."""
MAX_DICTIONARY_BYTES: Final = 1 * MIB
"""Larger files are not read. Beyond 16 KiB nothing was gained (measured on events of 200 B)."""
MAX_DESCRIPTION_BYTES: Final = 16 * KIB
MAX_PATTERN_BYTES: Final = 200
"""As long as a room's name."""

FOLDER: Final = "dictionaries"
"""Where they are, below the data directory."""


# -- patterns -------------------------------------------------------------------


class RoomPattern:
    """The rooms a dictionary is for: one room, or all that begin with what stands before a final ``*``.

    As with permissions, a ``*`` does not reach the server's own rooms, except
    where the pattern names them (``user:*``). Raises :class:`ValueError` for a
    text that is no such pattern.
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
        """Whether ``room`` is one of them."""
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
    pattern: RoomPattern

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
        self._directory = None if directory is None else Path(directory) / FOLDER
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
    about = _description.decode(read_file(path, MAX_DESCRIPTION_BYTES))
    if path.stem != str(about.id):
        raise ValueError(f"describes dictionary {about.id}, not {path.stem}")
    pattern = RoomPattern(about.rooms)
    raw = read_file(path.with_suffix(".dict"), MAX_DICTIONARY_BYTES)
    if hashlib.sha256(raw).hexdigest() != about.sha256:
        raise ValueError("the dictionary differs from its sha256")
    compression = zstandard.ZstdCompressionDict(raw, dict_type=zstandard.DICT_TYPE_FULLDICT)
    if compression.dict_id() != about.id or not about.id:
        raise ValueError(f"the dictionary carries the id {compression.dict_id()}")
    compression.precompute_compress(level=level)
    return Dictionary(about, raw, compression, pattern)
