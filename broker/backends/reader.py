"""Durable events from backends: the stream ``publish``, read by one node at a time.

``XADD broker:publish * room … event … data …`` is stored in Redis at once, and
stays there until the event is stored in its room: that is what makes it
durable. One node holds the lease and reads; each read asks for the lease in the
same script, so that a node that was frozen and lost it reads nothing more. What
it had sent before may still arrive late, as a duplicate, which the key of the
event drops: the entry's own id, if the backend gave none. :mod:`broker.backends.backlog`
keeps the order within a room.

A room without history stores nothing and knows no keys. There the entry is
removed first, and told to the nodes by the one that removed it: at most once.

The next entry is waited for by a blocking ``XREAD`` that only wakes; it is kept
shorter than the time within which the link expects answers.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import trio

from broker.backends.backlog import Backlog, Item
from broker.backends.leases import FAREWELL, Lease, Standing
from broker.backends.rejected import Rejected, Saying
from broker.backends.said import PUBLISHER, Options, claimed_room, decode_entry
from broker.config import Redis
from broker.engine.base import Done
from broker.errors import BrokerError, ErrorCode
from broker.link.base import Link, LinkError, Reply, load_script
from broker.link.keys import Keys
from broker.logs import Throttle, get_logger
from broker.protocol.events import Event, Position

log = get_logger(__name__)

READ_STREAM: Final = load_script("read_stream")

Publish = Callable[[Event, Done], None]
"""Store an event in a room with history, and remember its key for :data:`REMEMBERED`."""

Tell = Callable[[Event], None]
"""Tell an event to all nodes, this one too, in a room without history."""

REMEMBERED: Final = 24 * 3600.0
"""Seconds that the keys of entries are remembered: as long as all nodes may be away between storing an
event and removing its entry."""

REMEMBERED_AFTER: Final = 600.0
"""The same once the entry is removed, if its id is the key: a day of ids would fill the memory of Redis.
As long as a node may be frozen with the event in hand and wake up again."""

READ_ENTRIES: Final = 256
"""Entries of one read. Redis serves nobody else meanwhile (0.2 ms for small ones)."""

READ_BYTES: Final = 1024 * 1024
"""Bytes of one read, unless a single entry has more."""

ENTRY_BYTES: Final = 16 * 1024 * 1024
"""An entry larger than this is rejected unread."""

REMOVE_ENTRIES: Final = 128
"""Settled entries removed by one command."""

WAKE: Final = 0.5
"""Seconds that one ``XREAD`` blocks at most."""

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 2.0
"""Seconds between a failure and the next attempt; doubled each time, and jittered."""


class Reader:
    """One node's reader; only the one with the lease does anything."""

    def __init__(
        self,
        link: Link,
        keys: Keys,
        rejected: Rejected,
        options: Options,
        *,
        node: str,
        settings: Redis,
        publish: Publish,
        tell: Tell,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._link = link
        self._stream = keys.publish
        # Its hash tag is the whole name of the stream, so that one script may touch both in a cluster.
        self._lease = Lease(link, keys.lease(f"{{{keys.publish}}}"), node, settings.reader_lease)
        self._rejected = rejected
        self._options = options
        self._publish = publish
        self._tell = tell
        self._clock = clock
        self._rest = settings.reader_lease / 3
        self._wake = min(WAKE, self._rest, settings.answer_timeout / 2)
        self._once = keys.once
        self._backlog = Backlog()
        self._marks: dict[str, str] = {}  # id → key in Redis that remembers it, of settled entries
        self._ready: deque[Item] = deque()  # to be sent on their way
        self._sending = False
        self._removing = 0
        self._progress = trio.Event()
        self._attempts = 0
        self._retry_at: float | None = None
        self._passing = False
        """The stream goes on behind what was read, and there is place for it."""
        self._throttle = Throttle()
        self._read = self._stored = self._told = self._failed = self._waiting = self._faults = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read until cancelled. Cancel it before the link, so that another node may go on at once."""
        task_status.started()
        try:
            while True:
                try:
                    await self._turn()
                except LinkError as error:
                    self._stumble("cannot read what backends publish", str(error))
                    await trio.sleep(self._pause())
        finally:
            await self._retire()

    # -- reading ----------------------------------------------------------------

    async def _turn(self) -> None:
        """Read once, hand out what came, and wait until there is reason to read again."""
        backlog = self._backlog
        # Only where a pass has ended: rooms behind one that fails must get their turn before it.
        if self._retry_at is not None and not self._passing and trio.current_time() >= self._retry_at:
            self._retry_at = None
            backlog.restart()
        if backlog.idle:
            backlog.restart()  # ids may have begun anew: the store was emptied, or a clock went back
        held = self._lease.held
        more = await (self._read_entries() if backlog.free >= READ_ENTRIES else self._keep_lease())
        if self._lease.held != held:
            log.info(
                "reading what backends publish" if not held else "another node reads now", stream=self._stream
            )
        if not self._lease.held:
            self._passing = False
            backlog.abandon()
            await trio.sleep(self._rest)
            return
        self._remove()
        self._passing = more and backlog.free >= READ_ENTRIES
        if backlog.free < READ_ENTRIES:
            await self._wait_for_room()
        elif more:
            await trio.lowlevel.checkpoint()
        else:
            if backlog.idle:
                self._attempts = 0
            await self._wait_for_entries()

    async def _read_entries(self) -> bool:
        """Read on, under the lease; whether more follows."""
        backlog = self._backlog
        asked_at = trio.current_time()
        standing, *rest = await self._link.call_script(
            READ_STREAM,
            (self._stream, self._lease.key),
            self._lease.who,
            self._lease.duration_ms,
            backlog.cursor,
            READ_ENTRIES,
            READ_BYTES,
            ENTRY_BYTES,
        )
        self._lease.learn(Standing(standing), asked_at)
        if not rest or not self._lease.held:
            return False
        self._waiting, more, entries = rest
        for name, fields in entries:
            identifier = name.decode()
            backlog.cursor = identifier
            if identifier not in backlog:
                self._read += 1
                self._accept(identifier, fields)
        self._send_ready()
        return bool(more)

    async def _keep_lease(self) -> bool:
        await self._lease.hold()
        return False

    def _accept(self, identifier: str, fields: Sequence[bytes] | int) -> None:
        if isinstance(fields, int):
            error = BrokerError(ErrorCode.TOO_LARGE, f"{fields} bytes; an entry takes {ENTRY_BYTES}")
            self._reject_entry(identifier, (), error)
            return
        try:
            event = decode_entry(identifier, fields, self._options, self._clock())
        except BrokerError as refusal:
            self._reject_entry(identifier, fields, refusal)
            return
        except Exception:
            # One entry that nobody thought of must not stop the stream on one node after the other.
            self._faults += 1
            log.exception("cannot make sense of an entry", stream=self._stream, id=identifier)
            self._reject_entry(identifier, (), BrokerError(ErrorCode.INTERNAL, "the broker failed over it"))
            return
        stored = self._options(event.room).history > 0
        ready = self._backlog.admit(Item(identifier, event, stored=stored))
        if ready is not None:
            self._ready.append(ready)

    # -- waiting ----------------------------------------------------------------

    def _until_retry(self, longest: float) -> float:
        if self._retry_at is None:
            return longest
        return min(longest, max(0.001, self._retry_at - trio.current_time()))

    async def _wait_for_entries(self) -> None:
        """Until something comes after the cursor; the read itself is made under the lease."""
        block = max(1, int(self._until_retry(self._wake) * 1000))
        await self._link.call(
            self._stream, "XREAD", "COUNT", 1, "BLOCK", block, "STREAMS", self._stream, self._backlog.cursor
        )

    async def _wait_for_room(self) -> None:
        """Until a whole read fits again, or it is time to try again or to keep the lease."""
        with trio.move_on_after(self._until_retry(self._rest)):
            while self._backlog.free < READ_ENTRIES:
                await self._progress.wait()

    # -- entries on their way -------------------------------------------------------

    def _send_ready(self) -> None:
        # A loop rather than a chain of calls: an answer may come before the call returns.
        if self._sending:
            return
        self._sending = True
        try:
            while self._ready:
                item = self._ready.popleft()
                if self._lease.held:
                    self._send(item)
                else:  # read again, by whoever has the lease now
                    self._backlog.fail(item)
                    self._plan_retry()
        finally:
            self._sending = False

    def _send(self, item: Item) -> None:
        if not item.stored:
            self._link.send(partial(self._taken_out, item), self._stream, "XDEL", self._stream, item.id)
            return
        try:
            self._publish(item.event, partial(self._published, item))
        except Exception as error:
            self._broke(item, error)

    def _published(self, item: Item, outcome: Position | BrokerError) -> None:
        if not isinstance(outcome, BrokerError):
            self._stored += 1
            self._marks[item.id] = self._once(item.event.room, PUBLISHER, item.event.key or "")
            self._go_on(self._backlog.settle(item))
        elif outcome.retry:
            self._fail(item, outcome.message)
        else:
            self._give_up(item, outcome)

    def _taken_out(self, item: Item, reply: Reply | LinkError) -> None:
        """An entry of a room without history was removed, if it was there."""
        if isinstance(reply, LinkError):
            self._fail(item, str(reply))
            return
        if reply:
            try:
                self._tell(item.event)
                self._told += 1
            except Exception:
                self._faults += 1
                log.exception("cannot tell an event", room=item.event.room, id=item.id)
        self._go_on(self._backlog.settle(item, gone=True))

    def _go_on(self, following: Item | None) -> None:
        if following is not None:
            self._ready.append(following)
            self._send_ready()
        elif not self._ready:
            self._remove()
        self._wake_up()

    def _fail(self, item: Item, reason: str) -> None:
        self._backlog.fail(item)
        self._stumble("cannot publish an entry now", reason, room=item.event.room, id=item.id)
        self._plan_retry()

    def _broke(self, item: Item, error: Exception) -> None:
        self._faults += 1
        log.error("publishing an entry failed", room=item.event.room, id=item.id, exc_info=error)
        self._give_up(item, BrokerError(ErrorCode.INTERNAL, "the broker failed over it"))

    # -- entries that nobody can use ------------------------------------------------

    def _give_up(self, item: Item, error: BrokerError) -> None:
        """Reject an event that was refused for good; its room goes on."""
        saying = Saying("publish", item.event.room, item.event.body, item.id)
        following = self._backlog.settle(item, gone=True)
        self._backlog.hold(item.id)
        self._rejected.reject(saying, error, partial(self._rejection_kept, item.id))
        self._go_on(following)

    def _reject_entry(self, identifier: str, fields: Sequence[bytes], error: BrokerError) -> None:
        saying = Saying("publish", claimed_room(fields), b" ".join(fields), identifier)
        self._backlog.hold(identifier)
        self._rejected.reject(saying, error, partial(self._rejection_kept, identifier))

    def _rejection_kept(self, identifier: str, reply: Reply | LinkError) -> None:
        if isinstance(reply, LinkError):
            self._backlog.forget(identifier)
            self._stumble("cannot set a rejected entry aside", str(reply), id=identifier)
            self._plan_retry()
        else:
            self._backlog.settle_held(identifier)
            self._go_on(None)

    # -- removal and retries ----------------------------------------------------------

    def _remove(self) -> None:
        """Remove what is settled: when there is much of it, or nothing else to wait for."""
        backlog = self._backlog
        pending = len(backlog) - backlog.settled - self._removing
        if backlog.settled and (backlog.settled >= REMOVE_ENTRIES or pending <= 0):
            taken = backlog.take_settled()
            self._removing += len(taken)
            self._link.send(partial(self._removed, taken), self._stream, "XDEL", self._stream, *taken)

    def _removed(self, identifiers: list[str], reply: Reply | LinkError) -> None:
        self._removing -= len(identifiers)
        if isinstance(reply, LinkError):
            self._backlog.not_removed(identifiers)  # a later turn tries again
        else:
            self._backlog.removed(identifiers)
            for identifier in identifiers:
                mark = self._marks.pop(identifier, None)
                if mark is not None:
                    self._link.send(_ignore, mark, "PEXPIRE", mark, int(REMEMBERED_AFTER * 1000))
        self._wake_up()

    def _plan_retry(self) -> None:
        if self._retry_at is None:
            self._retry_at = trio.current_time() + self._pause()
        self._wake_up()

    def _wake_up(self) -> None:
        self._progress.set()
        self._progress = trio.Event()

    def _pause(self) -> float:
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._attempts, 10))
        self._attempts += 1
        return random.uniform(longest / 2, longest)

    def _stumble(self, event: str, reason: str, **fields: Any) -> None:
        self._failed += 1
        missed = self._throttle.admit(event)
        if missed is not None:
            log.warning(event, reason=reason, stream=self._stream, suppressed=missed, **fields)

    async def _retire(self) -> None:
        """Let what is on its way arrive, as far as it does soon; remove it; give the lease back."""
        self._backlog.abandon()
        with trio.move_on_after(FAREWELL, shield=True):
            while len(self._backlog) and self._link.up:
                self._remove()
                await self._progress.wait()
        await self._lease.release()

    def statistics(self) -> dict[str, int]:
        """``waiting``: entries in the stream, when this node read it last; 0 where another node reads.

        ``stored`` and ``told`` went to rooms with and without history; ``failed``
        counts what was tried again; ``faults`` are failures of the broker itself.
        """
        lease = self._lease.statistics()
        return {
            "reading": lease["held"],
            "taken_over": lease["taken_over"],
            "lost": lease["lost"],
            "waiting": self._waiting if lease["held"] else 0,
            "working": len(self._backlog),
            "blocked_rooms": self._backlog.blocked,
            "read": self._read,
            "stored": self._stored,
            "told": self._told,
            "failed": self._failed,
            "faults": self._faults,
        }


def _ignore(_reply: Reply | LinkError) -> None:
    """A mark that lives longer does no harm."""
