"""A periodic timer that a task waits for as for a socket.

``trio.sleep`` ends by a deadline, a cancellation and an exception; waiting for
Linux's timerfd ends like any other readable descriptor, for half the CPU, and
may tick more finely than Trio's milliseconds. The standard library has timerfd
from Python 3.13 on; until that is the oldest we serve, the C library is asked.
"""

from __future__ import annotations

import ctypes
import os
import time
from types import TracebackType
from typing import Self

import trio


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Timer(ctypes.Structure):
    _fields_ = (("interval", _Time), ("first", _Time))


_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class Ticker:
    """Ticks every ``period`` seconds (below one) while started. A context manager: leaving it closes it."""

    def __init__(self, period: float) -> None:
        tick = _Time(0, round(period * 1e9))
        self._on = _Timer(tick, tick)
        self._off = _Timer()
        self._fileno = _checked(_libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))
        self.ticking = False

    def start(self) -> None:
        """Tick from one period from now on. Does nothing while it ticks."""
        if not self.ticking:
            self._set(self._on)
            self.ticking = True

    def stop(self) -> None:
        """Tick no more."""
        if self.ticking:
            self._set(self._off)
            self.ticking = False

    async def wait(self) -> None:
        """Wait for the next tick; at once if one has passed since the last call."""
        await trio.lowlevel.wait_readable(self._fileno)
        os.read(self._fileno, 8)

    def _set(self, timer: _Timer) -> None:
        _checked(_libc.timerfd_settime(self._fileno, 0, ctypes.byref(timer), None))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        os.close(self._fileno)
