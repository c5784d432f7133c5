"""The scripts of streams, and what their arguments have in common.

Redis runs a script as one step, so each of these is a whole transition of a
room. The shorter ones begin with ``lua/stream.lua``, which they share.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha1
from typing import Final, NamedTuple

import trio

from broker.link.base import Argument, Link, LinkError, Reply, Script, load_script
from broker.link.keys import Keys

SLACK: Final = 600.0
"""A room outlives its newest event by this much more than its ``ttl`` (s): expiry only collects
garbage, and while an idempotency key may come again the room remembers what it answered."""

LONGEST_TTL: Final = 1e12
"""Seconds; neither Lua nor Redis can read ``inf`` everywhere."""

LONGEST_LIFE: Final = 10 * 365 * 86_400_000
"""Milliseconds; Redis adds them to the time of day and must not overflow."""


def _shared(name: str) -> Script:
    source = load_script("stream").source + load_script(name).source
    return Script(name, source, sha1(source.encode(), usedforsecurity=False).hexdigest())


PUBLISH: Final = load_script("publish")
OPEN: Final = _shared("open")
HISTORY: Final = _shared("history")
TOPS: Final = load_script("tops")
PROOF: Final = load_script("proof")
RENEW: Final = load_script("renew")
ACKNOWLEDGE: Final = load_script("acknowledge")
ACKNOWLEDGED: Final = load_script("acknowledged")
GENERATION: Final = load_script("generation")

SCRIPTS: Final = (PUBLISH, OPEN, HISTORY, TOPS, PROOF, RENEW, ACKNOWLEDGE, ACKNOWLEDGED, GENERATION)
"""For the link, which loads them on every connection."""


class StreamKeys(NamedTuple):
    """Names of one room."""

    meta: str
    stream: str
    live: str
    seen: str


class StreamNames:
    """Names of rooms, made once for each room in use."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self.of = lru_cache(maxsize=8192)(self._make)

    def _make(self, room: str) -> StreamKeys:
        keys = self.keys
        return StreamKeys(keys.meta(room), keys.stream(room), keys.live(room), keys.seen(room))


class Tokens:
    """Names for what a script may have to make: an epoch, a generation. No two are ever the same.

    Most are not used, so they must cost little: one random beginning for the process, then a number.
    """

    def __init__(self) -> None:
        self.start = secrets.token_urlsafe(9).replace("_", "-")
        """What all of them begin with: it is nobody else's."""
        self._numbers = itertools.count()

    def __call__(self) -> str:
        """The next one."""
        return f"{self.start}{next(self._numbers):x}"


def life(ttl: float) -> int:
    """How long a stream with this retention is kept after its newest event (ms)."""
    return int(min((ttl + SLACK) * 1000, LONGEST_LIFE))


async def ask(link: Link, script: Script, keys: Sequence[str], *arguments: Argument) -> Reply:
    """Run a script on the hot lane, after whatever was sent before, and wait. Raises :class:`LinkError`."""
    answered = trio.Event()
    replies: list[Reply | LinkError] = []

    def done(reply: Reply | LinkError) -> None:
        replies.append(reply)
        answered.set()

    link.send_script(done, script, keys, *arguments)
    await answered.wait()
    if isinstance(replies[0], LinkError):
        raise replies[0]
    return replies[0]
