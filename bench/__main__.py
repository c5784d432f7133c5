"""The command line: ``python -m bench SCENARIO [options]``, ``python -m bench all``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from bench.machine import machine
from bench.report import Result, Terminal, save, show
from bench.runner import Bench
from bench.scenarios import SCENARIOS, Scenario
from bench.servers import COMMANDS
from bench.tools import CACHE, HERE, compiled, raise_descriptor_limit

PEERS = tuple(name for name in COMMANDS if name != "broker")


def _peers(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Names of peers, separated by commas."""
    if value is None:
        return None
    names = tuple(name for name in value.split(",") if name)
    for name in names:
        if name not in PEERS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(PEERS)}")
    return names


def _cores() -> tuple[int | None, int | None]:
    """One core for the server, another for the load; none are pinned where there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    return (cores[0], cores[1]) if len(cores) > 1 else (None, None)


_SERVER_CORE, _CLIENT_CORE = _cores()

_COMMON = (
    click.option(
        "--repeat", type=click.IntRange(1), default=1, help="Runs of each subject; the median counts."
    ),
    click.option(
        "--vs",
        "versus",
        callback=_peers,
        help=f"Peers to compare with, of {','.join(PEERS)}; default: the usual.",
    ),
    click.option(
        "--broker/--no-broker", "with_broker", default=True, help="Measure the broker, or only peers."
    ),
    click.option("--server-core", type=int, default=_SERVER_CORE, help="Core of the servers."),
    click.option("--client-core", type=int, default=_CLIENT_CORE, help="Core of the load client."),
    click.option(
        "--json", "json_path", type=click.Path(path_type=Path), help="Also write the results to this file."
    ),
    click.option(
        "--output",
        type=click.Path(path_type=Path, file_okay=False),
        default=HERE / "results",
        help="Folder for JSON and SVG of each scenario.",
    ),
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}
)
def main() -> None:
    """Measure the broker, side by side with others, on this machine."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    repeat: int
    versus: tuple[str, ...] | None
    with_broker: bool
    server_core: int | None
    client_core: int | None
    json_path: Path | None
    output: Path


def _measure(scenarios: Sequence[Scenario], options: _Options) -> None:
    compiled("load")
    CACHE.mkdir(parents=True, exist_ok=True)
    raise_descriptor_limit()
    results = []
    with Terminal() as terminal:
        for scenario in scenarios:
            terminal.note(f"{scenario.name}: {(scenario.__doc__ or '').splitlines()[0]}")
            bench = Bench(
                display=terminal,
                versus=scenario.rivals if options.versus is None else options.versus,
                repeat=options.repeat,
                server_core=options.server_core,
                client_core=options.client_core,
                with_broker=options.with_broker,
            )
            results.append(Result.of(scenario, scenario.measure(bench)))
    where = machine()
    save(results, where, options.output, options.json_path)
    for result in results:
        show(result)
    click.echo(f"results in {options.output}")
    if any(
        sample.faults
        for result in results
        for sample in result.samples
        if sample.subject.startswith("broker")
    ):
        raise SystemExit(1)


def _command(kind: type[Scenario]) -> click.Command:
    def callback(**values: Any) -> None:
        settings = {item.name: values.pop(item.name) for item in dataclasses.fields(kind)}
        _measure([kind(**settings)], _Options(**values))

    command: Callable[..., Any] = callback
    for option in reversed(_COMMON):
        command = option(command)
    for item in reversed(dataclasses.fields(kind)):
        name = "--" + item.name.replace("_", "-")
        command = click.option(
            name, type=type(item.default), default=item.default, help=item.metadata["help"]
        )(command)
    return click.command(kind.name, help=kind.__doc__)(command)


for _kind in SCENARIOS:
    main.add_command(_command(_kind))


def _all(**values: Any) -> None:
    """Every scenario, in a short version, each against its usual peers."""
    _measure([kind.short() for kind in SCENARIOS], _Options(**values))


_short: Callable[..., Any] = _all
for _option in reversed(_COMMON):
    _short = _option(_short)
main.add_command(click.command("all", help=_all.__doc__)(_short))

if __name__ == "__main__":
    main(prog_name="python -m bench")
