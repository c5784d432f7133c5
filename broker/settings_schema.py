"""The schema of :mod:`broker.config` as a flat list of keys, each with its type.

One place knows how a value is read from text (environment, flags) and whether
it conforms to its type and range. Called by
:mod:`broker.settings_loader`, and by :mod:`broker.cli` to make one option per
key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

from broker.config import Config, RoomOptions
from broker.settings_names import SECRET, Path, describe, did_you_mean, dotted, nearest, required, show


class SettingKey(NamedTuple):
    """One key that can be set: its place, its type, and what it is when nobody sets it."""

    path: Path
    kind: inspect.Type
    default: Any


class Fault(NamedTuple):
    """One thing wrong with a value. ``at`` is the place below the key, such as ``[0].secret``."""

    at: str
    problem: str
    mend: str


class Faults(Exception):  # noqa: N818 - it carries several, and is caught one call up
    """A value that does not conform, with everything that is wrong with it."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__(faults)
        self.faults = faults


def fields(kind: inspect.StructType) -> dict[str, inspect.Type]:
    """Names and types of a table's keys."""
    return {field.name: field.type for field in kind.fields}


def _walk(kind: inspect.StructType, defaults: msgspec.Struct, path: Path) -> Iterator[SettingKey]:
    for name, field in fields(kind).items():
        value = getattr(defaults, name)
        if isinstance(field, inspect.StructType):
            yield from _walk(field, value, (*path, name))
        elif not isinstance(field, inspect.DictType):
            yield SettingKey((*path, name), field, value)


def _struct(of: type[msgspec.Struct]) -> inspect.StructType:
    kind = inspect.type_info(of)
    assert isinstance(kind, inspect.StructType)
    return kind


ROOT = _struct(Config)
ROOM = _struct(RoomOptions)

KEYS: dict[Path, SettingKey] = {key.path: key for key in _walk(ROOT, Config(), ())}
"""Every key but those of rooms, in the order of the schema."""

ROOM_KEYS: dict[str, SettingKey] = {key.path[0]: key for key in _walk(ROOM, RoomOptions(), ())}
"""Keys of one ``[rooms.NAMESPACE]`` table."""


def find(path: Path) -> SettingKey | None:
    """The key at ``path``, with ``("rooms", NAMESPACE, KEY)`` for any namespace."""
    if len(path) == 3 and path[0] == "rooms":
        key = ROOM_KEYS.get(path[2])
        return key and SettingKey(path, key.kind, key.default)
    return KEYS.get(path)


# --- Reading and checking -----------------------------------------------------

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


def parse(text: str, kind: inspect.Type) -> object:
    """Read a value from a variable or a flag.

    Lists are separated by commas, lists of tables are JSON, and an empty text
    unsets a key that may be absent. Text that cannot be read comes back as it
    is, so that :func:`conform` says what was expected.
    """
    inner = required(kind)
    if inner is not kind and not text:
        return None
    match inner:
        case inspect.BoolType():
            word = text.strip().lower()
            return True if word in _TRUE else False if word in _FALSE else text
        case inspect.IntType() | inspect.FloatType():
            try:
                return int(text) if isinstance(inner, inspect.IntType) else float(text)
            except ValueError:
                return text
        case inspect.VarTupleType(item_type=inspect.StructType()):
            try:
                return msgspec.json.decode(text or "[]")
            except (msgspec.DecodeError, RecursionError, UnicodeError):
                return text
        case inspect.VarTupleType():
            return [item for part in text.split(",") if (item := part.strip())]
        case _:
            return text


def conform(value: object, kind: inspect.Type, *, name: str = "") -> Any:
    """``value`` as the schema's type holds it (a list becomes a tuple, a table its structure).

    ``name`` is the key's own name, so that secrets are not repeated.
    Raises :class:`Faults` with everything that is wrong.
    """
    if isinstance(kind, inspect.UnionType) and value is None:
        return None
    kind = expected = required(kind)
    if isinstance(kind, inspect.Metadata):  # a list in which one text may stand for itself
        kind, value = kind.type, [value] if isinstance(value, str) else value
    match kind:
        case inspect.DictType() if isinstance(value, dict):
            return value
        case inspect.VarTupleType() if isinstance(value, (list, tuple)):
            return tuple(_each(value, kind.item_type, name))
        case inspect.StructType() if isinstance(value, dict):
            return _table(value, kind)
        case inspect.BoolType() if isinstance(value, bool):
            return value
        case inspect.IntType() if isinstance(value, int) and not isinstance(value, bool):
            return _bounded(value, kind)
        case inspect.FloatType() if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(_bounded(value, kind))
        case inspect.LiteralType() if isinstance(value, str):
            if value in kind.values:
                return value
            meant = nearest(value, map(str, kind.values))
            hint = f"did you mean {meant}?" if meant else f"give {describe(kind)}"
            raise Faults([Fault("", f"{show(value)} is not a choice here", hint)])
        case inspect.StrType() if isinstance(value, str):
            return _text(value, kind, hidden=name in SECRET)
        case _:
            found = show(value, hidden=name in SECRET)
            raise Faults([Fault("", f"{found} has the wrong type", f"give {describe(expected)}")])


def _bounded(value: float, kind: inspect.IntType | inspect.FloatType) -> float:
    """Check a number against its range. Each comparison is written so that NaN fails it."""
    low = value >= kind.ge if kind.ge is not None else value > (-math.inf if kind.gt is None else kind.gt)
    high = value <= (math.inf if kind.le is None else kind.le)
    if low and high:
        return value
    raise Faults([Fault("", f"{show(value)} is out of range", f"give {describe(kind)}")])


def _text(value: str, kind: inspect.StrType, *, hidden: bool) -> str:
    length = len(value)
    if length < (kind.min_length or 0) or (kind.max_length is not None and length > kind.max_length):
        raise Faults([Fault("", f"has {length:,} characters", f"give {describe(kind)}")])
    # Control characters and lone surrogates (bytes of the environment that are not UTF-8) would break
    # paths, headers and logs further on, where the message could not name the key any more.
    if any(char < " " or char == "\x7f" or "\ud800" <= char <= "\udfff" for char in value):
        raise Faults([Fault("", f"{show(value, hidden=hidden)} holds a control character", "remove it")])
    return value


def _each(values: Iterable[object], kind: inspect.Type, name: str) -> list[Any]:
    found: list[Any] = []
    faults: list[Fault] = []
    for index, value in enumerate(values):
        try:
            found.append(conform(value, kind, name=name))
        except Faults as bad:
            faults += [fault._replace(at=f"[{index}]{fault.at}") for fault in bad.faults]
    if faults:
        raise Faults(faults)
    return found


def _table(values: dict[str, Any], kind: inspect.StructType) -> Any:
    known = {field.encode_name: field for field in kind.fields}
    faults: list[Fault] = []
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            faults.append(Fault(f".{dotted((name,))}", "unknown key", did_you_mean(name, known)))
            continue
        try:
            found[known[name].name] = conform(value, known[name].type, name=name)
        except Faults as bad:
            faults += [fault._replace(at=f".{name}{fault.at}") for fault in bad.faults]
    for name, field in known.items():
        if field.required and name not in values:
            faults.append(Fault(f".{name}", "missing", f"give {describe(field.type)}"))
    if faults:
        raise Faults(faults)
    return kind.cls(**found)
