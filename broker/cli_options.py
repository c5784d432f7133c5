"""What the commands share: how they end, and how settings and values become options.

Used by :mod:`broker.cli`, :mod:`broker.cli_rooms` and :mod:`broker.cli_stats`.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from datetime import datetime
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

import click
from msgspec import inspect

from broker.config import Config
from broker.errors import ConfigurationError
from broker.settings_loader import load
from broker.settings_names import Path as KeyPath
from broker.settings_names import describe, flag, required, variable
from broker.settings_schema import KEYS, ROOM_KEYS, SettingKey


class Exit(IntEnum):
    """How every command ends, for scripts."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    INTERRUPTED = 130
    PIPE = 141


_EXIT_CODES = """\
Exit codes: 0 done · 1 the broker refused or failed · 2 usage or configuration
3 no connection · 4 token or permission refused · 130 Ctrl-C · 141 the reader went away"""


def closing(*examples: str) -> str:
    """The end of a command's help: examples, and the exit codes.

    A backspace in front of a paragraph keeps click from joining its lines.
    """
    lines = "\n".join(f"  {example}" for example in examples)
    return f"\b\nExamples:\n{lines}\n\n\b\n{_EXIT_CODES}"


class BadConfiguration(click.ClickException):
    """A configuration that cannot be used; the message has one line per problem."""

    exit_code = Exit.USAGE

    def __init__(self, error: ConfigurationError) -> None:
        super().__init__(str(error))

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the lines as they are, so that they can be searched by file and key."""
        click.secho(self.message, fg="red", err=True, file=file)


_ABOUT: dict[KeyPath, str] = {
    ("dev",): "everything open, for this machine only",
    ("server", "host"): "address for clients",
    ("server", "port"): "port for clients",
    ("server", "tls_cert"): "certificate chain (PEM)",
    ("server", "tls_key"): "its key (PEM)",
    ("admin", "port"): "port for operators, -1 for none",
    ("store", "data"): "directory for history",
    ("redis", "url"): "the Redis of several nodes and of backends",
    ("server", "workers"): "processes that share the port",
}
"""Settings that people give as flags, first in the help; the others are told by type and range alone."""

_METAVARS: dict[type[inspect.Type], str] = {
    inspect.IntType: "N",
    inspect.FloatType: "X",
    inspect.StrType: "TEXT",
    inspect.LiteralType: "WORD",
    inspect.VarTupleType: "LIST",
}


def _option(key: SettingKey) -> click.Option:
    """One setting as an option. Its value stays text: the loader reads and judges it, as for variables."""
    name = "__".join(key.path)
    names = list(dict.fromkeys((flag(key.path), "--" + "-".join(key.path).replace("_", "-"))))
    kind = required(key.kind)
    about = [_ABOUT[key.path]] if key.path in _ABOUT else []
    if isinstance(kind, inspect.BoolType):
        both = [f"{option}/--no-{option[2:]}" for option in names]
        return click.Option([*both, name], default=None, help=", ".join([*about, variable(key.path)]))
    about += [describe(kind), variable(key.path)]
    if key.default not in {None, ()}:
        about.append(f"default {key.default}")
    return click.Option([*names, name], default=None, metavar=_METAVARS[type(kind)], help=", ".join(about))


def config_option() -> click.Option:
    """``--config``. A file that is missing is the loader's to tell, in the words of every other problem."""
    return click.Option(
        ["--config", "-c", "config"],
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="TOML file with the settings, BROKER_CONFIG",
    )


def _set_option() -> click.Option:
    return click.Option(
        ["--set", "set_"],
        multiple=True,
        metavar="KEY=VALUE",
        help=f"any key, also of rooms: rooms.deal.history=100; rooms have {', '.join(ROOM_KEYS)}",
    )


@cache
def _settings() -> tuple[list[click.Option], list[click.Option]]:
    """The usual and the other settings. One set for all commands: it stays in memory while ``serve`` runs."""
    usual = [_option(KEYS[path]) for path in _ABOUT]
    return usual, [_option(key) for path, key in KEYS.items() if path not in _ABOUT]


