"""The supervisor of ``broker serve --workers N``: N processes that share the client port.

Theory. One Trio process uses one core, so a machine runs several brokers, each
a node of its own, which know each other through Redis like nodes on different
machines. The supervisor holds the port (bound with ``SO_REUSEPORT``, never
listening), starts the workers with the command that started itself, and starts
those again that die. It serves nothing and keeps nothing, so there is little in
it that could fail.

Who notices what: the supervisor sees a worker's end by waiting for it. A worker
sees the supervisor's end by a pipe that both hold and nobody writes to: its
writing end lives in the supervisor alone, so that the kernel closes it however
the supervisor ends, and reading it ends then.

The first worker is ready before the others are started: a configuration that
does not work is told once, and the admin port, which it alone has, is known.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec
import trio

from broker.config import Config, Server
from broker.errors import ConfigurationError
from broker.logs import get_logger
from broker.server.listening import bind, cannot_listen, close

log = get_logger(__name__)

VARIABLE: Final = "BROKER_WORKER"
"""Tells a worker what it is; no setting, and not for people."""

START_ATTEMPTS: Final = 3
"""How often a worker may die before it was ever ready; then it is no accident."""

BAD_CONFIGURATION: Final = 2
"""Exit code after which trying again is useless."""

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 10.0
"""Seconds before a worker that died is started again: doubling, lest a machine in trouble get more of it."""

STABLE: Final = 30.0
"""A worker that lived for so many seconds begins with the first pause again."""

KILL_MARGIN: Final = 5.0
"""Seconds a worker may take to end, on top of what its settings give the sessions."""


_NOT_STARTED: Final = 1
_ENDED_WELL: Final = frozenset({0, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT})


class Worker(NamedTuple):
    """What one worker is told: its ``number`` from 0, the ports, its siblings' common ``group``.

    ``alive`` is the reading end of the pipe that ends with the supervisor.
    """

    number: int
    port: int
    admin_port: int
    alive: int
    group: str

    @classmethod
    def from_environment(cls) -> Worker | None:
        """What this process is; ``None`` unless a supervisor started it."""
        text = os.environ.get(VARIABLE)
        if text is None:
            return None
        try:
            number, port, admin_port, alive, group = text.split(":", 4)
            return cls(int(number), int(port), int(admin_port), int(alive), group)
        except ValueError:
            raise ConfigurationError(
                "environment", VARIABLE, "is no setting; workers get it from their supervisor", "unset it"
            ) from None

    def text(self) -> str:
        """For the environment."""
        return ":".join(map(str, self))

    def adapt(self, config: Config) -> Config:
        """The settings that this worker uses: the shared port, a name of its own, one admin port for all.

        Listen with ``reuse_port=True`` on it.
        """
        base = config.node or f"{socket.gethostname()}-{os.getppid()}"
        return msgspec.structs.replace(
            config,
            node=f"{base}-{self.number}",
            server=msgspec.structs.replace(config.server, port=self.port),
            admin=msgspec.structs.replace(config.admin, port=self.admin_port),
        )

    async def orphaned(self) -> None:
        """Return when the supervisor is gone, so that nobody will stop or replace this worker."""
        await trio.lowlevel.wait_readable(self.alive)


def supervise(config: Config, command: Sequence[str], *, kill_margin: float = KILL_MARGIN) -> int:
    """Run ``config.server.workers`` processes of ``command`` until SIGTERM or SIGINT; the exit code.

    Prints the one ready line once all are ready. ``kill_margin`` as the
    constant. Raises :class:`~broker.errors.ConfigurationError` if the port is
    not to be had.
    """
    held = reserve(config.server)
    alive, lives = os.pipe()
    try:
        port = held[0].getsockname()[1]
        supervisor = Supervisor(config, command, port, alive, kill_margin=kill_margin)
        return trio.run(supervisor.run)
    finally:
        os.close(alive)
        os.close(lives)
        close(held)


def reserve(settings: Server) -> list[socket.socket]:
    """Sockets that hold the port for the workers; who does not listen gets no connection.

    The port is first bound alone: with ``SO_REUSEPORT`` a second broker of the
    same user would share it in silence.
    """
    try:
        if settings.port:
            close(bind(settings))
        return bind(settings, reuse_port=True)
    except OSError as error:
        raise cannot_listen(settings, error) from None


class Supervisor:
    """One run of :func:`supervise`. ``port`` is held; ``alive`` is the pipe's end that workers inherit."""

    def __init__(
        self, config: Config, command: Sequence[str], port: int, alive: int, *, kill_margin: float
    ) -> None:
        self._settings = config.server
        self._command = command
        self._port = port
        self._admin_port = config.admin.port
        self._alive = alive
        self._group = secrets.token_hex(6)
        self._kill_margin = kill_margin
        self._ready = [trio.Event() for _ in range(config.server.workers)]
        self._line = ""
        self._running: dict[int, trio.Process] = {}
        self._serving: set[int] = set()
        """Workers whose process of now has said that it is ready."""
        self._stopping = trio.Event()
        self._code = 0

    async def run(self) -> int:
        """Start the workers, keep them running, stop them. Owns every one of them."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._heed_signals)
            async with trio.open_nursery() as workers:
                workers.start_soon(self._end_late_ones)
                for number, ready in enumerate(self._ready):
                    workers.start_soon(self._keep, number)
                    if number == 0:
                        await self._wait_for(ready)
                for ready in self._ready:
                    await self._wait_for(ready)
                if not self._stopping.is_set():
                    sys.stdout.write(self._line + "\n")
                    sys.stdout.flush()
                    log.info("workers ready", workers=len(self._ready), port=self._port)
            nursery.cancel_scope.cancel()
        return self._code

    async def _wait_for(self, ready: trio.Event) -> None:
        """Until it is ready, or nothing is to become ready any more."""
        async with trio.open_nursery() as nursery:

            async def first_of(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(first_of, ready)
            nursery.start_soon(first_of, self._stopping)

    # -- one worker ---------------------------------------------------------------

    async def _keep(self, number: int) -> None:
        """Run one worker, and the next one in its place, until all are to stop."""
        deaths = 0
        while not self._stopping.is_set():
            began = trio.current_time()
            code = await self._run_once(number)
            if self._stopping.is_set():
                self._judge(number, code)
                return
            deaths = 1 if trio.current_time() - began >= STABLE else deaths + 1
            if not self._ready[number].is_set() and (code == BAD_CONFIGURATION or deaths >= START_ATTEMPTS):
                self._give_up(number, code)
                return
            pause = min(FIRST_PAUSE * 2 ** min(deaths - 1, 20), LONGEST_PAUSE)
            log.warning("a worker ended; starting another", worker=number, code=code, pause=pause)
            with trio.move_on_after(pause):
                await self._stopping.wait()

    async def _run_once(self, number: int) -> int:
        """Start one process and see it end; its exit code, negative for a signal."""
        worker = Worker(number, self._port, self._admin_port if number == 0 else -1, self._alive, self._group)
        try:
            process = await trio.lowlevel.open_process(
                self._command,
                env=os.environ | {VARIABLE: worker.text()},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=(self._alive,),
            )
        except OSError as error:  # out of memory, processes or descriptors: the others must not go for it
            log.warning("cannot start a worker", worker=number, error=str(error))
            return _NOT_STARTED
        self._running[number] = process
        try:
            if self._stopping.is_set():  # told to stop while it was being started
                process.terminate()
            await self._listen_to(number, process)
            return await process.wait()
        finally:
            del self._running[number]
            await _end(process)

    async def _listen_to(self, number: int, process: trio.Process) -> None:
        """Read what the worker prints until it ends; its first line says that it is ready."""
        assert process.stdout is not None
        said = b""
        self._serving.discard(number)
        async for data in process.stdout:
            if number not in self._serving:
                said += data
                line, end, _ = said.partition(b"\n")
                if end:
                    self._serving.add(number)
                    if not self._ready[number].is_set():
                        self._note_ready(number, line.decode(errors="replace"))

    def _note_ready(self, number: int, line: str) -> None:
        if number == 0:
            self._line = line
            _, _, admin = line.partition(" admin ")
            if admin:  # the next one in its place must be found there, too
                self._admin_port = int(admin.rpartition(":")[2])
        self._ready[number].set()

    def _give_up(self, number: int, code: int) -> None:
        """A worker that cannot start: what it had to say stands on standard error."""
        log.error("a worker cannot start", worker=number, code=code)
        self._stop(code if code > 0 else 128 - code)

    def _judge(self, number: int, code: int) -> None:
        """It was asked to end; one that was not up yet may have ended in any way."""
        if code not in _ENDED_WELL and number in self._serving:
            log.error("a worker did not end well", worker=number, code=code)
            self._code = self._code or 1

    # -- the end ----------------------------------------------------------------------

    async def _heed_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                log.info("stopping the workers", workers=len(self._running))
                self._stop(0)

    def _stop(self, code: int) -> None:
        """Ask all workers to drain, at the same time."""
        if self._stopping.is_set():
            return
        self._code = code
        self._stopping.set()
        for process in self._running.values():
            process.terminate()

    async def _end_late_ones(self) -> None:
        """Once they are stopping: kill what takes longer than any drain, and say so by the exit code."""
        await self._stopping.wait()
        patience = self._settings.drain_timeout + self._settings.close_timeout + self._kill_margin
        deadline = trio.current_time() + patience
        while self._running and trio.current_time() < deadline:
            with trio.move_on_after(deadline - trio.current_time()):
                await next(iter(self._running.values())).wait()
            await trio.lowlevel.checkpoint()
        for number, process in self._running.items():
            log.error("a worker does not end; killing it", worker=number, pid=process.pid)
            process.kill()


async def _end(process: trio.Process) -> None:
    """See that the process is gone, also when this one's task was cancelled."""
    if process.returncode is None:
        process.kill()
    if process.stdout is not None:
        await trio.aclose_forcefully(process.stdout)
    with trio.CancelScope(shield=True):
        await process.wait()
