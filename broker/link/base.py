"""The link to Redis as the rest of the cluster sees it; implemented by :mod:`broker.link.bridge`.

Everything here is called on the Trio thread. ``send`` is the hot way: commands
gather for a moment and go out as one pipeline, on one connection for each
shard, so that commands for the same key are executed in call order. ``call``
waits and uses connections of its own, so that a long answer holds up nobody.

Nothing is repeated by the link: a command whose connection broke may or may not
have been executed, and only who sent it knows whether it may be sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Argument = str | bytes | int | float
Reply = Any
"""What Redis answered: bytes, integers, ``None``, lists of them."""


class LinkError(Exception):
    """What Redis answered instead of a result."""

    @property
    def code(self) -> str:
        """Its first word: ``OOM``, ``READONLY``, ``WRONGTYPE``…; the rest is for operators."""
        return str(self).partition(" ")[0]


class LinkDown(LinkError):  # noqa: N818 - a state rather than a fault
    """There is no answer: Redis is away, or the connection broke, or it took too long."""


Done = Callable[["Reply | LinkError"], None]
"""Called once, with the answer or with what stands in its place. Must not raise."""

Message = tuple[str, bytes]
"""Channel without decoration, and payload."""


class Script(NamedTuple):
    """A Lua script of ``lua/``, run by its hash."""

    name: str
    source: str
    sha: str


def load_script(name: str) -> Script:
    """Read ``lua/<name>.lua``."""
    from hashlib import sha1  # noqa: PLC0415 - only here

    source = (Path(__file__).parent / "lua" / f"{name}.lua").read_text()
    return Script(name, source, sha1(source.encode(), usedforsecurity=False).hexdigest())


def publishing(link: Link) -> str:
    """The command that reaches the live channel of a room, which is sharded in a Redis Cluster."""
    return "SPUBLISH" if link.clustered else "PUBLISH"


class Link(Protocol):
    """Commands, scripts, subscriptions."""

    @property
    def up(self) -> bool:
        """Whether commands are answered and messages come in, as far as anybody can know now."""

    @property
    def clustered(self) -> bool:
        """Whether this is a Redis Cluster: a script may only touch keys of one hash tag."""

    def send(self, done: Done, key: str, *command: Argument) -> None:
        """Send a command soon; ``key`` says to which shard. Down: ``done(LinkDown)`` at once."""

    def send_script(self, done: Done, script: Script, keys: Sequence[str], *arguments: Argument) -> None:
        """The same for a script; ``keys`` must not be empty."""

    async def call(self, key: str, *command: Argument) -> Reply:
        """Send a command and wait for the answer, for as long as is configured. Raises :class:`LinkError`."""

    async def call_script(self, script: Script, keys: Sequence[str], *arguments: Argument) -> Reply:
        """The same for a script."""

    def subscribe(self, channels: Iterable[str], *, sharded: bool) -> None:
        """Hear of ``channels`` from soon on, and again after every reconnect.

        ``sharded`` counts in a Redis Cluster only, and must be the same for a channel's whole life.
        """

    def unsubscribe(self, channels: Iterable[str]) -> None:
        """Hear of them no more. Unknown channels are ignored."""

    def hears(self, channel: str) -> bool:
        """Whether Redis has confirmed the subscription, on the connection of now."""

    async def heard(self, channel: str) -> bool:
        """Wait until :meth:`hears` or until the link goes down, which returns false at once."""
