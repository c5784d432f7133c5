"""The way to the writer thread and back.

``publish`` and ``request`` append and return. The thread takes all that waits,
has the :class:`~broker.engine.writer.Writer` commit it in one transaction, and
hands the batch back to the Trio thread in one call. While the disk syncs, the
next batch gathers: groups grow with load, and an idle broker answers after one
sync.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import trio

from broker.engine.batch import Batch, Publish, Request
from broker.engine.writer import Writer

BATCH_EVENTS = 1024
"""Publishes in one commit; delivering them keeps the Trio thread busy in one piece."""

WAITING_EVENTS = 32_768
"""Publishes that may wait for the disk; past it they are refused, or a stalled disk would fill the memory."""


class CommitQueue:
    """Publishes and requests for the writer, and the thread that serves them.

    ``finish`` is called on the Trio thread with every batch, in order. It must
    not raise. ``commit_window``: seconds to wait for more before each commit.
    """

    def __init__(self, finish: Callable[[Batch], None], commit_window: float) -> None:
        self._finish = finish
        self._commit_window = commit_window
        # Two threads use these, one at each end, which a deque allows.
        self._publishes: deque[Publish] = deque()
        self._requests: deque[Request] = deque()
        self._wake = threading.Event()
        self._stopping = False

    def __len__(self) -> int:
        return len(self._publishes)

    @property
    def full(self) -> bool:
        """Whether the next publish must be refused."""
        return len(self._publishes) >= WAITING_EVENTS

    def publish(self, publish: Publish) -> None:
        """Hand over an event."""
        self._publishes.append(publish)
        if not self._wake.is_set():  # half the price of setting it again
            self._wake.set()

    def request(self, request: Request, *, urgent: bool = True) -> None:
        """Hand over anything else; what is not urgent waits for the next batch."""
        self._requests.append(request)
        if urgent:
            self._wake.set()

    async def run(self, writer: Writer) -> None:
        """Serve the queue until :meth:`stop`. Cannot be cancelled once it runs, and ends soon after."""
        token = trio.lowlevel.current_trio_token()
        # A limiter of its own: this thread lives as long as the engine and must
        # not take one of the forty that everybody shares.
        limiter = trio.CapacityLimiter(1)
        await trio.to_thread.run_sync(self._serve, writer, token, limiter=limiter)

    def stop(self) -> None:
        """Let the thread commit what waits, and end. Nothing may be handed over any more."""
        self._stopping = True
        self._wake.set()

    def abandon(self) -> None:
        """Fail what is left once the thread has ended: something only if it never ran, or crashed."""
        while batch := self._take():
            self._finish(batch)
        self._stopping = False

    def _serve(self, writer: Writer, token: trio.lowlevel.TrioToken) -> None:
        """The thread."""
        while True:
            self._wake.wait()
            self._wake.clear()  # before looking: whoever appends later sets it again
            if self._commit_window and not self._stopping:
                time.sleep(self._commit_window)
            batch = self._take()
            if batch:
                try:
                    writer.commit(batch)
                finally:
                    token.run_sync_soon(self._finish, batch)
            if self._publishes or self._requests:
                self._wake.set()
            elif self._stopping:
                return

    def _take(self) -> Batch:
        """Everything that waits, up to a bound."""
        publishes, requests = self._publishes, self._requests
        return Batch(
            [publishes.popleft() for _ in range(min(len(publishes), BATCH_EVENTS))],
            [requests.popleft() for _ in range(min(len(requests), BATCH_EVENTS))],
        )
