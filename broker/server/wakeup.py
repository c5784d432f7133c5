"""Waking one task, cheaply."""

from __future__ import annotations

import trio


class Wakeup:
    """An event for one waiting task that resets itself; ``set`` before ``wait`` is not lost.

    ``trio.Event`` costs a parking lot and a new object for each use; 10,000
    sessions that sleep for hours should cost a pointer each.
    """

    __slots__ = ("_is_set", "_task")

    def __init__(self) -> None:
        self._is_set = False
        self._task: trio.lowlevel.Task | None = None

    def set(self) -> None:
        """Wake the waiting task, or let the next :meth:`wait` return at once."""
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)
        else:
            self._is_set = True

    async def wait(self) -> None:
        """Sleep until :meth:`set`. One task at a time."""
        if self._is_set:
            await trio.lowlevel.checkpoint()  # when this is cancelled, the next wait still returns at once
            self._is_set = False
            return
        assert self._task is None, "two tasks wait on one Wakeup"
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
