"""Logs: structlog on standard error, safe to print whatever a client said.

:func:`configure` is called once by the command line, before anything logs.
Modules take a logger by ``get_logger(__name__)`` and log an event's name with
fields: ``log.info("session opened", session=…)``. Every line goes through one
chain: secrets out, control characters escaped, fields cut, then JSON lines, or
columns on a terminal.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any, Literal, NamedTuple, TextIO, cast

# structlog imports rich when it can, for a style of traceback that is not used here: 3.5 MB of the
# 7.7 MB that importing it costs (RSS on top of trio and click; the rest is mostly asyncio, which the
# admin server needs anyway). Hidden during the import, rich stays out of a serving process.
_hidden = "rich" not in sys.modules
if _hidden:
    sys.modules["rich"] = cast("Any", None)
try:
    import structlog
finally:
    if _hidden:
        del sys.modules["rich"]

from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger  # noqa: E402 - see above

FIELD_CHARACTERS = 512
"""Longer fields are cut: a log line is not the place for a payload."""

TRACE_CHARACTERS = 16_384
"""The same for tracebacks, whose end matters most."""

_READ = 8 * FIELD_CHARACTERS
"""Characters of a field that are looked at. More than are shown, so that the cut does not hide half a token
from the search for tokens."""

_DEPTH = 4
"""Nesting of a field that is shown."""

_ITEMS = 64
"""Members of a list or a mapping that are shown."""

_SECRET_NAMES = re.compile(r"token|secret|authorization|password|cookie", re.IGNORECASE)

_SECRETS = re.compile(
    r"""eyJ[\w-]{5,}\.[\w-]*(?:\.[\w-]*)?            # a JWT, also one that was cut: '{"' in base64
      | (?<=[?&;]token=)[^&\s"']+ | (?<=access_token=)[^&\s"']+
      | (?i:(?<=bearer\ ))[^\s"',]+""",
    re.VERBOSE,
)

REDACTED = "[redacted]"


def get_logger(name: str) -> FilteringBoundLogger:
    """The logger of a module; ``name`` stands in every line as ``logger``."""
    return cast("FilteringBoundLogger", structlog.get_logger(name))


def configure(
    level: Literal["debug", "info", "warning", "error"] = "info",
    style: Literal["auto", "console", "json"] = "auto",
    *,
    stream: TextIO | None = None,
) -> Output:
    """Send all logs to ``stream`` (standard error), also those of libraries that use :mod:`logging`.

    ``style``: ``auto`` is columns on a terminal and JSON lines otherwise.
    Returns the output, whose ``dropped`` counts lines that could not be written.
    """
    target = sys.stderr if stream is None else stream
    people = style == "console" or (style == "auto" and target.isatty())
    number = logging.getLevelNamesMapping()[level.upper()]
    output = Output(target)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _add_name,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            sanitise,
            _columns(target) if people else structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda name="broker": _Named(output, name),
        cache_logger_on_first_use=False,  # tests and a reload configure again; a line costs 1 µs more
    )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Bridge)]:
        root.removeHandler(handler)
    root.addHandler(_Bridge())
    root.setLevel(max(number, logging.WARNING))  # libraries tell their life at info
    return output


def _columns(target: TextIO) -> structlog.dev.ConsoleRenderer:
    return structlog.dev.ConsoleRenderer(
        colors=target.isatty() and not os.environ.get("NO_COLOR"),
        exception_formatter=structlog.dev.plain_traceback,
        pad_event_to=24,
    )


class Output:
    """The end of the chain: writes lines, and never lets a broken log disturb a session.

    Whoever reads our standard error may have died (``EPIPE``), the disk below
    it may be full, or it may be closed: such a line is counted in ``dropped``.
    """

    __slots__ = ("_stream", "dropped")

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.dropped = 0

    def write(self, line: str) -> None:
        """Write one line."""
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            self.dropped += 1


class _Named:
    """What structlog calls a logger: a module's name, and the one output behind all of them."""

    __slots__ = ("critical", "debug", "error", "exception", "info", "log", "msg", "name", "warning")

    def __init__(self, output: Output, name: str) -> None:
        self.name = name
        self.msg = self.debug = self.info = self.warning = self.error = output.write
        self.critical = self.exception = self.log = output.write


