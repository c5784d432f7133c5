"""``broker export``: a room's past as JSON lines, to be continued where it ended."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import click

from broker.cli_options import Exit, Moment, Place, closing
from broker.cli_past import Past
from broker.cli_rooms import json_line
from broker.cli_session import connection, run

if TYPE_CHECKING:
    from broker.client import Lost, Position


@click.command(
    epilog=closing(
        "broker export deal:7 > deal-7.jsonl",
        "broker export activity --at -24h --until 2025-01-31T12:00:00Z -o activity.jsonl",
        "broker export activity --since tTN7rGJCa4hE.SIT-Z8tfm-lW:1200 -o activity.jsonl",
    )
)
@click.argument("room", metavar="ROOM")
@connection
@click.option("--since", type=Place(), metavar="EPOCH:OFFSET", help="only what came after this position")
@click.option("--at", type=Moment(), metavar="TIME", help="only events from this time on")
@click.option("--until", type=Moment(), metavar="TIME", help="end before the first event after this time")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="end after N events")
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="write there; with --since, append",
)
def export(
    *,
    room: str,
    url: str,
    token: str | None,
    since: tuple[str, int] | None,
    at: float | None,
    until: float | None,
    limit: int | None,
    output: str | None,
) -> None:
    """Write a room's stored events as JSON lines, the oldest first.

    The last line of standard error tells how far it came, also when it failed;
    `--since` goes on there. Where events that should have come are gone, it
    says so, writes the rest, and ends with 1.
    """
    if since is not None and at is not None:
        raise click.UsageError("--since and --at both say where to begin; give one of them")
    with _target(output, append=since is not None) as file:
        writing = Export(file, limit, regular=output is not None and os.path.isfile(output))

        async def work() -> None:
            from broker.client import Position, connect  # noqa: PLC0415 - --help does without

            place = Position(*since) if since is not None else None
            start = at if at is not None else 0.0 if since is None else None
            async with connect(url, token=token) as client:
                await writing.take(Past(client, room, since=place, at=start, until=until))

        try:
            run(work)
        except BrokenPipeError:
            raise  # who read has gone, and knows what it has read
        except BaseException:
            writing.tell()
            raise
        writing.tell()
    if writing.holes:
        raise SystemExit(int(Exit.FAILED))


@contextmanager
def _target(output: str | None, *, append: bool) -> Iterator[BinaryIO]:
    """Standard output, or the file, in which nothing stays of a line that could not be finished."""
    if output is None:
        yield sys.stdout.buffer
        return
    try:
        with open(output, "ab" if append else "wb", buffering=0) as file:
            yield file
    except OSError as error:
        raise click.ClickException(f"{output}: {error.strerror or error}") from None


class Export:
    """Writes pages, and knows what is safely written. ``regular``: a file that can be cut off."""

    def __init__(self, file: BinaryIO, limit: int | None, *, regular: bool) -> None:
        self.holes = 0
        self._file = file
        self._regular = regular
        self._left = limit
        self._written = 0
        self._position: Position | None = None

    async def take(self, past: Past) -> None:
        """Write all of it, up to the limit. Raises OSError if it cannot be written."""
        from broker.client import Event  # noqa: PLC0415 - as above

        while not past.ended:
            page = await past.read()
            events = [item for item in page if isinstance(item, Event)]
            for item in page:
                if not isinstance(item, Event):
                    self._warn(item)
            if self._left is not None and len(events) >= self._left:
                events = events[: self._left]
            self._write("".join(json_line(event) + "\n" for event in events).encode())
            self._written += len(events)
            if self._left is not None:
                self._left -= len(events)
                if self._left == 0:
                    self._position = events[-1].position
                    return
            self._position = past.position

    def _write(self, data: bytes) -> None:
        """All of it or, in a file, nothing: a torn line would spoil what is appended later."""
        start = self._file.tell() if self._regular else 0
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
            self._file.flush()
        except OSError:
            if self._regular:
                self._file.truncate(start)
            raise

    def _warn(self, lost: Lost) -> None:
        self.holes += 1
        why = "the stream was replaced" if lost.reason == "epoch" else "they were trimmed"
        where = "at the beginning" if self._position is None else f"after {place(self._position)}"
        click.secho(f"broker: events are missing {where}: {why}", fg="red", err=True)

    def tell(self) -> None:
        """Say how far it came."""
        if self._position is not None:
            what = "1 event" if self._written == 1 else f"{self._written:,} events"
            click.echo(f"broker: {what}, up to {place(self._position)}", err=True)


def place(position: Position) -> str:
    """A position as ``--since`` takes it."""
    return f"{position.epoch}:{position.offset}"
