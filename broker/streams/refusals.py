"""Whether the store refuses to store, and when it does so no more.

A Redis that is full, or cannot write to its disk, answers and yet takes nothing.
Whether it takes something again only a write can tell, and publishes need not
come: while a node is not ready, nobody is sent to it. So it tries by itself.
"""

from __future__ import annotations

from typing import Any, Final

import trio

from broker.link.base import Link, LinkError, Reply
from broker.link.keys import Keys
from broker.logs import Throttle, get_logger

log = get_logger(__name__)

TRY_EVERY: Final = 1.0
"""Between two trials, while the store refuses (s)."""

TRIAL_LIFE: Final = 1000
"""How long Redis keeps what was written to try it (ms)."""

PATIENCE: Final = 100
"""How long replicas may take to confirm a trial (ms): ``WAIT`` holds up what is behind it."""


class Refusals:
    """``replicas``: how many must have what is written, or it counts as refused."""

    def __init__(self, link: Link, keys: Keys, replicas: int) -> None:
        self._link = link
        self._keys = keys
        self._replicas = replicas
        self._room = ""
        self._refused = trio.Event()
        self._throttle = Throttle()
        self._told = False
        self.why: str | None = None
        """With which code the store refuses now."""

    def refused(self, room: str, error: LinkError) -> None:
        """The store did not take an event of ``room``."""
        code = error.code
        if code != self.why and (missed := self._throttle.admit(code)) is not None:
            log.error("store fails", reason=str(error), suppressed=missed)
            self._told = True
        self._room, self.why = room, code
        self._refused.set()

    def stored(self) -> None:
        """It took something."""
        if self._told:
            log.info("store works again", refused_with=self.why)
        self._told, self.why = False, None
        self._refused = trio.Event()

    async def run(self) -> None:
        """Try once in a while, for as long as the store refuses, until cancelled."""
        while True:
            await self._refused.wait()
            await trio.sleep(TRY_EVERY)
            if self.why is not None and self._link.up and await self._takes():
                self.stored()

    async def _takes(self) -> bool:
        """Write to the shard that refused, the way of publishes: ``WAIT`` asks for its own connection."""
        key = self._keys.trial(self._room)
        commands: list[tuple[str | int, ...]] = [("SET", key, "", "PX", TRIAL_LIFE)]
        if self._replicas:
            commands.append(("WAIT", self._replicas, PATIENCE))
        answers: list[Any] = []
        complete = trio.Event()

        def take(answer: Reply | LinkError) -> None:
            answers.append(answer)
            if len(answers) == len(commands):
                complete.set()

        for command in commands:
            self._link.send(take, key, *command)
        await complete.wait()
        if any(isinstance(answer, LinkError) for answer in answers):
            return False
        return not self._replicas or answers[-1] >= self._replicas
