"""Read the settings: built-in defaults < TOML file < ``BROKER_…`` variables < flags.

Each layer is flattened into ``{path: (value, source)}``, so that merging is one
dictionary update and every complaint can name where its value came from. All
layers are read to the end before anything is refused: a person gets the whole
list of problems at once, one per line.

Names. The key ``limits.outbox_bytes`` is ``[limits] outbox_bytes`` in TOML,
``BROKER_LIMITS_OUTBOX_BYTES`` in the environment and ``--limits-outbox-bytes``
as a flag. ``rooms.deal.history`` is ``BROKER_ROOMS_DEAL_HISTORY``: the longest
key that the name ends with is the key, and what stands before it the namespace,
in lower case. A variable cannot spell other characters, so each of them is
written as ``_`` and finds the namespace that the file spells in full
(``BROKER_ROOMS_LIVE_DATA_HISTORY`` sets ``[rooms."live-data"]`` where there is
one). For namespaces in no file use ``--set rooms.live-data.history=100``.
Lists are separated by commas; ``auth.keys`` is a JSON array.

Rooms. A key missing in ``[rooms.deal]`` comes from ``[rooms.default]``, then
from the schema. After loading every table is complete, and there are tables for
``default`` and for ``user``, which keeps history in any case.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any, NamedTuple, NoReturn

import msgspec
from msgspec import inspect

from broker.auth.permissions import valid_room
from broker.config import Config, RoomOptions, for_users
from broker.errors import ConfigurationError
from broker.protocol.origin import LOOPBACK
from broker.settings_checks import contradictions
from broker.settings_names import Path, did_you_mean, dotted, flag, nearest, quote, show, variable
from broker.settings_schema import KEYS, ROOM_KEYS, ROOT, Faults, conform, fields, find, parse

DEVELOPMENT: dict[Path, Any] = {
    ("auth", "anonymous"): True,
    ("server", "origins"): (LOOPBACK,),
    ("server", "echo"): True,
    ("rates", "enabled"): False,
    ("limits", "unauthenticated_per_address"): 0,
    ("limits", "sessions_per_user"): 0,
    ("rooms", "default", "join"): "anyone",
    ("rooms", "default", "publish"): "anyone",
    ("admin", "open_on_loopback"): True,
}
"""What ``dev = true`` changes; anything set in file, variable or flag wins over it. The development
key is :mod:`broker.auth.keys`' part: it stands in where ``auth.keys`` is empty."""

NOT_SETTINGS = frozenset({"BROKER_CONFIG", "BROKER_URL", "BROKER_TOKEN", "BROKER_WORKER"})
"""Variables that are no settings: the file, what ``listen`` connects to, and what a worker is."""

_SERVICE_LINK = re.compile(r"BROKER_(SERVICE_(HOST|PORT)\w*|PORT|PORT_\d+_\w+)")
"""What Kubernetes puts into every container next to a Service that is called ``broker``."""


class _Given(NamedTuple):
    """A value as somebody gave it, and who: a file, a variable or a flag."""

    value: object
    source: str


class ConfigurationErrors(ConfigurationError):  # noqa: N818 - plural: it carries all of them
    """Everything that is wrong, one line each in ``str()``; the attributes are the first one's."""

    def __init__(self, errors: list[ConfigurationError]) -> None:
        first = errors[0]
        super().__init__(first.source, first.key, first.problem, first.mend)
        self.args = ("\n".join(str(error) for error in errors),)
        self.errors = tuple(errors)


def load(
    path: FilePath | None, *, env: Mapping[str, str], flags: Mapping[str, Any], serving: bool = True
) -> Config:
    """Read and merge all layers.

    ``path``: the TOML file; without one ``BROKER_CONFIG`` names it, and without
    that there is none. ``env``: the environment. ``flags``: values by dotted
    key (``"limits.outbox_bytes"``); text is read as in the environment, other
    values are taken as they are, and ``None`` is not given. ``serving``: whether
    a broker is to run with them. If not, values are checked one by one only: a
    tool that reads the store needs no keys, certificates or ports that fit.

    Raises :class:`ConfigurationErrors` with every problem found.
    """
    if path is None and env.get("BROKER_CONFIG"):
        path = FilePath(env["BROKER_CONFIG"])
    name = "configuration" if path is None else str(path)
    reader = _Reader(name if name.isprintable() else quote(name))
    if path is not None:
        reader.read_file(path)
    reader.read_environment(env)
    reader.read_flags(flags)
    return reader.finish(serving=serving)


