"""Drives the load client (``load.c``): starts it, follows its phases, and always ends it."""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from bench.recording import Recording, read_recording
from bench.tools import CACHE, compiled, cpu_time, on_core

Progress = Callable[[str, int, int], None]
"""Told of a phase (``setup``, ``publish``, ``settle``), how much is done, and of how much."""

_STOP_TIMEOUT = 10.0


class LoadError(Exception):
    """The load client ended early or did not answer in time."""


class LoadClient:
    """One run of the load client. A context manager: leaving it ends the process.

    ``plan`` is a file by :func:`bench.plan.write_plan`. After construction
    connections are being opened; :meth:`wait` for ``ready``, then :meth:`go`, then
    :meth:`wait` for ``done``, then :meth:`finish`.
    """

    def __init__(self, plan: Path, core: int | None, progress: Progress) -> None:
        self._recording = CACHE / f"recording-{os.getpid()}"
        self._progress = progress
        with on_core(core):
            self._process = subprocess.Popen(
                [compiled("load"), plan, self._recording],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        assert self._process.stdout is not None
        self._lines = _Lines(self._process.stdout.fileno())

    def __enter__(self) -> LoadClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        if process.poll() is None:
            process.kill()
            process.wait(_STOP_TIMEOUT)
        self._lines.close()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        self._recording.unlink(missing_ok=True)

    def wait(self, phase: str, timeout: float) -> tuple[int, int]:
        """Wait for a phase and return its two numbers. Raises :class:`LoadError`."""
        deadline = time.monotonic() + timeout
        while (line := self._lines.next(deadline)) is not None:
            name, first, second = line.split()
            if name == phase:
                return int(first), int(second)
            self._progress(name, int(first), int(second))
        if time.monotonic() < deadline:
            self._process.wait(_STOP_TIMEOUT)
            raise self._failed(f"it ended before {phase!r}")
        raise self._failed(f"{phase!r} did not come within {timeout:.0f} s")

    def cpu(self) -> int:
        """CPU time the load client used so far (ns): near 100 % of its core, it measures itself."""
        return cpu_time(self._process.pid)

    def go(self) -> None:
        """Start publishing."""
        self._say(b"go\n")

    def finish(self) -> Recording:
        """Close the connections and return what was recorded."""
        self._say(b"end\n")
        try:
            status = self._process.wait(120)
        except subprocess.TimeoutExpired:
            raise self._failed("the recording was not written within 120 s") from None
        if status:
            raise self._failed(f"it ended with {status}")
        return read_recording(self._recording)

    def _say(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("it is gone") from None

    def _failed(self, problem: str) -> LoadError:
        said = b""
        if self._process.poll() is not None and self._process.stderr is not None:
            said = self._process.stderr.read()
        return LoadError(f"load client: {problem}{': ' if said else ''}{said.decode().strip()}")


class _Lines:
    """Lines from a pipe, with a deadline."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(fd, selectors.EVENT_READ)

    def next(self, deadline: float) -> str | None:
        """The next line, or ``None`` at the deadline or at the end."""
        while b"\n" not in self._rest:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                return None
            more = os.read(self._fd, 65536)
            if not more:
                return None
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def close(self) -> None:
        self._selector.close()
