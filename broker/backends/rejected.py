"""What backends said and nobody could use: set aside in a stream, counted, logged.

Every node that hears a ``PUBLISH`` refuses the same message, so a mark made of
its text lets the first enter it and the others be silent. The price: the same
bad message, said again within :data:`ONCE_MS`, is counted and logged but not
entered again. Entries of streams have an id, and are all entered.
"""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from typing import Final, NamedTuple

from broker.errors import BrokerError
from broker.link.base import Done as LinkDone
from broker.link.base import Link, LinkError, Reply, load_script
from broker.link.keys import Keys
from broker.logs import Throttle, get_logger

log = get_logger(__name__)

PAYLOAD_BYTES: Final = 1024
"""Of what was said, so much is kept: enough to see whose it is, and too little to fill a store."""

ONCE_MS: Final = 10_000
"""Life of a mark. Nodes hear the same message within milliseconds; one that was frozen for longer
than this enters it again, which does no harm."""

REJECT: Final = load_script("reject")


class Saying(NamedTuple):
    """What was said, and where."""

    source: str
    """``room`` for a ``PUBLISH`` to a room's channel, else the name of the stream (``publish``)."""
    room: str
    payload: bytes
    id: str = ""
    """Of the entry, in a stream."""


class Rejected:
    """The way into the stream ``rejected``."""

    def __init__(self, link: Link, keys: Keys, length: int) -> None:
        self._link = link
        self._keys = keys
        self._length = length
        self._by_reason: Counter[str] = Counter()
        self._unrecorded = 0
        self._throttle = Throttle()

    def reject(self, saying: Saying, error: BrokerError, done: LinkDone | None = None) -> None:
        """Set ``saying`` aside because of ``error``; ``done`` hears when it stands in the stream."""
        self._by_reason[error.code.value] += 1
        missed = self._throttle.admit((saying.source, error.code))
        if missed is not None:
            log.warning(
                "rejected what a backend said",
                source=saying.source,
                room=saying.room,
                id=saying.id,
                code=error.code.value,
                reason=error.message,
                payload=_readable(saying.payload),
                suppressed=missed,
            )
        self._link.send_script(
            done or self._recorded,
            REJECT,
            (self._keys.rejected, self._mark(saying)),
            self._length,
            ONCE_MS,
            "reason",
            error.message.encode(errors="backslashreplace"),
            "code",
            error.code.value,
            "source",
            saying.source,
            "id",
            saying.id,
            "room",
            saying.room,
            "payload",
            _readable(saying.payload),
        )

    def _mark(self, saying: Saying) -> str:
        """A key in the hash slot of the stream: what is between its braces is the stream's whole name.

        It begins with the prefix as all keys do, or an ACL would not let us write it.
        """
        digest = blake2b(digest_size=16)
        for part in (saying.source.encode(), saying.id.encode(), saying.room.encode(), saying.payload):
            digest.update(b"%d:" % len(part))
            digest.update(part)
        return f"{self._keys.rejected}:{{{self._keys.rejected}}}:{digest.hexdigest()}"

    def _recorded(self, reply: Reply | LinkError) -> None:
        # The others that heard it enter it; and it was counted and logged here.
        if isinstance(reply, LinkError):
            self._unrecorded += 1

    def statistics(self) -> dict[str, int]:
        """``rejected``, in all and as ``rejected_<code>``; ``unrecorded``: those that Redis did not take."""
        return {
            "rejected": self._by_reason.total(),
            **{f"rejected_{code}": count for code, count in sorted(self._by_reason.items())},
            "unrecorded": self._unrecorded,
        }


def _readable(payload: bytes) -> str:
    """The beginning, as UTF-8 whatever it was: who reads the stream may expect that of every field."""
    text = payload[:PAYLOAD_BYTES].decode(errors="backslashreplace")
    return text.encode()[:PAYLOAD_BYTES].decode(errors="ignore")
