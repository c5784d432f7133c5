"""The command line: ``broker serve`` and the tools around it.

This module stays light, because ``serve`` keeps what it imports for as long as
it runs: each command imports its own work when it is called, and the commands
that talk to a broker live in modules of their own, found by name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, cast

import click

from broker import __version__
from broker.cli_options import (
    BadConfiguration,
    Duration,
    Exit,
    Json,
    SettingsCommand,
    closing,
    configuration,
)
from broker.config import Config
from broker.errors import ConfigurationError


def main(args: list[str] | None = None) -> NoReturn:
    """Entry point of ``broker`` and ``python -m broker``: run a command, then exit with its code."""
    if "_BROKER_COMPLETE" in os.environ:
        broker.main(prog_name="broker")  # a shell asks click for completions
    try:
        code = _call(sys.argv[1:] if args is None else args)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = Exit.INTERRUPTED
    except BrokenPipeError:
        # `broker listen … | head`: nobody reads on. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.PIPE
    raise SystemExit(int(code))


def _call(args: list[str]) -> int:
    """What ``broker.main`` does, which would turn a broken pipe into 1 like any failure."""
    try:
        with broker.make_context("broker", args) as ctx:
            broker.invoke(ctx)
    except click.exceptions.Exit as done:  # of --help and --version
        return done.exit_code
    return Exit.OK


class _Commands(click.Group):
    """A group whose commands may live in other modules, imported when they are named."""

    elsewhere: Mapping[str, str] = {
        "export": "broker.cli_export",
        "listen": "broker.cli_rooms",
        "publish": "broker.cli_rooms",
        "stats": "broker.cli_stats",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [
            "serve", "check-config", "token", "listen", "export", "publish", "stats", "train-dict", "version",
        ]  # fmt: skip

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = self.elsewhere.get(cmd_name)
        if module is None:
            return super().get_command(ctx, cmd_name)
        return cast("click.Command", getattr(import_module(module), cmd_name))


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=closing(
        "broker serve --dev",
        "broker listen deal:7",
        'broker publish deal:7 deal-updated \'{"stage": "won"}\'',
    ),
)
@click.version_option(__version__, prog_name="broker")
@click.pass_context
def broker(ctx: click.Context) -> None:
    """A real-time WebSocket broker: rooms, presence, history, recovery."""
    if os.environ.get("NO_COLOR"):  # https://no-color.org
        ctx.color = False


# --- Commands -----------------------------------------------------------------------


@broker.command(
    cls=SettingsCommand,
    epilog=closing(
        "broker serve --dev                          open, for this machine only",
        "broker serve --config /etc/broker/broker.toml",
        "broker serve --config broker.toml --port 0 --limits-outbox-bytes 131072",
        "broker serve --config broker.toml --redis redis://127.0.0.1 --workers 4",
    ),
)
@click.option("--public-port", metavar="PORT", help="public HTTP port (not in this version)")
def serve(*, config: Path | None, set_: tuple[str, ...], public_port: str | None, **options: Any) -> None:
    """Run the broker until SIGTERM or SIGINT, then drain its sessions.

    Standard output carries one line, "ready ws://HOST:PORT/ws admin http://HOST:PORT",
    with the real ports; all logs go to standard error.
    """
    if public_port is not None:
        raise click.UsageError(
            "--public-port is not in this version, which has no public HTTP port; leave it out"
        )
    settings = configuration(config, set_, options)
    try:
        raise SystemExit(_serve(settings))
    except ConfigurationError as error:
        raise BadConfiguration(error) from None


def _serve(settings: Config) -> int:
    """Run one node, or the supervisor of several; the exit code."""
    from broker import logs  # noqa: PLC0415 - structlog costs 4 MB, which the other commands do without

    logs.configure(settings.log.level, settings.log.format)
    is_worker = "BROKER_WORKER" in os.environ
    if not is_worker:  # else its supervisor has said so
        from broker.settings_checks import warnings  # noqa: PLC0415 - for this command only

        for warning in warnings(settings):
            logs.get_logger(__name__).warning(warning)
    if settings.server.workers > 1 and not is_worker:
        from broker.supervisor import supervise  # noqa: PLC0415 - the same

        return supervise(settings, [sys.executable, "-m", "broker", *sys.argv[1:]])
    from broker.app import run  # noqa: PLC0415 - everything else, only for this command

    return run(settings)


@broker.command(
    "check-config",
    cls=SettingsCommand,
    epilog=closing("broker check-config --config /etc/broker/broker.toml && systemctl restart broker"),
)
def check_config(*, config: Path | None, set_: tuple[str, ...], **options: Any) -> None:
    """Read all settings as `serve` would, and say what is wrong or what is in effect."""
    settings = configuration(config, set_, options)
    from broker.settings_checks import warnings  # noqa: PLC0415 - for this command only
    from broker.settings_summary import summary  # noqa: PLC0415 - the same

    click.secho("ok", fg="green")
    for warning in warnings(settings):
        click.secho(f"warning: {warning}", fg="yellow", err=True)
    for line in summary(settings):
        click.echo(line)


@broker.command(
    epilog=closing(
        "broker token --config config/dev.toml --user 42",
        "broker token --dev --user 42 --ttl 7d --join 'deal:*' --publish deal:7 --info '{\"name\": \"Ada\"}'",
        'broker listen --token "$(broker token --dev --user 42)" user:42',
    )
)
@click.option("--config", "-c", type=click.Path(path_type=Path), metavar="FILE", help="[BROKER_CONFIG]")
@click.option("--dev", is_flag=True, default=None, help="sign with the development key")
@click.option("--user", required=True, metavar="ID", help="who it is for (claim sub)")
@click.option(
    "--ttl", type=Duration(), default="1h", show_default=True, help="how long it is good: 90, 15m, 1h, 7d"
)
@click.option("--join", multiple=True, metavar="PATTERN", help="rooms it may join, such as deal:*")
@click.option("--publish", multiple=True, metavar="PATTERN", help="rooms it may publish to")
@click.option("--presence", multiple=True, metavar="PATTERN", help="rooms whose members it may see")
@click.option("--info", type=Json(), help="what presence shows of the user")
def token(
    *,
    config: Path | None,
    dev: bool | None,
    user: str,
    ttl: float,
    join: tuple[str, ...],
    publish: tuple[str, ...],
    presence: tuple[str, ...],
    info: Any,
) -> None:
    """Print a token, signed with the first configured key that can sign; nothing else."""
    settings = configuration(config, (), {"dev": dev})
    from broker.auth.tokens import sign  # noqa: PLC0415 - cryptography costs 11 MB

    named = {"join": list(join), "publish": list(publish), "presence": list(presence)}
    rooms = {verb: patterns for verb, patterns in named.items() if patterns}
    source = str(config) if config is not None else "configuration"
    try:
        signed = sign(
            settings.auth, user, ttl=ttl, info=info, rooms=rooms or None, dev=settings.dev, source=source
        )
    except ConfigurationError as error:
        raise BadConfiguration(error) from None
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    click.echo(signed)


@broker.command(
    "train-dict",
    cls=SettingsCommand,
    epilog=closing(
        "broker train-dict --config broker.toml --room 'deal:*'",
        "broker train-dict --data /var/lib/broker --room 'deal:*' --size 8192",
    ),
)
@click.option("--room", required=True, metavar="PATTERN", help="rooms it is for: deal:* or one room's name")
@click.option(
    "--size", type=int, default=16384, show_default=True, metavar="BYTES", help="size of the dictionary"
)
def train_dict(*, config: Path | None, set_: tuple[str, ...], room: str, size: int, **options: Any) -> None:
    """Train a zstd dictionary from the recorded events of namespaces with record = true.

    It becomes the newest one for these rooms; older ones are still served. A
    running broker on the same store finds it by itself.
    """
    settings = configuration(config, set_, options, serving=False)  # trainers need not hold the keys
    if settings.store.data is None:
        raise click.UsageError("store.data is not set, so nothing was recorded; give --data or --config")
    from broker.protocol.samples import load_samples  # noqa: PLC0415 - as above
    from broker.protocol.training import TrainingError, train  # noqa: PLC0415 - as above

    try:
        recorded = load_samples(settings.store.data, room)
        for problem in recorded.problems:
            click.echo(problem, err=True)
        level = settings.wire.zstd_level
        made = train(recorded.events, rooms=room, directory=settings.store.data, size=size, level=level)
    except (TrainingError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(
        f"dictionary {made.id} for {made.rooms}: {made.bytes:,} bytes from {made.samples:,} events; "
        f"single events shrink to {made.ratio_with:.0%} instead of {made.ratio_without:.0%}"
    )


@broker.command(epilog=closing("broker version"))
def version() -> None:
    """Print the versions of the broker and of what it stands on."""
    from importlib.metadata import version as installed  # noqa: PLC0415 - for this command only

    parts = ", ".join(f"{name} {installed(name)}" for name in ("trio", "wsproto", "zstandard"))
    click.echo(f"broker {__version__} (Python {sys.version.split()[0]}, {parts})")
