"""Ephemeral events on their way to the other nodes, and back.

Theory. Events of one room that come in quick succession travel in one message,
a body a line. Nothing waits while little happens: what is there goes at once.
Each message then earns the next ones a short pause, in which events gather, so
that the messages a second are bounded and their size grows with the load.

At most once: what Redis does not take is counted and gone. Events of one node
and room keep their order, since the link keeps that of its commands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import msgspec
import trio

from broker.link import wire
from broker.link.base import Done, Link, LinkError, Reply, load_script, publishing
from broker.link.keys import Keys
from broker.logs import Throttle, get_logger
from broker.protocol.events import Event

log = get_logger(__name__)

PACE: Final = 50e-6
"""Pause that each message earns (s): about what it costs to send, carry and receive one."""
LONGEST: Final = 0.005
"""The longest pause (s)."""
SHORTEST: Final = 0.0005
"""Shorter pauses are left out; the system's timer is not finer anyway (s)."""
MESSAGE_BYTES: Final = 64 * 1024
"""A message is sent when it has reached this size."""

REMEMBER: Final = load_script("remember")
RECALL: Final = load_script("recall")


class _Said(msgspec.Struct):
    """The fields of an event that the hub must know."""

    ts: float
    slot: str | None = None
    tags: dict[str, str | int | float] | None = None


_said = msgspec.json.Decoder(_Said)


class _Bundle:
    """Events of one room that wait for their message."""

    __slots__ = ("bodies", "size", "slots", "ttl")

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.size = 0
        self.slots: dict[str, bytes] | None = None
        """The newest of each slot, oldest first."""
        self.ttl = 0.0


class Relay:
    """Ephemeral events out and in.

    ``node`` gives the id of this node; ``slot_limit`` the number of slots that
    are remembered of a room.
    """

    def __init__(
        self, link: Link, keys: Keys, node: Callable[[], str], slot_limit: Callable[[str], int]
    ) -> None:
        self._link = link
        self._keys = keys
        self._node = node
        self._slot_limit = slot_limit
        self._bundles: dict[str, _Bundle] = {}
        self._wake = trio.Event()
        self._throttle = Throttle()
        self.relayed = 0
        self.messages = 0
        self.received = 0
        self.not_relayed = 0
        self.bad = 0
        self.failed_recalls = 0

    # -- out ----------------------------------------------------------------------------

    def relay(self, event: Event, remember: float) -> None:
        """Tell the other nodes soon. ``remember`` (s): keep it as the newest of its slot."""
        if not self._link.up:
            self.not_relayed += 1
            return
        bundle = self._bundles.get(event.room)
        if bundle is None:
            bundle = self._bundles[event.room] = _Bundle()
            if len(self._bundles) == 1:
                self._wake.set()
        body = event.body
        if b"\n" in body:  # white space between tokens; inside of strings it is always escaped
            body = body.replace(b"\n", b" ")
        bundle.bodies.append(body)
        bundle.size += len(body)
        if remember and event.slot is not None:
            if bundle.slots is None:
                bundle.slots = {}
            bundle.slots.pop(event.slot, None)
            bundle.slots[event.slot] = body
            bundle.ttl = remember
        if bundle.size >= MESSAGE_BYTES:
            del self._bundles[event.room]
            self._send(event.room, bundle)

    def remember(self, event: Event, ttl: float) -> None:
        """Keep an event that every node has heard as the newest of its slot, for ``ttl`` (s)."""
        if event.slot is not None:
            done = partial(self._sent, 0)
            self._keep(done, event.room, b"", ttl, (event.slot, event.body))

    async def run(self) -> None:
        """Send what has gathered, until cancelled; what is there then is sent on the way out."""
        try:
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                pause = min(self.flush() * PACE, LONGEST)
                if pause >= SHORTEST:
                    await trio.sleep(pause)
        finally:
            self.flush()

    def flush(self) -> int:
        """Send now; returns the number of messages."""
        bundles, self._bundles = self._bundles, {}
        for room, bundle in bundles.items():
            self._send(room, bundle)
        return len(bundles)

    def _send(self, room: str, bundle: _Bundle) -> None:
        channel = self._keys.live(room)
        command = publishing(self._link)
        message = wire.pack(wire.EPHEMERAL, self._node(), body=b"\n".join(bundle.bodies))
        done = partial(self._sent, len(bundle.bodies))
        self.messages += 1
        if bundle.slots is None:
            self._link.send(done, channel, command, channel, message)
            return
        pairs = [part for pair in bundle.slots.items() for part in pair]
        self._keep(done, room, message, bundle.ttl, pairs)

    def _keep(self, done: Done, room: str, message: bytes, ttl: float, pairs: Sequence[str | bytes]) -> None:
        keys = self._keys
        self._link.send_script(
            done,
            REMEMBER,
            [keys.slots(room), keys.slots_order(room), keys.live(room)],
            publishing(self._link),
            message,
            max(round(ttl * 1000), 1),
            self._slot_limit(room),
            *pairs,
        )

    def _sent(self, events: int, reply: Reply | LinkError) -> None:
        if not isinstance(reply, LinkError):
            self.relayed += events
            return
        self.not_relayed += events
        missed = self._throttle.admit("relay", trio.current_time())
        if missed is not None:
            log.warning("events could not be relayed", events=events, why=str(reply), suppressed=missed)

    # -- in -----------------------------------------------------------------------------

    def take(self, room: str, body: bytes) -> list[Event]:
        """The events of a message from another node."""
        events = []
        for line in body.split(b"\n"):
            event = self._read(room, line)
            if event is not None:
                events.append(event)
        self.received += len(events)
        return events

    def _read(self, room: str, body: bytes) -> Event | None:
        """One event; ``None`` if it cannot be read, which is counted."""
        try:
            said = _said.decode(body)
        except (msgspec.DecodeError, ValueError) as error:
            self.bad += 1
            missed = self._throttle.admit("bad", trio.current_time())
            if missed is not None:
                log.warning("an event cannot be read", room=room, why=str(error), suppressed=missed)
            return None
        return Event(room, body, said.ts, slot=said.slot, tags=said.tags)

    async def recall(self, room: str) -> list[Event]:
        """What is remembered of the slots of ``room``, oldest first; nothing if that cannot be read."""
        keys = [self._keys.slots(room), self._keys.slots_order(room)]
        try:
            bodies: Sequence[bytes | None] = await self._link.call_script(RECALL, keys)
        except LinkError as error:
            self.failed_recalls += 1
            missed = self._throttle.admit("recall", trio.current_time())
            if missed is not None:
                log.warning("slots cannot be read", room=room, why=str(error), suppressed=missed)
            return []
        events = [self._read(room, body) for body in bodies if body is not None]
        return [event for event in events if event is not None]

    def statistics(self) -> dict[str, int]:
        """Counters and gauges by name."""
        return {
            "relayed": self.relayed,
            "relay_messages": self.messages,
            "not_relayed": self.not_relayed,
            "received": self.received,
            "failed_recalls": self.failed_recalls,
            "bad_messages": self.bad,
            "relay_waiting": sum(len(bundle.bodies) for bundle in self._bundles.values()),
        }
