"""One node of a house: a broker process, again and again on one port."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Final

import trio

from tests.e2e.harness import ROOT, command, environment
from tests.faults.load import Endpoint
from tests.redis_server import free_port

READY: Final = 60.0
"""Seconds of real time after which a node that does not say "ready" fails the run."""

CONFIG: Final = """
dev = true
node = "{name}"
[server]
host = "127.0.0.1"
port = {port}
retry_after = 0.5     # the least that spreads a few dozen clients
[admin]
port = -1
[rooms.default]
history = 20000       # more than a round publishes: nothing is ever trimmed
[rooms.live]
history = 0
{store}
"""


class Node:
    """``store`` is the part of its configuration that says where the past is kept."""

    def __init__(self, name: str, directory: Path, store: str) -> None:
        self.name = name
        self.directory = directory
        self.endpoint = Endpoint("127.0.0.1", free_port())
        self._config = directory / f"{name}.toml"
        self._log = directory / f"{name}.log"
        self._config.write_text(CONFIG.format(name=name, port=self.endpoint.port, store=store))
        self._process: trio.Process | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and not ended by us."""
        return self._process is not None

    async def start(self) -> None:
        """Start it; it says "ready" before this returns."""
        with self._log.open("ab") as log:
            self._process = await trio.lowlevel.open_process(
                command("serve", "--config", str(self._config)),
                cwd=ROOT,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        with trio.move_on_after(READY):
            if (await self._process.stdout.receive_some()).startswith(b"ready "):
                return
        raise AssertionError(f"{self.name} did not start:\n{self.last_words()}")

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to exactly this process."""
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        """kill -9, and wait for it."""
        self.signal(signal.SIGKILL)
        await self._gone()

    async def drain(self) -> int:
        """SIGTERM, and wait for it; the exit code."""
        self.signal(signal.SIGTERM)
        return await self._gone()

    async def _gone(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        code = await self._process.wait()
        await self._process.stdout.aclose()
        self._process = None
        return code

    async def close(self) -> None:
        """End it, whatever state it is in."""
        if self._process is not None:
            with trio.CancelScope(shield=True):
                await self.kill()
