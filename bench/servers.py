"""The subjects of the benchmark: how each is started, measured and stopped, all in the same way."""

from __future__ import annotations

import os
import re
import selectors
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from bench.tools import CACHE, HERE, ROOT, Unavailable, compiled, cpu_time, node_modules, on_core

CONFIG = ROOT / "config" / "bench.toml"
"""What the broker runs with: open, and without limits on how fast it may go."""

_READY = re.compile(r"ready wss?://[^:/]+:(\d+)\S*(?: admin (\S+))?")
_START_TIMEOUT = 30.0
_STOP_TIMEOUT = 15.0
_TAIL = 2000


def broker_command() -> list[str]:
    """The broker of this checkout, or what ``BENCH_BROKER`` says (a shell-like command line)."""
    override = os.environ.get("BENCH_BROKER")
    if override:
        return shlex.split(override)
    program = Path(sys.executable).parent / "broker"
    if not program.exists():
        raise Unavailable(f"{program} does not exist: run `make install`")
    return [str(program), "serve", "--config", str(CONFIG), "--port", "0", "--admin-port", "0"]


def _node(script: str) -> list[str]:
    return ["node", str(node_modules() / script)]


COMMANDS: Mapping[str, Callable[[], list[str]]] = {
    "broker": broker_command,
    "floor": lambda: [str(compiled("floor"))],
    "ws": lambda: _node("ws.mjs"),
    "socketio": lambda: _node("socketio.mjs"),
    "websockets": lambda: [sys.executable, str(HERE / "peers" / "websockets_peer.py")],
}
"""Subject → what starts it; each prints one line ``ready ws://HOST:PORT/…``. May raise ``Unavailable``."""


class ServerError(Exception):
    """A subject did not start, or died."""


class Process:
    """A process under measurement, pinned to ``core``. A context manager: leaving it stops the process.

    Standard output is :attr:`said`, everything else it says goes to a file.
    """

    def __init__(self, name: str, core: int | None, command: Sequence[str]) -> None:
        self.name = name
        self.core = core
        CACHE.mkdir(parents=True, exist_ok=True)
        self._log = CACHE / f"{name.replace(' ', '-')}.log"
        with self._log.open("wb") as log, on_core(core):
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, cwd=ROOT
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL when that takes too long."""
        process = self._process
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.kill()
        if process.stdout is not None:
            process.stdout.close()

    def kill(self) -> None:
        """SIGKILL, and wait for it."""
        self._process.kill()
        self._process.wait(_STOP_TIMEOUT)

    def check(self) -> None:
        """Raise :class:`ServerError` if it is no longer running."""
        if self._process.poll() is not None:
            raise ServerError(f"{self.name} ended with {self._process.returncode}:\n{self.tail()}")

    def cpu(self) -> int:
        """CPU time of all its threads so far (ns)."""
        return cpu_time(self.pid)

    def wakes(self) -> int:
        """How often its main thread has gone to sleep so far: the fewer per message, the cheaper each."""
        found = re.search(
            r"^voluntary_ctxt_switches:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE
        )
        assert found is not None
        return int(found[1])

    def memory(self) -> int:
        """Resident memory (B), exact: ``VmRSS`` in ``status`` lags by a batch of pages per thread."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        found = re.search(r"^Rss:\s+(\d+) kB", text, re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024

    def tail(self) -> str:
        """The end of what it said on standard error."""
        return self._log.read_bytes()[-_TAIL:].decode(errors="replace").strip()


class Server(Process):
    """A running subject. ``port`` is for clients, ``admin`` the URL of its admin port where it has one."""

    def __init__(
        self, name: str, core: int | None, extra: list[str] | None = None, label: str | None = None
    ) -> None:
        super().__init__(label or name, core, COMMANDS[name]() + (extra or []))
        try:
            self.port, self.admin = self._wait_ready()
        except BaseException:
            self.stop()
            raise

    @property
    def ports(self) -> Sequence[int]:
        """Where the load may connect to."""
        return (self.port,)

    @property
    def processes(self) -> Sequence[Process]:
        """What is measured."""
        return (self,)

    def _wait_ready(self) -> tuple[int, str | None]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + _START_TIMEOUT
        said = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in said:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise ServerError(
                        f"{self.name} was not ready within {_START_TIMEOUT:.0f} s:\n{self.tail()}"
                    )
                more = os.read(self._process.stdout.fileno(), 4096)
                if not more:
                    raise ServerError(f"{self.name} did not start:\n{self.tail()}")
                said += more
        found = _READY.match(said.decode())
        if found is None:
            raise ServerError(f"{self.name} said {said!r} instead of 'ready ws://HOST:PORT/…'")
        return int(found[1]), found[2]


class Measured(Protocol):
    """What a run is measured against: one server, or several processes that serve together."""

    @property
    def ports(self) -> Sequence[int]:
        """Where the load may connect to, in the order that :attr:`bench.workload.Workload.place` means."""

    @property
    def processes(self) -> Sequence[Process]:
        """What is measured; their names are distinct."""
