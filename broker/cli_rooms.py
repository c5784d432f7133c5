"""``broker listen`` and ``broker publish``: rooms in the terminal.

People get columns and colours, pipes get plain text, programs get JSON lines.
Whatever a publisher wrote is shown as JSON, whose strings hold no control
characters, so that nobody takes over the terminal of whoever listens.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click
import trio

from broker.cli_options import Exit, Json, Place, Tag, closing, fail, json_text, word

if TYPE_CHECKING:
    from broker.client import ClientError, Item

DEFAULT_URL = "ws://127.0.0.1:8765/ws"

MAX_LINE_BYTES = 1 << 20
"""One line of ``publish -``. More than a broker takes; a pipe without line ends must not cost all memory."""

_REFUSED_CODES = frozenset({"unauthenticated", "forbidden"})
_REFUSED_CLOSES = frozenset({4401, 4403, 4408, 4501})


def _websocket(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    """Check ``--url`` here, where a bad one is a matter of usage and not of the connection."""
    try:
        url = urlsplit(value)
        usable = url.scheme in {"ws", "wss"} and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise click.BadParameter(f"{value!r} is not ws://HOST[:PORT]/ws or wss://…")
    return value


def _connection(command: Callable[..., None]) -> Callable[..., None]:
    """Options of the commands that open a session."""
    for option in (
        click.option(
            "--token", envvar="BROKER_TOKEN", show_envvar=True, help="who you are; see `broker token`"
        ),
        click.option(
            "--url",
            envvar="BROKER_URL",
            show_envvar=True,
            default=DEFAULT_URL,
            show_default=True,
            callback=_websocket,
            help="the client port",
        ),
    ):
        command = option(command)
    return command


def _run(work: Callable[[], Awaitable[None]]) -> None:
    """Run ``work``, and turn what ends it into an exit code and one sentence."""
    from broker.client import ClientError  # noqa: PLC0415 - --help does without

    try:
        trio.run(work)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):  # of several, the first is as good as any
            error = error.exceptions[0]
    except ClientError as single:
        error = single
    else:
        return
    if isinstance(error, ClientError):
        fail(str(error), exit_code(error))
    raise error


def exit_code(error: ClientError) -> Exit:
    """How a script is told what went wrong."""
    from broker.client import Closed, ConnectFailed, RequestError, RoomClosed  # noqa: PLC0415 - as above

    match error:
        case ConnectFailed(status=401 | 403):
            return Exit.REFUSED
        case ConnectFailed():
            return Exit.UNREACHABLE
        case Closed(code=code) if code in _REFUSED_CLOSES:
            return Exit.REFUSED
        case RequestError(code=code) | RoomClosed(code=code) if code in _REFUSED_CODES:
            return Exit.REFUSED
        case _:
            return Exit.FAILED


# --- listen ---------------------------------------------------------------------------


@click.command(
    epilog=closing(
        "broker listen deal:7 deal:8",
        "broker listen deal:7 --tail 20 --json | jq .data",
        'broker listen deals --filter \'{"eq": ["region", "EMEA"]}\' --count 1',
        'broker listen user:42 --token "$(broker token --dev --user 42)"',
    )
)
@click.argument("rooms", metavar="ROOM…", nargs=-1, required=True)
@_connection
@click.option(
    "--since", type=Place(), metavar="EPOCH:OFFSET", help="first what came after this position (one room)"
)
@click.option(
    "--tail", type=click.IntRange(min=0), metavar="N", help="first the newest N events of each room"
)
@click.option("--filter", "filter_", type=Json(), metavar="JSON", help="only events whose tags match")
@click.option("--presence", is_flag=True, help="also who comes and goes")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="end after N events")
@click.option("--json", "as_json", is_flag=True, help="JSON lines")
def listen(
    *,
    rooms: tuple[str, ...],
    url: str,
    token: str | None,
    since: tuple[str, int] | None,
    tail: int | None,
    filter_: Any,
    presence: bool,
    count: int | None,
    as_json: bool,
) -> None:
    """Print what happens in rooms, until Ctrl-C. Reconnects by itself, and says where events are missing."""
    if since is not None and len(rooms) > 1:
        raise click.UsageError("--since is a position in one room; name one room, or use --tail")
    printer = _Printer(count, as_json=as_json)

    async def work() -> None:
        from broker.client import Position, connect  # noqa: PLC0415 - as above

        place = Position(*since) if since is not None else None
        async with connect(url, token=token) as client, trio.open_nursery() as nursery:
            for name in dict.fromkeys(rooms):
                room = await client.join(name, since=place, tail=tail, filter=filter_, presence=presence)
                nursery.start_soon(printer.follow, room.items(), nursery.cancel_scope)

    _run(work)


class _Printer:
    """Prints items, and ends everything after ``count`` events."""

    def __init__(self, count: int | None, *, as_json: bool) -> None:
        self._left = count
        self._line = json_line if as_json else text_line

    async def follow(self, items: AsyncIterator[Item], everything: trio.CancelScope) -> None:
        from broker.client import Event  # noqa: PLC0415 - as above

        async for item in items:
            if self._left == 0:
                return
            click.echo(self._line(item))
            if isinstance(item, Event) and self._left is not None:
                self._left -= 1
                if self._left == 0:
                    everything.cancel()


def json_line(item: Item) -> str:
    """One item as JSON: ``op`` is its kind, the fields are those of ``docs/protocol.md``."""
    import msgspec  # noqa: PLC0415 - loaded long since by the client

    fields = {name: value for name, value in msgspec.to_builtins(item).items() if value is not None}
    fields.setdefault("data", None) if type(item).__name__ == "Event" else None
    return json_text({"op": type(item).__name__.lower(), **fields})


def text_line(item: Item) -> str:
    """One item for people; :func:`click.echo` takes the colours out where they are not wanted."""
    from broker.client import Event, Left, Lost, Presence  # noqa: PLC0415 - as above

    room = click.style(item.room, fg="cyan")
    match item:
        case Event():
            clock = time.strftime("%H:%M:%S", time.localtime(item.ts)) + f".{int(item.ts % 1 * 1000):03d}"
            place = "" if item.offset is None else f" #{item.offset}"
            extra = {"by": item.user, "key": item.key, "slot": item.slot, "tags": item.tags}
            told = "".join(f" {name}={word(value)}" for name, value in extra.items() if value is not None)
            name = click.style(word(item.name), fg="green", bold=True)
            dim = click.style(f"{clock} ", dim=True)
            return f"{dim}{room}{place} {name} {json_text(item.data)}{click.style(told, dim=True)}"
        case Lost():
            count = "some" if item.count is None else f"{item.count:,}"
            return f"{room} {click.style(f'{count} events lost here ({item.reason})', fg='red')}"
        case Presence():
            changes = [("+", item.joined), ("-", item.left), ("~", item.changed)]
            who = [
                f"{sign}{word(member.user or member.session)}" for sign, some in changes for member in some
            ]
            return f"{room} {click.style(' '.join(who), fg='magenta')}"
        case Left():
            return f"{room} {click.style(f'taken away ({item.code})', fg='red')}"
        case _:
            hole = "nothing was missed" if item.recovered else "events may be missing here"
            colour = "yellow" if item.recovered else "red"
            return f"{room} {click.style(f'joined again ({item.reason}): {hole}', fg=colour)}"


# --- publish -----------------------------------------------------------------------------


@click.command(
    epilog=closing(
        'broker publish deal:7 deal-updated \'{"stage": "won"}\'',
        "broker publish deal:7 deal-updated '{}' --key import-17 --tag region=EMEA --tag value=1200",
        "jq -c .[] deals.json | broker publish deals deal-imported -",
    )
)
@click.argument("room")
@click.argument("event")
@click.argument("data", required=False, default="null")
@_connection
@click.option("--key", metavar="TEXT", help="idempotency key: stored once within 5 minutes")
@click.option("--slot", metavar="TEXT", help="the thing this is the newest value of")
@click.option("--tag", "tags", type=Tag(), multiple=True, help="for filters; repeat for more")
@click.option("--json", "as_json", is_flag=True, help="JSON lines")
def publish(
    *,
    room: str,
    event: str,
    data: str,
    url: str,
    token: str | None,
    key: str | None,
    slot: str | None,
    tags: tuple[tuple[str, str | int | float], ...],
    as_json: bool,
) -> None:
    """Publish one event with DATA (JSON), or with "-" one for each line of standard input.

    Prints where each was stored.
    """
    if key is not None and data == "-":
        raise click.UsageError("--key would make all lines one event; leave it out")
    once = None if data == "-" else _parse(data, "DATA")

    async def work() -> None:
        from broker.client import connect  # noqa: PLC0415 - as above

        values = _values() if data == "-" else _single(once)
        async with connect(url, token=token) as client, aclosing(values):
            async for value in values:
                place = await client.publish(room, event, value, key=key, slot=slot, tags=dict(tags) or None)
                stored = {} if place is None else {"epoch": place.epoch, "offset": place.offset}
                if as_json:
                    click.echo(json_text({"room": room, **stored}))
                else:
                    click.echo(f"{word(room)} " + (f"#{place.offset}" if place is not None else "sent"))

    _run(work)


async def _single(value: Any) -> AsyncGenerator[Any, None]:
    yield value


async def _values() -> AsyncGenerator[Any, None]:
    number = 0
    async with aclosing(input_lines(0)) as lines:
        async for line in lines:
            number += 1
            if line.strip():
                yield _parse(line, f"line {number}")


def _parse(text: str | bytes, where: str) -> Any:
    import orjson  # noqa: PLC0415 - as above

    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise click.UsageError(f"{where} is not JSON: {error}") from None


async def input_lines(descriptor: int) -> AsyncGenerator[bytes, None]:
    """Lines of a descriptor, while the session goes on beside it.

    It is left in blocking mode, which it shares with the shell it came from: a
    read that follows readiness does not block. Regular files are always ready,
    which epoll says by refusing them.
    """
    rest = b""
    while True:
        try:
            await trio.lowlevel.wait_readable(descriptor)
        except PermissionError:
            await trio.lowlevel.checkpoint()
        chunk = os.read(descriptor, 65536)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
        if not chunk:
            break
        if len(rest) > MAX_LINE_BYTES:
            raise click.UsageError(
                f"a line is longer than {MAX_LINE_BYTES} bytes; write one JSON value a line"
            )
    if rest:
        yield rest
