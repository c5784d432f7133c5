"""``broker stats``: the counters of a running broker, once or again and again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import click

from broker.cli_options import Exit, closing, fail, json_text, word

DEFAULT_ADMIN = "http://127.0.0.1:8766"


@click.command(
    epilog=closing(
        "broker stats",
        "broker stats --watch",
        "broker stats --json | jq .hub",
        'broker stats --admin https://broker.example.com:8766 --admin-token "$TOKEN"',
    )
)
@click.option("--admin", metavar="URL", default=DEFAULT_ADMIN, show_default=True, help="the operators' port")
@click.option("--admin-token", envvar="BROKER_ADMIN_TOKEN", show_envvar=True, help="its bearer token")
@click.option("--watch", is_flag=True, help="again and again, until Ctrl-C")
@click.option(
    "--every",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    help="seconds between, with --watch",
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines")
def stats(*, admin: str, admin_token: str | None, watch: bool, every: float, as_json: bool) -> None:
    """Print the counters of a running broker."""
    import httpx  # noqa: PLC0415 - 19 MB, for this command only

    headers = {"authorization": f"Bearer {admin_token}"} if admin_token else {}
    url = f"{admin.rstrip('/')}/api/stats"
    with httpx.Client(headers=headers, timeout=10.0, trust_env=False) as http:

        def fetch() -> dict[str, Any]:
            try:
                answer = http.get(url)
            except httpx.InvalidURL as error:
                raise click.UsageError(f"--admin: {error}") from None
            except httpx.HTTPError as error:
                fail(f"{url}: {str(error) or type(error).__name__}", Exit.UNREACHABLE)
            return _checked(answer.status_code, answer.content, url)

        if not watch:
            click.echo(_report(fetch(), as_json=as_json))
        elif as_json or not sys.stdout.isatty():
            while True:
                click.echo(_report(fetch(), as_json=as_json))
                time.sleep(every)
        else:
            _watch(fetch, every)


def _checked(status: int, content: bytes, url: str) -> dict[str, Any]:
    if status in {401, 403}:
        fail(f"{url}: not allowed ({status}); give --admin-token", Exit.REFUSED)
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if status != 200 or not isinstance(found, dict):
        message = found.get("message") if isinstance(found, dict) else None
        fail(f"{url}: {word(message or 'not the admin port of a broker')} ({status})", Exit.FAILED)
    return found


def flatten(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Nested statistics as lines: ``("hub.rooms", 12)``."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flatten(inner, f"{path}.{word(name)}" if path else word(name))
    else:
        yield path, value


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else word(value)


def _report(found: dict[str, Any], *, as_json: bool) -> str:
    if as_json:
        return json_text(found)
    rows = list(flatten(found))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{click.style(name.ljust(width), fg='cyan')}  {_shown(value)}" for name, value in rows)


def _watch(fetch: Callable[[], dict[str, Any]], every: float) -> None:
    """A table that is drawn again, with the change per second of each number."""
    from rich.live import Live  # noqa: PLC0415 - for this option only
    from rich.table import Table  # noqa: PLC0415 - the same
    from rich.text import Text  # noqa: PLC0415 - the same

    before: dict[str, Any] = {}
    last = time.monotonic()
    with Live(auto_refresh=False, screen=True) as live:
        while True:
            rows = dict(flatten(fetch()))
            now = time.monotonic()
            table = Table("", "now", "per second", box=None)
            for name, value in rows.items():
                change = per_second(before.get(name), value, now - last)
                table.add_row(Text(name, style="cyan"), Text(_shown(value)), Text(change, style="green"))
            live.update(table, refresh=True)
            before, last = rows, now
            time.sleep(every)


def per_second(before: Any, now: Any, seconds: float) -> str:
    """Change per second of a number, nothing where there is none."""
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (before, now))
    return f"{(now - before) / seconds:+,.1f}" if numbers and now != before and seconds > 0 else ""
