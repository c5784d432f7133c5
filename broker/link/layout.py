"""Which primary has which slots of a Redis Cluster, as its nodes tell it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from broker.link.base import LinkDown, LinkError, Reply
from broker.link.target import Address

SLOTS: Final = 16_384


@dataclass(frozen=True, slots=True)
class Layout:
    """One node's opinion. ``epoch`` counts changes: the greater of two is newer."""

    epoch: int
    ranges: tuple[tuple[int, int, Address], ...]
    """First slot, last slot, primary; in the order of slots."""

    @property
    def primaries(self) -> list[Address]:
        """All that have slots, in an order that every node of ours finds."""
        return sorted({address for _, _, address in self.ranges})

    @property
    def complete(self) -> bool:
        """Whether every slot has a primary."""
        return sum(last - first + 1 for first, last, _ in self.ranges) == SLOTS


def read_layout(replies: Sequence[Reply], asked: Address) -> Layout:
    """Understand what ``asked`` answered to ``CLUSTER INFO`` and ``CLUSTER SLOTS``.

    Raises :class:`LinkDown` when one of them is an error.
    """
    for reply in replies:
        if isinstance(reply, LinkError):
            raise LinkDown(str(reply))
    info, slots = replies
    facts = dict(line.split(b":", 1) for line in info.split(b"\r\n") if b":" in line)
    ranges = []
    for first, last, primary, *_ in slots:
        # A node that does not know its own name says nothing: it is the one that was asked.
        host = primary[0].decode() if primary[0] not in (None, b"", b"?") else asked.host
        ranges.append((first, last, Address(host, primary[1])))
    return Layout(int(facts.get(b"cluster_current_epoch", 0)), tuple(sorted(ranges)))


def read_redirection(error: str, asked: Address | None) -> Address | None:
    """Where ``MOVED`` or ``ASK`` points to: ``MOVED 3999 127.0.0.1:6381``; the host may be missing."""
    words = error.split(" ")
    if len(words) < 3 or words[0] not in ("MOVED", "ASK"):
        return None
    host, _, port = words[2].rpartition(":")
    if not port.isdecimal():
        return None
    return Address(host or (asked.host if asked is not None else ""), int(port))