def _add_name(logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event["logger"] = logger.name
    return event


class _Bridge(logging.Handler):
    """Hands records of :mod:`logging` to the same chain."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event = record.getMessage()
        except (TypeError, ValueError):  # wrong arguments for its own format: show them apart
            event = f"{record.msg!r} {record.args!r}"
        log = get_logger(record.name)
        level = min(max(record.levelno // 10 * 10, logging.DEBUG), logging.CRITICAL)
        log.log(level, event, exc_info=record.exc_info)


# --- Making a line safe -----------------------------------------------------------


def sanitise(_logger: WrappedLogger | None, _method: str, event: EventDict) -> EventDict:
    """Processor: no secret, no control character, no endless field; the fixed fields come first."""
    clean = {name: event.pop(name) for name in ("timestamp", "level", "logger") if name in event}
    clean["event"] = clean_text(str(event.pop("event", "")))
    for name, value in event.items():
        clean[name] = _trace(str(value)) if name == "exception" else _field(name, value, _DEPTH)
    return clean


def _field(name: str, value: object, depth: int) -> Any:
    """A named value. Numbers are no secrets: ``tokens=3`` is a bucket."""
    if _SECRET_NAMES.search(name) and not isinstance(value, (int, float, type(None))):
        return REDACTED
    return _clean(value, depth)


def _clean(value: object, depth: int) -> Any:
    match value:
        case None | bool():
            return value
        case float():
            return value if math.isfinite(value) else str(value)  # JSON has no word for it
        case int():
            return value if abs(value) < 1 << 64 else "a huge number"
        case str():
            return clean_text(value)
        case bytes() | bytearray() | memoryview():
            return clean_text(bytes(value[:_READ]).decode(errors="backslashreplace"))
        case Mapping() | list() | tuple() | set() | frozenset() if depth == 0:
            return "…"
        case Mapping():
            some = list(value.items())[:_ITEMS]
            return {clean_text(str(name)): _field(str(name), item, depth - 1) for name, item in some}
        case list() | tuple() | set() | frozenset():
            return [_clean(item, depth - 1) for item in list(value)[:_ITEMS]]
        case _:
            try:
                return clean_text(str(value))
            except Exception as error:
                return f"<{type(value).__name__}: {type(error).__name__} in str()>"


def clean_text(text: str, limit: int = FIELD_CHARACTERS) -> str:
    """``text`` without secrets, with characters that are not printable escaped, cut to ``limit``.

    What is not printable (Unicode's word for it) covers escape sequences that
    take over a terminal, line breaks that forge a line, direction marks that
    turn text around, and surrogates that cannot be encoded.
    """
    length = len(text)
    if length > _READ:
        text = text[:_READ]
    text = _escape(_SECRETS.sub(REDACTED, text))
    if len(text) > limit or length > _READ:
        text = f"{text[:limit]}… ({length} characters)"
    return text


def _escape(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _trace(text: str) -> str:
    """A traceback: lines stay lines, each indented, so that none can pass for a log line."""
    if len(text) > TRACE_CHARACTERS:
        text = "…" + text[-TRACE_CHARACTERS:]
    return "\n".join("  " + _escape(line) for line in _SECRETS.sub(REDACTED, text).splitlines())


# --- Not the same line a thousand times ----------------------------------------------


class _Seen:
    """When a key was last let through, and how often it was not since."""

    __slots__ = ("at", "suppressed")

    def __init__(self, at: float) -> None:
        self.at = at
        self.suppressed = 0


class ThrottleStatistics(NamedTuple):
    """``keys`` remembered, ``suppressed`` lines in all."""

    keys: int
    suppressed: int


class Throttle:
    """Lets each key through once per ``interval`` (s), and counts the others.

    For what an overload would say a thousand times a second (``EMFILE``, a bad
    entry, a full disk)::

        if (missed := throttle.admit("emfile", now)) is not None:
            log.warning("out of file descriptors", suppressed=missed)

    At most ``keys`` keys are remembered; the one unused for longest gives way,
    so that keys made of client input cost bounded memory.
    """

    def __init__(self, interval: float = 30.0, *, keys: int = 1024) -> None:
        self._interval = interval
        self._keys = keys
        self._seen: OrderedDict[Hashable, _Seen] = OrderedDict()
        self._suppressed = 0

    def admit(self, key: Hashable, now: float | None = None) -> int | None:
        """How many were held back since the last line of ``key``; ``None`` while this one must wait too.

        ``now``: seconds on any clock that only moves forward; the monotonic one if not given.
        """
        if now is None:
            now = time.monotonic()
        seen = self._seen.get(key)
        if seen is None:
            self._seen[key] = _Seen(now)
            if len(self._seen) > self._keys:
                self._seen.popitem(last=False)
            return 0
        self._seen.move_to_end(key)
        if now - seen.at < self._interval:
            seen.suppressed += 1
            self._suppressed += 1
            return None
        missed, seen.suppressed, seen.at = seen.suppressed, 0, now
        return missed

    def statistics(self) -> ThrottleStatistics:
        """Counters for ``/api/stats``."""
        return ThrottleStatistics(len(self._seen), self._suppressed)
