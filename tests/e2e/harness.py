"""Brokers for the end-to-end tests: in this process, or as the process that a person starts.

Tests that use :func:`running` are run by :func:`run_on_jumping_clock`: time
passes as usual, and :func:`jump` lets any deadline pass without a wait.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker.app import Broker
from broker.auth.tokens import sign
from broker.config import Admin, Auth, Config, Key, Rates, RoomOptions, Server
from broker.hub.hub import LINGER

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0
"""Seconds of real time after which a test that hangs fails. Nothing is ever asserted about less."""

KEY = Key(algorithm="HS256", secret="0123456789abcdef" * 4)
OPEN = RoomOptions(join="anyone", publish="anyone", history=100)
CONFIG = Config(
    node="here",
    server=Server(port=0, echo=True),
    auth=Auth(anonymous=True, keys=(KEY,)),
    rates=Rates(enabled=False),
    admin=Admin(port=-1),
    rooms={
        "default": OPEN,
        "live": msgspec.structs.replace(OPEN, history=0),
        "closed": RoomOptions(history=100),
        "members": RoomOptions(join="user", publish="user", history=100),
        "drop": msgspec.structs.replace(OPEN, history=0, slow="drop"),
        "latest": msgspec.structs.replace(OPEN, history=0, slow="latest", last_value=True),
        "board": msgspec.structs.replace(OPEN, last_value=True),
    },
)
"""Open to everybody, without a disk, without rates."""


def config(**tables: Any) -> Config:
    """:data:`CONFIG` with other values: ``config(limits={"accepts": 1})``, ``config(rooms={"a": OPEN})``."""
    changed: dict[str, Any] = {}
    for name, values in tables.items():
        table = getattr(CONFIG, name)
        if isinstance(table, msgspec.Struct) and isinstance(values, dict):
            changed[name] = msgspec.structs.replace(table, **values)
        elif isinstance(table, dict):
            changed[name] = table | values
        else:
            changed[name] = values
    return msgspec.structs.replace(CONFIG, **changed)


def token(user: str, *, ttl: float = 3600.0, **claims: Any) -> str:
    """A token that the broker of :data:`CONFIG` accepts."""
    return sign(CONFIG.auth, user, ttl=ttl, **claims)


# -- time ----------------------------------------------------------------------------------------


def run_on_jumping_clock(
    main: Callable[..., Awaitable[Any]], *, clock: Any = None, instruments: Any = ()
) -> Any:
    """``trio.run`` for tests; see ``conftest.py``."""
    return trio.run(main, clock=clock or MockClock(rate=1.0), instruments=instruments)


def jump(seconds: float) -> None:
    """Let time pass."""
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, MockClock), "the folder's conftest.py sees to it"
    clock.jump(seconds)


async def until(condition: Callable[[], object]) -> None:
    """Return once the condition holds. Fails the test if it never does."""
    for _ in range(int(PATIENCE / 0.002)):
        if condition():
            return
        await wait_all_tasks_blocked(0.002)
    raise AssertionError("this never happened")


# -- a broker in this process --------------------------------------------------------------------


@asynccontextmanager
async def running(settings: Config = CONFIG) -> AsyncIterator[Broker]:
    """A broker that answers; when the body is over, it must have left nothing behind."""
    descriptors, tasks = open_descriptors(), living_tasks()
    broker = Broker(settings)
    with real_deadline():
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(broker.run))
            at_rest = living_tasks()
            yield broker
            await check_nothing_is_left(broker, at_rest)
            broker.stop()
    assert living_tasks() == tasks
    assert open_descriptors() == descriptors


async def check_nothing_is_left(broker: Broker, tasks: int) -> None:
    """The leak check: what clients made is gone once they are gone."""
    registry, hub = broker.context.registry, broker.hub
    await until(lambda: not registry.connections and not hub.fanout.busy)
    assert not registry.sessions
    left = registry.statistics()
    assert (left["users"], left["strangers"]) == (0, 0)
    assert all(not room.members and not room.watchers and not room.apart for room in hub.rooms.values())
    assert broker.traffic.queued == 0
    assert len(broker.pump) == 0
    assert not hub.fanout.hid_members
    # Rooms linger for a while; those that remember the newest value of each slot for as long as it is good.
    jump(LINGER + 1.0)
    hub.sweep_idle()
    remembering = {room.name for room in hub.rooms.values() if room.slots and not room.has_history}
    assert set(hub.rooms) == remembering
    if broker.ready:  # a test may have stopped it
        await until(lambda: living_tasks() == tasks)


def living_tasks() -> int:
    """Trio tasks of this run."""
    return trio.lowlevel.current_statistics().tasks_living


def open_descriptors() -> dict[str, str]:
    """What this process holds open, save what only waits for the garbage collector."""
    gc.collect()
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the directory that is being read
            found[entry] = os.readlink(f"/proc/self/fd/{entry}")
    return found


@contextlib.contextmanager
def real_deadline() -> Iterator[None]:
    """End a test that hangs, by the real clock: the test's own may jump."""
    trio_token = trio.lowlevel.current_trio_token()
    scope = trio.CancelScope()

    def expire(_signal: int, _frame: object) -> None:
        trio_token.run_sync_soon(scope.cancel)

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        with scope:
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if scope.cancelled_caught:
        raise TimeoutError(f"the test hung for {PATIENCE} s")


# -- a broker as a process -----------------------------------------------------------------------


class BrokerProcess:
    """``broker serve`` as a person starts it."""

    def __init__(self, process: trio.Process, port: int, line: str) -> None:
        self.process = process
        self.port = port
        self.line = line
        self.logs = b""
        self._out = b""

    async def read_out(self) -> bytes:
        """All of standard output after the ready line. Ends with the process."""
        assert self.process.stdout is not None
        async for data in self.process.stdout:
            self._out += data
        return self._out

    async def read_logs(self) -> None:
        """Collect standard error until the process ends."""
        assert self.process.stderr is not None
        async for data in self.process.stderr:
            self.logs += data

    async def stop(self) -> int:
        """SIGTERM, then the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return await self.process.wait()


def command(*arguments: str) -> list[str]:
    """A ``broker`` command, run from this tree."""
    return [sys.executable, "-m", "broker", *arguments]


def environment(**variables: str) -> dict[str, str]:
    """The environment without settings of whoever runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
    return kept | variables


@asynccontextmanager
async def serving(
    *arguments: str, limit_descriptors: int | None = None, **variables: str
) -> AsyncIterator[BrokerProcess]:
    """``broker serve`` in a process of its own, once it is ready. Killed at the end if it still runs."""
    line = command("serve", "--port", "0", "--admin-port", "-1", *arguments)
    if limit_descriptors is not None:
        line = ["sh", "-c", f'ulimit -n {limit_descriptors}; exec "$@"', "sh", *line]
    with real_deadline():
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(
                partial(
                    trio.run_process,
                    line,
                    cwd=ROOT,
                    env=environment(**variables),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    check=False,
                )
            )
            assert process.stdout is not None
            assert process.stderr is not None
            ready = await _ready_line(process)
            served = BrokerProcess(process, int(ready.split("/ws")[0].rpartition(":")[2]), ready)
            nursery.start_soon(served.read_logs)
            try:
                yield served
            finally:
                if process.returncode is None:
                    process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
            nursery.cancel_scope.cancel()


async def _ready_line(process: trio.Process) -> str:
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        data = await process.stdout.receive_some(1)
        if not data:
            assert process.stderr is not None
            raise AssertionError(f"no ready line: {(await process.stderr.receive_some()).decode()}")
        line += data
    return line.decode().strip()
