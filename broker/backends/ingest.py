"""Ephemeral events from backends: ``PUBLISH broker:room:<room> '{"event": …, "data": …}'``.

Every node hears the channels of the rooms that it has, and gives the events to
its own sessions; nothing is stored or passed on. Called with all messages of
one read of the socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from broker.backends.rejected import Rejected, Saying
from broker.backends.said import Options, decode_message
from broker.engine.peers import Events
from broker.errors import BrokerError
from broker.protocol.events import Event


class Ingest:
    """Turns messages of backends into events of the hub.

    ``remember(event, ttl)`` keeps one as the newest of its slot, for who joins later on any node.
    """

    def __init__(
        self,
        events: Events,
        rejected: Rejected,
        options: Options,
        remember: Callable[[Event, float], None],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._remember = remember
        self._events = events
        self._rejected = rejected
        self._options = options
        self._clock = clock
        self._published = 0
        self._refused = 0

    def take(self, messages: Sequence[tuple[str, bytes]]) -> None:
        """Rooms and what was published to each, in order. HOT: 3 µs each, and the hub's own."""
        now = self._clock()
        options = self._options
        events: list[Event] = []
        for room, payload in messages:
            try:
                wanted = options(room)
                event = decode_message(room, payload, wanted, now)
                events.append(event)
                if event.slot is not None and wanted.last_value and not wanted.history:
                    self._remember(event, wanted.history_ttl)
            except BrokerError as error:
                self._refused += 1
                self._rejected.reject(Saying("room", room, payload), error)
        self._published += len(events)
        if events:
            self._events.receive(events)

    def statistics(self) -> dict[str, int]:
        """``published`` were given to the hub, ``refused`` were not events."""
        return {"published": self._published, "refused": self._refused}
