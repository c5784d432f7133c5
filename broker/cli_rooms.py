"""``broker listen`` and ``broker publish``: rooms in the terminal.

People get columns and colours, pipes get plain text, programs get JSON lines.
Whatever a publisher wrote is shown as JSON, whose strings hold no control
characters, so that nobody takes over the terminal of whoever listens.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import click
import trio

from broker.cli_options import Json, Moment, Place, Tag, closing, json_text, word
from broker.cli_past import Past
from broker.cli_session import connection, run

if TYPE_CHECKING:
    from broker.client import Client, Item

MAX_LINE_BYTES = 1 << 20
"""One line of ``publish -``. More than a broker takes; a pipe without line ends must not cost all memory."""

# --- listen ---------------------------------------------------------------------------


@click.command(
    epilog=closing(
        "broker listen deal:7 deal:8",
        "broker listen deal:7 --tail 20 --json | jq .data",
        "broker listen activity --at -15m",
        "broker listen activity --at 2025-01-31T12:00:00Z --until 2025-01-31T13:00:00Z",
        'broker listen deals --filter \'{"eq": ["region", "EMEA"]}\' --count 1',
        'broker listen user:42 --token "$(broker token --dev --user 42)"',
    )
)
@click.argument("rooms", metavar="ROOM…", nargs=-1, required=True)
@connection
@click.option(
    "--since", type=Place(), metavar="EPOCH:OFFSET", help="first what came after this position (one room)"
)
@click.option("--at", type=Moment(), metavar="TIME", help="first what came from this time on")
@click.option(
    "--tail", type=click.IntRange(min=0), metavar="N", help="first the newest N events of each room"
)
@click.option("--until", type=Moment(), metavar="TIME", help="end at this time")
@click.option(
    "--follow/--no-follow", default=True, show_default=True, help="go on with what happens from now on"
)
@click.option("--filter", "filter_", type=Json(), metavar="JSON", help="only events whose tags match")
@click.option("--presence", is_flag=True, help="also who comes and goes")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="end after N events")
@click.option("--json", "as_json", is_flag=True, help="JSON lines")
def listen(*, rooms: tuple[str, ...], url: str, token: str | None, as_json: bool, **options: Any) -> None:
    """Print what happens in rooms, until Ctrl-C. Reconnects by itself, and says where events are missing.

    With --since or --at the past comes first, however long it is; then what
    happens from now on, without a hole and nothing twice.
    """
    listening = _Listening(as_json=as_json, **options)
    listening.check(rooms)

    async def work() -> None:
        from broker.client import connect  # noqa: PLC0415 - as above

        async with connect(url, token=token) as client, trio.open_nursery() as nursery:
            listening.everything = nursery.cancel_scope
            for name in dict.fromkeys(rooms):
                nursery.start_soon(listening.to, client, name)

    run(work)


class _Listening:
    """What was asked for, and how much of it was shown. ``everything`` is cancelled when that is all."""

    def __init__(
        self,
        *,
        as_json: bool,
        since: tuple[str, int] | None,
        at: float | None,
        tail: int | None,
        until: float | None,
        follow: bool,
        filter_: Any,
        presence: bool,
        count: int | None,
    ) -> None:
        self.everything = trio.CancelScope()
        self._line = json_line if as_json else text_line
        self._since, self._at, self._tail = since, at, tail
        self._until = until
        self._follow = follow
        self._filter = filter_
        self._presence = presence
        self._left = count

    def check(self, rooms: tuple[str, ...]) -> None:
        """Refuse what contradicts itself."""
        if self._since is not None and len(rooms) > 1:
            raise click.UsageError("--since is a position in one room; name one room, or use --at or --tail")
        starts = [start for start in (self._since, self._at, self._tail) if start is not None]
        if len(starts) > 1:
            raise click.UsageError("--since, --at and --tail all say where to begin; give one of them")
        if not starts and (not self._follow or (self._until is not None and self._until <= time.time())):
            raise click.UsageError("that would show nothing; say where to begin: --since, --at or --tail")

    async def to(self, client: Client, room: str) -> None:
        """Show one room: its past, as far as it was asked for, and its present."""
        now = time.time()
        present = self._follow and (self._until is None or self._until > now)
        place = None
        tail = self._tail
        if self._since is not None or self._at is not None or not present:
            past = await self._past(client, room)
            while not past.ended:
                for found in await past.read():
                    self._show(found)
            place, tail = past.position, None
            present = present and not past.over
        if not present:
            return
        joined = await client.join(room, since=place, tail=tail, filter=self._filter, presence=self._presence)
        if place is not None and not joined.recovered:
            self._show(_lost(room))
        with trio.move_on_after(math.inf if self._until is None else max(0.0, self._until - now)):
            async for item in joined.items():
                self._show(item)

    async def _past(self, client: Client, room: str) -> Past:
        from broker.client import Position  # noqa: PLC0415 - as above
        from broker.errors import BrokerError  # noqa: PLC0415 - as above
        from broker.protocol.filters import compile_filter  # noqa: PLC0415 - as above

        try:
            wanted = compile_filter(self._filter) if self._filter is not None else None
        except BrokerError as error:
            raise click.BadParameter(error.message, param_hint="--filter") from None
        if self._tail is not None:
            return await Past.newest(client, room, self._tail, until=self._until, wanted=wanted)
        since = Position(*self._since) if self._since is not None else None
        return Past(client, room, since=since, at=self._at, until=self._until, wanted=wanted)

    def _show(self, item: Item) -> None:
        from broker.client import Event  # noqa: PLC0415 - as above

        if self._left == 0:
            return
        click.echo(self._line(item))
        if isinstance(item, Event) and self._left is not None:
            self._left -= 1
            if self._left == 0:
                self.everything.cancel()


def _lost(room: str) -> Item:
    """What to show where the broker kept too little between the past and the join."""
    from broker.client import Lost  # noqa: PLC0415 - as above

    return Lost(room=room, reason="trimmed")


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
@connection
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

    run(work)


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
