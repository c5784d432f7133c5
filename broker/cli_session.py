"""What the commands that open a session share: whom they connect to, and how that ends.

Used by :mod:`broker.cli_rooms` and :mod:`broker.cli_export`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click
import trio

from broker.cli_options import Exit, fail

if TYPE_CHECKING:
    from broker.client import ClientError

DEFAULT_URL = "ws://127.0.0.1:8765/ws"

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


def connection(command: Callable[..., None]) -> Callable[..., None]:
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


def run(work: Callable[[], Awaitable[None]]) -> None:
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