class SettingsCommand(click.Command):
    """A command that takes the configuration file and every setting as options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        usual, self._rare = _settings()
        self.params = [config_option(), *usual, _set_option(), *self.params, *self._rare]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options that people use first, then one for each remaining key."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": [], "Every other setting": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                groups["Every other setting" if param in self._rare else "Options"].append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def configuration(
    config: Path | None, set_: tuple[str, ...], options: Mapping[str, Any], *, serving: bool = True
) -> Config:
    """Load the settings of one call; ``serving`` as in ``load``. Raises :class:`BadConfiguration`."""
    flags = {name.replace("__", "."): value for name, value in options.items() if value is not None}
    for item in set_:
        key, equals, value = item.partition("=")
        if not equals:
            raise click.BadParameter(f"{item!r} has no '='; write KEY=VALUE", param_hint="--set")
        flags[key.strip()] = value
    try:
        return load(config, env=os.environ, flags=flags, serving=serving)
    except ConfigurationError as error:
        raise BadConfiguration(error) from None


# --- Values of other options --------------------------------------------------------


class Duration(click.ParamType[float]):
    """Seconds, or a number with s, m, h or d."""

    name = "duration"
    _units: Mapping[str, float] = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds of ``1h``."""
        found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd]?)", str(value))
        seconds = float(found[1]) * self._units[found[2]] if found else 0.0
        if not 0 < seconds <= 3650 * 86400.0:
            self.fail(f"{value!r} is no duration; write 90, 15m, 1h or 7d, at most ten years", param, ctx)
        return seconds


class Moment(click.ParamType[float]):
    """A point in time, as Unix seconds: given so, in RFC 3339, or as long ago as ``-15m``."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Unix seconds of ``2025-01-31T12:00:00Z``."""
        text = str(value)
        if text.startswith("-"):
            return max(0.0, time.time() - Duration().convert(text[1:], param, ctx))
        seconds = _unix_seconds(text)
        if seconds is None:
            self.fail(f"{text!r} is no time; write 2025-01-31T12:00:00Z, Unix seconds, or -15m", param, ctx)
        return seconds


_DATE = "[0-9]{4}-[0-9]{2}-[0-9]{2}"
_CLOCK = r"[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?"
_RFC3339 = re.compile(f"{_DATE}[Tt ]{_CLOCK}([Zz]|[+-][0-9]{{2}}:[0-9]{{2}})")


def _unix_seconds(text: str) -> float | None:
    if re.fullmatch(r"[0-9]{1,11}(\.[0-9]{1,9})?", text):
        return float(text)
    if _RFC3339.fullmatch(text):
        try:
            return max(0.0, datetime.fromisoformat(text.upper()).timestamp())
        except (ValueError, OverflowError):
            pass  # the 31st of February
    return None


class Json(click.ParamType[Any]):
    """Any JSON value."""

    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value that the text says."""
        import orjson  # noqa: PLC0415 - not for serve's sake, which has it anyway, but for --help's

        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError as error:
            self.fail(f"not JSON: {error}", param, ctx)


class Place(click.ParamType[tuple[str, int]]):
    """A position in a room's stream, as ``EPOCH:OFFSET``."""

    name = "EPOCH:OFFSET"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        """Epoch and offset. The epoch may hold colons, the offset cannot."""
        epoch, colon, offset = str(value).rpartition(":")
        if not (colon and epoch and offset.isascii() and offset.isdigit()):
            self.fail(f"{value!r} is no position; write EPOCH:OFFSET as --json shows them", param, ctx)
        return epoch, int(offset)


class Tag(click.ParamType[tuple[str, "str | int | float"]]):
    """``name=value``; a value that is a JSON number or string is that, any other is text."""

    name = "K=V"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str | int | float]:
        """Name and value."""
        name, equals, text = str(value).partition("=")
        if not (name and equals):
            self.fail(f"{value!r} has no '='; write NAME=VALUE", param, ctx)
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            return name, text
        number = isinstance(parsed, (int, float)) and not isinstance(parsed, bool) and abs(parsed) < 1 << 63
        return name, parsed if number or isinstance(parsed, str) else text


# --- What is shown ---------------------------------------------------------------------


def json_text(value: object) -> str:
    """``value`` as JSON that is safe to show: what does not print (C1 control characters) is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)


def word(value: object) -> str:
    """A text as it is where that is safe and clear to read, else as JSON."""
    plain = isinstance(value, str) and value.isprintable() and value and " " not in value
    return str(value) if plain else json_text(value)


def fail(message: str, code: Exit) -> NoReturn:
    """End the command with one sentence on standard error."""
    click.secho(f"broker: {message}", fg="red", err=True)
    raise SystemExit(int(code))
