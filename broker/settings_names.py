"""How keys, types and values are written: for people, in the environment, as flags.

Used wherever a message, an option or a summary names a setting.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
from collections.abc import Iterable

import msgspec
from msgspec import inspect

Path = tuple[str, ...]
"""Where a key stands: ``("limits", "outbox_bytes")``; written with dots for people."""

SECRET = frozenset({"secret", "token", "keys", "url"})
"""Keys whose values are never repeated in a message or a summary; a URL may hold a password."""

_BARE = re.compile("[A-Za-z0-9_-]+")
"""Keys that TOML writes without quotes."""

_SHOWN = 60
"""Characters of a bad value that are repeated to the person; enough to recognise it."""

SHORT_FLAGS: dict[Path, str] = {
    ("server", "host"): "--host",
    ("server", "port"): "--port",
    ("server", "tls_cert"): "--tls-cert",
    ("server", "tls_key"): "--tls-key",
    ("store", "data"): "--data",
    ("redis", "url"): "--redis",
    ("server", "workers"): "--workers",
}
"""Flags that are shorter than their key."""


def variable(path: Path) -> str:
    """The environment variable of a key."""
    return "_".join(("BROKER", *path)).upper()


def flag(path: Path) -> str:
    """The command line's option for a key."""
    if path[0] == "rooms":
        return "--set"
    return SHORT_FLAGS.get(path) or "--" + "-".join(path).replace("_", "-")


def dotted(path: Path) -> str:
    """``limits.outbox_bytes``; parts that TOML would quote are quoted."""
    return ".".join(part if _BARE.fullmatch(part) else quote(part) for part in path)


def quote(text: str) -> str:
    """Text as a TOML string: quotes around it, control characters escaped."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of ``names`` that was probably meant."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The mend for an unknown name among ``names``."""
    choice = list(names)
    meant = nearest(name, choice)
    return f"did you mean {meant}?" if meant else f"remove it, or use one of {', '.join(choice)}"


# --- Types and values ----------------------------------------------------------


_TYPE_NAMES: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "boolean"),  # before int, which it is
    (int, "integer"),
    (float, "float"),
    (str, "string"),
    ((list, tuple), "array"),
    (dict, "table"),
    ((datetime.date, datetime.time), "date or time"),
)


def type_name(value: object) -> str:
    """What TOML calls the type of ``value``."""
    return next((name for types, name in _TYPE_NAMES if isinstance(value, types)), type(value).__name__)


def show(value: object, *, hidden: bool = False) -> str:
    """``value`` as TOML writes it, cut to a length a person reads, with its type."""
    if hidden:
        return f"a hidden value ({type_name(value)})"
    text = toml(value)
    cut = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
    return f"{cut} ({type_name(value)})"


def toml(value: object) -> str:
    """A value as TOML writes it; long texts and deep lists are cut, tables left out."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() if abs(value) >= 1 << 200:
            return "a number of more than 60 digits"  # str() of 4,300 digits or more raises ValueError
        case str():
            return quote(value[: _SHOWN + 1])
        case list() | tuple():
            # One level is shown: JSON from a variable may nest deeper than Python recurses.
            return "[" + ", ".join(toml(item) if _flat(item) else "[…]" for item in value[:_SHOWN]) + "]"
        case dict() | msgspec.Struct():
            return "{…}"
        case _:
            return str(value)


def _flat(value: object) -> bool:
    return not isinstance(value, (list, tuple))


def describe(kind: inspect.Type) -> str:
    """What a value of this type looks like: ``a whole number from 0 to 65535``."""
    match kind:
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return "a whole number" + _range(kind)
        case inspect.FloatType():
            return "a number" + _range(kind)
        case inspect.LiteralType():
            return "one of " + ", ".join(map(str, kind.values))
        case inspect.StrType():
            return "text" if kind.max_length is None else f"text of 1 to {kind.max_length:_} characters"
        case inspect.VarTupleType():
            what = "tables" if isinstance(kind.item_type, inspect.StructType) else "texts"
            return f"a list of {what}"
        case inspect.Metadata():
            return "a text or a list of texts"
        case inspect.UnionType():
            return describe(required(kind))
        case _:
            return "a table"


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    if kind.ge is not None:
        return f" from {kind.ge:_} to {kind.le:_}"
    return f" above {kind.gt:_}, at most {kind.le:_}"


def required(kind: inspect.Type) -> inspect.Type:
    """The type that an optional key has when it is given."""
    if isinstance(kind, inspect.UnionType):
        return next(member for member in kind.types if not isinstance(member, inspect.NoneType))
    return kind
