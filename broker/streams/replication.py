"""Waiting for replicas: what is stored counts once so many replicas have it as well.

``WAIT`` holds up its connection until the replicas have confirmed everything
that was written on it before, so one is sent behind all the publishes of a
moment. Until it is answered, their answers are kept here.

In a Redis Cluster a publish may turn out to belong to another shard, where the
link sends it again; the ``WAIT`` behind it has been answered by then, for
nothing, and another one follows. Only while a slot is on its way, one key after
the other, may an event be stored where ``WAIT`` does not ask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Generic, TypeVar

import trio

from broker.link.base import Link, LinkError, Reply

PATIENCE: Final = 1000
"""How long replicas may take (ms): well below the time after which publishers must have an answer."""

T = TypeVar("T")


class Replication(Generic[T]):
    """``finish(publish, reply)`` is called for each publish, in order, with the answer that counts.

    Give every publish to :meth:`sent` right after sending it, and its answer to :meth:`stored`.
    """

    def __init__(self, link: Link, replicas: int, finish: Callable[[T, Reply | LinkError], None]) -> None:
        self._link = link
        self._replicas = replicas
        self._finish = finish
        self._gathered: dict[str, list[tuple[T, list[Reply | LinkError]]]] = {}
        self._wake = trio.Event()
        self.too_few = 0

    def sent(self, publish: T, key: str) -> Callable[[Reply | LinkError], None]:
        """A publish is about to be sent to the shard of ``key``; what takes its answer."""
        # Nobody here knows the shards, so in a Redis Cluster each room waits for itself.
        answer: list[Reply | LinkError] = []
        self._gather(key if self._link.clustered else "", publish, answer)
        return answer.append

    def _gather(self, key: str, publish: T, answer: list[Reply | LinkError]) -> None:
        self._gathered.setdefault(key, []).append((publish, answer))
        self._wake.set()

    async def run(self) -> None:
        """Send a ``WAIT`` behind whatever was gathered, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            self.flush()

    def flush(self) -> None:
        """Send it now."""
        gathered, self._gathered = self._gathered, {}
        for key, group in gathered.items():
            self._link.send(self._waited(key, group), key, "WAIT", self._replicas, PATIENCE)

    def _waited(
        self, key: str, group: list[tuple[T, list[Reply | LinkError]]]
    ) -> Callable[[Reply | LinkError], None]:
        def done(reply: Reply | LinkError) -> None:
            verdict: LinkError | None = None
            if isinstance(reply, LinkError):
                verdict = reply
            elif reply < self._replicas:
                self.too_few += 1
                verdict = LinkError(f"NOREPLICAS only {reply} of {self._replicas} replicas have it")
            for publish, answer in group:
                if answer:
                    stored = answer[0]
                    self._finish(
                        publish, stored if verdict is None or isinstance(stored, LinkError) else verdict
                    )
                elif isinstance(reply, LinkError):
                    self._finish(publish, reply)
                else:
                    self._gather(key, publish, answer)  # it is on its way to another shard

        return done
