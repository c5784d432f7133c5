"""Everything that happens by the clock, in one task: sweeps instead of thousands of timers."""

from __future__ import annotations

import gc
from typing import Final

import structlog
import trio

from broker.protocol.messages import encode_op
from broker.protocol.samples import SampleRecorder
from broker.server.context import Context
from broker.server.load import Load

log = structlog.get_logger(__name__)

TICK: Final = 0.1
"""Presence changes are gathered this long, and deadlines looked at this often (s)."""
SECOND: Final = 1.0
"""Between two looks at backlogs, at idle rooms, and at the node's load (s)."""
POSITIONS: Final = 5.0
"""Between two ``position`` messages (s)."""
HOUSEKEEPING: Final = 5.0
"""Between sweeps that may take their time (s); also how soon samples can be trained on and
new dictionaries are announced."""
RAMP: Final = 5000
"""New sessions after which what lives is taken out of the garbage collector's sight."""


class Clock:
    """Drives the sweeps of the hub, the wheel, and the slow housekeeping."""

    def __init__(self, context: Context, load: Load, recorder: SampleRecorder | None) -> None:
        self._context = context
        self._load = load
        self._recorder = recorder
        self._frozen_at = 0
        self._problems: list[str] = []

    async def run(self) -> None:
        """Tick until cancelled. Late ticks are not caught up, but seen as loop lag."""
        context = self._context
        started = trio.current_time()
        due = started + TICK
        second, positions, housekeeping = started + SECOND, started + POSITIONS, started + HOUSEKEEPING
        while True:
            await trio.sleep_until(due)
            now = trio.current_time()
            context.stages.loop_lag.observe(now - due)
            self._load.tick(now - due)
            due = max(due + TICK, now)
            context.hub.push_presence()
            context.wheel.advance(now)
            if now >= second:
                second = now + SECOND
                for connection in list(context.traffic.behind):
                    connection.owner.check_progress(now)
                context.hub.sweep_idle()
                self._load.sample(now)
            if now >= positions:
                positions = now + POSITIONS
                context.hub.push_positions()
            if now >= housekeeping:
                housekeeping = now + HOUSEKEEPING
                await self._housekeeping(now)

    async def _housekeeping(self, now: float) -> None:
        context = self._context
        context.failures.sweep(now)
        if context.registry.opened - self._frozen_at >= RAMP:
            # Sessions free themselves by reference counts; looking at 10,000 of them in
            # every full collection costs about 100 ms.
            self._frozen_at = context.registry.opened
            gc.freeze()
        if self._recorder is None:
            return  # nothing is kept on disk, so nothing is found there either
        try:
            await trio.to_thread.run_sync(self._recorder.flush)
        except OSError as error:  # a full disk costs samples, not sessions
            log.warning("cannot keep the recorded samples", error=str(error))
        if await trio.to_thread.run_sync(context.dictionaries.rescan):
            self.announce_dictionaries()
        self._tell_problems()

    def _tell_problems(self) -> None:
        """Log what cannot be used, once and not every time it is found again."""
        problems = self._context.dictionaries.problems
        for problem in problems:
            if problem not in self._problems:
                log.warning("dictionary left aside", problem=problem)
        self._problems = list(problems)

    def announce_dictionaries(self) -> None:
        """Tell every session that could use them, save those that have yet to be welcomed."""
        message = encode_op("dicts", dicts=self._context.dictionaries.announcement())
        for session in self._context.registry.sessions.values():
            if session.connection.codec.kind == "zstd" and session.connection.started:
                session.post(message)