class _Reader:
    """One run of :func:`load`: what was given so far, and what is wrong with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.given: dict[Path, _Given] = {}
        self.errors: list[ConfigurationError] = []

    def refuse(self, source: str, key: str, problem: str, mend: str) -> None:
        self.errors.append(ConfigurationError(source, key, problem, mend))

    # --- The layers -------------------------------------------------------------

    def read_file(self, path: FilePath) -> None:
        """The TOML file. One that cannot be read at all ends the run: its keys would all be missed."""
        try:
            document = tomllib.loads(path.read_bytes().decode())
        except OSError as error:
            self.fail("file", f"cannot be read: {error.strerror}", "name a file that this user may read")
        except UnicodeDecodeError as error:
            self.fail(f"byte {error.start}", "is not UTF-8", "save the file as UTF-8")
        except tomllib.TOMLDecodeError as error:
            problem, _, place = str(error).removesuffix(")").partition(" (at ")
            self.fail(place or "file", f"not TOML: {problem}", "mend the syntax (https://toml.io/en/v1.0.0)")
        except (ValueError, RecursionError):  # an integer of thousands of digits; arrays nested as deep
            self.fail("file", "holds a number or a nesting beyond all bounds", "write it shorter")
        self._flatten(document, ROOT, ())

    def fail(self, key: str, problem: str, mend: str) -> NoReturn:
        raise ConfigurationErrors([ConfigurationError(self.name, key, problem, mend)]) from None

    def _flatten(self, table: dict[str, Any], kind: inspect.StructType, path: Path) -> None:
        known = fields(kind)
        for name, value in table.items():
            here = (*path, name)
            field = known.get(name)
            if field is None:
                self.refuse(self.name, dotted(here), "unknown key", _mend_unknown(here, known))
            elif isinstance(field, inspect.StructType | inspect.DictType):
                if not isinstance(value, dict):
                    mend = f"write a [{dotted(here)}] table"
                    self.refuse(
                        self.name, dotted(here), f"{show(value)} stands where a table is needed", mend
                    )
                elif isinstance(field, inspect.StructType):
                    self._flatten(value, field, here)
                else:
                    self._flatten_rooms(value)
            else:
                self.given[here] = _Given(value, self.name)

    def _flatten_rooms(self, rooms: dict[str, Any]) -> None:
        for namespace, table in rooms.items():
            here = ("rooms", namespace)
            if not self._is_namespace(self.name, namespace):
                continue
            if not isinstance(table, dict):
                hint = (
                    f"[rooms.default] {namespace} = …"
                    if namespace in ROOM_KEYS
                    else f"a [{dotted(here)}] table"
                )
                self.refuse(
                    self.name,
                    dotted(here),
                    f"{show(table)} stands where a namespace is needed",
                    f"write {hint}",
                )
                continue
            for name, value in table.items():
                if name in ROOM_KEYS:
                    self.given[(*here, name)] = _Given(value, self.name)
                else:
                    mend = did_you_mean(name, ROOM_KEYS)
                    self.refuse(self.name, dotted((*here, name)), "unknown key", mend)

    def _is_namespace(self, source: str, name: str) -> bool:
        """Whether rooms can have this namespace; if not, it is refused."""
        if valid_room(name) and ":" not in name:
            return True
        meant = name.partition(":")[0].replace("*", "")
        mend = (
            f"write [rooms.{meant}]"
            if meant.isalnum()
            else "write the part of the rooms' names before the first colon"
        )
        self.refuse(
            source, dotted(("rooms", name)), "is a pattern or no name, where a namespace is needed", mend
        )
        return False

    def read_environment(self, env: Mapping[str, str]) -> None:
        """Every ``BROKER_…`` variable."""
        names = {variable(path): path for path in KEYS}
        for name in sorted(name for name in env if name.startswith("BROKER_") and name not in NOT_SETTINGS):
            path = names.get(name)
            if path is None and name.startswith("BROKER_ROOMS_"):
                path = self._room_variable(name)
            elif path is None:
                self._unknown_variable(name, names)
            if path is not None:
                key = find(path)
                assert key is not None
                self.given[path] = _Given(parse(env[name], key.kind), f"environment variable {name}")

    def _unknown_variable(self, name: str, names: Iterable[str]) -> None:
        if _SERVICE_LINK.fullmatch(name):
            mend = "unset it; if Kubernetes made it for a Service named broker, set enableServiceLinks: false"
        else:
            # Compared without the prefix, which alone would make every name look like every other.
            meant = nearest(name.removeprefix("BROKER_"), [known.removeprefix("BROKER_") for known in names])
            mend = f"did you mean BROKER_{meant}?" if meant else "remove it; `broker serve --help` names all"
        self.refuse("environment", dotted((name,)), "unknown variable", mend)

    def _room_variable(self, name: str) -> Path | None:
        """Which room option a variable means (see the top of this file)."""
        rest = name.removeprefix("BROKER_ROOMS_")
        keys = [key for key in ROOM_KEYS if rest.endswith(f"_{key.upper()}") and len(rest) > len(key) + 1]
        if not keys:
            example = "BROKER_ROOMS_DEFAULT_HISTORY"
            mend = f"end it with a key, as in {example}: {', '.join(ROOM_KEYS).upper()}"
            self.refuse("environment", name, "unknown variable", mend)
            return None
        key = max(keys, key=len)
        spelled = rest[: -len(key) - 1]
        known = {path[1] for path in self.given if path[0] == "rooms"}
        meant = sorted(
            namespace for namespace in known if re.sub(r"\W", "_", namespace).upper() == spelled.upper()
        )
        if len(meant) > 1:
            found = " and ".join(f"[rooms.{namespace}]" for namespace in map(quote, meant))
            mend = f"use --set rooms.{meant[0]}.{key}=…"
            self.refuse("environment", name, f"may mean {found}", mend)
            return None
        namespace = meant[0] if meant else spelled.lower()
        return ("rooms", namespace, key) if self._is_namespace("environment", namespace) else None

    def read_flags(self, flags: Mapping[str, Any]) -> None:
        """Values by dotted key."""
        for name, value in flags.items():
            if value is None:
                continue
            first, _, rest = name.partition(".")
            path = (first, *rest.rsplit(".", 1)) if first == "rooms" else tuple(name.split("."))
            key = find(path)
            if key is None:
                known = ROOM_KEYS if first == "rooms" and len(path) == 3 else [dotted(path) for path in KEYS]
                mend = did_you_mean(path[-1] if known is ROOM_KEYS else name, known)
                if nearest(name, known) is None and known is not ROOM_KEYS:
                    mend = "`broker serve --help` names all keys; rooms are rooms.NAMESPACE.KEY"
                self.refuse("flag --set", dotted(path), "unknown key", mend)
            elif first != "rooms" or self._is_namespace("flag --set", path[1]):
                read = parse(value, key.kind) if isinstance(value, str) else value
                self.given[path] = _Given(read, f"flag {flag(path)}")

    # --- From the layers to the configuration -------------------------------------

    def finish(self, *, serving: bool) -> Config:
        """Check every value, then (for serving) how they go together, and build the configuration."""
        values: dict[Path, Any] = {}
        for path, (value, source) in self.given.items():
            key = find(path)
            assert key is not None
            try:
                values[path] = conform(value, key.kind, name=path[-1])
            except Faults as bad:
                for fault in bad.faults:
                    self.refuse(source, dotted(path) + fault.at, fault.problem, fault.mend)
        bad_keys = self.given.keys() - values.keys()
        if values.get(("dev",)):
            values = {**DEVELOPMENT, **values}
        config = _build(values)
        for keys, problem, mend, at in contradictions(config) if serving else ():
            if bad_keys.isdisjoint(keys):  # else it is a consequence of what is told already
                source = next((self.given[key].source for key in keys if key in self.given), self.name)
                self.refuse(source, dotted(keys[0]) + at, problem, mend)
        if self.errors:
            raise ConfigurationErrors(self.errors)
        return config


def _mend_unknown(path: Path, known: Iterable[str]) -> str:
    """The nearest key, here or in another table."""
    name = path[-1]
    if nearest(name, known) is None:
        elsewhere = nearest(name, {path[-1] for path in KEYS})
        if elsewhere is not None:
            places = [dotted(path) for path in KEYS if path[-1] == elsewhere]
            return f"did you mean {' or '.join(places)}?"
    return did_you_mean(name, known)


def _build(values: Mapping[Path, Any]) -> Config:
    """The configuration with ``values``, which conform, in place of the schema's defaults."""
    rooms: dict[str, RoomOptions] = {}
    named = {path[1] for path in values if path[0] == "rooms"} - {"default"}
    namespaces = ["default", *sorted(named | {"user"})]
    for namespace in namespaces:
        own = {path[2]: value for path, value in values.items() if path[:2] == ("rooms", namespace)}
        base = rooms.get("default", RoomOptions())
        if namespace == "user":
            base = for_users(base)
        elif namespace == "all":
            base = msgspec.structs.replace(base, history=0)
        rooms[namespace] = msgspec.structs.replace(base, **own)
    config: Config = _replace(Config(), values, ())
    return msgspec.structs.replace(config, rooms=rooms)


def _replace(table: Any, values: Mapping[Path, Any], path: Path) -> Any:
    changed: dict[str, Any] = {}
    for name in table.__struct_fields__:
        here = (*path, name)
        current = getattr(table, name)
        if here in values:
            changed[name] = values[here]
        elif isinstance(current, msgspec.Struct):
            changed[name] = _replace(current, values, here)
    return msgspec.structs.replace(table, **changed)
