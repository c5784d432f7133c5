"""Everything that happens by the clock, in one task: sweeps instead of thousands of timers."""

from __future__ import annotations

import gc
from typing import Final

import structlog
import trio

from broker.protocol.dictionaries import SampleRecorder
from broker.protocol.messages import encode_op
from broker.server.context import Context

log = structlog.get_logger(__name__)

TICK: Final = 0.1
"""Presence changes are gathered this long (s)."""
_SECOND: Final = 10
_POSITIONS: Final = 50
"""Ticks between two ``position`` messages: 5 s."""
_SLOW_SWEEPS: Final = 300
"""Ticks between sweeps that may take their time: 30 s."""
RAMP: Final = 5000
"""New sessions after which what lives is taken out of the garbage collector's sight."""


class Clock:
    """Drives the sweeps of the hub, the wheel, and the slow housekeeping."""

    def __init__(self, context: Context, recorder: SampleRecorder | None) -> None:
        self._context = context
        self._recorder = recorder
        self._frozen_at = 0

    async def run(self) -> None:
        """Tick until cancelled. Late ticks are not caught up, but seen as loop lag."""
        context = self._context
        tick = 0
        due = trio.current_time() + TICK
        while True:
            await trio.sleep_until(due)
            now = trio.current_time()
            context.stages.loop_lag.observe(now - due)
            due = max(due + TICK, now)
            tick += 1
            context.hub.push_presence()
            if tick % _SECOND == 0:
                context.wheel.advance(now)
                for connection in list(context.traffic.behind):
                    connection.owner.check_progress(now)
                context.hub.sweep_idle()
            if tick % _POSITIONS == 0:
                context.hub.push_positions()
            if tick % _SLOW_SWEEPS == 0:
                await self._housekeeping(now)

    async def _housekeeping(self, now: float) -> None:
        context = self._context
        context.failures.sweep(now)
        if context.registry.opened - self._frozen_at >= RAMP:
            # Sessions free themselves by reference counts; looking at 10,000 of them in
            # every full collection costs about 100 ms.
            self._frozen_at = context.registry.opened
            gc.freeze()
        if self._recorder is not None:
            await trio.to_thread.run_sync(self._recorder.flush)
        for problem in context.dictionaries.problems:
            log.warning("dictionary left aside", problem=problem)
        if await trio.to_thread.run_sync(context.dictionaries.rescan):
            self.announce_dictionaries()

    def announce_dictionaries(self) -> None:
        """Tell every session that could use them."""
        message = encode_op("dicts", dicts=self._context.dictionaries.announcement())
        for session in self._context.registry.sessions.values():
            if session.connection.codec.kind == "zstd":
                session.post(message)
